"""LoRA linear: the frozen GEMM and the low-rank update as one op.

    y = x Wᵀ + bias + scale · (drop(x) Aᵀ) Bᵀ      x [*, K]  W [N, K]  A [R, K]  B [N, R]  y [*, N]

Backward, with dS = scale · dy B:   dx = dy W + drop(dS A),  dA = dSᵀ drop(x),  dB = scale · dyᵀ S.
(Hu et al. 2021, "LoRA", §4.1; DoRA: Liu et al. 2024, eq. 5 and §4.3.)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedpeft.ops import twice
from fusedpeft.ops.arguments import autocast, autocasts, device_of, is_plain, refuse_transforms
from fusedpeft.ops.dropout import as_seed, dropout_ref
from fusedpeft.ops.lora_check import (
    check,
    check_decode,
    check_quantised,
    decode_ok,
    is_sound,
)
from fusedpeft.ops.lora_choice import use_triton
from fusedpeft.ops.lora_cpu import MAX_DECODE_TOKENS, aten_bwd, aten_fwd, native_fwd, native_ok
from fusedpeft.ops.lora_dora import dora_factor
from fusedpeft.ops.lora_quantised import lora_quantised
from fusedpeft.ops.multi_lora_cuda import one_fwd
from fusedpeft.ops.quantised import QuantisedWeight


def lora_linear_ref(
    x: Tensor,
    w: Tensor | QuantisedWeight,
    a: Tensor,
    b: Tensor,
    scale: float,
    bias: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    magnitude: Tensor | None = None,
) -> Tensor:
    """The specification, in plain torch. The adapter is computed in its own dtype, as in PEFT."""
    w = w.dequantise(x.dtype) if isinstance(w, QuantisedWeight) else w
    rows = x.flatten(0, -2) if x.ndim > 1 else x[None]
    dropped = dropout_ref(rows, dropout_p, seed).view(x.shape)
    y = F.linear(x, w) + scale * F.linear(F.linear(dropped.to(a.dtype), a), b)
    if magnitude is not None:
        y = y * (magnitude / (w + scale * (b @ a)).norm(dim=1).detach())
    return (y if bias is None else y + bias).to(x.dtype)


def choose_impl(
    device_type: str, tokens: int, needs_grad: bool, native_ok: bool = True,
    dtype: torch.dtype = torch.float32,
) -> tuple[str, str]:  # fmt: skip
    """(implementation, why) that `lora_linear` takes by itself. Pure; `doctor` prints it.

    native_ok: the C++ or CUDA kernel is built and takes these tensors.
    """
    if device_type == "cuda" and dtype == torch.float64:
        return "aten", "the Triton kernels sum in fp32: fp64 takes ATen"
    if device_type == "cuda" and native_ok and not needs_grad and tokens <= MAX_DECODE_TOKENS:
        return "cuda", f"at most {MAX_DECODE_TOKENS} tokens without gradients: one launch"
    if device_type == "cuda":
        return "by shape", "Triton or cuBLAS, as lora_choice.choose says of the sizes"
    if device_type != "cpu":
        return "aten", f"no kernel of ours for device '{device_type}'"
    if needs_grad:
        return "aten", "on a CPU, training runs near the GEMM floor with in-place ATen accumulation"
    if tokens > MAX_DECODE_TOKENS:
        return "aten", f"more than {MAX_DECODE_TOKENS} tokens: ATen's GEMM is ahead"
    if not native_ok:
        return "aten", "dtypes or strides that the C++ kernel does not take"
    return "native", f"at most {MAX_DECODE_TOKENS} tokens without gradients: one C++ pass over W"


DECODE = {"native": native_fwd, "cuda": one_fwd}  # for a few rows, without gradients


# --- custom ops ---------------------------------------------------------------------------------

_lib = torch.library.Library("fusedpeft", "FRAGMENT")
_lib.define(
    "lora_linear(Tensor x, Tensor w, Tensor a, Tensor b, Tensor? bias, Tensor? seed, "
    "float scale, float dropout_p, str impl) -> (Tensor, Tensor)"
)
_lib.define(
    "lora_linear_infer(Tensor x, Tensor w, Tensor a, Tensor b, Tensor? bias, Tensor? seed, "
    "float scale, float dropout_p, str impl) -> Tensor"
)
_lib.define(
    "lora_linear_backward(Tensor dy, Tensor x, Tensor w, Tensor a, Tensor b, Tensor s, "
    "Tensor? seed, float scale, float dropout_p, bool[] need, str impl) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _forward(x, w, a, b, bias, seed, scale, dropout_p, impl):
    if use_triton("fwd", x, impl, (w,), a, dropout_p):
        from fusedpeft.kernels.lora import lora_fwd

        return lora_fwd(x, w, a, b, scale, bias, dropout_p, seed)
    return aten_fwd(x, w, a, b, bias, seed, scale, dropout_p)


def _infer(x, w, a, b, bias, seed, scale, dropout_p, impl):
    if impl == "":
        ok = dropout_p == 0.0 and decode_ok(x, w, a, b)
        impl = choose_impl(x.device.type, x.shape[0], False, ok, x.dtype)[0]
        impl = impl if impl in DECODE else ""
    if impl in DECODE:
        return DECODE[impl](x, w, a, b, bias, scale)
    return _forward(x, w, a, b, bias, seed, scale, dropout_p, impl)[0]


def _backward(dy, x, w, a, b, s, seed, scale, dropout_p, need, impl):
    dy = dy.contiguous()
    if use_triton("bwd", dy, impl, (w,), a, dropout_p):
        from fusedpeft.kernels.lora import lora_bwd

        grads = lora_bwd(dy, x, w, a, b, s, scale, dropout_p, seed, *need)
        return tuple(dy.new_empty(0) if g is None else g for g in grads)
    return aten_bwd(dy, x, w, a, b, s, seed, scale, dropout_p, need)


for _name, _fn in (
    ("lora_linear", _forward),
    ("lora_linear_infer", _infer),
    ("lora_linear_backward", _backward),
):
    _lib.impl(_name, _fn, "CompositeExplicitAutograd")


@torch.library.register_fake("fusedpeft::lora_linear")
def _(x, w, a, b, bias, seed, scale, dropout_p, impl):
    return x.new_empty(x.shape[0], w.shape[0]), a.new_empty(x.shape[0], a.shape[0])


@torch.library.register_fake("fusedpeft::lora_linear_infer")
def _(x, w, a, b, bias, seed, scale, dropout_p, impl):
    return x.new_empty(x.shape[0], w.shape[0])


@torch.library.register_fake("fusedpeft::lora_linear_backward")
def _(dy, x, w, a, b, s, seed, scale, dropout_p, need, impl):
    like = (x, w, a, b)
    grads = [t.new_empty(t.shape if n else 0) for t, n in zip(like, need[:4], strict=True)]
    # x is not saved when neither A nor W learns, so dx takes its shape from dy and W.
    grads[0] = dy.new_empty((dy.shape[0], w.shape[1]) if need[0] else 0)
    return (*grads, dy.new_empty(dy.shape[1] if need[4] else 0))


def _setup_context(ctx, inputs, output) -> None:
    x, w, a, b, bias, seed, ctx.scale, ctx.dropout_p, ctx.impl = inputs
    need_x, need_w, need_a, need_b, need_bias = ctx.needs_input_grad[:5]
    ctx.set_materialize_grads(False)
    empty = x.new_empty(0)
    ctx.save_for_backward(
        x if need_w or need_a else empty, w, a, b, output[1] if need_b else empty, seed
    )


def _gradients(ctx, dy: Tensor | None, backward) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 9
    x, w, a, b, s, seed = ctx.saved_tensors
    need = list(ctx.needs_input_grad[:5])
    if twice.asked():
        return (*_second(dy, x, w, a, b, seed, ctx.scale, ctx.dropout_p, need), *(None,) * 4)
    grads = backward(dy, x, w, a, b, s, seed, ctx.scale, ctx.dropout_p, need, ctx.impl)
    return (*(g if n else None for g, n in zip(grads, need, strict=True)), None, None, None, None)


def _second(dy, x, w, a, b, seed, scale: float, dropout_p: float, need: list[bool]):
    x = whole_x(x, dy, w, need[0], need[3])
    bias = dy.new_zeros(dy.shape[1]).requires_grad_() if need[4] else None

    def reference(x, w, a, b, bias):
        return lora_linear_ref(x, w, a, b, scale, bias, dropout_p=dropout_p, seed=seed)

    return twice.gradients(reference, (x, w, a, b, bias), need, dy)


def whole_x(x: Tensor, dy: Tensor, w: Tensor, need_x: bool, need_b: bool) -> Tensor:
    """x as the graph of second gradients takes it; where A is frozen it was not kept, and stands
    for nothing if B is too."""
    shape = (dy.shape[0], w.shape[1])
    if x.shape == shape:
        return x
    if need_b:
        raise RuntimeError(
            "lora_linear: expected A or W to be trained for second gradients of B, which need x: "
            "it is kept for those alone"
        )
    return dy.new_zeros(shape).requires_grad_(need_x)


torch.library.register_autograd(
    "fusedpeft::lora_linear",
    lambda ctx, dy, _ds: _gradients(ctx, dy, torch.ops.fusedpeft.lora_linear_backward),
    setup_context=_setup_context,
)


class _LoraLinear(torch.autograd.Function):
    """The same op without the dispatcher: half the overhead of a custom op with autograd."""

    @staticmethod
    def forward(ctx, *args):
        y, s = _forward(*args)
        _setup_context(ctx, args, (y, s))
        return y

    @staticmethod
    def backward(ctx, dy):
        return _gradients(ctx, dy, _backward)


# --- public -------------------------------------------------------------------------------------


def lora_linear(
    x: Tensor,
    w: Tensor | QuantisedWeight,
    a: Tensor,
    b: Tensor,
    scale: float,
    bias: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    magnitude: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """y = x Wᵀ + bias + scale · (drop(x) Aᵀ) Bᵀ, the frozen linear with its LoRA update.

    x [*, K] and w [N, K] share a dtype (fp32, bf16, fp16; fp64 on ATen); a [R, K] and b [N, R]
    share one, which may be fp32 beside a 16-bit base. Returns [*, N] in x's dtype; every gradient
    comes in its parameter's dtype. bias [N]. Any rank >= 1, leading dims and strides, empty x.

    dropout_p drops elements of x on the adapter's path only; the mask is a function of `seed` (an
    int, an int64 tensor of one element, or None: drawn from torch's generator) and is recomputed in
    backward, never stored. magnitude [N] makes it DoRA: y = (m/‖W + scale·BA‖)·(…) + bias, the norm
    by row, held constant in backward (Liu et al. 2024, §4.3) and kept until w, a or b is written in
    place (on a GPU a write through `.data` is not seen: `lora_dora.forget_norms`).

    w may be an `ops.NF4Weight` or `ops.FP8Weight`: frozen, read in its own form
    ("native", which then takes gradients too, "aten", "triton").

    impl: None chooses by device and shape, on CUDA for forward and backward each (lora_choice.py;
    `fusedpeft doctor` shows it); "native" (C++ decode, CPU, at most 16 rows, no gradients), "cuda"
    (the same on a GPU, at most 64 rows, R a multiple of 8), "aten" (on CUDA: cuBLAS and passes that
    accumulate), "triton" force one.

    Saved for backward: x, and S = drop(x)Aᵀ (M·R elements in a's dtype). Raises TypeError or
    ValueError with the expected and the given value before anything is launched.
    """
    refuse_transforms("lora_linear")
    quantised, given = isinstance(w, QuantisedWeight), (w, a, b)
    if autocasts(device := device_of(x)):
        x, w, a, b, bias = autocast(device, x, w, a, b, bias)
    plain = is_plain((x, w, a, b))
    usual = plain and impl is None and magnitude is None and dropout_p == 0.0
    usual = usual and type(scale) is float and scale - scale == 0.0
    sound = usual and is_sound(x, w, a, b, bias)
    if quantised:
        check_quantised(x, w, a, b, bias, scale, dropout_p, magnitude, impl)
    elif not sound:
        check(x, w, a, b, bias, scale, dropout_p, magnitude, impl)
    if magnitude is not None:
        y = lora_linear(x, w, a, b, scale, dropout_p=dropout_p, seed=seed, impl=impl)
        y = (y * dora_factor(*given, scale, magnitude)).to(x.dtype)
        return y if bias is None else y + bias

    if quantised:
        seed = as_seed(seed, x.device) if dropout_p > 0.0 else None
        rest = (a, b, bias, seed, float(scale), float(dropout_p), impl or "")
        return lora_quantised(x.reshape(-1, x.shape[-1]), w, *rest).view(*x.shape[:-1], w.shape[0])

    needs_grad = torch.is_grad_enabled() and any(
        t.requires_grad for t in (x, w, a, b, bias) if t is not None
    )
    if sound and not needs_grad and (k := w.shape[1]) > 0 and native_ok(x, w, a, b):
        if choose_impl("cpu", x.numel() // k, False)[0] == "native":
            return native_fwd(x, w, a, b, bias, float(scale))

    x2 = x if x.ndim == 2 else x.flatten(0, -2) if x.ndim > 2 else x[None]
    seed = as_seed(seed, x.device) if dropout_p > 0.0 else None
    if impl in DECODE:
        check_decode(impl, x2, w, a, b, needs_grad, dropout_p)
    args = (x2, w, a, b, bias, seed, float(scale), float(dropout_p), impl or "")
    if needs_grad:
        y = _LoraLinear.apply(*args) if plain else torch.ops.fusedpeft.lora_linear(*args)[0]
    else:
        y = (_infer if plain else torch.ops.fusedpeft.lora_linear_infer)(*args)
    return y if x.ndim == 2 else y.view(*x.shape[:-1], w.shape[0])
