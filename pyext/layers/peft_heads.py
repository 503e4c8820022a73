"""The classifier that PEFT keeps in a checkpoint beside an adapter (its modules_to_save).

Here it is a head of its own, an OutputLayer named like the adapter with `_head` behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from fusedpeft.errors import InputError
from fusedpeft.layers.attach import activate, attach_to, check_new
from fusedpeft.layers.config import OutputLayer
from fusedpeft.layers.heads import head_path, head_tensors, new_head, set_head_tensors
from fusedpeft.layers.targets import CLASSIFIERS

_HEAD = "head."  # how the keys of `head_tensors` begin


def head_name(name: str) -> str:
    return f"{name}_head"


def take_head(tensors: dict[str, Tensor], start: str) -> dict[str, Tensor]:
    """Takes the classifier out: {key of `head_tensors`: tensor}. start: of PEFT's keys."""
    found = {}
    for key in list(tensors):
        module, _, rest = key.removeprefix(start).partition(".")
        if key.startswith(start) and module in CLASSIFIERS and ".lora_" not in f".{rest}":
            found[_HEAD + rest] = tensors.pop(key)
    return found


def check_head(
    path: Path, model: nn.Module, name: str, tensors: dict[str, Tensor], saved: Sequence[str]
) -> None:
    """Raises InputError unless they are all of the model's head, and its name is free; there may be
    none where `saved`, PEFT's modules_to_save, names no classifier that the model has."""
    if not tensors:
        lost = [m for m in saved if m in CLASSIFIERS and hasattr(model, m)]
        if lost:
            raise InputError(
                f"{path} has no tensors of {lost[0]}, which its settings name as saved"
            )
        return
    check_new(model, head_name(name))
    own = new_head(model, OutputLayer()).state_dict()
    want = {_HEAD + key: tuple(t.shape) for key, t in own.items()}
    got = {key: tuple(t.shape) for key, t in tensors.items()}
    if got != want:
        raise InputError(
            f"{path} does not fit the head of this {type(model).__name__}: expected {want}, got "
            f"{got}"
        )


def add_head(model: nn.Module, name: str, tensors: dict[str, Tensor]) -> None:
    """Beside the adapter `name`, both active."""
    attach_to(model, OutputLayer(), head_name(name), strict=False)
    set_head_tensors(model, head_name(name), tensors)
    activate(model, (name, head_name(name)))


def head_beside(model: nn.Module, name: str, start: str) -> tuple[dict[str, Tensor], dict]:
    """(tensors under PEFT's keys, settings) of the head that goes with an adapter; none: both
    empty."""
    config = model._fusedpeft.configs.get(head_name(name))
    path = head_path(model, config) if isinstance(config, OutputLayer) else ""
    if path not in CLASSIFIERS:
        return {}, {}
    own = head_tensors(model, head_name(name))
    keys = {key: f"{start}{path}.{key.removeprefix(_HEAD)}" for key in own}
    return {keys[key]: t for key, t in own.items()}, {"modules_to_save": [path]}
