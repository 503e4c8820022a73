"""Adapters on a model, in place: attach, activate, detach."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import nn
from transformers.pytorch_utils import Conv1D

from fusedpeft.errors import InputError
from fusedpeft.layers.config import LoRA
from fusedpeft.layers.lora import LoraLinear
from fusedpeft.layers.targets import match_targets, nearest

_STATE = "_fusedpeft"


@dataclass
class State:
    """What a model remembers of its adapters."""

    configs: dict[str, LoRA] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    merged: tuple[str, ...] = ()
    was_trainable: list[nn.Parameter] = field(default_factory=list)


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside torch.compile's wrapper."""
    if not isinstance(model, nn.Module):
        raise InputError(f"expected a model (torch.nn.Module), got {type(model).__name__}")
    return getattr(model, "_orig_mod", model)


def state_of(model: nn.Module, name: str | None = None) -> State:
    """The model's state; with `name`, checked to have that adapter. Raises InputError."""
    state = getattr(model, _STATE, None)
    if state is None:
        raise InputError(f"{type(model).__name__} has no adapter: attach or load one first")
    if name is not None and name not in state.configs:
        raise InputError(f"no adapter is named {name!r}; {nearest(str(name), state.configs)}")
    return state


def lora_modules(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """(path, module) of every adapted linear, shared ones once."""
    return ((p, m) for p, m in model.named_modules() if isinstance(m, LoraLinear))


def require_unmerged(state: State | None, what: str) -> None:
    if state is not None and state.merged:
        raise InputError(f"cannot {what} while {list(state.merged)} are merged: unmerge first")


def check_new(model: nn.Module, name: str) -> None:
    if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise InputError(
            f"adapter name: expected a word without dots that is no method's name, got {name!r}"
        )
    if any(type(m).__module__.startswith("peft.tuners") for m in model.modules()):
        raise InputError("the model carries PEFT's adapters: use fusedpeft.accelerate(model)")
    state = getattr(model, _STATE, None)
    if state is not None and name in state.configs:
        raise InputError(
            f"an adapter named {name!r} is attached already: detach it or take another name"
        )
    require_unmerged(state, "attach")


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever `old` stands: a module can stand in several places."""
    for parent in list(model.modules()):
        if parent is new:
            continue
        for child, module in parent._modules.items():
            if module is old:
                parent._modules[child] = new


def attach(model: nn.Module, config: LoRA, name: str = "default") -> nn.Module:
    """Add a LoRA adapter to the model, in place, and return the model. Its output is unchanged
    until the adapter learns (B is zero).

    The first adapter freezes the base. The new adapter becomes the only active, the only trainable
    one (`activate` changes that). `targets` choose the linears: LoRA's docstring.
    Raises InputError, before anything is changed: no module matches (the nearest names are
    suggested), a name taken, a model that is merged or PEFT's.
    """
    attach_to(unwrap(model), config, name, strict=True)
    return model


def attach_to(model: nn.Module, config: LoRA, name: str, strict: bool) -> None:
    """`attach` on the unwrapped model; not strict: names of `targets` may match nothing."""
    if not isinstance(config, LoRA):
        raise InputError(f"attach: expected a LoRA config, got {type(config).__name__}")
    check_new(model, name)
    found = match_targets(model, config.targets, strict=strict)

    state = getattr(model, _STATE, None)
    if state is None:
        state = State(was_trainable=[p for p in model.parameters() if p.requires_grad])
        for parameter in state.was_trainable:
            parameter.requires_grad_(False)
        setattr(model, _STATE, state)
    for path, module in found.items():
        if not isinstance(module, LoraLinear):
            wrapper = LoraLinear(module, transposed=isinstance(module, Conv1D))
            _replace(model, module, wrapper)
            module = wrapper
        rank, scale = config.rank_and_scale(path)
        module.add(name, rank, scale, config.dropout, config.dora)
    state.configs[name] = config
    activate(model, name)


def activate(model: nn.Module, names: str | Sequence[str] | None) -> None:
    """Choose the adapters that act and train: one, several (their updates add up), None for none.

    DoRA rescales the whole weight, so a DoRA adapter acts alone. Raises InputError for an unknown
    name, for DoRA beside another, and while merged.
    """
    model = unwrap(model)
    wanted = (names,) if isinstance(names, str) else tuple(dict.fromkeys(names or ()))
    state = state_of(model)
    for name in wanted:
        state_of(model, name)
    require_unmerged(state, "activate")
    dora = [n for n in wanted if state.configs[n].dora]
    if dora and len(wanted) > 1:
        raise InputError(f"DoRA adapter {dora[0]!r} rescales the whole weight: activate it alone")
    for _, module in lora_modules(model):
        module.activate(wanted)
    state.active = wanted


def detach(model: nn.Module, name: str = "default") -> None:
    """Remove an adapter. With the last one the very modules that stood there before return, and
    the parameters that were trainable before the first `attach` are trainable again.

    Raises InputError for an unknown name and while merged.
    """
    model = unwrap(model)
    state = state_of(model, name)
    require_unmerged(state, "detach")
    del state.configs[name]
    state.active = tuple(n for n in state.active if n != name)
    for _, module in list(lora_modules(model)):
        if name in module.adapters:
            del module.adapters[name]
        module.activate(state.active)
        if not module.adapters:
            restore(model, module)
    if not state.configs:
        forget(model, state)


def restore(model: nn.Module, module: LoraLinear) -> None:
    """Put a LoraLinear's base back wherever it stood."""
    _replace(model, module, module.base_layer)


def forget(model: nn.Module, state: State) -> None:
    for parameter in state.was_trainable:
        parameter.requires_grad_(True)
    delattr(model, _STATE)


def trainable_parameters(model: nn.Module) -> int:
    """How many numbers an optimiser would update (shared parameters once)."""
    return sum(p.numel() for p in unwrap(model).parameters() if p.requires_grad)
