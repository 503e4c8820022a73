"""The head that PEFT keeps in a checkpoint beside an adapter (its modules_to_save).

Here it is a head of its own, an OutputLayer named like the adapter with `_head` behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from fusedpeft.errors import InputError
from fusedpeft.layers.attach import activate, attach_to, check_new
from fusedpeft.layers.config import OutputLayer
from fusedpeft.layers.heads import head_path, head_tensors, new_head, set_head_tensors
from fusedpeft.layers.targets import CLASSIFIERS

_HEAD = "head."  # how the keys of `head_tensors` begin


def head_name(name: str) -> str:
    return f"{name}_head"


def output_layer(model: nn.Module) -> str | None:
    """Where the output embeddings are; None where there are none, or a classifier."""
    try:
        path = head_path(model, OutputLayer())
    except InputError:
        return None
    return None if path in CLASSIFIERS else path


def known_heads(model: nn.Module) -> tuple[str, ...]:
    """What modules_to_save may name: PEFT takes whole paths and the last of their names."""
    path = output_layer(model)
    return CLASSIFIERS if path is None else (*CLASSIFIERS, path, path.rpartition(".")[2])


def take_head(
    tensors: dict[str, Tensor], start: str, model: nn.Module, saved: Sequence[str]
) -> dict[str, Tensor]:
    """Takes the head out: {key of `head_tensors`: tensor}. start: of PEFT's keys; saved: its
    modules_to_save, without which output embeddings are a part of the base."""
    output, found = output_layer(model), {}
    places = (*CLASSIFIERS, output) if output and _names(saved, output) else CLASSIFIERS
    for key in list(tensors):
        inner = key.removeprefix(start)
        place = next((p for p in places if inner.startswith(f"{p}.")), None)
        if key.startswith(start) and place and ".lora_" not in inner:
            found[_HEAD + inner[len(place) + 1 :]] = tensors.pop(key)
    return found


def _names(saved: Sequence[str], path: str) -> bool:
    return any(f".{path}".endswith(f".{name}") for name in saved)


def drop_base(path: Path, start: str, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Takes out what PEFT keeps of the base itself (embeddings, where the adapter is on one).

    Raises InputError where it is not what the model has."""
    own = dict(model.named_parameters(remove_duplicate=False))
    for key in list(tensors):
        name = key.removeprefix(start).replace(".base_layer.", ".")
        if not key.startswith(start) or name not in own:
            continue
        there, here = tensors.pop(key), own[name].detach()
        why = "the values differ"
        if there.shape != here.shape:
            why = f"expected {tuple(here.shape)}"
        elif _equal(there.to(here.device), here):
            continue
        raise InputError(
            f"{path} holds the base's {name} {tuple(there.shape)}, which is not what this "
            f"{type(model).__name__} has, {why}: load it on the base it is for"
        )


def _equal(one: Tensor, two: Tensor) -> bool:
    """In the coarser of their dtypes: the same base may have been loaded in another."""
    if one.is_floating_point() and two.is_floating_point():
        coarser = max(one.dtype, two.dtype, key=lambda dtype: torch.finfo(dtype).eps)
        one, two = one.to(coarser), two.to(coarser)
    return torch.equal(one, two.to(one))


def check_head(
    path: Path, model: nn.Module, name: str, tensors: dict[str, Tensor], saved: Sequence[str]
) -> None:
    """Raises InputError unless they are all of the model's head, and its name is free; there may be
    none where `saved`, PEFT's modules_to_save, names no head that the model has."""
    if not tensors:
        output = output_layer(model)
        lost = [m for m in saved if m in CLASSIFIERS and hasattr(model, m)]
        lost += [output] if output and _names(saved, output) else []
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
    if not isinstance(config, OutputLayer):
        return {}, {}
    path = head_path(model, config)
    own = head_tensors(model, head_name(name))
    keys = {key: f"{start}{path}.{key.removeprefix(_HEAD)}" for key in own}
    return {keys[key]: t for key, t in own.items()}, {"modules_to_save": [path]}
