"""Bottleneck adapter: down, activation, up, residual and norm as one op.

    y = residual + scale · drop(act(norm(x) Dᵀ + c) Uᵀ + e)   x, y [*, d]   D [E, d]   U [d, E]

The norm is folded into the products. With D' = D∘γ, g = Σ_j D'_ej and the row's mean μ and
1/σ = r:    P = norm(x) Dᵀ + c = r·(x D'ᵀ − μ g) + c + D β
Backward, with dP = act'(P)∘(du U), Q = r·dP, and x̂ the normalised x:
    dx = Q D' + α x + b   (α, b a number a row, from Q, g and P),   G = dPᵀ x̂ = Qᵀ x − (Qᵀ μ) 1ᵀ,
    dD = γ∘G + dc βᵀ,   dγ = Σ_e D_e∘G_e,   dβ = Dᵀ dc
(Houlsby et al. 2019, §2; He et al. 2021, "Towards a unified view", §3. Dropout is where AdapterHub
has it: on the scaled output of the up-projection.)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedpeft.ops import twice
from fusedpeft.ops.adapter_aten import ACTIVATIONS, aten_bwd, aten_fwd, has_products, stats_dtype
from fusedpeft.ops.adapter_checks import check
from fusedpeft.ops.adapter_native import one_fwd, one_ok, train_bwd, train_fwd
from fusedpeft.ops.arguments import autocast, autocasts, device_of, is_plain, refuse_transforms
from fusedpeft.ops.dropout import as_seed, dropout_ref
from fusedpeft.ops.native import native


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


def choose_impl(
    device_type: str,
    dtype: torch.dtype,
    norm: str = "",
    dropout: bool = False,
    capability: str | None = None,
    products: bool | None = None,
    wide: bool = True,
) -> tuple[str, str]:
    """(implementation, why) that `bottleneck_adapter` takes by itself; `doctor` prints it. Pure but
    for what the CPU is, by default this one: the instruction set of fusedpeft._C ("": not built)
    and whether torch has products in dtype. wide: 16 divides d."""
    if device_type == "cuda" and dtype != torch.float64 and not wide:
        return "aten", "16 does not divide d: ATen's products, where the Triton kernels would spill"
    if device_type == "cuda" and dtype != torch.float64:
        return "triton", "CUDA tensors take the Triton kernels: any E, wide ones a kernel a product"
    if device_type == "cuda":
        return "aten", "the Triton kernels sum in fp32: fp64 takes ATen's products"
    if device_type != "cpu":
        return "aten", f"no kernel of ours for device '{device_type}': ATen's products"
    if dtype == torch.float64 or dropout:
        return "aten", "the C++ kernel knows neither fp64 nor dropout: ATen's products"
    if capability is None:
        capability = "" if native is None else native.cpu_capability()
    if capability in ("", "portable"):
        why = f"fusedpeft._C {'has no vectors for this CPU' if capability else 'is not built'}"
        return "aten", why + ": ATen's products"
    if dtype == torch.float32 and capability == "avx2":
        return "aten", "with vectors of 8 ATen's products in fp32 are as fast as ours"
    if dtype == torch.bfloat16 and capability == "amx":
        return "native", "C++: x is read once, products in tiles of bf16 (a fp32 adapter's in fp32)"
    rounds = dtype != torch.float32 and norm != "rms_norm"  # its x is in fp32 on ATen too
    if rounds and (has_products(dtype) if products is None else products):
        return "aten", f"this CPU has products of {dtype}, the C++ kernel sums in fp32: ATen's"
    return "native", "C++: x is read once, both products run on it in the cache"


# --- custom ops ---------------------------------------------------------------------------------

_lib = torch.library.Library("fusedpeft", "FRAGMENT")
_lib.define(
    "bottleneck_adapter(Tensor x, Tensor down_w, Tensor? down_b, Tensor up_w, Tensor? up_b, "
    "Tensor? residual, Tensor? norm_w, Tensor? norm_b, Tensor? seed, str activation, str norm, "
    "float eps, float scale, float dropout_p, bool add_x, str impl) -> (Tensor, Tensor, Tensor)"
)
_lib.define(
    "bottleneck_adapter_backward(Tensor dy, Tensor x, Tensor down_w, Tensor? down_b, Tensor up_w, "
    "Tensor? norm_w, Tensor? norm_b, Tensor p, Tensor stats, Tensor? seed, str activation, "
    "str norm, float scale, float dropout_p, bool add_x, bool[] need, str impl) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _impl(x: Tensor, impl: str, norm: str, dropout_p: float) -> str:
    wide = x.shape[1] % 16 == 0
    return impl or choose_impl(x.device.type, x.dtype, norm, dropout_p > 0.0, wide=wide)[0]


def _forward(x, *args) -> tuple[Tensor, Tensor, Tensor]:
    """(y [M, d], P [M, E] in the adapter's dtype, row statistics [M, 2] or empty)."""
    *args, impl = args
    impl = _impl(x, impl, args[-5], args[-2])
    if impl == "triton":
        from fusedpeft.kernels.adapter import adapter_fwd

        return adapter_fwd(x, *args)
    return (train_fwd if impl == "native" else aten_fwd)(x, *args)


def _backward(dy, *args) -> tuple[Tensor, ...]:
    """Gradients of (x, D, c, U, e, γ, β), each in its parameter's dtype; empty where not needed."""
    *args, impl = args
    impl = _impl(dy, impl, args[-5], args[-3])
    if impl == "triton":
        from fusedpeft.kernels.adapter import adapter_bwd

        return adapter_bwd(dy, *args)
    return (train_bwd if impl == "native" else aten_bwd)(dy, *args)


_lib.impl("bottleneck_adapter", _forward, "CompositeExplicitAutograd")
_lib.impl("bottleneck_adapter_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("fusedpeft::bottleneck_adapter")
def _(x, down_w, down_b, up_w, up_b, residual, nw, nb, seed, activation, norm, *_rest):
    rows = x.shape[0] if norm else 0
    p = down_w.new_empty(x.shape[0], down_w.shape[0])
    return x.new_empty(x.shape), p, x.new_empty((rows, 2), dtype=stats_dtype(x))


@torch.library.register_fake("fusedpeft::bottleneck_adapter_backward")
def _(dy, x, down_w, down_b, up_w, norm_w, norm_b, p, stats, seed, *rest):
    need, (e, d) = rest[-2], down_w.shape
    shapes = ((e, d), (e,), (d, e), (d,), (d,), (d,))
    weights = [down_w.new_empty(s if n else 0) for s, n in zip(shapes, need[1:], strict=True)]
    return (dy.new_empty(dy.shape if need[0] else 0), *weights)


def _setup_context(ctx, inputs, output) -> None:
    x, down_w, down_b, up_w, _up_b, _residual, norm_w, norm_b, seed = inputs[:9]
    ctx.activation, ctx.norm, ctx.eps, ctx.scale, ctx.dropout_p, ctx.add_x, ctx.impl = inputs[9:]
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
        return (None,) * 16
    needs = ctx.needs_input_grad
    need = [needs[i] for i in (0, 1, 2, 3, 4, 6, 7)]
    grads = (None,) * 7
    if any(need) and twice.asked():
        grads = _second(ctx, dy, need)
    elif any(need):
        args = (ctx.activation, ctx.norm, ctx.scale, ctx.dropout_p, ctx.add_x, need, ctx.impl)
        found = backward(dy, *ctx.saved_tensors, *args)
        grads = tuple(g if n else None for g, n in zip(found, need, strict=True))
    return (*grads[:5], dy if needs[5] else None, *grads[5:], *(None,) * 8)


def _second(ctx, dy: Tensor, need: list[bool]) -> tuple[Tensor | None, ...]:
    x, down_w, down_b, up_w, norm_w, norm_b, _p, _stats, seed = ctx.saved_tensors
    if x.shape != dy.shape:
        raise RuntimeError(
            "bottleneck_adapter: expected down_w to be trained for second gradients, which need x: "
            "it is kept for that alone"
        )
    up_b = down_w.new_zeros(dy.shape[1]).requires_grad_() if need[4] else None

    def reference(x, down_w, down_b, up_w, up_b, norm_w, norm_b):
        return bottleneck_adapter_ref(
            x, down_w, down_b, up_w, up_b, activation=ctx.activation, scale=ctx.scale,
            residual=x if ctx.add_x else None, norm=ctx.norm or None, norm_weight=norm_w,
            norm_bias=norm_b, norm_eps=ctx.eps, dropout_p=ctx.dropout_p, seed=seed,
        )  # fmt: skip

    inputs = (x, down_w, down_b, up_w, up_b, norm_w, norm_b)
    return twice.gradients(reference, inputs, need, dy)


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
    impl: None chooses by device, dtype and dropout (`fusedpeft doctor` shows it), and for up to 32
    rows without gradients a C++ kernel of their own; "native" (C++), "aten" and "triton" force
    one. Triton casts an fp32 adapter beside a 16-bit x to x's dtype for the tensor cores, and wants
    a d that 16 divides; by None others take ATen.

    Saved for backward: x, P [M, E] in the adapter's dtype, and 8 bytes a row with a norm before
    (after: y before the norm, and its statistics). Raises TypeError or ValueError with the expected
    and the given value before anything is computed.
    """
    refuse_transforms("bottleneck_adapter")
    if impl is None:
        tensors = (down_w, down_b, up_w, up_b, residual, norm_weight, norm_bias)
        options = (norm_position, dropout_p, scale, norm_eps)
        if type(x) is Tensor and one_ok(x, tensors, activation, norm, *options):
            return one_fwd(x, tensors, activation, norm, scale, norm_eps)
    add_x = residual is x
    if autocasts(device := device_of(x)):
        given = (down_w, down_b, up_w, up_b, norm_weight, norm_bias, x, residual)
        down_w, down_b, up_w, up_b, norm_weight, norm_bias, x, residual = autocast(device, *given)
        with torch.autocast(device, enabled=False):  # what is computed in fp32 stays there
            return bottleneck_adapter(
                x, down_w, down_b, up_w, up_b, activation=activation, scale=scale,
                residual=x if add_x else residual, norm=norm, norm_weight=norm_weight,
                norm_bias=norm_bias, norm_eps=norm_eps, norm_position=norm_position,
                dropout_p=dropout_p, seed=seed, impl=impl,
            )  # fmt: skip
    check(
        x, down_w, down_b, up_w, up_b, residual, norm_weight, norm_bias,
        activation, norm, norm_position, scale, norm_eps, dropout_p, impl,
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
        float(norm_eps), float(scale), float(dropout_p), add_x, impl or "",
    )  # fmt: skip
    given = [t for t in tensors if t is not None]
    if not is_plain(given):
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
