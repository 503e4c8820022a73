"""prefix_attention on a CPU: prefix and keys attended to apart, merged by their logsumexp.

A part is one call of ATen's flash attention on a few rows at a time. 16-bit inputs are computed in
fp32, but for the forward pass of bf16 on a chip with AMX: without it ATen's own takes seven times
as long, and its backward is slower and less exact on any chip. Backward needs no merge: with the
whole row's out and logsumexp each part gives its own share of dq, dk and dv. It goes by blocks of
queries, of which alone it takes copies in fp32, and adds the shares of a shared prefix in order.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedpeft.ops.prefix_attention_checks import check_values

_QUERIES = 128  # rows of a block that masks by position: what lies beyond its last key is skipped
_FORWARD_BYTES, _BACKWARD_BYTES = 2**22, 2**21  # of q, at a time
_FORWARD_COPIES, _BACKWARD_COPIES = 2**20, 2**18  # the same in fp32, where 16 bits are copied
_Block = tuple[slice, slice, Tensor | None, Tensor | None, bool]

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_bwd = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def acc_dtype(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


@functools.cache
def _has_amx() -> bool:
    return getattr(torch.cpu, "_is_amx_tile_supported", bool)()


def _forward_dtype(t: Tensor) -> torch.dtype:
    return t.dtype if t.dtype == torch.bfloat16 and _has_amx() else acc_dtype(t)


def _aten_hides(mask, T: int, S: int, causal: bool, window: int, scale: float) -> bool:
    """One block for all, of which ATen hides the keys after each query."""
    # ATen multiplies the −inf that it hides with by the scale.
    return causal and T == S <= 2 * _QUERIES and mask is None and not window and scale > 0.0


def _hiding(
    mask: Tensor | None, acc: torch.dtype, T: int, S: int, causal: bool, window: int, scale: float
) -> tuple[Tensor, int] | None:
    """(table, at): table[i, at + d] is −inf where query i of a block does not see the key d
    positions after the block's first query, else 0. One for the blocks of all rows, and of all
    sequences up to T = S."""
    n = min(T, _QUERIES)
    if n < 2 or not (causal or window) or _aten_hides(mask, T, S, causal, window, scale):
        return None
    at = S - T + (T - 1) // n * n  # the last block's first query
    at = min(at, window - 1) if window else at
    hidden = torch.full((n, at + (n if causal else min(n - 1 + window, S))), -math.inf, dtype=acc)
    table = hidden.triu(at + (1 if causal else window))
    return (table + hidden.tril_(at - window) if window else table), at


def _blocks(
    mask: Tensor | None, hiding, T: int, S: int, causal: bool, window: int, scale: float
) -> Iterator[_Block]:
    """(queries, keys, additive bias or None, queries that see no key or None, whether ATen is to
    hide the keys after each query), covering all; the last queries, which see most, first."""
    if T == 0 or S == 0:
        return
    if _aten_hides(mask, T, S, causal, window, scale):
        yield slice(0, T), slice(0, S), None, None, True
        return
    step = _QUERIES if causal or window or mask is not None else T
    for q0 in reversed(range(0, T, step)):
        q1 = min(q0 + step, T)
        first, last = S - T + q0, S - T + q1 - 1  # positions of the block's queries
        lo = max(0, first - window + 1) if window else 0
        hi = last + 1 if causal else min(S, last + window) if window else S
        bias = dead = None
        if mask is not None:
            bias = mask[:, :, q0:q1, lo:hi]
        if hiding is not None and q1 - q0 > 1:
            table, at = hiding
            table = table[: q1 - q0, at + lo - first : at + hi - first]
            bias = table[None, None] if bias is None else bias + table
        if mask is not None:
            dead = bias.amax(-1) == -math.inf
        yield slice(q0, q1), slice(lo, hi), bias, dead, False


def _jobs(
    q: Tensor, k: Tensor, pk: Tensor, mask: Tensor | None, cu, ids, dtype: torch.dtype, most: int
):
    """(index of q, of k, of the prefix [·, HKV, P, D], of the mask) to compute at a time.

    Rows that share a prefix go together until there is work for every thread and `most` bytes of
    q, where the call's overhead is small; more would only cost memory. Heads that need copies in
    `dtype` go apart.
    """
    whole, one, (H, HKV) = slice(None), pk.shape[0] == 1 and ids is None, (q.shape[1], k.shape[1])
    threads, group = torch.get_num_threads(), max(H // HKV, 1)
    heads = HKV if q.dtype == dtype else min(HKV, threads)  # ATen's backward deals out those of k
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


def _as_rows(prefix: Tensor) -> Tensor:
    return prefix if prefix.ndim == 4 else prefix.unsqueeze(0)


def _unit(t: Tensor, acc: torch.dtype) -> Tensor:
    """In `acc`, copied only where that or an inner stride other than 1 asks for it."""
    t = t.to(acc)
    return t if t.stride(-1) == 1 else t.contiguous()


def _shared(prefix: Tensor, rows: int, acc: torch.dtype) -> Tensor | None:
    """The prefix with a stride of 0 over the rows that share it; None where it is empty."""
    return None if prefix.numel() == 0 else _unit(prefix, acc).expand(rows, -1, -1, -1)


def _part_fwd(q, k, v, pk, pv, mask, hiding, out, lse, causal, scale: float, window) -> None:
    """Sets out and lse of a few rows: the keys first, then the prefix."""
    for qs, ks, bias, dead, hides in _blocks(
        mask, hiding, q.shape[2], k.shape[2], causal, window, scale
    ):
        ins = (q[:, :, qs], k[:, :, ks], v[:, :, ks])
        out[:, :, qs], e = _flash(*ins, 0.0, hides, attn_mask=bias, scale=scale)
        lse[:, :, qs] = e if dead is None else e.masked_fill(dead, -math.inf)
    if pk is not None:
        o, e = _flash(q, pk, pv, scale=scale)
        out.lerp_(o, torch.sigmoid(e - lse).unsqueeze(-1).to(out.dtype))
        lse.copy_(torch.logaddexp(lse, e))


def aten_fwd(q, k, v, pk, pv, mask, cu, ids, causal: bool, scale: float, window: int):
    check_values(None, cu, ids, pk, q.shape[2])  # a compiled call has not
    acc = acc_dtype(q)
    pk, pv = _as_rows(pk), _as_rows(pv)
    out = torch.zeros(q.shape, dtype=q.dtype)
    lse = torch.full(q.shape[:3], -math.inf, dtype=acc)
    dtype = _forward_dtype(q)
    hiding = _hiding(mask, acc, q.shape[2], k.shape[2], causal, window, scale)
    most = _FORWARD_BYTES if q.dtype == dtype else _FORWARD_COPIES
    for aq, ak, ap, am in _jobs(q, k, pk, mask, cu, ids, dtype, most):
        ins = [_unit(t, dtype) for t in (q[aq], k[ak], v[ak])]
        prefix = [_shared(t[ap], len(ins[0]), dtype) for t in (pk, pv)]
        m = None if mask is None else mask[am].to(acc)
        o = out[aq].to(dtype)  # a copy only where 16 bits are computed in fp32
        _part_fwd(*ins, *prefix, m, hiding, o, lse[aq], causal, scale, window)
        if out.dtype != dtype:
            out[aq] = o
    return out, lse


def _wider(t: Tensor, last: float, dlse: Tensor | None, acc: torch.dtype) -> Tensor:
    """One column more makes Σ dout·out into Σ dout·out − dlse and changes no product."""
    t = _unit(t, acc)
    return t if dlse is None else F.pad(t, (0, 1), value=last)


def _add(sums, shares, fresh: bool) -> None:
    """fresh: nothing is in the sums yet, and the first share often is as long as they are."""
    for whole, share in zip(sums, shares, strict=True):
        if fresh and whole.shape == share.shape:
            whole.copy_(share)
        else:
            whole += share


def _block_bwd(
    dout, dlse, q, k, v, pk, pv, out, lse, bias, hides, scale, dq, dkv, dpkv, fresh
) -> None:
    """Sets dq of a block of queries and adds its shares to dk, dv and the prefix's gradients. A
    call of its own: names of a loop would hold what it takes beside the next block's."""
    acc, parts = lse.dtype, []
    ins = [_wider(t, last, dlse, acc) for t, last in ((dout, 0.0), (q, 0.0), (out, -1.0))]
    if dlse is not None:
        ins[0][..., -1] = dlse
    dout, q, out = ins
    if dkv:
        part, *shares = _flash_bwd(dout, q, k, v, out, lse, 0.0, hides, attn_mask=bias, scale=scale)
        parts.append(part)
        _add(dkv, shares, fresh)
        del shares
    if pk is not None:
        part, *shares = _flash_bwd(dout, q, pk, pv, out, lse, 0.0, False, scale=scale)
        parts.append(part)
        for whole, share in zip(dpkv, shares, strict=True):
            for row in share if whole.shape[0] == 1 else (share,):
                whole += row[..., : whole.shape[-1]]
    if dkv:
        part = parts[0] if len(parts) == 1 else parts[0].add_(parts[1])
        dq.copy_(part[..., : dq.shape[-1]])


def _part_bwd(
    dout, dlse, q, k, v, pk, pv, mask, hiding, out, lse, dq, dk, dv, dpkv, causal, scale, window
) -> None:
    """Sets dq, dk and dv of a few rows, unless they are None, and adds to dpk and dpv."""
    # A row that sees nothing: its bias is −inf everywhere and exp(−inf − 0) is 0.
    lse, keys = lse.masked_fill(lse == -math.inf, 0.0), dq is not None
    k, v = (_wider(t, 0.0, dlse, lse.dtype) for t in (k, v))
    own = keys and dk.dtype == k.dtype and dlse is None
    sums = [] if not keys else [dk, dv] if own else [torch.empty_like(t) for t in (k, v)]
    fresh = True
    if not keys:
        mask, hiding, causal, window = None, None, False, 0  # all queries in one block
    for qs, ks, bias, _, hides in _blocks(
        mask, hiding, q.shape[2], k.shape[2], causal, window, scale
    ):
        if fresh and ks != slice(0, k.shape[2]):
            for t in sums:
                t.zero_()
        of_q = [None if t is None else t[:, :, qs] for t in (dout, dlse, q, out, lse, dq)]
        do, dl, qq, o, e, d = of_q
        dkv = [t[:, :, ks] for t in sums]
        _block_bwd(
            do,
            dl,
            qq,
            k[:, :, ks],
            v[:, :, ks],
            pk,
            pv,
            o,
            e,
            bias,
            hides,
            scale,
            d,
            dkv,
            dpkv,
            fresh and ks == slice(0, k.shape[2]),
        )
        fresh = False
    if not own:
        for whole, t in zip((dk, dv), sums, strict=False):
            whole.copy_(t[..., : whole.shape[-1]])


def aten_bwd(
    dout, dlse, q, k, v, pk, pv, out, lse, mask, cu, ids, causal, scale, window, need: list[bool]
):
    acc, shape, like = acc_dtype(q), pk.shape, q.dtype
    pk, pv = _as_rows(pk), _as_rows(pv)
    hiding = _hiding(mask, acc, q.shape[2], k.shape[2], causal, window, scale)
    make = torch.empty if q.numel() else torch.zeros
    dqkv = [make(t.shape, dtype=like) if any(need[:3]) else None for t in (q, k, v)]
    dpkv = [torch.zeros(t.shape, dtype=acc) for t in (pk, pv)]
    most = _BACKWARD_BYTES if like == acc else _BACKWARD_COPIES
    for aq, ak, ap, am in _jobs(q, k, pk, mask, cu, ids, acc, most):
        prefix = [_shared(_wider(t[ap], 0.0, dlse, acc), len(q[aq]), acc) for t in (pk, pv)]
        m = None if mask is None else mask[am].to(acc)
        of_q = [None if t is None else t[aq] for t in (dout, dlse, q, out, lse, dqkv[0])]
        do, dl, qq, o, e, dq = of_q
        dk, dv = (None if t is None else t[ak] for t in dqkv[1:])
        sums = [t[ap] for t in dpkv]
        _part_bwd(
            do,
            dl,
            qq,
            k[ak],
            v[ak],
            *prefix,
            m,
            hiding,
            o,
            e,
            dq,
            dk,
            dv,
            sums,
            causal,
            scale,
            window,
        )
    grads = (*dqkv, *(t.to(like).view(shape) for t in dpkv))
    return tuple(g if n else q.new_empty(0) for g, n in zip(grads, need, strict=True))
