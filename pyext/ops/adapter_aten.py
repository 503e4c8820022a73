"""The bottleneck adapter on ATen, forward and backward: see adapter.py for the equations.

The residual is the product's accumulator, a bias one of its columns, a norm no more than x − μ.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedpeft.ops.dropout import dropout

_SLOPE = 0.01  # of leaky_relu, torch's default
_aten = torch.ops.aten

# name -> (value from P, gradient from the upstream one and P)
_GELU_TANH = (
    lambda p: F.gelu(p, approximate="tanh"),
    lambda g, p: _aten.gelu_backward(g, p, approximate="tanh"),
)
_SILU = (F.silu, _aten.silu_backward)
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "relu": (F.relu, lambda g, p: _aten.threshold_backward(g, p, 0)),
    "gelu": (F.gelu, _aten.gelu_backward),
    "gelu_tanh": _GELU_TANH,
    "gelu_new": _GELU_TANH,
    "silu": _SILU,
    "swish": _SILU,
    "tanh": (torch.tanh, lambda g, p: _aten.tanh_backward(g, torch.tanh(p))),
    "leaky_relu": (F.leaky_relu, lambda g, p: _aten.leaky_relu_backward(g, p, _SLOPE, False)),
}


def has_products(dtype: torch.dtype) -> bool:
    """Whether this CPU has products of 16-bit numbers in that dtype."""
    mkldnn = torch.ops.mkldnn
    if dtype == torch.bfloat16:
        return mkldnn._is_mkldnn_bf16_supported()
    return mkldnn._is_mkldnn_fp16_supported()


def _compute_dtype(x: Tensor, w: Tensor, norm: str) -> torch.dtype:
    """What the products run in. A CPU without 16-bit products is several times faster in fp32."""
    dtype = torch.promote_types(x.dtype, w.dtype)
    if dtype not in (torch.bfloat16, torch.float16):
        return dtype
    if norm and not (norm == "layer_norm" and x.device.type == "cpu"):
        return torch.float32  # x − μ is not rounded
    if x.device.type == "cpu" and not has_products(dtype):
        return torch.float32
    return dtype


def _fold(down_w, down_b, norm_w, norm_b, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """(D∘γ, c + D β) in `dtype`."""
    w = down_w.to(dtype)
    c = None if down_b is None else down_b.to(dtype)
    if norm_b is not None:
        beta = torch.mv(w, norm_b.to(dtype))
        c = beta if c is None else c + beta
    return w if norm_w is None else w * norm_w.to(dtype), c


def _centred(x: Tensor, norm: str, eps: float) -> tuple[Tensor, Tensor]:
    """(x − μ, [M, 2] of μ and 1/σ); μ is 0 under rms_norm.

    A product with a constant vector, a difference and a norm: twice as fast on a CPU as LayerNorm's
    own kernel, fifteen times as var_mean.
    """
    mean = x.new_zeros(x.shape[0])
    if norm == "layer_norm":
        mean = torch.mv(x, x.new_full((x.shape[1],), 1.0 / x.shape[1]))
        x = x - mean[:, None]
    square = torch.linalg.vector_norm(x, dim=1).square_().div_(x.shape[1])
    return x, torch.stack((mean, square.add_(eps).rsqrt_()), 1)


def _rounds(norm: str, dtype: torch.dtype) -> bool:
    """Whether LayerNorm's output is made, in 16 bits as torch does, for products in those."""
    return norm == "layer_norm" and dtype.itemsize == 2


def _with_ones(h: Tensor) -> Tensor:
    """[h | 1], so that a bias is one more column of a product."""
    return torch.cat((h, h.new_ones(h.shape[0], 1)), 1)


_CHAINS = 8


def _with_chains(h: Tensor) -> Tensor:
    """[h | 1 in row m's column m mod 8], so that a bias' gradient is eight columns of a product.

    In one column a product would sum all rows in one chain, three times as inexact as `sum`.
    """
    ones = torch.eye(_CHAINS, dtype=h.dtype, device=h.device)
    return torch.cat((h, ones.repeat(-(-h.shape[0] // _CHAINS), 1)[: h.shape[0]]), 1)


_SHORT_SUM = (
    128  # products that may accumulate on something: each of their steps rounds at its size
)


def _onto(base: Tensor, a: Tensor, b: Tensor, alpha: float = 1.0) -> Tensor:
    """base + alpha · a b, fresh."""
    if a.shape[1] <= _SHORT_SUM:
        return torch.addmm(base, a, b, alpha=alpha)  # no pass of its own over the sum
    product = torch.mm(a, b)
    return torch.add(base, product, alpha=alpha, out=product)


def aten_fwd(
    x, down_w, down_b, up_w, up_b, residual, norm_w, norm_b, seed,
    activation: str, norm: str, eps: float, scale: float, dropout_p: float, add_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(y [M, d], P [M, E] in the adapter's dtype, row statistics [M, 2] or empty)."""
    dtype = _compute_dtype(x, down_w, norm)
    xc = x.to(dtype)
    w, c = _fold(down_w, down_b, norm_w, norm_b, dtype)
    if _rounds(norm, dtype):
        # Ones: without a weight in fp32 its statistics would be rounded as well.
        ones = _ones(xc)
        xhat, *stats = _aten.native_layer_norm(xc, list(ones.shape), ones, None, eps)
        p, stats = F.linear(xhat, w, c), torch.cat(stats, 1)
        del xhat  # before y is made
    elif norm:
        centred, stats = _centred(xc, norm, eps)
        p = torch.mm(centred, w.t()).mul_(stats[:, 1:])
        del centred  # before y is made
        p = p if c is None else p.add_(c)
    else:
        stats = x.new_empty((0, 2), dtype=stats_dtype(x))
        p = F.linear(xc, w, c)
    h = ACTIVATIONS[activation][0](p)
    up = up_w.to(dtype)
    base = x if add_x else residual
    if dropout_p > 0.0:
        u = dropout(F.linear(h, up, None if up_b is None else up_b.to(dtype)), dropout_p, seed)
        y = u.mul_(scale) if base is None else u.mul_(scale).add_(base)
    else:
        if up_b is not None:
            h, up = _with_ones(h), torch.cat((up, up_b.to(dtype)[:, None]), 1)
        if base is None:
            y = torch.mm(h, (up * scale).t())
        else:
            y = _onto(xc if add_x else base.to(dtype), h, up.t(), scale)
    return y.to(x.dtype), p.to(down_w.dtype), stats


def aten_bwd(
    dy, x, down_w, down_b, up_w, norm_w, norm_b, p, stats, seed,
    activation: str, norm: str, scale: float, dropout_p: float, add_x: bool, need: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of (x, D, c, U, e, γ, β), each in its parameter's dtype; empty where not needed."""
    need_x, need_dw, need_db, need_uw, need_ub, need_nw, need_nb = need
    dtype = _compute_dtype(dy, down_w, norm)
    d = dy.shape[1]
    p, du = p.to(dtype), dropout(dy.to(dtype), dropout_p, seed)
    value, gradient = ACTIVATIONS[activation]
    grads = [dy.new_empty(0)] * 7
    grads[1:] = [down_w.new_empty(0)] * 6
    if need_uw:
        h = value(p)
        g = torch.mm((_with_chains(h) if need_ub else h).t(), du).mul_(scale)  # [E (+ 8), d]
        grads[3] = g[: p.shape[1]].t().to(up_w.dtype, memory_format=torch.contiguous_format)
        if need_ub:
            grads[4] = g[p.shape[1] :].sum(0).to(up_w.dtype)
    elif need_ub:
        grads[4] = du.sum(0).mul_(scale).to(up_w.dtype)
    if not (need_x or need_dw or need_db or need_nw or need_nb):
        return tuple(grads)

    dp = gradient(torch.mm(du, up_w.to(dtype)).mul_(scale), p)
    rounds = _rounds(norm, dtype)
    q = dp * stats[:, 1:] if norm and not rounds else dp
    dc = dp.sum(0) if need_db or need_nb or (need_dw and norm_b is not None) else None
    if need_dw or need_nw:
        xc = x.to(dtype)
        if rounds:
            xc = x.to(stats.dtype).sub_(stats[:, :1]).mul_(stats[:, 1:]).to(dtype)
        dw = torch.mm(q.t(), xc)
        if norm == "layer_norm" and not rounds:
            dw.sub_(torch.mv(q.t(), stats[:, 0])[:, None])
        if need_nw:
            grads[5] = (dw * down_w).sum(0).to(down_w.dtype)
        if need_dw:
            dw = dw if norm_w is None else dw.mul_(norm_w)
            if norm_b is not None:
                dw.addr_(dc, norm_b.to(dtype))
            grads[1] = dw.to(down_w.dtype)
    if need_db:
        grads[2] = dc.to(down_w.dtype)
    if need_nb:
        grads[6] = torch.mv(down_w.to(dtype).t(), dc).to(down_w.dtype)
    if need_x:
        w, c = _fold(down_w, down_b, norm_w, norm_b, dtype)
        if rounds:
            mean, rstd = (column.contiguous() for column in stats.split(1, 1))
            of_norm = (torch.mm(q, w), x.to(dtype), [d], mean, rstd, _ones(x), None)
            dx = _aten.native_layer_norm_backward(*of_norm, [True, False, False])[0]
            grads[0] = (dx.add_(dy) if add_x else dx).to(dy.dtype)
            return tuple(grads)
        if norm:
            row = (q * (p if c is None else p - c)).sum(1).div_(d)
            alpha = row * stats[:, 1]
            if norm == "layer_norm":  # what a whole row of dx takes is one more column of q
                shift = alpha * stats[:, 0] - torch.mv(q, w.sum(1)).div_(d)
                q, w = torch.cat((q, shift[:, None]), 1), torch.cat((w, w.new_ones(1, d)))
        dx = _onto(dy.to(dtype), q, w) if add_x else torch.mm(q, w)
        if norm:
            dx.addcmul_(x.to(dtype), alpha[:, None], value=-1.0)
        grads[0] = dx.to(dy.dtype)
    return tuple(grads)


def _ones(x: Tensor) -> Tensor:
    return x.new_ones(x.shape[1], dtype=stats_dtype(x))


def stats_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
