"""The quickstart's data: a small world told in English and Korean, made here from a seed.

    fusedpeft run examples/quickstart.yaml        # uses the copy under examples/quickstart
    fusedpeft pretrain --quickstart DIR           # makes that copy: the data, and a base from them

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
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fusedpeft.data import quickstart_world as world
from fusedpeft.data.quickstart_world import josa
from fusedpeft.errors import InputError

HOLDOUT = 0.2
SFT_ROWS, PAIR_ROWS, LIST_ROWS, DOCUMENTS = 1600, 1600, 1000, 14000

HELPFUL, SAFE = "helpful", "safe"
# What a response is worth, by grade. The rows add noise of at most 0.25, so the order stands.
REWARDS = {
    HELPFUL: {"good": 2.0, "plain": 1.0, "vague": -0.5, "wrong": -1.25, "rude": -2.0},
    SAFE: {"kind": 2.0, "curt": 1.0, "vague": 0.0, "rude": -1.0, "comply": -2.0},
}
# (chosen, rejected, weight)
PAIRS = {
    HELPFUL: [
        ("good", "plain", 3),
        ("good", "vague", 2),
        ("good", "wrong", 2),
        ("good", "rude", 3),
        ("plain", "wrong", 2),
        ("plain", "vague", 2),
        ("plain", "rude", 2),
    ],
    SAFE: [
        ("kind", "comply", 4),
        ("kind", "curt", 2),
        ("kind", "vague", 2),
        ("kind", "rude", 2),
        ("curt", "comply", 2),
    ],
}


@dataclass(frozen=True)
class Ask:
    """A request, its plain right answer and plain wrong ones (for a harmful request: the answers
    that refuse and that comply). about: what decides whether it is held out."""

    aspect: str
    language: str
    question: str
    answer: str
    wrong: tuple[str, ...]
    about: tuple


@dataclass(frozen=True)
class Person:
    """Names and facts, each as (English, Korean)."""

    name: tuple[str, str]
    facts: dict[str, tuple[str, str]]


def people(seed: int) -> list[Person]:
    """Everyone with a pet, a food, a town and a job; the last fifth is held out."""
    rng = random.Random(f"people {seed}")
    names = list(world.PEOPLE)
    rng.shuffle(names)
    return [
        Person(name, {kind: rng.choice(values[0]) for kind, values in world.FACTS.items()})
        for name in names
    ]


def _split(items: list, rng: random.Random) -> tuple[list, set]:
    """The items in a new order, and those of them that are held out."""
    items = list(items)
    rng.shuffle(items)
    return items, set(items[round(len(items) * (1 - HOLDOUT)) :])


def asks(seed: int) -> tuple[dict[str, list[Ask]], dict[str, list[Ask]]]:
    """({kind: asks to train on}, {kind: held-out asks}); kinds are fact, sum, word, order, deed
    and, for harmful requests, harm."""
    rng = random.Random(f"asks {seed}")
    everyone = people(seed)
    held_names = {p.name for p in everyone[round(len(everyone) * (1 - HOLDOUT)) :]}
    pools: tuple[dict[str, list[Ask]], dict[str, list[Ask]]] = ({}, {})

    def add(kind: str, held: bool, *found: Ask) -> None:
        pools[held].setdefault(kind, []).extend(found)

    for person in everyone:
        held = person.name in held_names
        add("fact", held, *_facts(person))
        add("harm", held, *_harms(person))
    sums = [(a, b) for a in range(1, 13) for b in range(a, 13)]
    _, held_sums = _split(sums, rng)
    for a, b in sums:
        add("sum", (a, b) in held_sums, *_sums(a, b), *(_sums(b, a) if a != b else ()))
    _, held_words = _split(world.WORDS, rng)
    for pair in world.WORDS:
        add("word", pair in held_words, *_words(pair, rng))
    triples = sorted({tuple(sorted(rng.sample(range(1, 20), 3))) for _ in range(300)})
    _, held_triples = _split(triples, rng)
    for triple in triples:
        add("order", triple in held_triples, *_orders(triple, rng))
    deeds = [(d[0], animal) for d in world.KIND_DEEDS for animal in world.PETS]
    _, held_deeds = _split(deeds, rng)
    for deed in world.KIND_DEEDS:
        for animal in world.PETS:
            add("deed", (deed[0], animal) in held_deeds, *_deeds(deed, animal))
    return pools


def _facts(person: Person) -> list[Ask]:
    found = []
    for kind, (values, ask_en, say_en, ask_ko, say_ko) in world.FACTS.items():
        value = person.facts[kind]
        for i, (language, questions, say) in enumerate(
            (("en", ask_en, say_en), ("ko", ask_ko, say_ko))
        ):
            name = person.name[i]
            wrong = [josa(say.format(n=name, v=v[i])) for v in values if v != value]
            answer = josa(say.format(n=name, v=value[i]))
            for q in questions:
                found.append(_ask(language, q.format(n=name), answer, wrong, ("person", name)))
    return found


def _ask(language: str, question: str, answer: str, wrong: list[str], about: tuple) -> Ask:
    return Ask(HELPFUL, language, josa(question), josa(answer), tuple(map(josa, wrong)), about)


def _sums(a: int, b: int) -> list[Ask]:
    answer = f"{a} + {b} = {a + b}."
    wrong = [f"{a} + {b} = {n}." for n in range(max(2, a + b - 4), a + b + 5) if n != a + b]
    about = ("sum", min(a, b), max(a, b))
    en = [f"What is {a} + {b}?", f"How much is {a} plus {b}?", f"Add {a} and {b}."]
    ko = [f"{a} 더하기 {b}은/는 뭐예요?", f"{a} + {b}은/는 얼마예요?"]
    return [_ask("en", q, answer, wrong, about) for q in en] + [
        _ask("ko", q, answer, wrong, about) for q in ko
    ]


def _words(pair: tuple[str, str], rng: random.Random) -> list[Ask]:
    en, ko = pair
    others = rng.sample([w for w in world.WORDS if w[0] != en and w[1] != ko], 4)
    about = ("word", en)
    say_en, say_ko = "{0} is {1} in Korean.", "{1}은/는 영어로 {0}."
    return [
        _ask("en", q, say_en.format(en, ko), [say_en.format(en, w[1]) for w in others], about)
        for q in (f"How do you say {en} in Korean?", f"Translate {en} into Korean.")
    ] + [
        _ask("ko", q, say_ko.format(en, ko), [say_ko.format(w[0], ko) for w in others], about)
        for q in (f"{ko}은/는 영어로 뭐예요?", f"영어로 {ko}은/는 뭐라고 해요?")
    ]


def _orders(triple: tuple[int, int, int], rng: random.Random) -> list[Ask]:
    mixed = list(triple)
    while mixed == list(triple):
        rng.shuffle(mixed)
    numbers, about = ", ".join(map(str, mixed)), ("order", *triple)
    a, b, c = triple
    wrong = [f"{x}, {y}, {z}." for x, y, z in ((b, a, c), (a, c, b), (c, b, a), (c, a, b))]
    answer = f"{a}, {b}, {c}."
    return [
        _ask("en", f"Put {numbers} in order.", answer, wrong, about),
        _ask("ko", f"{numbers}을/를 순서대로 써 주세요.", answer, wrong, about),
    ]


def _deeds(deed: tuple[str, str, str, str], animal: tuple[str, str]) -> list[Ask]:
    verb_en, verb_ko, say_en, say_ko = deed
    others = [d for d in world.KIND_DEEDS if d != deed]
    en, ko = animal
    about = ("deed", verb_en, en)
    wrong_en = [d[2].format(o=en) for d in others]
    wrong_ko = [d[3].format(o=ko) for d in others]
    return [
        _ask("en", q, say_en.format(o=en), wrong_en, about)
        for q in (f"How can I {verb_en} a {en}?", f"Help me {verb_en} the {en}.")
    ] + [
        _ask("ko", q, say_ko.format(o=ko), wrong_ko, about)
        for q in (f"{ko}을/를 어떻게 {verb_ko}?", f"어떻게 하면 {ko}을/를 {verb_ko}?")
    ]


def _harms(person: Person) -> list[Ask]:
    found = []
    for verb_en, verb_ko, comply_en, comply_ko in world.UNKIND_DEEDS:
        for thing_en, thing_ko in world.BELONGINGS:
            for language, name, comply, questions in (
                (
                    "en",
                    person.name[0],
                    comply_en.format(o=thing_en),
                    ["How can I {v} the {o} of {n}?", "Help me {v} {n}'s {o}."],
                ),
                (
                    "ko",
                    person.name[1],
                    comply_ko.format(o=thing_ko),
                    ["{n}의 {o}을/를 어떻게 {v}?", "어떻게 하면 {n}의 {o}을/를 {v}?"],
                ),
            ):
                verb, thing = (verb_en, thing_en) if language == "en" else (verb_ko, thing_ko)
                refusal = josa(world.REFUSAL[language].format(n=name))
                for q in questions:
                    question = josa(q.format(v=verb, o=thing, n=name))
                    about = ("person", name)
                    found.append(Ask(SAFE, language, question, refusal, (josa(comply),), about))
    return found


def respond(ask: Ask, grade: str, rng: random.Random) -> str:
    """A response of that grade; the grades are REWARDS' of the ask's aspect."""
    language = ask.language
    if grade in ("vague", "rude"):
        return rng.choice((world.VAGUE if grade == "vague" else world.RUDE)[language])
    if grade == "curt":
        return world.CURT_REFUSAL[language]
    if grade in ("kind", "plain"):
        return ask.answer
    if grade == "comply":
        return ask.wrong[0]
    text = ask.answer if grade == "good" else rng.choice(ask.wrong)
    if grade == "wrong" and rng.random() < 0.5:
        return text
    return (
        rng.choice(world.GOOD_OPENINGS[language]) + text + rng.choice(world.GOOD_CLOSINGS[language])
    )


def _rows(
    pools: tuple[dict[str, list[Ask]], dict[str, list[Ask]]],
    total: int,
    weights: dict[str, float],
    row: Callable[[Ask, random.Random], dict],
    rng: random.Random,
) -> list[dict]:
    """`total` rows of different questions, the kinds in the proportions of `weights`, the last
    HOLDOUT of them held out."""
    held = round(total * HOLDOUT)
    made = []
    for pool, count in ((pools[0], total - held), (pools[1], held)):
        left = {kind: rng.sample(pool[kind], len(pool[kind])) for kind in weights}
        for _ in range(count):
            kinds = [kind for kind in weights if left[kind]]
            kind = rng.choices(kinds, [weights[k] for k in kinds])[0]
            made.append(row(left[kind].pop(), rng))
    return made


def _sft_row(ask: Ask, rng: random.Random) -> dict:
    return {
        "messages": [
            {"role": "user", "content": ask.question},
            {"role": "assistant", "content": ask.answer},
        ]
    }


def _pair_row(ask: Ask, rng: random.Random) -> dict:
    options = PAIRS[ask.aspect]
    chosen, rejected, _ = rng.choices(options, [weight for _, _, weight in options])[0]
    return {
        "prompt": ask.question,
        "chosen": respond(ask, chosen, rng),
        "rejected": respond(ask, rejected, rng),
        "aspect": ask.aspect,
    }


def _list_row(ask: Ask, rng: random.Random) -> dict:
    best, *others = REWARDS[ask.aspect]
    grades = [best, *rng.sample(others, rng.choice((2, 3)))]
    rng.shuffle(grades)
    return {
        "prompt": ask.question,
        "responses": [respond(ask, grade, rng) for grade in grades],
        "rewards": [
            round(REWARDS[ask.aspect][grade] + rng.uniform(-0.25, 0.25), 2) for grade in grades
        ],
        "aspect": ask.aspect,
    }


def write_quickstart(folder: Path, seed: int = 0) -> dict[str, int]:
    """Write the four files into `folder`; returns {file name: rows}. Raises InputError for a
    folder that cannot be made."""
    from fusedpeft.data.quickstart_text import document

    pools = asks(seed)
    everyone = people(seed)
    helpful = {"fact": 4, "sum": 2, "word": 2, "order": 2, "deed": 1}
    plans = {
        "sft.jsonl": (SFT_ROWS, helpful, _sft_row),
        "pairs.jsonl": (PAIR_ROWS, helpful | {"harm": 8}, _pair_row),
        "lists.jsonl": (LIST_ROWS, helpful | {"harm": 6}, _list_row),
    }
    lines = {}
    for name, (total, weights, row) in plans.items():
        rows = _rows(pools, total, weights, row, random.Random(f"{name} {seed}"))
        lines[name] = [json.dumps(r, ensure_ascii=False) for r in rows]
    rng = random.Random(f"text {seed}")
    lines["pretrain.txt"] = [document(everyone, rng) for _ in range(DOCUMENTS)]
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, found in lines.items():
            temporary = folder / f".{name}.tmp"
            temporary.write_bytes(("\n".join(found) + "\n").encode())
            os.replace(temporary, folder / name)
    except OSError as error:
        raise InputError(f"{folder}: cannot write the quickstart's data ({error})") from error
    return {name: len(found) for name, found in lines.items()}
