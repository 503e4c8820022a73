"""Merged weights: the adapter at no cost, and exactly the old weights back."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fusedpeft.errors import InputError
from fusedpeft.layers import frozen
from fusedpeft.layers.attach import forget
from fusedpeft.layers.config import LoRA
from fusedpeft.layers.heads import drop_ties
from fusedpeft.layers.lora import LoraLinear
from fusedpeft.layers.lora_method import lora_modules, restore
from fusedpeft.layers.state import State, require_unmerged, state_of, unwrap

_ORIGINAL = "_original_weight"


def _tied(model: nn.Module) -> set[int]:
    """ids of parameters that stand in more than one place (an embedding tied to the head)."""
    seen = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    return {key for key, count in seen.items() if count > 1}


def _put(module: LoraLinear, merged_nk: Tensor, tied: set[int]) -> None:
    base = module.base_layer
    weight, merged = base.weight, merged_nk.t() if module.transposed else merged_nk
    if id(weight) in tied:  # the other places keep the old weight: this one gets its own
        setattr(module, _ORIGINAL, [weight])
        base.weight = nn.Parameter(merged.contiguous(), requires_grad=weight.requires_grad)
    else:  # in place, so that addresses hold; the copy lies in host memory
        setattr(module, _ORIGINAL, [weight.detach().to("cpu", copy=True)])
        weight.data.copy_(merged)


def _put_back(module: LoraLinear) -> None:
    (original,) = getattr(module, _ORIGINAL)
    delattr(module, _ORIGINAL)
    if isinstance(original, nn.Parameter):
        module.base_layer.weight = original
    else:
        module.base_layer.weight.data.copy_(original)


def _merge_weights(model: nn.Module) -> None:
    tied, done = _tied(model), []
    with torch.no_grad():
        for path, module in lora_modules(model):
            if not module._active:
                continue
            merged = module.merged_weight()
            if not torch.isfinite(merged).all():
                for other in done:
                    _put_back(other)
                raise InputError(f"cannot merge: the merged weight of {path!r} is not finite")
            _put(module, merged, tied)
            done.append(module)


def merge(model: nn.Module, *, unload: bool = False) -> None:
    """Add the active adapters into the weights, W + scale·B A computed in fp32 and rounded to W's
    dtype: inference then costs what the base costs. Nothing trains until `unmerge`.

    The original weights are kept in host memory, so that `unmerge` returns them bit for bit (the
    difference of rounded 16-bit weights would not). unload=True keeps nothing: every adapter goes,
    the plain modules stay with the merged weights, ready for `save_pretrained`.
    Raises InputError where no adapter is active, where one is merged already, and, with every
    weight as it was, where a merged weight is not finite.
    """
    model = unwrap(model)
    state = state_of(model)
    require_unmerged(state, "merge again")
    if not state.active:
        raise InputError("nothing to merge: no adapter is active")
    for name in state.active:
        if not isinstance(state.configs[name], LoRA):
            kind = type(state.configs[name]).__name__
            raise InputError(
                f"cannot merge {name!r}: {kind} changes no weight; deactivate it first"
            )
    _merge_weights(model)
    if unload:
        _unload(model, state)
        return
    for _, module in lora_modules(model):
        module.activate(())
    state.merged = state.active


def _unload(model: nn.Module, state: State) -> None:
    forget(model, state)
    for path, module in list(lora_modules(model)):
        restore(model, module)
        (original,) = getattr(module, _ORIGINAL, (None,))
        if isinstance(original, nn.Parameter):
            module.base_layer.weight.requires_grad_(original.requires_grad)
            _untie(model, f"{path}.weight")
    frozen.restore(model)  # those too that LoRA's stood around


def _untie(model: nn.Module, name: str) -> None:
    """A merged weight is no longer to be tied, by `tie_weights` or, where the settings tie nothing
    else (T5's and BART's do), after `from_pretrained`."""
    drop_ties(model, name)
    models = [m for m in model.modules() if isinstance(m, PreTrainedModel)]
    for config in [m.config for m in models if getattr(m.config, "tie_word_embeddings", False)]:
        if not any(m.get_expanded_tied_weights_keys() for m in models if m.config is config):
            config.tie_word_embeddings = False


def unmerge(model: nn.Module) -> None:
    """Give every weight its original bits back; the adapters that were merged act again."""
    model = unwrap(model)
    state = state_of(model)
    if not state.merged:
        raise InputError("nothing to unmerge: no adapter is merged")
    for _, module in lora_modules(model):
        if hasattr(module, _ORIGINAL):
            _put_back(module)
        module.activate(state.merged)
    state.merged = ()
