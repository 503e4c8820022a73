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
from collections.abc import Sequence
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
    element at max_rank·(N_0 + … + N_{i−1}). max_rank is a multiple of RANK_STEP. A slot is free
    where the rank of any of its parts is -1.
    """

    a: Tensor  # [slots, parts·max_rank, K], K contiguous
    b: Tensor  # [slots, ΣN·max_rank], flat, a's dtype
    rank: Tensor  # [slots, parts] int32
    scale: Tensor  # [slots, parts] fp32
    sizes: tuple[int, ...]  # N of each part

    @property
    def max_rank(self) -> int:
        return self.a.shape[1] // len(self.sizes)

    @torch.no_grad()
    def put(self, slot: int, parts: Sequence[LoRA | tuple | None] | None) -> None:
        """Writes an adapter into a slot, on the current stream; None: none, and no byte stays.

        parts: (a [R, K], b [N_i, R], scale) of each part, ranks differ freely; None for a part that
        the adapter leaves alone. Cast to the pool's dtype, from any device. Raises ValueError where
        it does not fit, before anything is written.
        """
        count, _, k = self.a.shape
        if not 0 <= slot < count:
            raise ValueError(f"slot: expected 0..{count - 1}, got {slot}")
        if parts is not None:
            self._check_fits(parts, k)
        for t, empty in ((self.rank, -1), (self.a, 0), (self.b, 0), (self.scale, 0)):
            t[slot].fill_(empty)
        if parts is None:
            return
        for i, part in enumerate(parts):
            a, b = self._places(slot, i, 0 if part is None else part[0].shape[0])
            if part is not None:
                a.copy_(part[0], non_blocking=True)
                b.copy_(part[1], non_blocking=True)
                self.scale[slot, i].fill_(float(part[2]))
        for i, part in enumerate(parts):  # once all is there
            self.rank[slot, i].fill_(0 if part is None else part[0].shape[0])

    def get(self, slot: int) -> list[LoRA]:
        """The adapter of a slot, part by part, as views. Reads rank and scale: waits for a GPU."""
        if not 0 <= slot < self.rank.shape[0]:
            raise ValueError(f"slot: expected 0..{self.rank.shape[0] - 1}, got {slot}")
        ranks = self.rank[slot].tolist()
        if min(ranks) < 0:
            raise ValueError(f"slots: slot {slot} holds no adapter; load one into it first")
        if max(ranks) > self.max_rank:
            raise ValueError(
                f"slots: expected ranks <= max_rank {self.max_rank}, got {ranks} in slot {slot}"
            )
        scales = self.scale[slot].tolist()
        places = (self._places(slot, i, rank) for i, rank in enumerate(ranks))
        return [LoRA(a, b, s) for (a, b), s in zip(places, scales, strict=True)]

    def _places(self, slot: int, part: int, rank: int) -> tuple[Tensor, Tensor]:
        """A [rank, K] and B [N_i, rank] where they lie."""
        first, n, stride = part * self.max_rank, self.sizes[part], row_stride(rank)
        at = self.max_rank * sum(self.sizes[:part])
        b = self.b[slot, at : at + n * stride].view(n, stride)
        return self.a[slot, first : first + rank], b[:, :rank]

    def _check_fits(self, parts: Sequence[LoRA | tuple | None], k: int) -> None:
        if len(parts) != len(self.sizes):
            raise ValueError(f"parts: expected {len(self.sizes)}, as sizes, got {len(parts)}")
        for i, (part, n) in enumerate(zip(parts, self.sizes, strict=True)):
            if part is None:
                continue
            a, b, scale = part
            r = a.shape[0]
            if not isinstance(scale, int | float) and not (
                isinstance(scale, Tensor) and scale.numel() == 1
            ):
                raise ValueError(f"scale of part {i}: expected a number, got {scale!r}")
            if a.shape != (r, k):
                raise ValueError(f"a of part {i}: expected [R, {k}], got {tuple(a.shape)}")
            if b.shape != (n, r):
                raise ValueError(f"b of part {i}: expected {(n, r)}, got {tuple(b.shape)}")
            if r > self.max_rank:
                raise ValueError(f"a of part {i}: expected a rank <= {self.max_rank}, got {r}")


class LoRA(NamedTuple):
    """The update of one linear: scale · B A."""

    a: Tensor  # [R, K]
    b: Tensor  # [N, R]
    scale: float


def empty_lora_slots(
    k: int,
    sizes: Sequence[int],
    slots: int,
    max_rank: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> LoRASlots:
    """Free slots for the adapters of linears [N_i, K], N_i in sizes; max_rank is rounded up."""
    most, parts = row_stride(max(max_rank, 1)), len(sizes)
    return LoRASlots(
        a=torch.zeros(slots, parts * most, k, dtype=dtype, device=device),
        b=torch.zeros(slots, sum(sizes) * most, dtype=dtype, device=device),
        rank=torch.full((slots, parts), -1, dtype=torch.int32, device=device),
        scale=torch.zeros(slots, parts, dtype=torch.float32, device=device),
        sizes=tuple(int(n) for n in sizes),
    )


def lora_slots(
    adapters: Sequence[tuple | Sequence[LoRA | tuple | None] | None],
    max_rank: int | None = None,
    slots: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> LoRASlots:
    """Slots that hold these adapters in their order; None leaves one free, as those after the last.

    An adapter is (a [R, K], b [N, R], scale), or a list of such where linears are stacked, None for
    a part that it leaves alone; each part needs an adapter that has it, which says its N. max_rank,
    slots: room for ranks so large and that many; None: as much as these take. dtype, device: None
    for the first adapter's.
    """
    given = [[e] if isinstance(e, tuple) else e for e in adapters]
    held = [e for e in given if e is not None]
    for part in (p for e in held for p in e if p is not None):
        if len(part) != 3 or not all(isinstance(t, Tensor) and t.ndim == 2 for t in part[:2]):
            got = [tuple(t.shape) if isinstance(t, Tensor) else t for t in part]
            raise ValueError(f"adapters: expected (a [R, K], b [N, R], scale) each, got {got}")
    if not held:
        raise ValueError("adapters: expected at least one, which says K and N, got none")
    if len({len(e) for e in held}) != 1:
        raise ValueError(f"adapters: expected as many parts in each, got {[len(e) for e in held]}")
    first = [next((p for p in part if p is not None), None) for part in zip(*held, strict=True)]
    if None in first:
        raise ValueError(f"adapters: expected one that has part {first.index(None)}, got none")
    like, sizes = first[0][0], [p[1].shape[0] for p in first]
    if max_rank is None:
        max_rank = max(p[0].shape[0] for e in held for p in e if p is not None)
    count = len(given) if slots is None else slots
    if count < len(given):
        raise ValueError(f"slots: expected >= {len(given)}, one for each adapter, got {count}")
    made = empty_lora_slots(
        like.shape[1], sizes, count, max_rank,
        like.dtype if dtype is None else dtype, like.device if device is None else device,
    )  # fmt: skip
    for slot, parts in enumerate(given):
        made.put(slot, parts)
    return made


class Adapter(NamedTuple):
    """One bottleneck adapter, as `ops.bottleneck_adapter` takes it; what a slot is filled with."""

    down_w: Tensor  # [E, d]
    down_b: Tensor | None  # [E]
    up_w: Tensor  # [d, E]
    up_b: Tensor | None  # [d]
    scale: float = 1.0
    norm_weight: Tensor | None = None  # [d]
    norm_bias: Tensor | None = None


class AdapterSlots(NamedTuple):
    """The bottleneck adapters of one place in the model, as `ops.bottleneck_adapter` defines them.

    Of slot s, with E = size[s] and L = row_stride(E): D is [E, d] at down[s], U is [d, L] (columns
    from E on are zero) at the beginning of up[s]. max_size is a multiple of RANK_STEP.
    """

    down: Tensor  # [slots, max_size, d], d contiguous
    down_bias: Tensor  # [slots, max_size]
    up: Tensor  # [slots, d·max_size], flat
    up_bias: Tensor  # [slots, d]
    size: Tensor  # [slots] int32
    scale: Tensor  # [slots] fp32
    norm_weight: Tensor | None = None  # [slots, d], where the adapter brings its own norm
    norm_bias: Tensor | None = None  # where that has one

    @torch.no_grad()
    def put(self, slot: int, adapter: Adapter | None) -> None:
        """Writes an adapter into a slot, on the current stream; None: none, and no byte stays.

        Its tensors are cast to the pool's dtype, from any device. Missing biases are 0, a norm's
        missing weight is 1. Raises ValueError where it does not fit, before anything is written.
        """
        slots, max_size, d = self.down.shape
        if not 0 <= slot < slots:
            raise ValueError(f"slot: expected 0..{slots - 1}, got {slot}")
        if adapter is not None:
            self._check_fits(adapter, max_size, d)
        for t, empty in zip(self, (0, 0, 0, 0, -1, 0, 0, 0), strict=True):
            if t is not None:
                t[slot].fill_(empty)
        if adapter is None:
            return
        down_w, down_b, up_w, up_b, scale, norm_weight, norm_bias = adapter
        size = down_w.shape[0]
        if size:
            self.down[slot, :size].copy_(down_w)
            stride = row_stride(size)
            self.up[slot, : d * stride].view(d, stride)[:, :size].copy_(up_w)
        if down_b is not None:
            self.down_bias[slot, :size].copy_(down_b)
        if up_b is not None:
            self.up_bias[slot].copy_(up_b)
        if norm_weight is not None:
            self.norm_weight[slot].copy_(norm_weight)
        elif self.norm_weight is not None:
            self.norm_weight[slot].fill_(1)
        if norm_bias is not None:
            self.norm_bias[slot].copy_(norm_bias)
        self.scale[slot].fill_(scale)
        self.size[slot].fill_(size)

    def get(self, slot: int) -> Adapter | None:
        """The adapter of a slot, as views; None for -1 and for one of size 0. Reads its size."""
        size = 0 if slot < 0 else int(self.size[slot])
        if size < 0:
            raise ValueError(f"slots: slot {slot} holds no adapter; load one into it first")
        if size > self.down.shape[1]:
            raise ValueError(
                f"slots: expected sizes <= {self.down.shape[1]}, got {size} in slot {slot}"
            )
        if size == 0:
            return None
        d, stride = self.down.shape[2], row_stride(size)
        return Adapter(
            self.down[slot, :size],
            self.down_bias[slot, :size],
            self.up[slot, : d * stride].view(d, stride)[:, :size],
            self.up_bias[slot],
            float(self.scale[slot]),
            None if self.norm_weight is None else self.norm_weight[slot],
            None if self.norm_bias is None else self.norm_bias[slot],
        )

    def _check_fits(self, adapter: Adapter, max_size: int, d: int) -> None:
        size = adapter.down_w.shape[0]
        shapes = ((size, d), (size,), (d, size), (d,), None, (d,), (d,))
        for name, t, shape in zip(Adapter._fields, adapter, shapes, strict=True):
            if shape is not None and t is not None and tuple(t.shape) != shape:
                raise ValueError(f"{name}: expected shape {shape}, got {tuple(t.shape)}")
        if size > max_size:
            raise ValueError(f"down_w: expected a bottleneck E <= {max_size}, got {size}")
        for name in ("norm_weight", "norm_bias"):
            if getattr(adapter, name) is not None and getattr(self, name) is None:
                raise ValueError(f"{name}: expected None, as the slots have none, got a Tensor")


def adapter_slots(
    adapters: Sequence[Adapter | tuple | None],
    *,
    slots: int | None = None,
    max_size: int | None = None,
) -> AdapterSlots:
    """Slots that hold these adapters in their order; None leaves one free, as those after the last.

    slots, max_size: room for that many and that wide ones; None: as much as these take. Dtype and
    device are the first adapter's. Norm weights have a place where an adapter brings some.
    """
    given = [None if a is None else Adapter(*a) for a in adapters]
    held = [a for a in given if a is not None]
    if not held:
        raise ValueError("adapters: expected at least one, which says d, dtype and device")
    most = max(a.down_w.shape[0] for a in held) if max_size is None else max_size
    most, d = row_stride(max(most, 1)), held[0].down_w.shape[1]
    count = len(given) if slots is None else slots
    if count < len(given):
        raise ValueError(f"slots: expected >= {len(given)}, one for each adapter, got {count}")
    like = held[0].down_w
    norm_weight = any(a.norm_weight is not None or a.norm_bias is not None for a in held)
    norm_bias = any(a.norm_bias is not None for a in held)
    made = AdapterSlots(
        down=like.new_zeros(count, most, d),
        down_bias=like.new_zeros(count, most),
        up=like.new_zeros(count, d * most),
        up_bias=like.new_zeros(count, d),
        size=like.new_full((count,), -1, dtype=torch.int32),
        scale=like.new_zeros(count, dtype=torch.float32),
        norm_weight=like.new_zeros(count, d) if norm_weight else None,
        norm_bias=like.new_zeros(count, d) if norm_bias else None,
    )
    for slot, adapter in enumerate(given):
        if adapter is not None:
            made.put(slot, adapter)
    return made


class PrefixSlots(NamedTuple):
    """The prefixes of one attention layer; a row of a batch sees the first length[slot] keys."""

    k: Tensor  # [slots, HKV, max_length, D]
    v: Tensor  # as k
    length: Tensor  # [slots] int32


class PromptSlots(NamedTuple):
    """Soft prompts."""

    prompt: Tensor  # [slots, max_length, d]
    length: Tensor  # [slots] int32


def debugging() -> bool:
    """Whether values of CUDA tensors are checked, for which the GPU is waited for."""
    return os.environ.get("FUSEDPEFT_DEBUG") == "1"


def check_slots(slots: Tensor, rows: int, size: Tensor, read: bool = True) -> None:
    """slots: one int32 for each row, -1 or a slot that holds an adapter.

    size: [slots] or [slots, parts], as above. Values are read of CPU tensors; of CUDA tensors under
    FUSEDPEFT_DEBUG=1 only, as it stalls the GPU. read=False: not here, as the kernel does so.
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
    if rows and read and (slots.is_cpu or debugging()):
        # In Python: half a dozen torch operations on a few numbers take ten times as long.
        named, count = sorted(set(slots.tolist()) - {-1}), size.shape[0]
        if named and (named[0] < 0 or named[-1] >= count):
            bad = named[0] if named[0] < 0 else named[-1]
            raise ValueError(f"slots: expected -1 (no adapter) or 0..{count - 1}, got {bad}")
        if named and size.numel() > 512:  # a gather, where a list of all would cost more
            held = size[named].tolist()
        else:
            held = size.tolist() if named else []
            held = [held[slot] for slot in named]
        for slot, sizes in zip(named, held, strict=True):
            if (min(sizes) if size.ndim > 1 else sizes) < 0:
                raise ValueError(f"slots: slot {slot} holds no adapter; load one into it first")
