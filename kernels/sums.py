"""Partial sums of weight gradients, added in a fixed order: no float atomics, the same bits always.

    out[i] = scale · Σ_p part[p, i]      part [P, …] fp32, out […] in the gradient's dtype

Reads P·numel·4 bytes, mostly out of L2, and writes numel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedpeft.kernels.device import SUM_CONFIG, on_device


@triton.jit
def _sum_kernel(part_ptr, out_ptr, parts, numel, scale, BLOCK: tl.constexpr):
    """out[i] = scale · Σ_p part[p, i], p ascending."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = at < numel
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    part_ptrs = part_ptr + at
    for _ in range(parts):
        acc += tl.load(part_ptrs, mask=ok, other=0.0)
        part_ptrs += numel
    tl.store(out_ptr + at, (acc * scale).to(out_ptr.dtype.element_ty), mask=ok)


def ordered_sum(part: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
    """scale · part.sum(0) in `dtype`, in a fixed order."""
    out = torch.empty(part.shape[1:], dtype=dtype, device=part.device)
    if out.numel() > 0:
        grid = (triton.cdiv(out.numel(), SUM_CONFIG["BLOCK"]),)
        with on_device(part):
            _sum_kernel[grid](part, out, part.shape[0], out.numel(), scale, **SUM_CONFIG)
    return out
