"""What the ops that serve many adapters take: tensors that hold one adapter a slot.

A slot is a place of fixed size for one adapter; a batch names a slot for each of its rows, -1 for
none. The tensors are allocated once and never move, so that a captured CUDA graph stays good while
slots are replaced. Plain data: `AdapterPool` fills it, tests and benches may as well.

Sizes differ from slot to slot and stand in a tensor of their own: an adapter of rank 8 costs a rank
of 8, whatever `max_rank` is. Size 0 leaves the rows as they are; size -1 marks a slot that holds no
adapter, and naming it is an error (NaN rows on a GPU, where nobody reads the values first).
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from torch import Tensor

RANK_STEP = 8  # elements; rows of B start at whole 16 bytes in every dtype


def row_stride(size: int) -> int:
    """Elements from one row of B (of `up`) to the next, for an adapter of that rank (size)."""
    return -(-size // RANK_STEP) * RANK_STEP


class LoRASlots(NamedTuple):
    """The LoRA adapters of one linear, or of several that read the same x and are stacked by rows.

    Of slot s and part i (0 where nothing is stacked), with R = rank[s, i] and L = row_stride(R):
    A is [R, K] at a[s, i·max_rank:], B is [N_i, L] (columns from R on are zero) in b[s], its first
    element at max_rank·(N_0 + … + N_{i−1}).
    """

    a: Tensor  # [slots, parts·max_rank, K], K contiguous
    b: Tensor  # [slots, ΣN·max_rank], flat, a's dtype
    rank: Tensor  # [slots, parts] int32
    scale: Tensor  # [slots, parts] fp32
    sizes: tuple[int, ...]  # N of each part

    @property
    def max_rank(self) -> int:
        return self.a.shape[1] // len(self.sizes)


class AdapterSlots(NamedTuple):
    """The bottleneck adapters of one place in the model, as `ops.bottleneck_adapter` defines them.

    Of slot s, with E = size[s] and L = row_stride(E): D is [E, d] at down[s], U is [d, L] (columns
    from E on are zero) at the beginning of up[s].
    """

    down: Tensor  # [slots, max_size, d], d contiguous
    down_bias: Tensor  # [slots, max_size]
    up: Tensor  # [slots, d·max_size], flat
    up_bias: Tensor  # [slots, d]
    size: Tensor  # [slots] int32
    scale: Tensor  # [slots] fp32
    norm_weight: Tensor | None = None  # [slots, d], where the adapter brings its own norm
    norm_bias: Tensor | None = None


class PrefixSlots(NamedTuple):
    """The prefixes of one attention layer; a row of a batch sees the first length[slot] keys."""

    k: Tensor  # [slots, HKV, max_length, D]
    v: Tensor  # as k
    length: Tensor  # [slots] int32


class PromptSlots(NamedTuple):
    """Soft prompts."""

    prompt: Tensor  # [slots, max_length, d]
    length: Tensor  # [slots] int32


def check_slots(slots: Tensor, rows: int, size: Tensor) -> None:
    """slots: one int32 for each row, -1 or a slot that holds an adapter.

    size: [slots] or [slots, parts], as above. Values are read of CPU tensors; of CUDA tensors under
    FUSEDPEFT_DEBUG=1 only, as it stalls the GPU.
    """
    if not isinstance(slots, Tensor):
        raise TypeError(f"slots: expected an int32 Tensor [{rows}], got {type(slots).__name__}")
    if slots.dtype != torch.int32:
        raise TypeError(f"slots: expected int32, got {slots.dtype}")
    if slots.shape != (rows,):
        raise ValueError(
            f"slots: expected [{rows}], one for each row of x, got {tuple(slots.shape)}"
        )
    if slots.device != size.device:
        raise ValueError(f"slots: expected device {size.device} (as the pool), got {slots.device}")
    if rows and (slots.is_cpu or os.environ.get("FUSEDPEFT_DEBUG") == "1"):
        low, high = (int(v) for v in torch.aminmax(slots))
        count = size.shape[0]
        if low < -1 or high >= count:
            bad = low if low < -1 else high
            raise ValueError(f"slots: expected -1 (no adapter) or 0..{count - 1}, got {bad}")
        used = slots[slots >= 0].long()
        free = used[(size[used] < 0).reshape(used.numel(), -1).any(1)]
        if free.numel():
            raise ValueError(f"slots: slot {int(free[0])} holds no adapter; load one into it first")
