"""What goes at a time in prefix_attention on a CPU: rows and heads, of them blocks of queries."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

QUERIES = 192  # from here on ATen's backward multiplies 64 rows at a time, before 32
_ATEN_HIDES = 256  # up to here its own causal mask costs less than the blocks save
_Block = tuple[slice, slice, Tensor | None, Tensor | None, bool]


class Blocks:
    """Blocks of queries, each with the keys from the first to the last that one of them sees."""

    def __init__(
        self, acc: torch.dtype, T: int, S: int, causal: bool, scale: float, window: int, step: int
    ) -> None:
        self.acc, self.T, self.S = acc, T, S
        self.causal, self.window, self.step = causal, window, step
        # ATen multiplies the −inf that it hides with by the scale.
        self.aten = causal and not window and scale > 0.0

    @functools.cached_property
    def table(self) -> tuple[Tensor, int]:
        """(table, at): table[i, at + d] is −inf where query i of a block does not see the key d
        positions after the block's first query, else 0. It goes by distance alone, so one serves
        all blocks, rows and sequences (of T = S, up to the sizes given)."""
        n, window = min(self.T, self.step), self.window
        at = min(self.S - self.T + (self.T - 1) // n * n, window - 1 if window else self.S)
        after = n if self.causal else min(n - 1 + window, self.S)
        hidden = torch.full((n, at + after), -math.inf, dtype=self.acc)
        table = hidden.triu(at + (1 if self.causal else window))
        return (table + hidden.tril_(at - window) if window else table), at

    def of(self, mask: Tensor | None, T: int, S: int) -> Iterator[_Block]:
        """(queries, keys, additive bias or None, queries that see no key or None, whether ATen is
        to hide the keys after each query), covering all; the last queries, which see most, first.
        """
        causal, window = self.causal, self.window
        if T == 0 or S == 0:
            return
        if self.aten and T == S <= _ATEN_HIDES and mask is None:
            yield slice(0, T), slice(0, S), None, None, True
            return
        step = self.step if causal or window or mask is not None else T
        for q0 in reversed(range(0, T, step)):
            q1 = min(q0 + step, T)
            first, last = S - T + q0, S - T + q1 - 1  # positions of the block's queries
            lo = max(0, first - window + 1) if window else 0
            hi = last + 1 if causal else min(S, last + window) if window else S
            bias = dead = None
            if mask is not None:
                bias = mask[:, :, q0:q1, lo:hi]
            if (causal or window) and q1 - q0 > 1:
                table, at = self.table
                hidden = table[: q1 - q0, at + lo - first : at + hi - first]
                bias = hidden[None, None] if bias is None else bias + hidden
            if mask is not None:
                dead = bias.amax(-1) == -math.inf
            yield slice(q0, q1), slice(lo, hi), bias, dead, False


def heads_at_once(q: Tensor, k: Tensor, dtype: torch.dtype) -> int:
    """Heads of k: all, or where they need copies in `dtype` one a thread, by which ATen deals."""
    return k.shape[1] if q.dtype == dtype else min(k.shape[1], torch.get_num_threads())


def jobs(
    q: Tensor, k: Tensor, pk: Tensor, mask: Tensor | None, cu, ids, dtype: torch.dtype, most: int
):
    """(index of q, of k, of the prefix [·, HKV, P, D], of the mask) to compute at a time.

    Rows that share a prefix go together until there is work for every thread and `most` bytes of q
    in `dtype`, where a call's overhead is small; more would only cost memory.
    """
    whole, one, (H, HKV) = slice(None), pk.shape[0] == 1 and ids is None, (q.shape[1], k.shape[1])
    threads, group, heads = torch.get_num_threads(), max(H // HKV, 1), heads_at_once(q, k, dtype)
    if cu is None:
        fits = most // max(1, q[:1, : heads * group].numel() * dtype.itemsize)
        step = 1 if ids is not None else max(-(-threads // HKV), fits, 1)
        spans = [(slice(i, min(i + step, len(q))), whole) for i in range(0, len(q), step)]
    else:
        ends = cu.tolist()
        spans = [(whole, slice(a, b)) for a, b in zip(ends, ends[1:], strict=False)]
    ids = None if ids is None else ids.tolist()
    for i, (rows, tokens) in enumerate(spans):
        if q[rows, :, tokens].numel() == 0:
            continue
        at = slice(0, 1) if one else rows if cu is None else slice(i, i + 1)
        if ids is not None:
            at = slice(ids[i], ids[i] + 1) if ids[i] >= 0 else slice(0, 0)
        for h in range(0, HKV, heads):
            kv, of_q = slice(h, h + heads), slice(h * group, (h + heads) * group)
            of_mask = None
            if mask is not None:
                of_mask = tuple(
                    whole if n == 1 else s
                    for n, s in zip(mask.shape[:2], (rows, of_q), strict=True)
                )
            yield (rows, of_q, tokens), (rows, kv, tokens), (at, kv), of_mask


def laid_out(t: Tensor) -> Tensor:
    """An empty tensor with t's layout: a model's queries lie by token, not by head, as does what it
    makes of the result; else contiguous."""
    made = torch.empty_like(t)
    return made if made.stride(-1) == 1 else t.new_empty(t.shape)
