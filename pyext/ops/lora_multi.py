"""Several LoRA linears of one input as one op: q, k and v, or gate and up.

    y_i = x W_iᵀ + bias_i + scale_i · (drop(x) A_iᵀ) B_iᵀ     x [*, K]  W_i [N_i, K]  A_i [R_i, K]

With A = [A_1; A_2; …] stacked, S = drop(x) Aᵀ [M, ΣR] is one product. Backward, with dS_i =
scale_i · dy_i B_i side by side in dS:

    dx = Σ dy_i W_i + drop(dS A),   dA = dSᵀ drop(x),   dB_i = scale_i · dy_iᵀ S_i
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedpeft.ops import twice
from fusedpeft.ops.arguments import autocast, autocasts, device_of, is_plain, refuse_transforms
from fusedpeft.ops.dropout import as_seed
from fusedpeft.ops.lora import DECODE, choose_impl, lora_linear, lora_linear_ref, whole_x
from fusedpeft.ops.lora_check import check_decode, check_multi, decode_ok
from fusedpeft.ops.lora_choice import use_triton
from fusedpeft.ops.lora_cpu import aten_multi_bwd, aten_multi_fwd
from fusedpeft.ops.lora_dora import dora_factor


def lora_linear_multi_ref(
    x: Tensor,
    ws: Sequence[Tensor],
    as_: Sequence[Tensor | None],
    bs: Sequence[Tensor | None],
    scales: Sequence[float],
    biases: Sequence[Tensor | None] | None = None,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    magnitudes: Sequence[Tensor | None] | None = None,
) -> tuple[Tensor, ...]:
    """The specification: `lora_linear_ref` for each projection, with one mask of x for all."""
    none = [None] * len(ws)
    rows = zip(ws, as_, bs, scales, biases or none, magnitudes or none, strict=True)
    return tuple(
        F.linear(x, w, c)
        if a is None
        else lora_linear_ref(x, w, a, b, s, c, dropout_p=dropout_p, seed=seed, magnitude=m)
        for w, a, b, s, c, m in rows
    )


# --- custom ops ---------------------------------------------------------------------------------

_lib = torch.library.Library("fusedpeft", "FRAGMENT")
_lib.define(
    "lora_linear_multi(Tensor x, Tensor[] ws, Tensor[] as_, Tensor[] bs, Tensor[] biases, "
    "Tensor? seed, float[] scales, float dropout_p, str impl) -> (Tensor[], Tensor)"
)
_lib.define(
    "lora_linear_multi_backward(Tensor[] dys, Tensor x, Tensor[] ws, Tensor[] as_, Tensor[] bs, "
    "Tensor s, Tensor? seed, float[] scales, float dropout_p, bool[] need, str impl) "
    "-> (Tensor, Tensor[], Tensor[], Tensor[], Tensor[])"
)


def _forward(x, ws, as_, bs, biases, seed, scales, dropout_p, impl):
    """A bias of no elements is none: gradients do not pass lists with None in them."""
    biases = [c if c.numel() else None for c in biases]
    if _on_triton("fwd", x, ws, as_, dropout_p, impl):
        from fusedpeft.kernels.lora_multi import lora_multi_fwd

        return lora_multi_fwd(x, ws, as_, bs, scales, biases, dropout_p, seed)
    return aten_multi_fwd(x, ws, as_, bs, biases, seed, scales, dropout_p)


def _on_triton(kind, t, ws, as_, dropout_p, impl) -> bool:
    """As for one linear of the widths side by side, with the widest rank."""
    return use_triton(kind, t, impl, ws, max(as_, key=len), dropout_p)


def _by_kind(need: list[bool], count: int) -> list[list[bool]]:
    """[W…, A…, B…, bias…] of x's and theirs, laid end to end."""
    return [need[1 + i * count : 1 + (i + 1) * count] for i in range(4)]


def _backward(dys, x, ws, as_, bs, s, seed, scales, dropout_p, need, impl):
    dys = [dy.contiguous() for dy in dys]
    args = (dys, x, ws, as_, bs, s)
    needs = (need[0], _by_kind(need, len(ws)))
    if _on_triton("bwd", dys[0], ws, as_, dropout_p, impl):
        from fusedpeft.kernels.lora_multi import lora_multi_bwd

        dx, *lists = lora_multi_bwd(*args, scales, dropout_p, seed, *needs)
        none = dys[0].new_empty(0)
        return none if dx is None else dx, *([none if g is None else g for g in t] for t in lists)
    return aten_multi_bwd(*args, seed, scales, dropout_p, *needs)


_lib.impl("lora_linear_multi", _forward, "CompositeExplicitAutograd")
_lib.impl("lora_linear_multi_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("fusedpeft::lora_linear_multi")
def _(x, ws, as_, bs, biases, seed, scales, dropout_p, impl):
    m = x.shape[0]
    ys = [x.new_empty(m, w.shape[0]) for w in ws]
    return ys, as_[0].new_empty(m, sum(a.shape[0] for a in as_))


@torch.library.register_fake("fusedpeft::lora_linear_multi_backward")
def _(dys, x, ws, as_, bs, s, seed, scales, dropout_p, need, impl):
    biases = [dy.new_empty(dy.shape[1]) for dy in dys]
    lists = zip((ws, as_, bs, biases), _by_kind(need, len(ws)), strict=True)
    pairs = (zip(*pair, strict=True) for pair in lists)
    grads = ([t.new_empty(t.shape if n else 0) for t, n in pair] for pair in pairs)
    return dys[0].new_empty((dys[0].shape[0], ws[0].shape[1]) if need[0] else 0), *grads


def _save(ctx, x, ws, as_, bs, seed, s, need: list[bool]) -> None:
    ctx.set_materialize_grads(False)
    ctx.need, ctx.count = need, len(ws)
    need_w, need_a, need_b, _ = _by_kind(need, len(ws))
    x = x if any(need_w) or any(need_a) else x.new_empty(0)
    s = s if any(need_b) else s.new_empty(0)
    ctx.save_for_backward(x, s, seed, *ws, *as_, *bs)


def _gradients(ctx, dys: Sequence[Tensor | None], backward):
    """(dx, [dW], [dA], [dB], [dbias]), None where not needed; None if no output was used."""
    live = next((dy for dy in dys if dy is not None), None)
    if live is None:
        return None
    x, s, seed, *rest = ctx.saved_tensors
    n = ctx.count
    ws, as_, bs = rest[:n], rest[n : 2 * n], rest[2 * n :]
    dys = [  # an output that nobody used
        live.new_zeros(live.shape[0], w.shape[0]) if dy is None else dy
        for dy, w in zip(dys, ws, strict=True)
    ]
    if twice.asked():
        return _second(ctx, dys, x, ws, as_, bs, seed)
    args = (dys, x, ws, as_, bs, s, seed, ctx.scales, ctx.dropout_p, ctx.need, ctx.impl)
    dx, *lists = backward(*args)
    pairs = zip(lists, _by_kind(ctx.need, n), strict=True)
    lists = [[g if m else None for g, m in zip(*pair, strict=True)] for pair in pairs]
    return dx if ctx.need[0] else None, *lists


def _second(ctx, dys, x, ws, as_, bs, seed):
    n, need = ctx.count, ctx.need
    *_, need_b, need_bias = _by_kind(need, n)
    x = whole_x(x, dys[0], ws[0], need[0], any(need_b))
    biases = [
        dy.new_zeros(dy.shape[1]).requires_grad_() if needed else None
        for dy, needed in zip(dys, need_bias, strict=True)
    ]

    def reference(x, *rest):
        parts = [rest[i * n : (i + 1) * n] for i in range(4)]
        args = (x, *parts[:3], ctx.scales, parts[3])
        return lora_linear_multi_ref(*args, dropout_p=ctx.dropout_p, seed=seed)

    dx, *rest = twice.gradients(reference, (x, *ws, *as_, *bs, *biases), need, dys)
    return dx, *(rest[i * n : (i + 1) * n] for i in range(4))


def _setup_context(ctx, inputs, output) -> None:
    x, ws, as_, bs, biases, seed, ctx.scales, ctx.dropout_p, ctx.impl = inputs
    _save(ctx, x, ws, as_, bs, seed, output[1], list(ctx.needs_input_grad[: 1 + 4 * len(ws)]))


def _registered(ctx, dys, _ds):
    n = ctx.count
    none = (None, *([None] * n for _ in range(4)))
    grads = _gradients(ctx, dys, torch.ops.fusedpeft.lora_linear_multi_backward)
    return *(grads or none), None, None, None, None


torch.library.register_autograd(
    "fusedpeft::lora_linear_multi", _registered, setup_context=_setup_context
)


class _LoraMulti(torch.autograd.Function):
    """The same op without the dispatcher, its lists laid end to end: see lora.py."""

    @staticmethod
    def forward(ctx, seed, scales, dropout_p, impl, x, *rest):
        n = len(scales)
        ws, as_, bs, biases = (rest[i * n : (i + 1) * n] for i in range(4))
        ctx.scales, ctx.dropout_p, ctx.impl = scales, dropout_p, impl
        ys, s = _forward(x, ws, as_, bs, biases, seed, scales, dropout_p, impl)
        _save(ctx, x, ws, as_, bs, seed, s, list(ctx.needs_input_grad[4:]))
        return tuple(ys)

    @staticmethod
    def backward(ctx, *dys):
        grads = _gradients(ctx, dys, _backward)
        if grads is None:
            return (None,) * (5 + 4 * ctx.count)
        return None, None, None, None, grads[0], *(g for part in grads[1:] for g in part)


# --- public -------------------------------------------------------------------------------------


def lora_linear_multi(
    x: Tensor,
    ws: Sequence[Tensor],
    as_: Sequence[Tensor | None],
    bs: Sequence[Tensor | None],
    scales: Sequence[float],
    biases: Sequence[Tensor | None] | None = None,
    *,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    magnitudes: Sequence[Tensor | None] | None = None,
    impl: str | None = None,
) -> tuple[Tensor, ...]:
    """(y_1, y_2, …), y_i = x W_iᵀ + bias_i + scale_i · (drop(x) A_iᵀ) B_iᵀ: one node of autograd.

    As `lora_linear` for each projection, except that S and dA take one read of x for all of them,
    dx is summed in one accumulation, and x is saved once. ws, as_, bs, scales (and biases,
    magnitudes) are lists of one length; widths N_i [N_i, K] and ranks R_i differ freely, the
    adapters share one dtype. None in as_ and bs: no adapter on that one.

    dropout_p drops with one mask of x, a function of `seed`, for all projections: what the same
    seed gives in `lora_linear`. magnitudes make DoRA of those projections.

    impl: None chooses as `lora_linear` does; "native" and "cuda" (decode, projection by
    projection), "aten", "triton" force one.

    Saved for backward: x, and S (M·ΣR elements in the adapters' dtype). Raises TypeError or
    ValueError, which names the projection, before anything is launched.
    """
    none = [None] * len(ws) if isinstance(ws, Sequence) else []
    biases, magnitudes = (none if t is None else t for t in (biases, magnitudes))
    given = ws, as_, bs
    refuse_transforms("lora_linear_multi")
    if autocasts(device := device_of(x)):
        lists = ((x,), ws, as_, bs, biases)
        (x,), ws, as_, bs, biases = (
            autocast(device, *part) if isinstance(part, Sequence) else part for part in lists
        )
    check_multi(x, ws, as_, bs, scales, biases, dropout_p, magnitudes, impl)
    rows = x if x.ndim == 2 else x.flatten(0, -2) if x.ndim > 2 else x[None]
    m = magnitudes
    inside = [None if mag is not None else c for c, mag in zip(biases, m, strict=True)]
    ys = _multi(rows, ws, as_, bs, [float(s) for s in scales], inside, dropout_p, seed, impl)
    ys = [y if x.ndim == 2 else y.view(*x.shape[:-1], y.shape[1]) for y in ys]
    for i, mag in enumerate(magnitudes):
        if mag is not None:
            factor = dora_factor(*(part[i] for part in given), scales[i], mag)
            ys[i] = (ys[i] * factor).to(x.dtype)
            ys[i] = ys[i] if biases[i] is None else ys[i] + biases[i]
    return tuple(ys)


def _decode(impl: str, x, w, a, b, bias, scale: float) -> Tensor:
    """One of DECODE for compilers and subclasses: through the custom op."""
    return lora_linear(x, w, a, b, scale, bias, impl=impl)


def _multi(x, ws, as_, bs, scales, biases, dropout_p, seed, impl) -> Sequence[Tensor]:
    """x [M, K]: DoRA and autocast are done with."""
    tensors = [t for t in (x, *ws, *as_, *bs, *biases) if t is not None]
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    plain = is_plain(tensors)
    trios = [t for t in zip(ws, as_, bs, strict=True) if t[1] is not None]
    if impl in DECODE:
        for trio in trios:
            check_decode(impl, x, *trio, needs_grad, dropout_p)
    elif impl is None and not needs_grad and dropout_p == 0.0:
        ok = all(decode_ok(x, *t) for t in trios)
        chosen = choose_impl(x.device.type, x.shape[0], False, ok, x.dtype)[0]
        impl = chosen if chosen in DECODE else None
    if impl in DECODE:
        decode = DECODE[impl] if plain else functools.partial(_decode, impl)
        return [
            F.linear(x, w, c) if a is None else decode(x, w, a, b, c, s)
            for w, a, b, s, c in zip(ws, as_, bs, scales, biases, strict=True)
        ]
    like = next(a for a in as_ if a is not None)  # no adapter: one of rank 0
    as_ = [like.new_empty(0, x.shape[1]) if a is None else a for a in as_]
    bs = [like.new_empty(w.shape[0], 0) if b is None else b for w, b in zip(ws, bs, strict=True)]
    biases = [x.new_empty(0) if c is None else c for c in biases]
    seed = as_seed(seed, x.device) if dropout_p > 0.0 else None
    if plain and needs_grad:
        args = (seed, scales, float(dropout_p), impl or "", x, *ws, *as_, *bs, *biases)
        return _LoraMulti.apply(*args)
    args = (x, ws, as_, bs, biases, seed, scales, float(dropout_p), impl or "")
    return (_forward if plain else torch.ops.fusedpeft.lora_linear_multi)(*args)[0]
