"""What prefix_decode_attention refuses, with the expected and the given value."""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor

from fusedpeft.ops.prefix_attention_checks import (
    DECODE,
    MAX_DECODE_QUERIES,
    MAX_HEAD_DIM,
    check_kernel,
)
from fusedpeft.ops.slots import PrefixSlots, check_slots

IMPLS = (*DECODE, "aten")


def check(q, k, v, prefix, slots, lengths, table, scale, window, impl) -> None:
    if not isinstance(prefix, PrefixSlots):
        raise TypeError(f"prefix: expected PrefixSlots, got {type(prefix).__name__}")
    named = (("q", q), ("k", k), ("v", v), ("prefix.k", prefix.k), ("prefix.v", prefix.v))
    ints = (("slots", slots), ("prefix.length", prefix.length))
    extra = (("lengths", lengths), ("block_table", table))
    for name, t in (*named, *ints, *((n, t) for n, t in extra if t is not None)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(t).__name__}")
        if t.device != q.device:
            raise ValueError(f"{name}: expected device {q.device} (as q), got {t.device}")
    if not q.is_floating_point():
        raise TypeError(f"q: expected a floating dtype, got {q.dtype}")
    for name, t in named:
        if t.dtype != q.dtype:
            raise TypeError(f"{name}: expected dtype {q.dtype} (as q), got {t.dtype}")
        if t.ndim != 4:
            raise ValueError(f"{name}: expected 4 dims, got {tuple(t.shape)}")
    (B, H, T, D), (rows, HKV, S, _) = q.shape, k.shape
    if T > MAX_DECODE_QUERIES:
        why = "longer ones take ops.prefix_attention"
        raise ValueError(f"q: expected T <= {MAX_DECODE_QUERIES}, got {T}; {why}")
    if not 1 <= D <= MAX_HEAD_DIM:
        raise ValueError(f"q: expected head dim D in 1..{MAX_HEAD_DIM}, got {D}")
    if HKV < 1 or H % HKV:
        raise ValueError(f"k: expected HKV that divides H = {H}, got {HKV}")
    want = f"[{B}, HKV, S, {D}]" if table is None else f"[num_blocks, HKV, block_size, {D}]"
    if (table is None and rows != B) or k.shape[3] != D or v.shape != k.shape:
        got = f"{tuple(k.shape)}, {tuple(v.shape)}"
        raise ValueError(f"k, v: expected {want} (q is {tuple(q.shape)}), got {got}")
    slot_count, P = prefix.k.shape[0], prefix.k.shape[2]
    for name, t in named[3:]:
        if t.shape != (slot_count, HKV, P, D):
            want = f"[slots, {HKV}, max_length, {D}], k as v"
            raise ValueError(f"{name}: expected {want}, got {tuple(t.shape)}")
    for name, t, count in (*((n, t, B) for n, t in (ints[0], extra[0])), (*ints[1], slot_count)):
        if t is not None and t.dtype != torch.int32:
            raise TypeError(f"{name}: expected int32, got {t.dtype}")
        if t is not None and t.shape != (count,):
            raise ValueError(f"{name}: expected [{count}], got {tuple(t.shape)}")
    if table is not None and table.dtype != torch.int32:
        raise TypeError(f"block_table: expected int32, got {table.dtype}")
    if table is not None and (table.ndim != 2 or table.shape[0] != B or S < 1):
        got = f"{tuple(table.shape)}, block_size {S}"
        raise ValueError(f"block_table: expected [{B}, blocks] and block_size >= 1, got {got}")
    if window is not None and (not isinstance(window, int) or window < 1):
        raise ValueError(f"window: expected an int >= 1 or None, got {window!r}")
    if scale is not None and not -math.inf < scale < math.inf:
        raise ValueError(f"scale: expected a finite number, got {scale}")
    if impl not in (None, *IMPLS):
        raise ValueError(f"impl: expected one of {IMPLS} or None, got {impl!r}")
    if impl in DECODE:
        check_kernel(impl, q)


def check_values(slots, plen: Tensor, k: Tensor, lengths, table, T: int, window: int) -> None:
    """What the C++ kernel checks of itself: of CPU tensors, of CUDA tensors in debugging only."""
    check_slots(slots, slots.shape[0], plen)
    if not (slots.is_cpu or os.environ.get("FUSEDPEFT_DEBUG") == "1"):
        return
    size = k.shape[2]
    most = size if table is None else table.shape[1] * size
    if lengths is not None and lengths.numel():
        low, high = (int(n) for n in torch.aminmax(lengths))
        if low < 0 or high > most:
            raise ValueError(f"lengths: expected 0..{most}, got {low if low < 0 else high}")
    if table is None:
        return
    end = most if lengths is None else lengths[:, None]
    first = torch.arange(table.shape[1], device=table.device) * size  # key of each block
    seen = (first < end) & (first + size > end - T + 1 - (window or most + T))
    bad = table[seen & ((table < 0) | (table >= k.shape[0]))]
    if bad.numel():
        raise ValueError(f"block_table: expected blocks 0..{k.shape[0] - 1}, got {int(bad[0])}")
