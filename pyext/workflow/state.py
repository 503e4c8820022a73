"""What a run's folder remembers: which settings a stage was made with, and whether it is complete.

A stage's folder holds `config.json` (its identity, written before anything else), then checkpoints
and results, and last `result.json`: with it, and only with it, the stage is complete. Every file is
replaced in one step (files.py).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fusedpeft.errors import InputError
from fusedpeft.files import digest, write_json

CONFIG, RESULT, HISTORY = "config.json", "result.json", "history.json"
CHECKPOINTS, MARKER = "checkpoints", "complete.json"
_RESULT_KEYS = {"result", "seconds", "peak_memory_bytes"}


def read_json(path: Path) -> Any:
    """The file's content, None where there is none. Raises InputError for a damaged file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, why: object) -> InputError:
    return InputError(f"{path} is damaged ({why}): start the stage again with --fresh")


class Stage:
    """A stage's folder and its identity: {"settings": …, "inputs": {file: digest}, "after": …}."""

    def __init__(self, run_dir: Path, name: str, identity: dict[str, Any]):
        self.name, self.identity = name, identity
        self.dir = run_dir / name
        self.adapter = self.dir / "adapter"
        self.checkpoints = self.dir / CHECKPOINTS

    @property
    def digest(self) -> str:
        return digest(self.identity)

    def result(self) -> dict | None:
        """What the complete stage found, None while it is not complete."""
        path = self.dir / RESULT
        found = read_json(path)
        if found is not None and not (isinstance(found, dict) and _RESULT_KEYS <= found.keys()):
            raise _damaged(path, f"expected {', '.join(sorted(_RESULT_KEYS))}, got {found!r:.60}")
        return found

    def check(self) -> None:
        """Raises InputError where the folder was made with other settings or inputs."""
        path = self.dir / CONFIG
        before = read_json(path)
        sound = isinstance(before, dict) and all(isinstance(p, dict) for p in before.values())
        if before is not None and not sound:
            raise _damaged(path, f"expected settings, inputs and after, got {before!r:.60}")
        if before is None or digest(before) == self.digest:
            return
        raise InputError(
            f"{self.dir} was made with {_difference(before, self.identity)}: "
            f"start it again with --fresh, or give the run another name"
        )

    def begin(self) -> None:
        self.check()
        write_json(self.dir / CONFIG, self.identity)

    def clear(self) -> None:
        """Throw the stage away, in one step: checkpoints must not outlive their settings."""
        trash = self.dir.with_name(f".{self.name}.trash")
        shutil.rmtree(trash, ignore_errors=True)
        if self.dir.is_dir():
            self.dir.rename(trash)
            shutil.rmtree(trash)

    def last_checkpoint(self) -> tuple[Path | None, float]:
        """The newest checkpoint that was written to its end and the seconds spent until then;
        those cut off in the middle are removed."""
        found: list[tuple[int, Path, float]] = []
        for path in self.checkpoints.glob("checkpoint-*"):
            marker = path / MARKER
            if marker.is_file():
                seconds = read_json(marker)["seconds"]
                found.append((int(path.name.rpartition("-")[2]), path, seconds))
            else:
                shutil.rmtree(path)
        if not found:
            return None, 0.0
        _, path, seconds = max(found)
        return path, seconds


def _difference(before: dict, now: dict) -> str:
    """The first differing entries, as "learning_rate 0.001 (now 0.003)"."""
    told = []
    for part in ("settings", "inputs", "after"):
        old, new = before.get(part) or {}, now.get(part) or {}
        for key in sorted({*old, *new}):
            # As the identities are compared: 1 and 1.0 are told apart there.
            if digest(old.get(key)) == digest(new.get(key)):
                continue
            if part == "settings":
                told.append(f"{key} {old.get(key)} (now {new.get(key)})")
            elif part == "inputs":
                told.append(f"another {key}")
            else:
                told.append(f"another {key} stage before it")
    return ", ".join(told[:3]) + (" and more" if len(told) > 3 else "")


@contextlib.contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """One process at a time in a run's folder; the kernel drops the lock of a killed one."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = (run_dir / ".lock").open("w")
    except OSError as error:
        raise InputError(
            f"{run_dir}: expected a folder that can be written to ({error.strerror})"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"{run_dir} is in use by another process: wait for it or take another name"
            ) from error
        yield
