"""Benchmark files as rows for the local tasks in `tasks/`.

`mmlu/dev.jsonl`, `mmlu/test.jsonl`: {"question", "subject", "choices": [4], "answer": 0-3} a line.
`hellaswag/hellaswag_val_full.txt.bz2`: six lines a question: context, number of the right ending,
four endings.
"""

from __future__ import annotations

import bz2
import json
from pathlib import Path
from typing import Any

from fusedpeft.errors import InputError

LETTERS = "ABCD"
MMLU_SHOTS = 5
FILES = {
    "mmlu": ("mmlu/dev.jsonl", "mmlu/test.jsonl"),
    "hellaswag": ("hellaswag/hellaswag_val_full.txt.bz2",),
}


def evenly(rows: list[Any], limit: int | None) -> list[Any]:
    """`limit` of the rows at even distances (the files are sorted by subject), or all of them."""
    n = len(rows)
    if limit is None or limit >= n:
        return rows
    return [rows[i * n // limit] for i in range(limit)]


def mmlu_question(row: dict[str, Any]) -> str:
    """A question with its choices, up to and with "Answer:"."""
    choices = "".join(
        f"\n{letter}. {text}" for letter, text in zip(LETTERS, row["choices"], strict=True)
    )
    return f"{row['question'].strip()}{choices}\nAnswer:"


def mmlu_shots(subject: str, dev: list[dict[str, Any]], count: int) -> str:
    """What stands before a question: the subject, then its first `count` dev rows answered."""
    title = subject.replace("_", " ")
    text = f"The following are multiple choice questions (with answers) about {title}.\n\n"
    for row in dev[:count]:
        text += f"{mmlu_question(row)} {LETTERS[row['answer']]}\n\n"
    return text


def mmlu_rows(folder: Path, limit: int | None, num_fewshot: int) -> list[dict[str, Any]]:
    """{"shots", "question", "choices", "answer", "subject"} of `limit` test questions. Raises
    InputError for missing or damaged files and for more shots than a subject has dev rows."""
    dev: dict[str, list[dict[str, Any]]] = {}
    dev_file, test_file = (folder / name for name in FILES["mmlu"])
    for row in _mmlu_file(dev_file):
        dev.setdefault(row["subject"], []).append(row)
    rows = evenly(_mmlu_file(test_file), limit)
    shots = {}
    for subject in {row["subject"] for row in rows}:
        found = dev.get(subject, [])
        if len(found) < num_fewshot:
            raise InputError(
                f"mmlu: expected {num_fewshot} dev rows of {subject} for as many shots, got "
                f"{len(found)}: lower num_fewshot"
            )
        shots[subject] = mmlu_shots(subject, found, num_fewshot)
    return [{**row, "shots": shots[row["subject"]]} for row in rows]


def _mmlu_file(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(_lines(path), 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not _is_mmlu(row):
            raise InputError(
                f"{path} line {number}: expected question, subject, four choices and an answer "
                f"from 0 to 3, got {line[:60]!r}"
            )
        rows.append({key: row[key] for key in ("question", "subject", "choices", "answer")})
    return rows


def _is_mmlu(row: Any) -> bool:
    if not isinstance(row, dict):
        return False
    choices, answer = row.get("choices"), row.get("answer")
    texts = [row.get("question"), row.get("subject"), *(choices if type(choices) is list else ())]
    # type() and not isinstance(): true is no answer, and neither is 1.0.
    return (
        len(texts) == 6
        and all(type(t) is str for t in texts)
        and (type(answer) is int and 0 <= answer <= 3)
    )


def hellaswag_rows(folder: Path, limit: int | None) -> list[dict[str, Any]]:
    """{"query", "choices", "label"} of `limit` questions. Raises InputError for a missing or
    damaged file."""
    path = folder / FILES["hellaswag"][0]
    lines = _lines(path)
    if len(lines) % 6:
        raise InputError(f"{path}: expected six lines a question, got {len(lines)} lines")
    rows = []
    for first in range(0, len(lines), 6):
        query, label, *choices = lines[first : first + 6]
        if label.strip() not in ("0", "1", "2", "3"):
            raise InputError(
                f"{path} line {first + 2}: expected the right ending's number from 0 to 3, "
                f"got {label[:60]!r}"
            )
        # The harness cannot score an empty text; it would not say which.
        for offset, text in ((0, query), *enumerate(choices, 2)):
            if not text.strip():
                raise InputError(
                    f"{path} line {first + offset + 1}: expected text, got an empty line"
                )
        choices = [choice.strip() for choice in choices]
        rows.append({"query": query.strip(), "choices": choices, "label": int(label)})
    return evenly(rows, limit)


def _lines(path: Path) -> list[str]:
    """The lines of a text file, plain or bz2. At least one."""
    try:
        data = path.read_bytes()
        text = (bz2.decompress(data) if path.suffix == ".bz2" else data).decode()
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: expected this benchmark file ({error}): give the folder that holds it"
        ) from error
    # Not splitlines(): a question may contain a Unicode line separator.
    lines = text.removesuffix("\n").split("\n")
    if lines == [""]:
        raise InputError(f"{path}: expected questions, the file is empty")
    return lines
