"""prefix_attention on a CPU: prefix and keys attended to apart, merged by their logsumexp.

A part is one call of ATen's flash attention on a few rows at a time. 16-bit inputs are computed in
fp32, but for the forward pass of bf16 on a chip with AMX: without it ATen's own takes seven times
as long, and its backward is slower and less exact on any chip. Backward needs no merge: with the
whole row's out and logsumexp each part gives its own share of dq, dk and dv, and the shares of a
shared prefix are added row by row, in order.
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
_FORWARD_BYTES, _BACKWARD_BYTES = 2**22, 2**21  # of q, at a time: of some it takes copies
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


def _blocks(
    mask: Tensor | None, acc: torch.dtype, T: int, S: int, causal: bool, window: int, scale: float
) -> Iterator[_Block]:
    """(queries, keys, additive bias or None, queries that see no key or None, whether ATen is to
    hide the keys after each query), covering all."""
    if T == 0 or S == 0:
        return
    # ATen multiplies the −inf that it hides with by the scale.
    if causal and T == S <= 2 * _QUERIES and mask is None and not window and scale > 0.0:
        yield slice(0, T), slice(0, S), None, None, True
        return
    step = _QUERIES if causal or window or mask is not None else T
    for q0 in range(0, T, step):
        q1 = min(q0 + step, T)
        first, last = S - T + q0, S - T + q1 - 1  # positions of the block's queries
        lo = max(0, first - window + 1) if window else 0
        hi = last + 1 if causal else min(S, last + window) if window else S
        bias = dead = None
        if mask is not None:
            bias = mask[:, :, q0:q1, lo:hi]
        if (causal and q1 - q0 > 1) or window:
            ahead = torch.arange(lo, hi) - torch.arange(first, last + 1)[:, None]
            hide = (causal & (ahead > 0)) | (ahead.abs() >= (window or S))
            bias = torch.zeros(1, 1, q1 - q0, hi - lo, dtype=acc) if bias is None else bias
            bias = bias.masked_fill(hide, -math.inf)
        if mask is not None:
            dead = bias.amax(-1) == -math.inf
        yield slice(q0, q1), slice(lo, hi), bias, dead, False


def _jobs(
    q: Tensor, k: Tensor, pk: Tensor, mask: Tensor | None, cu, ids, dtype: torch.dtype, most: int
):
    """(index of q, of k, of the prefix [·, HKV, P, D], of the mask) to compute at a time.

    Rows that share a prefix go together until there is work for every thread and the call's
    overhead is small; more would only cost memory. Heads that need copies in `dtype` go apart.
    """
    whole, one, (H, HKV) = slice(None), pk.shape[0] == 1 and ids is None, (q.shape[1], k.shape[1])
    threads, group = torch.get_num_threads(), max(H // HKV, 1)
    if cu is None:
        fits = most // max(1, q[:1].numel() * dtype.itemsize)
        step = 1 if ids is not None else max(-(-threads // HKV), fits, 1)
        spans = [(slice(i, min(i + step, len(q))), whole) for i in range(0, len(q), step)]
    else:
        ends = cu.tolist()
        spans = [(whole, slice(a, b)) for a, b in zip(ends, ends[1:], strict=False)]
    ids = None if ids is None else ids.tolist()
    heads = HKV if q.dtype == dtype else min(HKV, threads)  # ATen's backward deals out those of k
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


def _part_fwd(q, k, v, pk, pv, mask, out, lse, causal: bool, scale: float, window: int) -> None:
    """out and lse, which hold 0 and −inf, of a few rows: the keys first, then the prefix."""
    blocks = _blocks(mask, lse.dtype, q.shape[2], k.shape[2], causal, window, scale)
    for qs, ks, bias, dead, hides in blocks:
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
    for aq, ak, ap, am in _jobs(q, k, pk, mask, cu, ids, dtype, _FORWARD_BYTES):
        ins = [_unit(t, dtype) for t in (q[aq], k[ak], v[ak])]
        prefix = [_shared(t[ap], len(ins[0]), dtype) for t in (pk, pv)]
        m = None if mask is None else mask[am].to(acc)
        o = out[aq].to(dtype)  # a copy only where 16 bits are computed in fp32
        _part_fwd(*ins, *prefix, m, o, lse[aq], causal, scale, window)
        if out.dtype != dtype:
            out[aq] = o
    return out, lse


def _part_bwd(
    dout, q, k, v, pk, pv, mask, out, lse, dq, dk, dv, causal, scale, window, keys: bool
) -> tuple[Tensor, ...]:
    """Adds to dq, dk and dv of a few rows; (dpk, dpv) by row, or nothing without a prefix."""
    # A row that sees nothing: its bias is −inf everywhere and exp(−inf − 0) is 0.
    lse = lse.masked_fill(lse == -math.inf, 0.0)
    blocks = _blocks(mask, q.dtype, q.shape[2], k.shape[2], causal, window, scale) if keys else ()
    for qs, ks, bias, _, hides in blocks:
        ins = (dout[:, :, qs], q[:, :, qs], k[:, :, ks], v[:, :, ks], out[:, :, qs], lse[:, :, qs])
        wholes = (dq[:, :, qs], dk[:, :, ks], dv[:, :, ks])
        _add(wholes, _flash_bwd(*ins, 0.0, hides, attn_mask=bias, scale=scale))
    if pk is None:
        return ()
    dq_p, *prefix = _flash_bwd(dout, q, pk, pv, out, lse, 0.0, False, scale=scale)
    dq += dq_p
    return tuple(prefix)


def _add(wholes: tuple[Tensor, ...], parts: tuple[Tensor, ...]) -> None:
    """A call of its own: names of a loop would hold the parts beside the next ones."""
    for whole, part in zip(wholes, parts, strict=True):
        whole += part


def aten_bwd(
    dout, dlse, q, k, v, pk, pv, out, lse, mask, cu, ids, causal, scale, window, need: list[bool]
):
    acc, D = acc_dtype(q), q.shape[-1]
    if dlse is not None:
        # One column more makes Σ dout·out into Σ dout·out − dlse and changes no product.
        q, k, v, pk, pv = (F.pad(t, (0, 1)) for t in (q, k, v, pk, pv))
        dout = torch.cat([dout.to(acc), dlse.unsqueeze(-1)], -1)
        out = torch.cat([out.to(acc), out.new_full((*lse.shape, 1), -1.0, dtype=acc)], -1)
    shape, like = pk.shape, q.dtype
    pk, pv = _as_rows(pk), _as_rows(pv)
    wholes = [torch.zeros(t.shape, dtype=like) for t in (q, k, v)]
    dpk, dpv = (torch.zeros(t.shape, dtype=acc) for t in (pk, pv))
    for aq, ak, ap, am in _jobs(q, k, pk, mask, cu, ids, acc, _BACKWARD_BYTES):
        do, *ins, o = (_unit(t, acc) for t in (dout[aq], q[aq], k[ak], v[ak], out[aq]))
        prefix = [_shared(t[ap], len(do), acc) for t in (pk, pv)]
        m = None if mask is None else mask[am].to(acc)
        parts = [t[at].to(acc) for t, at in zip(wholes, (aq, ak, ak), strict=True)]
        rest = (*parts, causal, scale, window, any(need[:3]))
        of_prefix = _part_bwd(do, *ins, *prefix, m, o, lse[aq], *rest)
        for whole, part in zip((dpk, dpv), of_prefix, strict=False):
            for row in part if whole[ap].shape[0] == 1 else (part,):
                whole[ap] += row
        if like != acc:  # else they were views
            for whole, at, part in zip(wholes, (aq, ak, ak), parts, strict=True):
                whole[at] = part
        del of_prefix, do, ins, o, parts, rest  # or they would stay beside the next ones
    grads = (*wholes, dpk.to(like).view(shape), dpv.to(like).view(shape))
    grads = (g if dlse is None else g[..., :D].contiguous() for g in grads)
    return tuple(g if n else q.new_empty(0) for g, n in zip(grads, need, strict=True))
