"""The frozen modules of a model that carries adapters: its plain linears, and in elementwise.py
what stands between them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fusedpeft.layers.elementwise import faster, is_faster
from fusedpeft.ops.linear_cpu import few_rows


class Linear(nn.Linear):
    """nn.Linear, but on a CPU without gradients a few tokens take the C++ kernel that LoRA's do:
    in decode the time is the frozen products'."""

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias  # a look-up each
        y = few_rows(input, weight, bias)
        return F.linear(input, weight, bias) if y is None else y


PLAIN_FORWARDS = (nn.Linear.forward, Linear.forward)  # what W and bias alone tell


def hasten(model: nn.Module) -> None:
    """The frozen modules become ours, in place: parameters, hooks and names stay as they are."""
    for module in model.modules():
        kind = type(module)
        made = Linear if kind is nn.Linear else faster(kind)
        if made is not None and "forward" not in module.__dict__:
            module.__class__ = made


def restore(model: nn.Module) -> None:
    for module in model.modules():
        if type(module) is Linear or is_faster(module):
            module.__class__ = type(module).__bases__[0]
