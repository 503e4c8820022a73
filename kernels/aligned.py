"""Brings matrices to the form that the kernels of the linears are compiled for ahead of time.

Triton compiles a kernel once more for sizes, strides and addresses that 16 does not divide: then
rows cannot be loaded 16 bytes at a time, every element has an address of its own, and these spill.
The tables (bench/results/aot) are of the others, so a launcher brings what it is given to that
form. Zeros behind K add nothing to a product, columns behind N are cut away, and a dropout mask
goes by seed, row and column. Rows of tokens cost nothing, whatever their number.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def aligned(t: Tensor | None, *dims: int) -> Tensor | None:
    """t [n] or [m, n] with unit inner stride, where 16 divides the address, the sizes of `dims` and
    the step from row to row (of a rank, which no dim names, only where it divides that as well).

    Itself where it is so already; else a copy, zeros behind it along `dims`.
    """
    if t is None:
        return None
    shape, stride = t.shape, t.stride()  # asked for once: this runs in every call
    for d in dims:
        if shape[d] % 16:
            missing = [-n % 16 if d in dims else 0 for d, n in enumerate(shape)]
            return F.pad(t, [side for n in reversed(missing) for side in (0, n)])
    if stride[-1] == 1 and t.data_ptr() % 16 == 0:
        if len(shape) == 1 or stride[0] % 16 == 0 or shape[1] % 16:
            return t
    return t.clone(memory_format=torch.contiguous_format)


def up16(n: int) -> int:
    """The next multiple of 16."""
    return -(-n // 16) * 16


def cut(t: Tensor, *sizes: int) -> Tensor:
    """t without what lies behind `sizes`, contiguous; itself where nothing does."""
    if t.shape == sizes:
        return t
    return t[tuple(slice(n) for n in sizes)].contiguous()
