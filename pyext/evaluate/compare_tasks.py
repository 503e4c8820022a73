"""The two tasks of `fusedpeft compare`: their rows, and which of them are trained on.

nsmc: sentiment of Korean film reviews, 0 or 1. e2e: a restaurant's facts put into a sentence.
"""

from __future__ import annotations

import gzip
import json
import random
import zlib
from dataclasses import dataclass
from pathlib import Path

from fusedpeft.errors import InputError

TASKS = ("nsmc", "e2e")
_MOST_CHARS = 140  # of a review, NSMC's own limit
# What reading rows of another form raises.
_OTHER_ROWS = (
    ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError,
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    text: str
    label: int = 0  # nsmc
    answer: str = ""  # e2e
    values: tuple[str, ...] = ()  # e2e: what the sentence must mention


@dataclass(frozen=True)
class Rows:
    train: list[Row]
    tune: list[Row]  # the learning rate is chosen on these
    test: list[Row]  # and measured on these


def load_rows(task: str, path: Path, counts: tuple[int, int, int], seed: int) -> Rows:
    """Rows of a task, shuffled by `seed` and divided; no text is in two parts.

    Raises InputError for an unknown task, a file that is not there, is not the task's or has too
    few rows.
    """
    if task not in TASKS:
        raise InputError(f"compare --task: expected nsmc or e2e, got {task!r}")
    if not path.is_file():
        raise InputError(f"compare --data: expected a file, there is none at {path}")
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8") as file:
            # Not splitlines(): a JSON string may hold a Unicode line separator.
            lines = [line for line in file.read().split("\n") if line.strip()]
        groups = (_nsmc if task == "nsmc" else _e2e)(lines)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    except _OTHER_ROWS as error:
        why = f"{type(error).__name__}: {error}"
        raise InputError(f"{path}: expected rows of {task} ({why})") from error
    random.Random(seed).shuffle(groups)
    if task == "nsmc":
        groups = _balanced(groups)
    parts: list[list[Row]] = []
    for count in reversed(counts):  # the test rows first: they stay when more are trained on
        part: list[Row] = []
        while groups and len(part) < count:
            part += groups.pop()
        parts.append(part[:count])
    rows = Rows(*reversed(parts))
    if len(rows.train) < 1 or len(rows.tune) < counts[1] or len(rows.test) < counts[2]:
        have = len(rows.train) + len(rows.tune) + len(rows.test)
        raise InputError(f"{path}: expected more than {sum(counts[1:])} rows, got {have}")
    return rows


def _nsmc(lines: list[str]) -> list[list[Row]]:
    """Raw reviews: 1 to 4 points are negative, 9 and 10 positive, those between say neither."""
    seen: dict[str, int] = {}
    for line in lines:
        raw = json.loads(line)
        text, rating = " ".join(raw["review"].split()), int(raw["rating"])
        if text and len(text) < _MOST_CHARS and (rating <= 4 or rating >= 9):
            seen.setdefault(text, int(rating >= 9))
    return [[Row(text, label)] for text, label in seen.items()]


def _balanced(groups: list[list[Row]]) -> list[list[Row]]:
    """As many of each label, in turns: accuracy then means what it says."""
    by_label = [[g for g in groups if g[0].label == label] for label in (0, 1)]
    return [group for pair in zip(*by_label, strict=False) for group in pair]


def _e2e(lines: list[str]) -> list[list[Row]]:
    """`name : X | area : Y||sentence`; sentences for the same facts stay together."""
    by_facts: dict[str, list[Row]] = {}
    for line in lines:
        facts, mark, sentence = line.partition("||")
        if not mark:
            raise KeyError("no '||' between the facts and the sentence")
        pairs = [pair.partition(" : ")[::2] for pair in facts.split(" | ")]
        values = tuple(v.strip().lower() for k, v in pairs if k.strip() != "family friendly")
        row = Row(facts.strip(), answer=sentence.strip(), values=values)
        by_facts.setdefault(facts, []).append(row)
    return list(by_facts.values())
