"""The plain linears of a model that carries adapters."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fusedpeft.ops.linear_cpu import few_rows


class Linear(nn.Linear):
    """nn.Linear, but on a CPU without gradients a few tokens take the C++ kernel that LoRA's do:
    in decode the time is the frozen products'."""

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias  # a look-up each
        y = few_rows(input, weight, bias)
        if y is not None:
            return y
        # [B, 1, K] of the last tokens of prompts: ATen would multiply by B copies of W in 16 bits.
        return F.linear(input.contiguous() if input.ndim == 3 else input, weight, bias)


PLAIN_FORWARDS = (nn.Linear.forward, Linear.forward)  # what W and bias alone tell
