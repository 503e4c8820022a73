"""W in 4 or 8 bits on a CPU, in C++: some of it as numbers, and decode straight from its codes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fusedpeft.ops.arguments import is_plain
from fusedpeft.ops.native import DTYPE_CODES, native

if TYPE_CHECKING:
    from fusedpeft.ops.quantised import QuantisedWeight

_COLUMNS = 64  # slabs of columns are multiples of it, where that many fit


def readable(*tensors: Tensor) -> bool:
    """Whether C++ can take their addresses: the extension is there, they lie in this memory and no
    compiler looks on."""
    return native is not None and is_plain(tensors) and all([t.is_cpu for t in tensors])


def _weight(weight: QuantisedWeight) -> tuple[list[Tensor], list[int], bool]:
    """(tensors to be kept until the call is over; their addresses; whether rows have scales)"""
    parts = [t.contiguous() for t in weight.parts()]
    addresses = [t.data_ptr() for t in parts]
    by_row = weight.layout[2] == 0 and parts[1].numel() > 1
    return parts, addresses + [0] * (5 - len(parts)), by_row


def native_slab(weight: QuantisedWeight, rows: range, cols: range, out: Tensor) -> Tensor:
    """out[rows, cols] = w[rows, cols]; cols from an even one on."""
    if out.numel() == 0:
        return out
    parts, addresses, by_row = _weight(weight)
    torch.get_num_threads()  # tells OpenMP in this thread what torch.set_num_threads said in any
    native.dequantise(
        addresses, *weight.layout, by_row, out.data_ptr(), rows.start, len(rows), cols.start,
        len(cols), out.stride(0), DTYPE_CODES[out.dtype],
    )  # fmt: skip
    return out


def native_rows(weight: QuantisedWeight, first: int, last: int, dtype: torch.dtype) -> Tensor:
    made = dtype if dtype in DTYPE_CODES else torch.float32
    k = weight.shape[1]
    out = torch.empty(last - first, k, dtype=made)
    return native_slab(weight, range(first, last), range(k), out).to(dtype)


def slabs(
    weight: QuantisedWeight, dtype: torch.dtype, most_bytes: int, columns: bool
) -> Iterator[tuple[slice, Tensor]]:
    """(which, w of them): some rows, or some columns, at a time, the next in the same memory."""
    n, k = weight.shape
    whole, other = (k, n) if columns else (n, k)
    made = dtype if dtype in DTYPE_CODES else torch.float32
    step = max(1, most_bytes // max(1, other * made.itemsize))
    if columns:
        step = step // _COLUMNS * _COLUMNS or max(2, step // 2 * 2)
    room = torch.empty(min(step, whole) * other, dtype=made)
    for first in range(0, whole, step):
        count = min(step, whole - first)
        at, everything = range(first, first + count), range(other)
        rows, cols = (everything, at) if columns else (at, everything)
        out = room[: count * other].view(len(rows), len(cols))
        yield slice(first, first + count), native_slab(weight, rows, cols, out).to(dtype)


def decode_ok(x: Tensor, weight: QuantisedWeight, a: Tensor, b: Tensor) -> bool:
    """Whether the C++ kernel is there and takes these; x [M, K]."""
    return (
        readable(x, a, b, weight.tensors()[0])
        and min(weight.shape) > 0
        and x.dtype in DTYPE_CODES
        and (a.dtype == x.dtype or a.dtype == torch.float32)
        and x.stride()[1] == a.stride()[1] == b.stride()[1] == 1
    )


def native_decode(
    x: Tensor, weight: QuantisedWeight, a: Tensor, b: Tensor, bias: Tensor | None, scale: float
) -> Tensor:
    """x [M, K] -> y [M, N] in one pass over the codes."""
    (m, k), (n, r) = x.shape, b.shape
    y = x.new_empty(m, n)
    bias = None if bias is None else bias.contiguous()  # named: it must outlive the call
    parts, addresses, by_row = _weight(weight)
    torch.get_num_threads()
    native.lora_decode_quantised(
        x.data_ptr(), addresses, a.data_ptr(), b.data_ptr(),
        0 if bias is None else bias.data_ptr(), y.data_ptr(),
        m, k, n, weight.layout[2], by_row, r, x.stride()[0], a.stride()[0], b.stride()[0], n,
        scale, DTYPE_CODES[x.dtype], DTYPE_CODES[a.dtype],
    )  # fmt: skip
    return y
