"""Attention over a prefix and the keys, the prefix neither copied per row nor concatenated.

    out = softmax([scale · q prefix_kᵀ | scale · q kᵀ + mask]) [prefix_v ; v]
    q [B, H, T, D]   k, v [B, HKV, S, D], S ≥ T   prefix [HKV, P, D] or [B or n, HKV, P, D]

One pass walks prefix and keys, in C++ on a CPU (prefix_attention_cpu.py), in Triton on a GPU
(kernels/prefix_attention.py). In fp64, with fewer heads of k than threads, and for bf16's forward
pass on AMX, a CPU attends to the two parts apart with ATen and merges them by their logsumexp
(prefix_attention_aten.py). All keep out and the logsumexp for backward, and add the shares of a
shared prefix in a fixed order. A few queries without gradients go to the kernels of
prefix_decode_attention. (Li & Liang 2021, "Prefix-Tuning"; partial softmaxes: Dao et al. 2022,
"FlashAttention", §3.1.)
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedpeft.ops import twice
from fusedpeft.ops.arguments import autocast, autocasts, device_of, is_plain, refuse_transforms
from fusedpeft.ops.prefix_attention_aten import acc_dtype, aten_bwd, aten_fwd, in_tiles
from fusedpeft.ops.prefix_attention_blocks import laid_out
from fusedpeft.ops.prefix_attention_checks import (
    DECODE,
    check,
    decodes,
    flash_ok,
    plainly_decodes,
)
from fusedpeft.ops.prefix_attention_cpu import flash_bwd, flash_fwd
from fusedpeft.ops.prefix_decode_impls import as_slots, forward, native_shared
from fusedpeft.ops.prefix_decode_impls import choose_impl as choose_decode_impl


def _row_ref(q, k, v, pk, pv, causal, scale, mask, window):
    """q [H, T, D], k and v [HKV, S, D], prefix [HKV, P, D] -> out [H, T, D], lse [H, T]."""
    (H, T, D), S = q.shape, k.shape[1]
    k, v = (torch.cat(t, 1).repeat_interleave(H // k.shape[0], 0) for t in ((pk, k), (pv, v)))
    ahead = torch.arange(S, device=q.device) - torch.arange(S - T, S, device=q.device)[:, None]
    hide = (causal & (ahead > 0)) | (ahead.abs() >= (window or math.inf))
    bias = (q.new_zeros(1, T, S) if mask is None else mask).masked_fill(hide, -math.inf)
    scale = D**-0.5 if scale is None else scale
    z = q @ k.transpose(1, 2) * scale + F.pad(bias, (pk.shape[1], 0))
    dead = (z == -math.inf).all(-1)
    z = z.masked_fill(dead.unsqueeze(-1), 0.0)
    out = (z.softmax(-1).to(v.dtype) @ v).masked_fill(dead.unsqueeze(-1), 0.0).to(q.dtype)
    return out, z.to(acc_dtype(q)).logsumexp(-1).masked_fill(dead, -math.inf)


def prefix_attention_ref(
    q, k, v, prefix_k, prefix_v, *, causal=True, scale=None, mask=None, window=None,
    cu_seqlens=None, prefix_ids=None, return_lse=False,
):  # fmt: skip
    """The specification, in plain torch and q's dtype: row by row, prefix and keys concatenated."""
    out, lse = q * 0, q[..., 0].to(acc_dtype(q)) * 0 - math.inf
    for i in range(q.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1):
        at = (i,) if cu_seqlens is None else (0, slice(None), slice(*cu_seqlens[i : i + 2]))
        id_ = i if prefix_ids is None else int(prefix_ids[i])
        pre = [t if t.ndim == 3 else t[id_] if id_ >= 0 else t.new_empty(t.shape[1], 0, t.shape[3])
               for t in (prefix_k, prefix_v)]  # fmt: skip
        m = None if mask is None else mask.expand(q.shape[0], -1, -1, -1)[i]
        out[at], lse[at] = _row_ref(q[at], k[at], v[at], *pre, causal, scale, m, window)
    return (out, lse) if return_lse else out


def choose_impl(device_type: str, decode: str = "", flash: bool = True) -> tuple[str, str]:
    """(implementation, why) that `prefix_attention` takes by itself. Pure; `doctor` prints it.

    decode: what `prefix_decode_attention` takes there, for a call that it can answer. flash: C++'s
    kernel for many queries takes the tensors."""
    if decode in DECODE:
        why = "few queries without gradients: the kernel of prefix_decode_attention"
        return decode, why
    if device_type == "cpu" and flash:
        return "flash", "C++: one pass over prefix and keys, the prefix packed once a head"
    if device_type == "cpu":
        return "aten", "two calls of ATen's flash attention, merged by their logsumexp"
    if device_type == "cuda":
        return "triton", "one pass over prefix and keys, the prefix read where it lies"
    if device_type == "meta":
        return "meta", "shapes alone"
    return "raises", f"no kernel of ours for device '{device_type}'"


# --- custom ops ---------------------------------------------------------------------------------

_lib = torch.library.Library("fusedpeft", "FRAGMENT")
_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor pk, Tensor pv"
_OPTIONS = "Tensor? mask, Tensor? cu, Tensor? ids, bool causal, float scale, int window, str impl"
_lib.define(f"prefix_attention({_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor)")
_lib.define(
    f"prefix_attention_backward(Tensor dout, Tensor? dlse, {_INPUTS}, Tensor out, Tensor lse, "
    f"{_OPTIONS}, bool[] need) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _flashes(impl: str, q: Tensor, k: Tensor, forward: bool = False) -> bool:
    return impl == "flash" or (impl == "" and flash_ok(q, k) and not (forward and in_tiles(q)))


def _forward(*args):
    *args, impl = args
    if impl in DECODE:
        q, k, v, pk, pv, _, _, ids, _, scale, window = args
        *prefix, slots = as_slots(pk, pv, ids, q.shape[0])
        return forward(q, k, v, *prefix, slots, None, None, scale, window, impl)
    if impl == "triton":
        from fusedpeft.kernels.prefix_attention import prefix_attention_fwd

        return prefix_attention_fwd(*args)
    return (flash_fwd if _flashes(impl, *args[:2], True) else aten_fwd)(*args)


def _backward(*args):
    *args, impl, need = args
    if impl == "triton":
        from fusedpeft.kernels.prefix_attention import prefix_attention_bwd

        return prefix_attention_bwd(*args, need)
    return (flash_bwd if _flashes(impl, *args[2:4]) else aten_bwd)(*args, need)


_lib.impl("prefix_attention", _forward, "CompositeExplicitAutograd")
_lib.impl("prefix_attention_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("fusedpeft::prefix_attention")
def _(q, k, v, pk, pv, mask, cu, ids, causal, scale, window, impl):
    out = laid_out(q) if q.is_cpu and impl not in DECODE else q.new_empty(q.shape)
    return out, q.new_empty(q.shape[:3], dtype=acc_dtype(q))


@torch.library.register_fake("fusedpeft::prefix_attention_backward")
def _(dout, dlse, q, k, v, pk, pv, out, lse, mask, cu, ids, causal, scale, window, impl, need):
    like = [laid_out(t) if q.is_cpu else t.new_empty(t.shape) for t in (q, k, v)]
    like += [t.new_empty(t.shape) for t in (pk, pv)]
    return tuple(t if n else t.new_empty(0) for t, n in zip(like, need, strict=True))


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.causal, ctx.scale, ctx.window, ctx.impl = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)


def _gradients(ctx, dout, dlse, backward) -> tuple[Tensor | None, ...]:
    if dout is None and dlse is None:
        return (None,) * 12
    *tensors, mask, cu, ids, out, lse = ctx.saved_tensors
    if twice.asked():
        return (*_second(ctx, dout, dlse, tensors, mask, cu, ids), *(None,) * 7)
    dout = torch.zeros_like(out) if dout is None else dout
    need = list(ctx.needs_input_grad[:5])
    options = (mask, cu, ids, ctx.causal, ctx.scale, ctx.window, ctx.impl)
    grads = backward(dout, dlse, *tensors, out, lse, *options, need)
    return (*(g if n else None for g, n in zip(grads, need, strict=True)), *(None,) * 7)


def _second(ctx, dout, dlse, tensors, mask, cu, ids) -> tuple[Tensor | None, ...]:
    given = [i for i, dy in enumerate((dout, dlse)) if dy is not None]

    def reference(*inputs):
        ys = prefix_attention_ref(
            *inputs, causal=ctx.causal, scale=ctx.scale, mask=mask, window=ctx.window or None,
            cu_seqlens=cu, prefix_ids=ids, return_lse=True,
        )  # fmt: skip
        return [ys[i] for i in given]

    dys = [dy for dy in (dout, dlse) if dy is not None]
    return twice.gradients(reference, tensors, ctx.needs_input_grad[:5], dys)


torch.library.register_autograd(
    "fusedpeft::prefix_attention",
    lambda ctx, *g: _gradients(ctx, *g, torch.ops.fusedpeft.prefix_attention_backward),
    setup_context=_setup_context,
)


class _PrefixAttention(torch.autograd.Function):
    """The same op without the dispatcher: half the overhead of a custom op with autograd."""

    @staticmethod
    def forward(ctx, *args):
        outs = _forward(*args)
        _setup_context(ctx, args, outs)
        return outs

    @staticmethod
    def backward(ctx, dout, dlse):
        return _gradients(ctx, dout, dlse, _backward)


# --- public -------------------------------------------------------------------------------------


def _reach(window: int | None, k: Tensor) -> int:
    """The window as the kernels take it: 0 for none, and no more than keys lie apart."""
    return 0 if window is None else min(window, max(k.shape[2], 1))


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
    (`fusedpeft doctor` shows it), "flash" is C++ and "aten" torch on a CPU, "triton" the GPU's;
    "native" and "cuda" are those of prefix_decode_attention, taken where T ≤ 8 and causal (or T =
    1), without gradients, mask and cu_seqlens. On a GPU without FUSEDPEFT_DEBUG=1 nobody reads
    cu_seqlens and prefix_ids before the launch: a row whose id is outside the table is NaN there,
    as are tokens that no sequence holds; fp64 has no kernel; and a mask's values below −1e29 hide
    as −inf does. Raises TypeError or ValueError with the expected and the given value,
    NotImplementedError on a device that has no kernel.
    """
    refuse_transforms("prefix_attention")
    plain = is_plain((q, k, v, prefix_k, prefix_v)) and not q.is_meta
    rare = not plain or not (mask is cu_seqlens is prefix_ids is impl is None)
    if not rare and plainly_decodes(q, k, v, prefix_k, prefix_v, causal, window, scale):
        scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
        out, lse = native_shared(q, k, v, prefix_k, prefix_v, scale, _reach(window, k))
        return (out, lse) if return_lse else out
    if autocasts(device := device_of(q)):
        q, k, v, prefix_k, prefix_v = autocast(device, q, k, v, prefix_k, prefix_v)
    given = impl
    if impl is None:
        few = decodes(q, k, v, prefix_k, prefix_v, causal, mask, cu_seqlens)
        decode = choose_decode_impl(device, q.dtype)[0] if few else ""
        impl = choose_impl(device, decode, flash=False)[0]
    check(q, k, v, prefix_k, prefix_v, mask, window, cu_seqlens, prefix_ids, scale, causal, impl)
    tensors = (q, k, v, prefix_k, prefix_v, mask, cu_seqlens, prefix_ids)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if given is None and impl == "aten":
        impl = ""  # "flash" or "aten": what decides cannot be asked under a compiler
    args = (*tensors, bool(causal), scale, _reach(window, k), impl)
    run = _forward if impl in DECODE else _PrefixAttention.apply
    out, lse = (run if plain else torch.ops.fusedpeft.prefix_attention)(*args)
    return (out, lse) if return_lse else out
