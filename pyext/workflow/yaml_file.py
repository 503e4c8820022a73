"""A YAML file as a dict: no key twice, `${NAME:-value}`, overrides from the command line."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import yaml

from fusedpeft.errors import InputError

_MERGE = "tag:yaml.org,2002:merge"
_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


class _Loader(yaml.SafeLoader):
    """YAML in which a key that is written twice is an error, not the last one's victory."""

    def construct_mapping(self, node, deep=False):
        keys = []
        for key_node, _ in node.value:
            if key_node.tag == _MERGE:
                continue
            key = self.construct_object(key_node, deep=True)
            if key in keys:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} stands here twice", key_node.start_mark
                )
            keys.append(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict:
    """The file's mapping. Raises InputError for a missing or unreadable file, with the line."""
    if not path.is_file():
        raise InputError(f"{path}: expected a YAML file, there is none")
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "unreadable"
        raise InputError(f"{path}{where}: not valid YAML: {problem}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected UTF-8 text ({error.reason})") from error
    if not isinstance(raw, dict):
        raise InputError(f"{path}: expected a mapping with name, base, sft, …, got {raw!r:.40}")
    return raw


def apply_override(raw: dict, override: str) -> None:
    """Set one value in place: "sft.max_steps=10", the value as in YAML; sections that are not there
    are made."""
    key, equals, value = override.partition("=")
    if not equals or not all(key.split(".")):
        raise InputError(f"--set: expected KEY=VALUE such as sft.max_steps=10, got {override!r}")
    try:
        value = yaml.load(value, _Loader)
    except yaml.YAMLError as error:
        raise InputError(f"--set {key}: not valid YAML: {value!r}") from error
    set_value(raw, key, value)


def set_value(raw: dict, key: str, value: Any) -> None:
    """Set one value in place; sections that are not there are made."""
    *parents, last = key.split(".")
    for parent in parents:
        if raw.get(parent) is None:
            raw[parent] = {}
        raw = raw[parent]
        if not isinstance(raw, dict):
            raise InputError(f"--set {key}: {parent!r} is a value, not a section")
    raw[last] = value


def expand(value: Any, path: Path) -> Any:
    """`value` with `${NAME}` and `${NAME:-default}` replaced in every text. Raises InputError where
    a variable has neither."""

    def variable(match: re.Match) -> str:
        name, default = match.groups()
        found = os.environ.get(name) or default
        if found is None:
            raise InputError(f"{path}: {match[0]}: the environment variable {name} is not set")
        return found

    if isinstance(value, dict):
        return {k: expand(v, path) for k, v in value.items()}
    if isinstance(value, list):
        return [expand(v, path) for v in value]
    return _VARIABLE.sub(variable, value) if isinstance(value, str) else value
