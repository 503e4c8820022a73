"""What a model remembers of its adapters, and the methods that there are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import ModuleType

from torch import nn

from fusedpeft.errors import InputError
from fusedpeft.layers import bottleneck, full, heads, lora_method, prefix, prompt
from fusedpeft.layers.config import (
    BottleneckAdapter,
    FeatureBased,
    FullFineTuning,
    LoRA,
    OutputLayer,
    PrefixTuning,
    PromptTuning,
)
from fusedpeft.layers.targets import nearest

STATE = "_fusedpeft"
SERVED = "fusedpeft_pool"  # the attribute of a model that an AdapterPool serves
Config = (
    LoRA
    | BottleneckAdapter
    | PrefixTuning
    | PromptTuning
    | FeatureBased
    | OutputLayer
    | FullFineTuning
)
# A method is a module with
#   plan(model, config, strict)           all that can go wrong: raises InputError, changes nothing
#   add(model, config, name, the plan)    its parameters, in place
#   check_together({name: config})        raises InputError for what cannot be active at once
#   activate(model, names)                the ones of its own that act and train
#   remove(model, name)
METHODS = {
    LoRA: lora_method,
    BottleneckAdapter: bottleneck,
    PrefixTuning: prefix,
    PromptTuning: prompt,
    FeatureBased: heads,
    OutputLayer: heads,
    FullFineTuning: full,
}


@dataclass
class State:
    """What a model remembers of its adapters."""

    configs: dict[str, Config] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    merged: tuple[str, ...] = ()
    was_trainable: list[nn.Parameter] = field(default_factory=list)
    by_row: Sequence[str | None] | None = None  # within `rows`
    handles: list = field(default_factory=list)  # of the hooks on the model

    def by_method(self, names: Sequence[str]) -> dict[ModuleType, dict[str, Config]]:
        """Every method and those of `names` that are its own."""
        own: dict[ModuleType, dict[str, Config]] = {method: {} for method in METHODS.values()}
        for name in names:
            own[METHODS[type(self.configs[name])]][name] = self.configs[name]
        return own


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside torch.compile's wrapper."""
    if not isinstance(model, nn.Module):
        raise InputError(f"expected a model (torch.nn.Module), got {type(model).__name__}")
    return getattr(model, "_orig_mod", model)


def state_of(model: nn.Module, name: str | None = None) -> State:
    """The model's state; with `name`, checked to have that adapter. Raises InputError."""
    state = getattr(model, STATE, None)
    if state is None:
        raise InputError(f"{type(model).__name__} has no adapter: attach or load one first")
    if name is not None and name not in state.configs:
        raise InputError(f"no adapter is named {name!r}; {nearest(str(name), state.configs)}")
    return state


def require_unmerged(state: State | None, what: str) -> None:
    if state is not None and state.merged:
        raise InputError(f"cannot {what} while {list(state.merged)} are merged: unmerge first")
