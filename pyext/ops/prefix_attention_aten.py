"""prefix_attention on a CPU: prefix and keys attended to apart, merged by their logsumexp.

A part is one call of ATen's flash attention on a few rows at a time. 16-bit inputs are computed in
fp32, but for the forward pass of bf16 on a chip with AMX: without it ATen's own takes seven times
as long, and its backward is slower and less exact on any chip. Backward needs no merge: with the
whole row's out and logsumexp each part gives its own share of dq, dk and dv. It goes by blocks of
queries, the only ones that are in fp32 then, and the shares of a shared prefix are added in order.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedpeft.ops.prefix_attention_blocks import QUERIES, Blocks, heads_at_once, jobs, laid_out
from fusedpeft.ops.prefix_attention_checks import check_values

_FORWARD_BYTES, _BACKWARD_BYTES = 2**22, 2**21  # of q, at a time
_FORWARD_COPIES, _BACKWARD_COPIES = 2**20, 2**18  # the same in fp32, where 16 bits are copied

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_bwd = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def acc_dtype(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


@functools.cache
def _has_amx() -> bool:
    return getattr(torch.cpu, "_is_amx_tile_supported", bool)()


def in_tiles(t: Tensor) -> bool:
    """Whether ATen's forward pass multiplies t on AMX, ahead of any fp32."""
    return t.dtype == torch.bfloat16 and _has_amx()


def _forward_dtype(t: Tensor) -> torch.dtype:
    return t.dtype if in_tiles(t) else acc_dtype(t)


def _as_rows(prefix: Tensor) -> Tensor:
    return prefix if prefix.ndim == 4 else prefix.unsqueeze(0)


def _unit(t: Tensor, acc: torch.dtype) -> Tensor:
    """In `acc`, copied only where that or an inner stride other than 1 asks for it."""
    t = t.to(acc)
    return t if t.stride(-1) == 1 else t.contiguous()


def _shared(prefix: Tensor, rows: int, acc: torch.dtype) -> Tensor | None:
    """The prefix with a stride of 0 over the rows that share it; None where it is empty."""
    return None if prefix.numel() == 0 else _unit(prefix, acc).expand(rows, -1, -1, -1)


def _part_fwd(q, k, v, pk, pv, mask, out, lse, blocks: Blocks, scale: float) -> None:
    """out and lse, which hold 0 and −inf, of a few rows: the keys first, then the prefix."""
    for qs, ks, bias, dead, hides in blocks.of(mask, q.shape[2], k.shape[2]):
        ins = (q[:, :, qs], k[:, :, ks], v[:, :, ks])
        out[:, :, qs], e = _flash(*ins, 0.0, hides, attn_mask=bias, scale=scale)
        lse[:, :, qs] = e if dead is None else e.masked_fill(dead, -math.inf)
    if pk is not None:
        o, e = _flash(q, pk, pv, scale=scale)
        out.lerp_(o, torch.sigmoid(e - lse).unsqueeze(-1).to(out.dtype))
        lse.copy_(torch.logaddexp(lse, e))


def aten_fwd(q, k, v, pk, pv, mask, cu, ids, causal: bool, scale: float, window: int):
    check_values(None, cu, ids, pk, q.shape[2])  # a compiled call has not
    acc, dtype = acc_dtype(q), _forward_dtype(q)
    pk, pv = _as_rows(pk), _as_rows(pv)
    out = laid_out(q).zero_()
    lse = torch.full(q.shape[:3], -math.inf, dtype=acc)
    blocks = Blocks(acc, q.shape[2], k.shape[2], causal, scale, window, QUERIES)
    most = _FORWARD_BYTES if q.dtype == dtype else _FORWARD_COPIES
    for aq, ak, ap, am in jobs(q, k, pk, mask, cu, ids, dtype, most):
        ins = [_unit(t, dtype) for t in (q[aq], k[ak], v[ak])]
        prefix = [_shared(t[ap], len(ins[0]), dtype) for t in (pk, pv)]
        m = None if mask is None else mask[am].to(acc)
        o = out[aq].to(dtype)  # a copy only where 16 bits are computed in fp32
        _part_fwd(*ins, *prefix, m, o, lse[aq], blocks, scale)
        if out.dtype != dtype:
            out[aq] = o
    return out, lse


def _block_bwd(of_q, kv, prefix, bias, hides, dq, dkv, dpkv, scale: float) -> list[Tensor]:
    """Sets dq of a block of queries, adds its shares to the prefix's gradients and to dkv, those of
    its keys; where there is none yet, the shares are it. Returns dkv. A call of its own: names of a
    loop would hold what this one takes beside the next one's."""
    *of_q, lse = of_q
    dout, q, out = (_unit(t, lse.dtype) for t in of_q)
    # A row that sees nothing: its bias is −inf everywhere and exp(−inf − 0) is 0.
    lse, parts = lse.masked_fill(lse == -math.inf, 0.0), []
    if dq is not None:
        part, *shares = _flash_bwd(dout, q, *kv, out, lse, 0.0, hides, attn_mask=bias, scale=scale)
        parts.append(part)
        for whole, share in zip(dkv, shares, strict=False):
            whole += share
        dkv = dkv or shares
        del shares
    if prefix[0] is not None:
        part, *shares = _flash_bwd(dout, q, *prefix, out, lse, 0.0, False, scale=scale)
        parts.append(part)
        for whole, share in zip(dpkv, shares, strict=True):
            for row in share if len(whole) == 1 else (share,):
                whole += row
    if dq is not None:
        dq.copy_(parts[0] if len(parts) == 1 else parts[0].add_(parts[1]))
    return dkv


def _part_bwd(of_q, kv, prefix, mask, grads, dpkv, blocks: Blocks, scale: float) -> None:
    """Sets dq, dk and dv of a few rows (`grads`, or nothing), adds to the prefix's gradients."""
    acc, T, S = of_q[-1].dtype, of_q[0].shape[2], kv[0].shape[2]
    kv = [_unit(t, acc) for t in kv]
    dq, *wholes = grads or (None,)
    prefix, dkv = [_shared(t, len(of_q[0]), acc) for t in prefix], []
    for qs, ks, bias, _, hides in blocks.of(mask, T, S):
        if not dkv and wholes and ks != slice(0, S):
            dkv = [torch.zeros(t.shape, dtype=acc) for t in kv]
        made = _block_bwd(
            [t[:, :, qs] for t in of_q], [t[:, :, ks] for t in kv], prefix, bias, hides,
            dq if dq is None else dq[:, :, qs], [t[:, :, ks] for t in dkv], dpkv, scale,
        )  # fmt: skip
        if not dkv:
            dkv = made
            if wholes and wholes[0].dtype == acc:
                dkv = [whole.copy_(t) for whole, t in zip(wholes, made, strict=True)]
        del made
    for whole, t in zip(wholes, dkv, strict=True):
        if whole is not t:
            whole.copy_(t)


def aten_bwd(
    dout, dlse, q, k, v, pk, pv, out, lse, mask, cu, ids, causal, scale, window, need: list[bool]
):
    acc, D = acc_dtype(q), q.shape[-1]
    if dlse is not None:
        # One column more makes Σ dout·out into Σ dout·out − dlse and changes no product.
        q, k, v, pk, pv = (F.pad(t, (0, 1)) for t in (q, k, v, pk, pv))
        dout = torch.cat([dout.to(acc), dlse.unsqueeze(-1)], -1)
        out = torch.cat([out.to(acc), out.new_full((*lse.shape, 1), -1.0, dtype=acc)], -1)
    (_, H, T, width), (HKV, S), like, shape = q.shape, k.shape[1:3], q.dtype, pk.shape
    pk, pv = _as_rows(pk), _as_rows(pv)
    most, step = _BACKWARD_BYTES, QUERIES
    if like != acc:  # blocks of 64 to 256, as their copies are of many bytes
        most = _BACKWARD_COPIES
        row = heads_at_once(q, k, acc) * (H // HKV) * width * acc.itemsize
        step = max(64, min(256, most // max(row, 1) // 64 * 64))
    keys = any(need[:3])
    if not keys:  # then all queries in one block
        mask, causal, window = None, False, 0
    blocks = Blocks(acc, T, S, causal, scale, window, step)
    dqkv = [laid_out(t) for t in (q, k, v)] if keys else []
    if q.numel() == 0:
        dqkv = [t.zero_() for t in dqkv]
    dpkv = [torch.zeros(t.shape, dtype=acc) for t in (pk, pv)]
    for aq, ak, ap, am in jobs(q, k, pk, mask, cu, ids, acc, most):
        _part_bwd(
            [t[aq] for t in (dout, q, out, lse)], (k[ak], v[ak]), (pk[ap], pv[ap]),
            None if mask is None else mask[am].to(acc),
            [t[at] for t, at in zip(dqkv, (aq, ak, ak), strict=False)],
            [t[ap] for t in dpkv], blocks, scale,
        )  # fmt: skip
    grads = (*(dqkv or need[:3]), *(t.to(like).view(shape) for t in dpkv))
    return tuple(
        (g if dlse is None else g[..., :D].contiguous()) if n else q.new_empty(0)
        for g, n in zip(grads, need, strict=True)
    )
