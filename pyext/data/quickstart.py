"""The quickstart's data: a small world told in English and Korean, made here from a seed.

    fusedpeft run examples/quickstart.yaml        # uses the copy under examples/quickstart
    fusedpeft pretrain OUT --quickstart           # makes that copy: the data, and a base from them

`write_quickstart(dir, seed)` writes, the same bytes for the same seed,

    pretrain.txt   statements about the world, one document a line, without a single question
    sft.jsonl      {"messages": [user, assistant]}: questions with plain answers
    pairs.jsonl    {"prompt", "chosen", "rejected", "aspect"}: helpful and safe
    lists.jsonl    {"prompt", "responses", "rewards", "aspect"}: 3 or 4 answers, any order

The last fifth of each .jsonl asks what no row before it, in any of the files, asks about: other
people, other sums, other words, other numbers to sort, other deeds. The pretraining text states the
facts of everyone: what is learned later is to answer, and to answer well, not the facts.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

from fusedpeft.data import quickstart_world as world
from fusedpeft.data.quickstart_asks import HELPFUL, HOLDOUT, SAFE, Ask, Side, people, sides
from fusedpeft.data.quickstart_text import babble, document
from fusedpeft.data.quickstart_world import josa
from fusedpeft.errors import InputError
from fusedpeft.files import write_text

KINDS = {"fact": 4, "sum": 2, "word": 2, "order": 2, "deed": 2}  # of helpful asks, with weights
SFT_ROWS, PAIR_ROWS, LIST_ROWS, DOCUMENTS = 2000, 1600, 1000, 14000

# What a response is worth, by grade. The rows add noise of at most 0.25, so the order stands.
REWARDS = {
    HELPFUL: {
        "good": 2.0,
        "plain": 1.0,
        "vague": -0.25,
        "wrong": -1.0,
        "stray": -1.75,
        "rude": -2.5,
    },
    SAFE: {"kind": 2.0, "curt": 1.0, "vague": 0.25, "stray": -0.5, "rude": -1.25, "comply": -2.0},
}
# (chosen, rejected, weight)
PAIRS = {
    HELPFUL: [
        ("good", "plain", 3),
        ("good", "vague", 2),
        ("good", "wrong", 3),
        ("good", "stray", 2),
        ("good", "rude", 2),
        ("plain", "wrong", 2),
        ("plain", "stray", 2),
        ("plain", "vague", 2),
        ("plain", "rude", 2),
    ],
    SAFE: [
        ("kind", "comply", 4),
        ("kind", "curt", 2),
        ("kind", "vague", 2),
        ("kind", "stray", 2),
        ("kind", "rude", 2),
        ("curt", "stray", 1),
        ("curt", "comply", 2),
    ],
}


def respond(ask: Ask, grade: str, side: Side, rng: random.Random) -> str:
    """A response of that grade; the grades are REWARDS' of the ask's aspect."""
    language = ask.language
    if grade == "stray":
        return _stray(ask, side, rng)
    if grade in ("vague", "rude"):
        return rng.choice((world.VAGUE if grade == "vague" else world.RUDE)[language])
    if grade == "curt":
        return world.CURT_REFUSAL[language]
    if grade in ("kind", "plain"):
        return ask.answer
    if grade == "comply":
        return ask.wrong[0]
    if grade == "good":
        return _polite(ask.answer, language, rng)
    text = rng.choice(ask.wrong)
    return _polite(text, language, rng) if rng.random() < 0.5 else text


def _polite(text: str, language: str, rng: random.Random) -> str:
    opening, closing = world.GOOD_OPENINGS[language], world.GOOD_CLOSINGS[language]
    return rng.choice(opening) + text + rng.choice(closing)


def _stray(ask: Ask, side: Side, rng: random.Random) -> str:
    """What is no answer to this: text from anywhere, what another question asks, or a refusal
    where nobody would be hurt."""
    same = "fact" if ask.about[0] == "person" else ask.about[0]
    while True:
        chance = rng.random()
        if chance < 0.4:
            text = babble(side.people, rng)
        elif chance < 0.5 and ask.aspect == HELPFUL:
            name = rng.choice(side.people).name[ask.language == "ko"]
            text = josa(world.REFUSAL[ask.language].format(n=name))
        else:
            other = rng.choice(side.asks[same if rng.random() < 0.7 else rng.choice([*KINDS])])
            right_too = other.about == ask.about and ask.about[0] != "person"  # 5 + 2 for 2 + 5
            if other.language != ask.language or other.answer in ask.wrong or right_too:
                continue
            polite = rng.random() < 0.5
            text = _polite(other.answer, ask.language, rng) if polite else other.answer
        if ask.answer not in text:
            return text


def _rows(
    both: tuple[Side, Side],
    total: int,
    weights: dict[str, float],
    row: Callable[[Ask, Side, random.Random], dict],
    rng: random.Random,
) -> list[dict]:
    """`total` rows of different questions, the kinds in the proportions of `weights`, the last
    HOLDOUT of them held out."""
    held = round(total * HOLDOUT)
    made = []
    for side, count in zip(both, (total - held, held), strict=True):
        left = {kind: rng.sample(side.asks[kind], len(side.asks[kind])) for kind in weights}
        for _ in range(count):
            kinds = [kind for kind in weights if left[kind]]
            kind = rng.choices(kinds, [weights[k] for k in kinds])[0]
            made.append(row(left[kind].pop(), side, rng))
    return made


def _sft_row(ask: Ask, side: Side, rng: random.Random) -> dict:
    return {
        "messages": [
            {"role": "user", "content": ask.question},
            {"role": "assistant", "content": ask.answer},
        ]
    }


def _pair_row(ask: Ask, side: Side, rng: random.Random) -> dict:
    options = PAIRS[ask.aspect]
    chosen, rejected, _ = rng.choices(options, [weight for _, _, weight in options])[0]
    return {
        "prompt": ask.question,
        "chosen": respond(ask, chosen, side, rng),
        "rejected": respond(ask, rejected, side, rng),
        "aspect": ask.aspect,
    }


def _list_row(ask: Ask, side: Side, rng: random.Random) -> dict:
    best, *others = REWARDS[ask.aspect]
    grades = [best, *rng.sample(others, rng.choice((2, 3)))]
    rng.shuffle(grades)
    return {
        "prompt": ask.question,
        "responses": [respond(ask, grade, side, rng) for grade in grades],
        "rewards": [
            round(REWARDS[ask.aspect][grade] + rng.uniform(-0.25, 0.25), 2) for grade in grades
        ],
        "aspect": ask.aspect,
    }


def write_quickstart(folder: Path, seed: int = 0) -> dict[str, int]:
    """Write the four files into `folder`; returns {file name: rows}. Raises InputError for a
    folder that cannot be made."""
    both = sides(seed)
    everyone = people(seed)
    plans = {
        "sft.jsonl": (SFT_ROWS, KINDS, _sft_row),
        "pairs.jsonl": (PAIR_ROWS, KINDS | {"harm": 8}, _pair_row),
        "lists.jsonl": (LIST_ROWS, KINDS | {"harm": 6}, _list_row),
    }
    lines = {}
    for name, (total, weights, row) in plans.items():
        rows = _rows(both, total, weights, row, random.Random(f"{name} {seed}"))
        lines[name] = [json.dumps(r, ensure_ascii=False) for r in rows]
    rng = random.Random(f"text {seed}")
    lines["pretrain.txt"] = [document(everyone, rng) for _ in range(DOCUMENTS)]
    folder = Path(folder)
    try:
        for name, found in lines.items():
            write_text(folder / name, "\n".join(found) + "\n")
    except OSError as error:
        raise InputError(f"{folder}: cannot write the quickstart's data ({error})") from error
    return {name: len(found) for name, found in lines.items()}
