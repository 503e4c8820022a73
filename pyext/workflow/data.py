"""The rows of every stage, and the guard: what one stage holds out, none trains on."""

from __future__ import annotations

from dataclasses import dataclass

from fusedpeft.data.rows import load_rows, split_rows
from fusedpeft.errors import InputError
from fusedpeft.workflow.config import TRAINED, Config

FORMS = {"sft": "sft", "reward": "pairs", "pro": "lists"}


@dataclass
class Rows:
    """train: rows to learn from. held: rows never trained on, in any stage. left_out: how many rows
    were neither, because their prompt is held out here or in another stage."""

    train: list[dict]
    held: list[dict]
    left_out: int

    def measured(self, limit: int | None) -> list[dict]:
        """`limit` of the held-out rows, evenly spaced: all files have their share."""
        n = len(self.held)
        if limit is None or limit >= n:
            return self.held
        return [self.held[i * n // limit] for i in range(limit)]


def prompt_key(row: dict) -> tuple[tuple[str, str], ...]:
    """The prompt up to white space: two files' copies of one conversation are the same."""
    return tuple((m["role"], " ".join(m["content"].split())) for m in row["prompt"])


def load_stages(config: Config) -> dict[str, Rows]:
    """{stage: its rows}, of every training stage the configuration has.

    The held-out prompts of all stages are taken from the training rows of each. Raises InputError
    for files and rows that cannot be used, and where nothing is left to train on.
    """
    split: dict[str, tuple[list[dict], list[dict], int]] = {}
    for stage in TRAINED:
        section = getattr(config, stage)
        if section is None:
            continue
        train, held, total = [], [], 0
        for path in section.data:
            rows = load_rows(path, FORMS[stage], getattr(section, "aspect", None))
            kept, out = split_rows(rows, section.holdout)
            train, held, total = train + kept, held + out, total + len(rows)
        split[stage] = train, held, total

    never = {prompt_key(row) for _, held, _ in split.values() for row in held}
    found = {}
    for stage, (train, held, total) in split.items():
        kept = [row for row in train if prompt_key(row) not in never]
        files = ", ".join(str(p) for p in config.training(stage).data)
        if not kept or not held:
            what = "train on" if not kept else "hold out"
            raise InputError(
                f"{stage}: {files}: no row is left to {what} of {total}: expected more rows, "
                f"or prompts that other stages do not hold out"
            )
        found[stage] = Rows(kept, held, total - len(kept) - len(held))
    return found
