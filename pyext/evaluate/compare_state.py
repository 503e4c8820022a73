"""What a comparison's folder remembers: what it was made of, and the methods that are complete."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusedpeft.errors import InputError
from fusedpeft.files import digest_file, digest_model

if TYPE_CHECKING:
    from fusedpeft.evaluate.compare import Settings


def identity(settings: Settings) -> dict[str, Any]:
    """The settings, and digests of the files that they name: another file under the same name is
    another comparison."""
    digests = {"base_digest": digest_model(Path(settings.base))}
    for name in ("data", "text"):
        if getattr(settings, name) is not None:
            digests[f"{name}_digest"] = digest_file(Path(getattr(settings, name)))
    return asdict(settings) | digests


def read(path: Path, made_from: dict[str, Any]) -> dict[str, Any]:
    """{"settings", "methods"} of the file, without methods where there is none. Raises InputError
    for a damaged file and for one of another identity."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {"settings": made_from, "methods": {}}
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, str(error)) from error
    parts = ("settings", "methods")
    if not isinstance(found, dict) or not all(isinstance(found.get(p), dict) for p in parts):
        raise _damaged(path, "expected settings and methods")
    if found["settings"] != made_from:
        raise InputError(
            f"compare --out: {path.parent} holds results of "
            f"{_difference(found['settings'], made_from)}: name another folder"
        )
    return found


def _damaged(path: Path, why: str) -> InputError:
    return InputError(f"{path} is damaged ({why}): remove it or name another --out")


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    told = []
    for key in {**now, **before}:
        if before.get(key) == now.get(key):
            continue
        name = key.removesuffix("_digest")
        other = f"{key} {before.get(key)} (now {now.get(key)})"
        told.append(other if name == key else f"another {name}")
    return ", ".join(told[:3]) + (" and more" if len(told) > 3 else "")
