"""Full fine-tuning: every parameter that was trainable before the first `attach`.

No adapter: the weights themselves change, and nothing here takes that back. It stands beside the
methods so that they can be compared by one line of code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from fusedpeft.errors import InputError
from fusedpeft.layers.config import FullFineTuning


def plan(model: nn.Module, config: FullFineTuning, strict: bool) -> None:
    pass


def add(model: nn.Module, config: FullFineTuning, name: str, planned: None) -> None:
    pass


def check_together(wanted: Mapping[str, FullFineTuning]) -> None:
    if len(wanted) > 1:
        raise InputError(f"full fine-tuning is one for the model: expected one of {list(wanted)}")


def activate(model: nn.Module, names: Sequence[str]) -> None:
    for parameter in model._fusedpeft.was_trainable:
        parameter.requires_grad_(bool(names))


def remove(model: nn.Module, name: str) -> None:
    pass
