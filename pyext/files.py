"""Files that are written whole or not at all, and what they are known by."""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
from pathlib import Path
from typing import Any

_WHOLE_FILE_BYTES = 256 << 20
# What transformers reads of a model: .jinja is the chat template, .txt vocabularies and merges.
_MODEL_FILES = (".json", ".safetensors", ".bin", ".model", ".txt", ".jinja")


def replace_file(path: Path, content: bytes) -> None:
    """Write beside, flush to the disk, rename: a reader, or a kill, finds the old file or the new
    one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    replace_file(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Numbers that are not finite become null: NaN is a word that no JSON reader has to know, and
    the curve of a training that went astray must be writable."""
    text = json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def digest(value: Any) -> str:
    """Of a JSON value, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def digest_file(path: Path) -> str:
    """Of the content; of a file above 256 MiB its size and both ends, for models are large."""
    size = path.stat().st_size
    sha = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size > _WHOLE_FILE_BYTES:
            sha.update(file.read(_WHOLE_FILE_BYTES // 2))
            file.seek(-_WHOLE_FILE_BYTES // 2, os.SEEK_END)
        while chunk := file.read(1 << 20):
            sha.update(chunk)
    return sha.hexdigest()[:16]


def digest_model(folder: Path) -> str:
    """Of a model's configuration, tokenizer and weights."""
    more = folder / "additional_chat_templates"
    files = [p for p in (*folder.iterdir(), *more.glob("*")) if p.suffix in _MODEL_FILES]
    return digest({str(p.relative_to(folder)): digest_file(p) for p in files})
