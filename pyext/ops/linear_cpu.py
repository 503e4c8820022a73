"""A frozen linear alone, few rows on a CPU: `multi_lora_linear` for tokens that name no slot."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedpeft.ops.arguments import is_plain
from fusedpeft.ops.lora_cpu import MAX_DECODE_TOKENS
from fusedpeft.ops.native import DTYPE_CODES, native

_LEAST = 1 << 19  # numbers of a W in fp32: below, F.linear is done while our threads wake up


def few_rows(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor | None:
    """x Wᵀ + bias in one C++ pass over W, or None where that is F.linear's to compute: for more
    than 16 rows, gradients, small fp32 W, on other devices, and wherever something is wrong.

    x [*, K], w [N, K], bias [N] of one dtype (fp32, bf16, fp16). Returns [*, N].
    """
    if native is None or not x.is_cpu or w.ndim != 2:
        return None
    (n, k), dtype, count = w.shape, x.dtype, x.numel()
    if count > MAX_DECODE_TOKENS * k or (n * k < _LEAST and dtype == torch.float32):
        return None  # before all that takes longer to ask
    if not (
        count > 0
        and x.shape[-1] == k
        and dtype == w.dtype
        and dtype in DTYPE_CODES
        and is_plain((x, w) if bias is None else (x, w, bias))
        and w.is_cpu
        and w.stride()[1] == 1
        and (bias is None or bias.is_cpu and bias.dtype == dtype and bias.is_contiguous())
        and not torch.is_autocast_enabled("cpu")
    ):
        return None
    if torch.is_grad_enabled() and (
        x.requires_grad or w.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return None
    # The last tokens of a batch of prompts, say: F.linear would copy W for each row in 16 bits.
    x = x.contiguous()
    m, y = count // k, x.new_empty(*x.shape[:-1], n)
    torch.get_num_threads()  # tells OpenMP in this thread what torch.set_num_threads said in any
    native.linear(
        x.data_ptr(), w.data_ptr(), 0 if bias is None else bias.data_ptr(), y.data_ptr(),
        m, k, n, k, w.stride()[0], DTYPE_CODES[dtype],
    )  # fmt: skip
    return y
