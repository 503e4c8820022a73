"""Attention over a prefix and the keys, the prefix neither copied per row nor concatenated.

    out = softmax([scale · q prefix_kᵀ | scale · q kᵀ + mask]) [prefix_v ; v]
    q [B, H, T, D]   k, v [B, HKV, S, D], S ≥ T   prefix [HKV, P, D] or [B or n, HKV, P, D]

The two parts are attended to apart and merged by their logsumexp. Backward needs no merge: with the
whole row's out and logsumexp each part gives its own share of dq, dk and dv, and the shares of a
shared prefix are added row by row, in order. (Li & Liang 2021, "Prefix-Tuning"; merging partial
softmaxes: Dao et al. 2022, "FlashAttention", §3.1.)

On a CPU a part is one call of ATen's flash attention on a few rows at a time, in fp32 for 16-bit
inputs: ATen's own 16-bit backward takes seven times as long without AMX, and is less exact.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_HEAD_DIM = 256
_QUERIES = 128  # rows of a block that masks by position: what lies beyond its last key is skipped
_CHUNK_BYTES = 2**20  # of q, at a time
_IMPLS = ("aten", "triton")
_PLAIN = (Tensor, torch.nn.Parameter)
_NO_KERNEL = "prefix_attention: expected CPU tensors and impl 'aten', got {}; no GPU kernel yet"
_Block = tuple[slice, slice, Tensor | None, Tensor | None]


def _row_ref(q, k, v, pk, pv, causal, scale, mask, window):
    """q [H, T, D], k and v [HKV, S, D], prefix [HKV, P, D] -> out [H, T, D], lse [H, T]."""
    (H, T, D), S = q.shape, k.shape[1]
    k, v = (torch.cat(t, 1).repeat_interleave(H // k.shape[0], 0) for t in ((pk, k), (pv, v)))
    ahead = torch.arange(S, device=q.device) - torch.arange(S - T, S, device=q.device)[:, None]
    hide = (causal & (ahead > 0)) | (ahead.abs() >= (window or math.inf))
    bias = (q.new_zeros(1, T, S) if mask is None else mask).masked_fill(hide, -math.inf)
    z = q @ k.transpose(1, 2) * (scale or D**-0.5) + F.pad(bias, (pk.shape[1], 0))
    dead = (z == -math.inf).all(-1)
    z = z.masked_fill(dead.unsqueeze(-1), 0.0)
    out = (z.softmax(-1).to(v.dtype) @ v).masked_fill(dead.unsqueeze(-1), 0.0).to(q.dtype)
    return out, z.to(_acc(q)).logsumexp(-1).masked_fill(dead, -math.inf)


def prefix_attention_ref(
    q, k, v, prefix_k, prefix_v, *, causal=True, scale=None, mask=None, window=None,
    cu_seqlens=None, prefix_ids=None, return_lse=False,
):  # fmt: skip
    """The specification, in plain torch and q's dtype: row by row, prefix and keys concatenated."""
    out, lse = q * 0, q[..., 0].to(_acc(q)) * 0 - math.inf
    for i in range(q.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1):
        at = (i,) if cu_seqlens is None else (0, slice(None), slice(*cu_seqlens[i : i + 2]))
        id_ = i if prefix_ids is None else int(prefix_ids[i])
        pre = [t if t.ndim == 3 else t[id_] if id_ >= 0 else t.new_empty(t.shape[1], 0, t.shape[3])
               for t in (prefix_k, prefix_v)]  # fmt: skip
        m = None if mask is None else mask.expand(q.shape[0], -1, -1, -1)[i]
        out[at], lse[at] = _row_ref(q[at], k[at], v[at], *pre, causal, scale, m, window)
    return (out, lse) if return_lse else out


def _acc(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def choose_impl(device_type: str) -> tuple[str, str]:
    """(implementation, why) that `prefix_attention` takes by itself. Pure; `doctor` prints it."""
    if device_type == "cpu":
        return "aten", "two calls of ATen's flash attention, merged by their logsumexp"
    return "raises", f"no kernel of ours for device '{device_type}' yet"


# --- ATen ---------------------------------------------------------------------------------------

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_bwd = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _blocks(
    mask: Tensor | None, acc: torch.dtype, T: int, S: int, causal: bool, window: int
) -> Iterator[_Block]:
    """(queries, keys, additive bias or None, queries that see no key or None), covering all."""
    if T == 0 or S == 0:
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
        yield slice(q0, q1), slice(lo, hi), bias, dead


def _jobs(q: Tensor, k: Tensor, pk: Tensor, mask: Tensor | None, cu: Tensor | None, ids):
    """(index of q, of k, of the prefix [·, HKV, P, D], of the mask) to compute at a time.

    Rows that share a prefix go together until there is work for every thread and the call's
    overhead is small; more would only cost memory. 16-bit heads, which need fp32 copies, go apart.
    """
    whole, one, (H, HKV) = slice(None), pk.shape[0] == 1 and ids is None, (q.shape[1], k.shape[1])
    threads, group = torch.get_num_threads(), max(H // HKV, 1)
    if cu is None:
        fits = _CHUNK_BYTES // max(1, q[:1].numel() * 4)
        step = 1 if ids is not None else max(-(-threads // HKV), fits, 1)
        spans = [(slice(i, min(i + step, len(q))), whole) for i in range(0, len(q), step)]
    else:
        ends = cu.tolist()
        spans = [(whole, slice(a, b)) for a, b in zip(ends, ends[1:], strict=False)]
    ids = None if ids is None else ids.tolist()
    heads = HKV if q.dtype == _acc(q) else min(HKV, -(-threads // group))
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
    for qs, ks, bias, dead in _blocks(mask, q.dtype, q.shape[2], k.shape[2], causal, window):
        ins = (q[:, :, qs], k[:, :, ks], v[:, :, ks])
        out[:, :, qs], e = _flash(*ins, attn_mask=bias, scale=scale)
        lse[:, :, qs] = e if dead is None else e.masked_fill(dead, -math.inf)
    if pk is not None:
        o, e = _flash(q, pk, pv, scale=scale)
        out.lerp_(o, torch.sigmoid(e - lse).unsqueeze(-1))
        lse.copy_(torch.logaddexp(lse, e))


def _aten_fwd(q, k, v, pk, pv, mask, cu, ids, causal: bool, scale: float, window: int):
    acc = _acc(q)
    pk, pv = _as_rows(pk), _as_rows(pv)
    out = torch.zeros(q.shape, dtype=q.dtype)
    lse = torch.full(q.shape[:3], -math.inf, dtype=acc)
    for aq, ak, ap, am in _jobs(q, k, pk, mask, cu, ids):
        ins = [_unit(t, acc) for t in (q[aq], k[ak], v[ak])]
        prefix = [_shared(t[ap], len(ins[0]), acc) for t in (pk, pv)]
        m = None if mask is None else mask[am].to(acc)
        o = out[aq].to(acc)  # a copy only for 16 bits
        _part_fwd(*ins, *prefix, m, o, lse[aq], causal, scale, window)
        if out.dtype != acc:
            out[aq] = o
    return out, lse


def _part_bwd(
    dout, q, k, v, pk, pv, mask, out, lse, dq, dk, dv, causal, scale, window, keys: bool
) -> tuple[Tensor, ...]:
    """Adds to dq, dk and dv of a few rows; (dpk, dpv) by row, or nothing without a prefix."""
    # A row that sees nothing: its bias is −inf everywhere and exp(−inf − 0) is 0.
    lse = lse.masked_fill(lse == -math.inf, 0.0)
    blocks = _blocks(mask, q.dtype, q.shape[2], k.shape[2], causal, window) if keys else ()
    for qs, ks, bias, _ in blocks:
        ins = (dout[:, :, qs], q[:, :, qs], k[:, :, ks], v[:, :, ks], out[:, :, qs], lse[:, :, qs])
        grads = _flash_bwd(*ins, 0.0, False, attn_mask=bias, scale=scale)
        for whole, at, part in zip((dq, dk, dv), (qs, ks, ks), grads, strict=True):
            whole[:, :, at] += part
    if pk is None:
        return ()
    dq_p, *prefix = _flash_bwd(dout, q, pk, pv, out, lse, 0.0, False, scale=scale)
    dq += dq_p
    return tuple(prefix)


def _aten_bwd(
    dout, dlse, q, k, v, pk, pv, out, lse, mask, cu, ids, causal, scale, window, need: list[bool]
):
    acc, D = _acc(q), q.shape[-1]
    if dlse is not None:
        # One column more makes Σ dout·out into Σ dout·out − dlse and changes no product.
        q, k, v, pk, pv = (F.pad(t, (0, 1)) for t in (q, k, v, pk, pv))
        dout = torch.cat([dout.to(acc), dlse.unsqueeze(-1)], -1)
        out = torch.cat([out.to(acc), out.new_full((*lse.shape, 1), -1.0, dtype=acc)], -1)
    shape, like = pk.shape, q.dtype
    pk, pv = _as_rows(pk), _as_rows(pv)
    wholes = [torch.zeros(t.shape, dtype=like) for t in (q, k, v)]
    dpk, dpv = (torch.zeros(t.shape, dtype=acc) for t in (pk, pv))
    for aq, ak, ap, am in _jobs(q, k, pk, mask, cu, ids):
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


# --- custom ops ---------------------------------------------------------------------------------

_lib = torch.library.Library("fusedpeft", "FRAGMENT")
_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor pk, Tensor pv"
_OPTIONS = "Tensor? mask, Tensor? cu, Tensor? ids, bool causal, float scale, int window"
_lib.define(f"prefix_attention({_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor)")
_lib.define(
    f"prefix_attention_backward(Tensor dout, Tensor? dlse, {_INPUTS}, Tensor out, Tensor lse, "
    f"{_OPTIONS}, bool[] need) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_lib.impl("prefix_attention", _aten_fwd, "CPU")
_lib.impl("prefix_attention_backward", _aten_bwd, "CPU")


@torch.library.register_fake("fusedpeft::prefix_attention")
def _(q, k, v, pk, pv, mask, cu, ids, causal, scale, window):
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=_acc(q))


@torch.library.register_fake("fusedpeft::prefix_attention_backward")
def _(dout, dlse, q, k, v, pk, pv, out, lse, mask, cu, ids, causal, scale, window, need):
    like = (q, k, v, pk, pv)
    return tuple(t.new_empty(t.shape if n else 0) for t, n in zip(like, need, strict=True))


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.causal, ctx.scale, ctx.window = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)


def _gradients(ctx, dout, dlse, backward) -> tuple[Tensor | None, ...]:
    if dout is None and dlse is None:
        return (None,) * 11
    *tensors, mask, cu, ids, out, lse = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    need = list(ctx.needs_input_grad[:5])
    options = (mask, cu, ids, ctx.causal, ctx.scale, ctx.window)
    grads = backward(dout, dlse, *tensors, out, lse, *options, need)
    return (*(g if n else None for g, n in zip(grads, need, strict=True)), *(None,) * 6)


torch.library.register_autograd(
    "fusedpeft::prefix_attention",
    lambda ctx, *g: _gradients(ctx, *g, torch.ops.fusedpeft.prefix_attention_backward),
    setup_context=_setup_context,
)


class _PrefixAttention(torch.autograd.Function):
    """The same op without the dispatcher: half the overhead of a custom op with autograd."""

    @staticmethod
    def forward(ctx, *args):
        outs = _aten_fwd(*args)
        _setup_context(ctx, args, outs)
        return outs

    @staticmethod
    def backward(ctx, dout, dlse):
        return _gradients(ctx, dout, dlse, _aten_bwd)


# --- public -------------------------------------------------------------------------------------


def _check(q, k, v, pk, pv, mask, window, cu, ids, scale, impl) -> None:
    named = (("q", q), ("k", k), ("v", v), ("prefix_k", pk), ("prefix_v", pv))
    extra = (("mask", mask), ("cu_seqlens", cu), ("prefix_ids", ids))
    for name, t in (*named, *((n, t) for n, t in extra if t is not None)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(t).__name__}")
        if t.device != q.device:
            raise ValueError(f"{name}: expected device {q.device} (as q), got {t.device}")
    if not q.is_floating_point():
        raise TypeError(f"q: expected a floating dtype, got {q.dtype}")
    for name, t in named[1:]:
        if t.dtype != q.dtype:
            raise TypeError(f"{name}: expected dtype {q.dtype} (as q), got {t.dtype}")
    for name, t in named[:3]:
        if t.ndim != 4:
            raise ValueError(f"{name}: expected 4 dims [B, heads, length, D], got {tuple(t.shape)}")
    (B, H, T, D), (_, HKV, S, _) = q.shape, k.shape
    if not 1 <= D <= MAX_HEAD_DIM:
        raise ValueError(f"q: expected head dim D in 1..{MAX_HEAD_DIM}, got {D}")
    if HKV < 1 or H % HKV:
        raise ValueError(f"k: expected HKV that divides H = {H}, got {HKV}")
    if k.shape != (B, HKV, S, D) or v.shape != k.shape:
        want = f"[{B}, HKV, S, {D}] (q is {tuple(q.shape)})"
        raise ValueError(f"k, v: expected {want}, got {tuple(k.shape)}, {tuple(v.shape)}")
    if S < T or (cu is not None and S != T):
        why = f"S {'=' if cu is not None else '>='} T = {T}"
        raise ValueError(f"k: expected {why}, got S = {S}")
    _check_prefix(pk, pv, ids, B if cu is None else len(cu) - 1, HKV, D)
    if mask is not None:
        if cu is not None:
            raise ValueError("mask: expected None beside cu_seqlens, got a Tensor")
        if not mask.is_floating_point():
            raise TypeError(f"mask: expected floating (added; -inf hides a key), got {mask.dtype}")
        allowed = ((1, B), (1, H), (T,), (S,))
        if mask.ndim != 4 or any(m not in a for m, a in zip(mask.shape, allowed, strict=True)):
            raise ValueError(
                f"mask: expected [{B} or 1, {H} or 1, {T}, {S}], got {tuple(mask.shape)}"
            )
        if mask.requires_grad:
            raise ValueError("mask: expected no gradient, got requires_grad=True")
    if cu is not None and (B != 1 or cu.ndim != 1 or len(cu) < 1):
        got = f"B = {B}, cu_seqlens {tuple(cu.shape)}"
        raise ValueError(f"cu_seqlens: expected B = 1 (packed) and [n + 1], got {got}")
    for name, t in extra[1:]:
        if t is not None and t.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name}: expected int32 or int64, got {t.dtype}")
    if window is not None and (not isinstance(window, int) or window < 1):
        raise ValueError(f"window: expected an int >= 1 or None, got {window!r}")
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale: expected a finite number, got {scale}")
    if impl is not None and impl not in _IMPLS:
        raise ValueError(f"impl: expected one of {_IMPLS} or None, got {impl!r}")
    read = q.device.type == "cpu" or os.environ.get("FUSEDPEFT_DEBUG") == "1"
    if read and not torch.compiler.is_compiling():
        _check_values(mask, cu, ids, pk, T)


def _check_prefix(pk: Tensor, pv: Tensor, ids: Tensor | None, B: int, HKV: int, D: int) -> None:
    lead = "n" if ids is not None else B
    want = f"[{lead}, {HKV}, P, {D}]" + ("" if ids is not None else f" or [{HKV}, P, {D}]")
    for name, t in (("prefix_k", pk), ("prefix_v", pv)):
        dims = (4,) if ids is not None else (3, 4)
        ok = t.ndim in dims and t.shape[-3] == HKV and t.shape[-1] == D
        if not ok or (t.ndim == 4 and ids is None and t.shape[0] != B):
            raise ValueError(f"{name}: expected {want}, got {tuple(t.shape)}")
    if pv.shape != pk.shape:
        raise ValueError(
            f"prefix_v: expected {tuple(pk.shape)} (as prefix_k), got {tuple(pv.shape)}"
        )
    if ids is not None and ids.shape != (B,):
        raise ValueError(f"prefix_ids: expected [{B}], one a row, got {tuple(ids.shape)}")


def _check_values(mask, cu, ids, pk: Tensor, T: int) -> None:
    if mask is not None and not (mask < math.inf).all():
        raise ValueError("mask: expected finite values or -inf, got NaN or +inf")
    if cu is not None:
        ends = cu.tolist()
        if (
            ends[0] != 0
            or ends[-1] != T
            or any(a > b for a, b in zip(ends, ends[1:], strict=False))
        ):
            raise ValueError(f"cu_seqlens: expected ascending from 0 to {T}, got {ends}")
    if ids is not None:
        bad = [i for i in ids.tolist() if not -1 <= i < pk.shape[0]]
        if bad:
            raise ValueError(f"prefix_ids: expected -1 or an id below {pk.shape[0]}, got {bad[0]}")


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    mask: Tensor | None = None,
    window: int | None = None,
    cu_seqlens: Tensor | None = None,
    prefix_ids: Tensor | None = None,
    return_lse: bool = False,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """out [B, H, T, D] in q's dtype, and with return_lse the logsumexp [B, H, T] in fp32.

    q [B, H, T, D]; k, v [B, HKV, S, D], HKV divides H, S ≥ T, D ≤ 256; one dtype (fp32, bf16, fp16,
    fp64). Query i stands at position S − T + i. Prefix: [HKV, P, D] shared by all rows,
    [B, HKV, P, D] one a row, or a table [n, HKV, P, D] with prefix_ids [B] (−1: none). Every query
    sees the whole prefix, whatever causal, window and mask say. P = 0 is plain attention.

    causal: no key after the query. window: no key `window` or more positions away from it. mask:
    added to the scores of the keys, [B or 1, H or 1, T, S], floating, −inf hides; no gradient.
    scale: D^−½ where None. A query that sees nothing gets 0 and a logsumexp of −inf.

    cu_seqlens [n + 1], int32 or int64: sequences packed one after the other in one row, q
    [1, H, N, D] and k, v [1, HKV, N, D], sequence i being tokens cu_seqlens[i] up to
    cu_seqlens[i + 1]; prefix and prefix_ids then go by sequence. Without mask.

    Both results are differentiable; gradients come in their input's dtype and are the same in every
    run. Saved for backward: the inputs, out and the logsumexp. impl: None chooses by device
    (`fusedpeft doctor` shows it), "aten" forces the CPU path. Raises TypeError or ValueError with
    the expected and the given value, NotImplementedError on a device that has no kernel yet.
    """
    device = "cpu" if not isinstance(q, Tensor) or q.is_cpu else q.device.type
    if choose_impl(device)[0] != "aten" or impl == "triton":
        raise NotImplementedError(_NO_KERNEL.format(f"{device} and impl {impl!r}"))
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        q, k, v, prefix_k, prefix_v = (t.to(dtype) for t in (q, k, v, prefix_k, prefix_v))
    _check(q, k, v, prefix_k, prefix_v, mask, window, cu_seqlens, prefix_ids, scale, impl)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    args = (
        q,
        k,
        v,
        prefix_k,
        prefix_v,
        mask,
        cu_seqlens,
        prefix_ids,
        bool(causal),
        scale,
        window or 0,
    )
    plain = all(type(t) in _PLAIN for t in args[:5]) and not torch.compiler.is_compiling()
    out, lse = (_PrefixAttention.apply if plain else torch.ops.fusedpeft.prefix_attention)(*args)
    return (out, lse) if return_lse else out
