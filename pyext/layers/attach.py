"""Adapters on a model, in place: attach, activate, detach."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from fusedpeft.errors import InputError
from fusedpeft.layers import frozen, kv_cache
from fusedpeft.layers.rows import AdapterNames
from fusedpeft.layers.state import (
    METHODS,
    SERVED,
    STATE,
    Config,
    State,
    require_unmerged,
    state_of,
    unwrap,
)


def check_new(model: nn.Module, name: str) -> None:
    if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise InputError(
            f"adapter name: expected a word without dots that is no method's name, got {name!r}"
        )
    if any(type(m).__module__.startswith("peft.tuners") for m in model.modules()):
        raise InputError("the model carries PEFT's adapters: use fusedpeft.accelerate(model)")
    if SERVED in model.__dict__:
        raise InputError("the model is served by an AdapterPool: uninstall that first")
    state = getattr(model, STATE, None)
    if state is not None and name in state.configs:
        raise InputError(
            f"an adapter named {name!r} is attached already: detach it or take another name"
        )
    require_unmerged(state, "attach")


def attach(model: nn.Module, config: Config, name: str = "default") -> nn.Module:
    """Add an adapter to the model, in place, and return the model.

    The first adapter freezes the base. The new adapter becomes the only active, the only trainable
    one (`activate` changes that). LoRA leaves the output as it is until the adapter learns (B is
    zero); which linears it goes on, its docstring says.
    Without gradients the model appends to a DynamicCache in place, and on a CPU frozen modules
    between the adapters run on kernels of ours, until `detach`.
    Raises InputError, before anything is changed: no module matches (the nearest names are
    suggested), a name taken, a model that is merged or PEFT's, or that the method cannot serve.
    """
    attach_to(unwrap(model), config, name, strict=True)
    return model


def attach_to(model: nn.Module, config: Config, name: str, strict: bool) -> None:
    """`attach` on the unwrapped model; not strict: names of LoRA's `targets` may match nothing."""
    method = METHODS.get(type(config))
    if method is None:
        known = ", ".join(kind.__name__ for kind in METHODS)
        raise InputError(f"attach: expected a config ({known}), got {type(config).__name__}")
    check_new(model, name)
    planned = method.plan(model, config, strict)

    state = getattr(model, STATE, None)
    if state is None:
        state = State(was_trainable=[p for p in model.parameters() if p.requires_grad])
        for parameter in state.was_trainable:
            parameter.requires_grad_(False)
        state.handles = [*AdapterNames().hook(model), kv_cache.hook(model)]
        frozen.hasten(model)
        setattr(model, STATE, state)
    method.add(model, config, name, planned)
    state.configs[name] = config
    activate(model, name)


def activate(model: nn.Module, names: str | Sequence[str] | None) -> None:
    """Choose the adapters that act and train: one, several, None for none.

    LoRA's updates add up, bottleneck adapters follow one another, and the methods act together.
    DoRA rescales the whole weight, so a DoRA adapter is the only LoRA; one prefix and one prompt
    act at a time. Raises InputError for an unknown name, for what cannot be together, and while
    merged.
    """
    model = unwrap(model)
    wanted = _names(names)
    state = state_of(model)
    for name in wanted:
        state_of(model, name)
    require_unmerged(state, "activate")
    for method, own in state.by_method(wanted).items():
        method.check_together(own)
    for method, own in state.by_method(wanted).items():
        method.activate(model, tuple(own))
    state.active = wanted


def _names(given: object) -> tuple[str, ...]:
    """Each once, in their order. Raises InputError."""
    names = (given,) if isinstance(given, str) else () if given is None else given
    names = tuple(names) if isinstance(names, Iterable) else (given,)
    if not all(isinstance(name, str) for name in names):
        raise InputError(f"activate: expected an adapter's name, several or None, got {given!r}")
    return tuple(dict.fromkeys(names))


def detach(model: nn.Module, name: str = "default") -> None:
    """Remove an adapter. With the last one the very modules that stood there before return, and
    the parameters that were trainable before the first `attach` are trainable again.

    Raises InputError for an unknown name and while merged.
    """
    model = unwrap(model)
    state = state_of(model, name)
    require_unmerged(state, "detach")
    activate(model, [n for n in state.active if n != name])
    METHODS[type(state.configs.pop(name))].remove(model, name)
    if not state.configs:
        forget(model, state)


def forget(model: nn.Module, state: State) -> None:
    for parameter in state.was_trainable:
        parameter.requires_grad_(True)
    for handle in state.handles:
        handle.remove()
    frozen.restore(model)
    delattr(model, STATE)


def trainable_parameters(model: nn.Module) -> int:
    """How many numbers an optimiser would update (shared parameters once)."""
    return sum(p.numel() for p in unwrap(model).parameters() if p.requires_grad)
