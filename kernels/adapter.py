"""Bottleneck adapter for GPUs, forward and backward (Houlsby et al. 2019, §2).

    y = residual + scale · drop(act(P) Uᵀ + e),  P = norm(x) Dᵀ + c    x, y [M, d] D [E, d] U [d, E]

Forward, E ≤ 256: one kernel. A block owns 64 rows, sums x D'ᵀ with D' = D∘γ and the
row's Σx, Σx² in one walk over d, so P = r·(x D'ᵀ − μ g) + c + D β; h = act(P) stays in registers;
a second walk, backwards, writes y. Backward: the same walk over dy gives dP = act'(P)∘(du U), the
second dx = r·(dP D' − m1 − x̂ m2) (+ dy where the residual is x), with m1 = Σ_e dP g / d and
m2 = Σ_e dP (P − c − D β) / d. One more kernel reads dy and x once for dU and dD, in splits of M;
partial sums are added in order, so every run gives the same bits. Backward beyond E 128, forward
beyond 256 and fp32 beyond 64 take a kernel for each product.

FLOPs 4·M·d·E forward, 8·M·d·E backward. Bytes (16 bits): forward 4·M·d, and 2·M·d more of x read
again as far as L2 does not hold it; backward 6·M·d, and so 4·M·d more of dy (2·M·d of x with a
norm). Weights come from L2 once a block: 4·d·E bytes for 64 rows. Saved: P [M, E]; μ and r.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from fusedpeft.kernels.adapter_kernels import (
    _adapter_bwd_kernel,
    _adapter_dw_kernel,
    _adapter_dx_kernel,
    _adapter_fwd_kernel,
    _adapter_up_kernel,
)
from fusedpeft.kernels.adapter_norm import _adapter_fold_kernel, _adapter_norm_grads_kernel
from fusedpeft.kernels.adapter_tables import (
    FOLD_CONFIG,
    NORM_GRADS_CONFIG,
    adapter_bwd_config,
    adapter_fwd_config,
)
from fusedpeft.kernels.aligned import aligned, cut
from fusedpeft.kernels.device import arch_of, on_device
from fusedpeft.kernels.dropout import signed_threshold
from fusedpeft.kernels.sums import ordered_sum

__all__ = ["adapter_bwd", "adapter_fwd"]

_ALIASES = {"gelu_new": "gelu_tanh", "swish": "silu"}


def _fp32(like: Tensor, *size: int) -> Tensor:
    return torch.empty(size, dtype=torch.float32, device=like.device)


def _whole(t: Tensor | None, *dims: int) -> Tensor | None:
    """Contiguous, as the kernels take all but x, residual and dy for granted, and `aligned`."""
    return None if t is None else aligned(t.contiguous(), *dims)


def _fold(
    dtype: torch.dtype, down_w: Tensor, down_b: Tensor | None, norm: str,
    norm_w: Tensor | None, norm_b: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """(D∘γ [E, d] in x's dtype, its sums g [E], c + D β [E]); without a norm (D, None, c)."""
    w, c = _whole(down_w), _whole(down_b)
    if not norm:
        return w.to(dtype), None, c
    E, d = w.shape
    out, g, fc = torch.empty((E, d), dtype=dtype, device=w.device), _fp32(w, E), _fp32(w, E)
    nw, nb = _whole(norm_w), _whole(norm_b)
    with on_device(w):
        _adapter_fold_kernel[(E,)](
            w, w if c is None else c, w if nw is None else nw, w if nb is None else nb, out, g, fc,
            d, int(c is not None), int(nw is not None), int(nb is not None), **FOLD_CONFIG,
        )  # fmt: skip
    return out, g, fc


def adapter_fwd(
    x: Tensor, down_w: Tensor, down_b: Tensor | None, up_w: Tensor, up_b: Tensor | None,
    residual: Tensor | None, norm_w: Tensor | None, norm_b: Tensor | None, seed: Tensor | None,
    activation: str, norm: str, eps: float, scale: float, dropout_p: float, add_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(y [M, d], P [M, E] in the adapter's dtype, (μ, 1/σ) [M, 2] fp32 or empty), all fresh.

    x and residual [M, d] in fp32, bf16 or fp16; the adapter's tensors share that or are fp32, cast
    to x's dtype for the tensor cores. norm "", "layer_norm" or "rms_norm". Any strides, E ≥ 1; d
    is a multiple of 16, as the op sees to: a norm would count the zeros behind another one.
    """
    (M, d), e = x.shape, down_w.shape[0]
    down_w, down_b, up_w = _whole(down_w, 0), _whole(down_b, 0), _whole(up_w, 1)
    E = down_w.shape[0]
    y = torch.empty((M, d), dtype=x.dtype, device=x.device)
    p = torch.empty((M, E), dtype=down_w.dtype, device=x.device)
    stats = _fp32(x, M if norm else 0, 2)
    if M == 0 or d == 0:
        return y, cut(p, M, e).zero_(), stats.zero_()  # no output, so no gradient will read P
    cfg = adapter_fwd_config(M, d, E, arch_of(x.device), elem_bytes=x.element_size())
    whole, down = cfg["whole"], cfg["down"]
    w, g, c = _fold(x.dtype, down_w, down_b, norm, norm_w, norm_b)
    up, x, bias = up_w.to(x.dtype), aligned(x), _whole(up_b)
    base = x if add_x else aligned(residual)
    h = y if whole else torch.empty((M, E), dtype=x.dtype, device=x.device)
    drop, factor = dropout_p > 0.0, scale / (1.0 - dropout_p)
    last = (up if bias is None else bias, x if base is None else base, seed if drop else stats)
    flags = (int(bias is not None), int(base is not None))
    stride_rm = 0 if base is None else base.stride(0)
    threshold = signed_threshold(dropout_p)
    with on_device(x):
        grid = (triton.cdiv(M, down["BLOCK_M"]), triton.cdiv(E, down["BLOCK_E"]))
        _adapter_fwd_kernel[grid](
            x, w, stats if g is None else g, w if c is None else c, up, *last, y, p, h, stats,
            float(norm == "layer_norm"), eps, factor, threshold,
            M, d, E, int(c is not None), *flags, x.stride(0), stride_rm,
            NORM=norm != "", DROPOUT=drop and whole, ACT=_ALIASES.get(activation, activation),
            WHOLE=whole, **down,
        )  # fmt: skip
        if not whole:
            tile = cfg["up"]
            grid = (triton.cdiv(M, tile["BLOCK_M"]), triton.cdiv(d, tile["BLOCK_N"]))
            _adapter_up_kernel[grid](
                h, up, *last, y, factor, threshold, M, d, E, *flags, stride_rm,
                DROPOUT=drop, **tile,
            )  # fmt: skip
    return y, cut(p, M, e), stats


def _dp_and_dx(
    dy, x, w, g, c, up, p, stats, seed, activation, norm, scale, dropout_p, add_x, cfg, *,
    need_dx: bool, need_dp: bool, need_dc: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """(dx [M, d], dP [M, E], dc [E] fp32 or None); what is not needed is not written."""
    (M, d), E = dy.shape, w.shape[0]
    down, whole = cfg["down"], cfg["whole"]
    blocks, columns = triton.cdiv(M, down["BLOCK_M"]), triton.cdiv(E, down["BLOCK_E"])
    apart = need_dx and not whole
    dx = torch.empty((M, d) if need_dx else 0, dtype=dy.dtype, device=dy.device)
    dp = torch.empty((M, E) if need_dp or apart else 0, dtype=dy.dtype, device=dy.device)
    dc = _fp32(dy, blocks if need_dc else 0, E)
    means = _fp32(dy, columns if norm and not (need_dx and whole) else 0, M, 2)
    drop, center = dropout_p > 0.0, float(norm == "layer_norm")
    with on_device(dy):
        _adapter_bwd_kernel[(blocks, columns)](
            dy, up, p, w, stats if g is None else g, w if c is None else c, x, stats,
            seed if drop else stats, dx, dp, dc, means,
            center, scale / (1.0 - dropout_p), signed_threshold(dropout_p),
            M, d, E, int(c is not None), int(add_x), int(need_dp or apart), int(need_dc),
            dy.stride(0), x.stride(0),
            NORM=norm != "", DROPOUT=drop, ACT=activation, WHOLE=need_dx and whole, **down,
        )  # fmt: skip
        if apart:
            tile = cfg["dx"]
            grid = (triton.cdiv(M, tile["BLOCK_M"]), triton.cdiv(d, tile["BLOCK_N"]))
            _adapter_dx_kernel[grid](
                dp, w, x, dy, stats, means, dx, M, d, E, columns, int(add_x),
                dy.stride(0), x.stride(0), NORM=norm != "", **tile,
            )  # fmt: skip
    # Many partials of few numbers: torch sums them as a tree, in an order that is fixed as well.
    return dx, dp, dc.sum(0) if need_dc else None


def _weight_sums(
    dy, x, dp, p, stats, seed, activation, norm, dropout_p, cfg, *,
    need_dd: bool, need_du: bool, need_de: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Partials of dPᵀ x̂ [splits, E, d], dyᵀ h [splits, d, E] and Σ dy [splits, d], fp32."""
    (M, d), E = dy.shape, p.shape[1]
    tile = cfg["dw"]
    rows = triton.cdiv(triton.cdiv(M, cfg["dw_splits"]), tile["BLOCK_M"]) * tile["BLOCK_M"]
    splits, drop = triton.cdiv(M, rows), dropout_p > 0.0
    dd = _fp32(dy, splits if need_dd else 0, E, d)
    du = _fp32(dy, splits if need_du else 0, d, E)
    de = _fp32(dy, splits if need_de else 0, d)
    reads_dy = need_du or need_de
    grid = (triton.cdiv(d, tile["BLOCK_N"]), splits, triton.cdiv(E, tile["BLOCK_E"]))
    with on_device(dy):
        _adapter_dw_kernel[grid](
            x, dp, stats, dy, p, seed if drop else stats, dd, du, de, signed_threshold(dropout_p),
            M, d, E, rows, int(need_du), int(need_de), x.stride(0), dy.stride(0),
            NORM=norm != "" and need_dd, DROPOUT=drop and reads_dy, ACT=activation,
            READ_X=need_dd, READ_DY=reads_dy, **tile,
        )  # fmt: skip
    return dd, du, de


def _norm_grads(part, down_w, norm_w, norm_b, dc, need: tuple[bool, bool, bool]):
    """(dD, dγ, dβ), each in its dtype and empty where not needed, from the partials of dPᵀ x̂."""
    E, d = down_w.shape
    w, nw, nb = _whole(down_w), _whole(norm_w), _whole(norm_b)
    out = [torch.empty(s if n else 0, dtype=w.dtype, device=w.device)
           for s, n in zip(((E, d), d, d), need, strict=True)]  # fmt: skip
    with on_device(w):
        _adapter_norm_grads_kernel[(triton.cdiv(d, NORM_GRADS_CONFIG["BLOCK_N"]),)](
            part, w, w if nw is None else nw, w if nb is None else nb,
            part if dc is None else dc, *out, part.shape[0], d, E,
            int(nw is not None), int(nb is not None), *(int(n) for n in need), **NORM_GRADS_CONFIG,
        )  # fmt: skip
    return out


def adapter_bwd(
    dy: Tensor, x: Tensor, down_w: Tensor, down_b: Tensor | None, up_w: Tensor,
    norm_w: Tensor | None, norm_b: Tensor | None, p: Tensor, stats: Tensor, seed: Tensor | None,
    activation: str, norm: str, scale: float, dropout_p: float, add_x: bool, need: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of (x, D, c, U, e, γ, β), each in its parameter's dtype; empty where not needed.

    dy [M, d]; x, p, stats are forward's. x may be empty where neither D, γ nor, with a norm, x
    needs a gradient; p where only e does. add_x: the residual was x, and dx takes dy as well.
    """
    need_x, need_dw, need_db, need_uw, need_ub, need_nw, need_nb = need
    (M, d), e = dy.shape, down_w.shape[0]
    grads = [dy.new_empty(0)] + [down_w.new_empty(0)] * 6
    shapes = ((M, d), (e, d), (e,), (d, e), (d,), (d,), (d,))
    if M == 0 or d == 0:
        return tuple(
            t.new_zeros(s) if n else t for t, s, n in zip(grads, shapes, need, strict=True)
        )
    activation = _ALIASES.get(activation, activation)
    down_w, down_b, up_w = _whole(down_w, 0), _whole(down_b, 0), _whole(up_w, 1)
    E, p = down_w.shape[0], _whole(p, 1)
    cfg = adapter_bwd_config(M, d, E, arch_of(dy.device), elem_bytes=dy.element_size())
    dy = aligned(dy)
    x = aligned(x) if x.numel() else dy  # dy stands for what is not read
    need_dd = need_dw or need_nw
    need_dc = need_db or need_nb or (need_dw and norm_b is not None)
    dp = dc = None
    if need_x or need_dd or need_dc:
        w, g, c = _fold(dy.dtype, down_w, down_b, norm, norm_w, norm_b)
        dx, dp, dc = _dp_and_dx(
            dy, x, w, g, c, up_w.to(dy.dtype), p, stats, seed,
            activation, norm, scale, dropout_p, add_x, cfg,
            need_dx=need_x, need_dp=need_dd, need_dc=need_dc,
        )  # fmt: skip
        grads[0] = dx
        if need_db:
            grads[2] = dc[:e].to(down_w.dtype)
    part = down_w.new_empty(0, dtype=torch.float32)
    if need_dd or need_uw or need_ub:
        part, du, de = _weight_sums(
            dy, x, dy if dp is None else dp, p, stats, seed,
            activation, norm, dropout_p, cfg, need_dd=need_dd, need_du=need_uw, need_de=need_ub,
        )  # fmt: skip
        factor = scale / (1.0 - dropout_p)
        if need_uw:
            grads[3] = cut(ordered_sum(du, down_w.dtype, factor), d, e)
        if need_ub:
            grads[4] = ordered_sum(de, down_w.dtype, factor)
    if norm and (need_dd or need_nb):
        needs = (need_dw, need_nw, need_nb)
        found = _norm_grads(part, down_w, norm_w, norm_b, dc, needs)
        grads[1], grads[5], grads[6] = found
        grads[1] = grads[1][:e]
    elif need_dw:
        grads[1] = ordered_sum(part, down_w.dtype, 1.0)[:e]
    return tuple(grads)
