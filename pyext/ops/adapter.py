"""Bottleneck adapter: down, activation, up, residual and norm as one op.

    y = residual + scale · drop(act(norm(x) Dᵀ + c) Uᵀ + e)   x, y [*, d]   D [E, d]   U [d, E]

The norm never makes a tensor of its own. With D' = D∘γ, g = Σ_j D'_ej and the row's mean μ and
1/σ = r:    P = norm(x) Dᵀ + c = r·(x D'ᵀ − μ g) + c + D β
Backward, with dP = act'(P)∘(du U), Q = r·dP, and x̂ the normalised x:
    dx = Q D' + α x + b   (α, b a number a row, from Q, g and P),   G = dPᵀ x̂ = Qᵀ x − (Qᵀ μ) 1ᵀ,
    dD = γ∘G + dc βᵀ,   dγ = Σ_e D_e∘G_e,   dβ = Dᵀ dc
(Houlsby et al. 2019, §2; He et al. 2021, "Towards a unified view", §3. Dropout is where AdapterHub
has it: on the scaled output of the up-projection.)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedpeft.ops.dropout import as_seed, dropout, dropout_ref

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
NORMS = ("layer_norm", "rms_norm")
_POSITIONS = ("before", "after")
_IMPLS = ("aten",)


def _norm(x: Tensor, norm: str, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    if norm == "layer_norm":
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def bottleneck_adapter_ref(
    x: Tensor, down_w: Tensor, down_b: Tensor | None, up_w: Tensor, up_b: Tensor | None, *,
    activation: str = "relu", scale: float = 1.0, residual: Tensor | None = None,
    norm: str | None = None, norm_weight: Tensor | None = None, norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5, norm_position: str = "before", dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The specification, in plain torch. The adapter is computed in its own dtype."""
    n = x.to(down_w.dtype)
    if norm is not None and norm_position == "before":
        n = _norm(n, norm, norm_weight, norm_bias, norm_eps)
    u = F.linear(ACTIVATIONS[activation][0](F.linear(n, down_w, down_b)), up_w, up_b)
    y = scale * dropout_ref(u.reshape(-1, u.shape[-1]), dropout_p, seed).view(u.shape)
    y = y if residual is None else residual + y
    if norm is not None and norm_position == "after":
        y = _norm(y, norm, norm_weight, norm_bias, norm_eps)
    return y.to(x.dtype)


def choose_impl(device_type: str) -> tuple[str, str]:
    """(implementation, why) that `bottleneck_adapter` takes by itself. Pure; `doctor` prints it."""
    if device_type == "cpu":
        return "aten", "residual, bias and their gradients ride on ATen's products"
    return "aten", f"no kernel of ours for device '{device_type}' yet: ATen's products"


# --- ATen ---------------------------------------------------------------------------------------


def _compute_dtype(x: Tensor, w: Tensor, norm: str) -> torch.dtype:
    """What the products run in. A CPU without 16-bit products is several times faster in fp32."""
    dtype = torch.promote_types(x.dtype, w.dtype)
    if dtype not in (torch.bfloat16, torch.float16):
        return dtype
    if norm:
        return torch.float32  # r·(x D'ᵀ − μ g) is a difference: not of rounded terms
    if x.device.type == "cpu":
        bf16 = dtype == torch.bfloat16
        mkldnn = torch.ops.mkldnn
        if not (mkldnn._is_mkldnn_bf16_supported if bf16 else mkldnn._is_mkldnn_fp16_supported)():
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


def _row_stats(x: Tensor, norm: str, eps: float) -> Tensor:
    """[M, 2]: μ (0 under rms_norm) and 1/σ of each row."""
    if x.shape[0] == 0:
        return x.new_empty((0, 2))
    if norm == "layer_norm":  # seven times as fast on a CPU as var_mean; its output is dropped
        _, mean, rstd = torch.native_layer_norm(x, x.shape[1:], None, None, eps)
        return torch.cat((mean, rstd), 1)
    square = torch.linalg.vector_norm(x, dim=1).square_().div_(x.shape[1])
    return torch.stack((torch.zeros_like(square), square.add_(eps).rsqrt_()), 1)


def _with_ones(h: Tensor) -> Tensor:
    """[h | 1], so that a bias, or its gradient, is one more column of a product."""
    return torch.cat((h, h.new_ones(h.shape[0], 1)), 1)


_SHORT_SUM = (
    128  # products that may accumulate on something: each of their steps rounds at its size
)


def _onto(base: Tensor, a: Tensor, b: Tensor, alpha: float = 1.0) -> Tensor:
    """base + alpha · a b, fresh."""
    if a.shape[1] <= _SHORT_SUM:
        return torch.addmm(base, a, b, alpha=alpha)  # no pass of its own over the sum
    product = torch.mm(a, b)
    return torch.add(base, product, alpha=alpha, out=product)


def _forward(
    x, down_w, down_b, up_w, up_b, residual, norm_w, norm_b, seed,
    activation: str, norm: str, eps: float, scale: float, dropout_p: float, add_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(y [M, d], P [M, E] in the adapter's dtype, row statistics [M, 2] or empty)."""
    dtype = _compute_dtype(x, down_w, norm)
    xc = x.to(dtype)
    w, c = _fold(down_w, down_b, norm_w, norm_b, dtype)
    if norm:
        stats = _row_stats(xc, norm, eps)
        p = torch.mm(xc, w.t())
        if norm == "layer_norm":
            p.addr_(stats[:, 0], w.sum(1), alpha=-1.0)
        p.mul_(stats[:, 1:])
        p = p if c is None else p.add_(c)
    else:
        stats = x.new_empty((0, 2), dtype=_stats_dtype(x))
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


def _backward(
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
        g = torch.mm((_with_ones(h) if need_ub else h).t(), du).mul_(scale)  # [E (+ 1), d]
        grads[3] = g[: p.shape[1]].t().to(up_w.dtype, memory_format=torch.contiguous_format)
        if need_ub:
            grads[4] = g[-1].to(up_w.dtype, copy=True)
    elif need_ub:
        grads[4] = du.sum(0).mul_(scale).to(up_w.dtype)
    if not (need_x or need_dw or need_db or need_nw or need_nb):
        return tuple(grads)

    dp = gradient(torch.mm(du, up_w.to(dtype)).mul_(scale), p)
    q = dp * stats[:, 1:] if norm else dp
    dc = dp.sum(0) if need_db or need_nb or (need_dw and norm_b is not None) else None
    if need_dw or need_nw:
        xc = x.to(dtype)
        dw = torch.mm(q.t(), xc)
        if norm == "layer_norm":
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
        dx = _onto(dy.to(dtype), q, w) if add_x else torch.mm(q, w)
        if norm:
            row = (q * (p if c is None else p - c)).sum(1).div_(d)
            alpha = row * stats[:, 1]
            dx.addcmul_(x.to(dtype), alpha[:, None], value=-1.0)
            if norm == "layer_norm":
                dx.add_((alpha * stats[:, 0] - torch.mv(q, w.sum(1)).div_(d))[:, None])
        grads[0] = dx.to(dy.dtype)
    return tuple(grads)


def _stats_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


# --- custom ops ---------------------------------------------------------------------------------

_lib = torch.library.Library("fusedpeft", "FRAGMENT")
_lib.define(
    "bottleneck_adapter(Tensor x, Tensor down_w, Tensor? down_b, Tensor up_w, Tensor? up_b, "
    "Tensor? residual, Tensor? norm_w, Tensor? norm_b, Tensor? seed, str activation, str norm, "
    "float eps, float scale, float dropout_p, bool add_x) -> (Tensor, Tensor, Tensor)"
)
_lib.define(
    "bottleneck_adapter_backward(Tensor dy, Tensor x, Tensor down_w, Tensor? down_b, Tensor up_w, "
    "Tensor? norm_w, Tensor? norm_b, Tensor p, Tensor stats, Tensor? seed, str activation, "
    "str norm, float scale, float dropout_p, bool add_x, bool[] need) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_lib.impl("bottleneck_adapter", _forward, "CompositeExplicitAutograd")
_lib.impl("bottleneck_adapter_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("fusedpeft::bottleneck_adapter")
def _(x, down_w, down_b, up_w, up_b, residual, nw, nb, seed, activation, norm, *_rest):
    rows = x.shape[0] if norm else 0
    p = down_w.new_empty(x.shape[0], down_w.shape[0])
    return x.new_empty(x.shape), p, x.new_empty((rows, 2), dtype=_stats_dtype(x))


@torch.library.register_fake("fusedpeft::bottleneck_adapter_backward")
def _(dy, x, down_w, down_b, up_w, norm_w, norm_b, p, stats, seed, *rest):
    need, (e, d) = rest[-1], down_w.shape
    shapes = ((e, d), (e,), (d, e), (d,), (d,), (d,))
    weights = [down_w.new_empty(s if n else 0) for s, n in zip(shapes, need[1:], strict=True)]
    return (dy.new_empty(dy.shape if need[0] else 0), *weights)


def _setup_context(ctx, inputs, output) -> None:
    x, down_w, down_b, up_w, _up_b, _residual, norm_w, norm_b, seed = inputs[:9]
    ctx.activation, ctx.norm, _eps, ctx.scale, ctx.dropout_p, ctx.add_x = inputs[9:]
    needs = ctx.needs_input_grad
    ctx.set_materialize_grads(False)
    reads_x = needs[1] or needs[6] or (needs[0] and ctx.norm)
    reads_p = needs[0] or needs[1] or needs[2] or needs[3] or needs[6] or needs[7]
    empty = x.new_empty(0)
    ctx.save_for_backward(
        x if reads_x else empty, down_w, down_b, up_w, norm_w, norm_b,
        output[1] if reads_p else down_w.new_empty(0, down_w.shape[0]), output[2], seed,
    )  # fmt: skip


def _gradients(ctx, dy: Tensor | None, backward) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 15
    needs = ctx.needs_input_grad
    need = [needs[i] for i in (0, 1, 2, 3, 4, 6, 7)]
    grads = (None,) * 7
    if any(need):
        args = (ctx.activation, ctx.norm, ctx.scale, ctx.dropout_p, ctx.add_x, need)
        found = backward(dy, *ctx.saved_tensors, *args)
        grads = tuple(g if n else None for g, n in zip(found, need, strict=True))
    return (*grads[:5], dy if needs[5] else None, *grads[5:], *(None,) * 7)


torch.library.register_autograd(
    "fusedpeft::bottleneck_adapter",
    lambda ctx, dy, _dp, _ds: _gradients(ctx, dy, torch.ops.fusedpeft.bottleneck_adapter_backward),
    setup_context=_setup_context,
)


class _BottleneckAdapter(torch.autograd.Function):
    """The same op without the dispatcher: half the overhead of a custom op with autograd."""

    @staticmethod
    def forward(ctx, *args):
        output = _forward(*args)
        _setup_context(ctx, args, output)
        return output[0]

    @staticmethod
    def backward(ctx, dy):
        return _gradients(ctx, dy, _backward)


# --- public -------------------------------------------------------------------------------------


def _check(x, down_w, down_b, up_w, up_b, residual, norm_w, norm_b, activation, norm, position,
           dropout_p, impl) -> None:  # fmt: skip
    for name, t in (("x", x), ("down_w", down_w), ("up_w", up_w)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(t).__name__}")
    if x.ndim < 1 or down_w.ndim != 2:
        raise ValueError(
            f"x, down_w: expected [*, d] and [E, d], got {tuple(x.shape)}, {tuple(down_w.shape)}"
        )
    e, d = down_w.shape
    if e < 1:
        raise ValueError("down_w: expected a bottleneck E >= 1, got 0")
    if x.shape[-1] != d:
        raise ValueError(
            f"x: expected last dim d = {d} (down_w is {(e, d)}), got {tuple(x.shape)}"
        )  # fmt: skip
    wanted = down_w.dtype
    if not x.is_floating_point():
        raise TypeError(f"x: expected a floating dtype, got {x.dtype}")
    if wanted not in (x.dtype, torch.float32) or x.dtype == torch.float64 != wanted:
        raise TypeError(f"down_w: expected dtype {x.dtype} (as x) or torch.float32, got {wanted}")
    for name, t, shape, dtype in (
        ("down_w", down_w, (e, d), wanted),
        ("down_b", down_b, (e,), wanted),
        ("up_w", up_w, (d, e), wanted),
        ("up_b", up_b, (d,), wanted),
        ("norm_weight", norm_w, (d,), wanted),
        ("norm_bias", norm_b, (d,), wanted),
        ("residual", residual, tuple(x.shape), x.dtype),
    ):
        if t is None:
            continue
        if tuple(t.shape) != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(t.shape)}")
        if t.dtype != dtype:
            like = "x" if t is residual else "down_w"
            raise TypeError(f"{name}: expected dtype {dtype} (as {like}), got {t.dtype}")
        if t.device != x.device:
            raise ValueError(f"{name}: expected device {x.device} (as x), got {t.device}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {tuple(ACTIVATIONS)}, got {activation!r}")
    if norm is not None and norm not in NORMS:
        raise ValueError(f"norm: expected one of {NORMS} or None, got {norm!r}")
    if position not in _POSITIONS:
        raise ValueError(f"norm_position: expected one of {_POSITIONS}, got {position!r}")
    if norm is None and not (norm_w is None and norm_b is None):
        raise ValueError("norm_weight, norm_bias: expected None without a norm, got tensors")
    if norm == "rms_norm" and norm_b is not None:
        raise ValueError("norm_bias: expected None with rms_norm, got a tensor")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: expected 0 <= p < 1, got {dropout_p}")
    if impl is not None and impl not in _IMPLS:
        raise ValueError(f"impl: expected one of {_IMPLS} or None, got {impl!r}")


def bottleneck_adapter(
    x: Tensor,
    down_w: Tensor,
    down_b: Tensor | None,
    up_w: Tensor,
    up_b: Tensor | None,
    *,
    activation: str = "relu",
    scale: float = 1.0,
    residual: Tensor | None = None,
    norm: str | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    norm_position: str = "before",
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """y = residual + scale · drop(act(norm(x) Dᵀ + c) Uᵀ + e), a bottleneck adapter.

    x [*, d]; D = down_w [E, d], c = down_b [E], U = up_w [d, E], e = up_b [d], each bias optional;
    fp32, bf16, fp16 (fp64 on ATen). The adapter's tensors share x's dtype or are fp32 beside a
    16-bit x; gradients come in each one's dtype. Any E >= 1, leading dims and strides, empty x.

    residual: of x's shape and dtype. A serial adapter passes x itself (the same tensor: it is read
    once, and its gradient joins dx in one pass), a parallel one the output of the layer beside it;
    None adds nothing. activation: relu, gelu, gelu_tanh (gelu_new), silu (swish), tanh, leaky_relu.

    norm "layer_norm" or "rms_norm" over d, with norm_weight and norm_bias [d] or without. Position
    "before": of x on the adapter's path. "after": of the whole sum, y = norm(residual + …), as in
    AdapterHub; with residual=None it is norm(…), to which a residual can be added outside. After,
    it is torch's own norm on top of the op.
    dropout_p drops elements of the up-projection's output, as in AdapterHub; the mask comes from
    `seed` (int, int64 tensor of one element, or None: torch's generator), again in backward.
    impl: None or "aten".

    Saved for backward: x, P [M, E] in the adapter's dtype, and 8 bytes a row with a norm before
    (after: y before the norm, and its statistics). Raises TypeError or ValueError with the expected
    and the given value before anything is computed.
    """
    add_x = residual is x
    device = x.device.type if isinstance(x, Tensor) else "cpu"
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        down_w, down_b, up_w, up_b, norm_weight, norm_bias, x, residual = (
            None if t is None else t.to(dtype)
            for t in (down_w, down_b, up_w, up_b, norm_weight, norm_bias, x, residual)
        )
        with torch.autocast(device, enabled=False):  # what is computed in fp32 stays there
            return bottleneck_adapter(
                x, down_w, down_b, up_w, up_b, activation=activation, scale=scale,
                residual=x if add_x else residual, norm=norm, norm_weight=norm_weight,
                norm_bias=norm_bias, norm_eps=norm_eps, norm_position=norm_position,
                dropout_p=dropout_p, seed=seed, impl=impl,
            )  # fmt: skip
    _check(
        x, down_w, down_b, up_w, up_b, residual, norm_weight, norm_bias,
        activation, norm, norm_position, dropout_p, impl,
    )  # fmt: skip
    before = norm is not None and norm_position == "before"
    x2 = x.reshape(-1, x.shape[-1])
    residual2 = None if add_x or residual is None else residual.reshape(x2.shape)
    seed = as_seed(seed, x.device) if dropout_p > 0.0 else None
    tensors = (
        x2, down_w, down_b, up_w, up_b, residual2,
        norm_weight if before else None, norm_bias if before else None,
    )  # fmt: skip
    args = (
        *tensors, seed, activation, norm if before else "",
        float(norm_eps), float(scale), float(dropout_p), add_x,
    )  # fmt: skip
    given = [t for t in tensors if t is not None]
    plain = not torch.compiler.is_compiling() and all(
        type(t) is Tensor or type(t) is torch.nn.Parameter for t in given
    )
    if not plain:
        y = torch.ops.fusedpeft.bottleneck_adapter(*args)[0]
    elif torch.is_grad_enabled() and any(t.requires_grad for t in given):
        y = _BottleneckAdapter.apply(*args)
    else:
        y = _forward(*args)[0]
    y = y.view(x.shape)
    if norm is None or before:
        return y
    dtype = y.dtype if norm_weight is None else norm_weight.dtype
    return _norm(y.to(dtype), norm, norm_weight, norm_bias, norm_eps).to(x.dtype)
