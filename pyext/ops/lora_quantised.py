"""`ops.lora_linear` over a frozen base in 4 or 8 bits (quantised.py), which is never in memory as a
whole in another form: some MiB of it are, at few tokens tiles or, in C++, some rows in a cache.

    y = x Wᵀ + bias + scale · (drop(x) Aᵀ) Bᵀ,    dx = dy W + drop(scale · dy B A)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedpeft.ops.lora_cpu import MAX_DECODE_TOKENS, aten_bwd, aten_fwd, wide, widens
from fusedpeft.ops.quantised import NF4_CODE, QuantisedWeight
from fusedpeft.ops.quantised_cpu import decode_ok, native_decode


def _up(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


# --- ATen ---------------------------------------------------------------------------------------


def _linear(x: Tensor, weight: QuantisedWeight, bias: Tensor | None) -> Tensor:
    return weight.linear(x, bias)


def _mm(dy: Tensor, weight: QuantisedWeight) -> Tensor:
    return weight.mm(dy)


def _aten_fwd(x, weight: QuantisedWeight, a, b, bias, seed, scale: float, p: float):
    tensors = (x, a, b, bias)
    x_, a_, b_, bias_ = wide(*tensors) if widens(x) else tensors
    y, s = aten_fwd(x_, weight, a_, b_, bias_, seed, scale, p, _linear)
    return y.to(x.dtype), s.to(_up(a))


def _aten_bwd(dy, x, weight: QuantisedWeight, a, b, s, seed, scale: float, p: float, need):
    tensors = (dy, x, a, b)
    dy_, x_, a_, b_ = wide(*tensors) if widens(dy) else tensors
    need = [need[0], False, *need[1:]]
    grads = aten_bwd(dy_, x_, weight, a_, b_, s.to(a_.dtype), seed, scale, p, need, _mm)
    dx, _, da, db, dbias = grads
    return dx.to(dy.dtype), da.to(a.dtype), db.to(b.dtype), dbias.to(dy.dtype)


# --- custom ops ---------------------------------------------------------------------------------

_lib = torch.library.Library("fusedpeft", "FRAGMENT")
_lib.define(
    "lora_linear_quantised(Tensor x, Tensor[] parts, int[] layout, Tensor a, Tensor b, "
    "Tensor? bias, Tensor? seed, float scale, float dropout_p, str impl) -> (Tensor, Tensor)"
)
_lib.define(
    "lora_linear_quantised_backward(Tensor dy, Tensor x, Tensor[] parts, int[] layout, Tensor a, "
    "Tensor b, Tensor s, Tensor? seed, float scale, float dropout_p, bool[] need, str impl) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)


def choose_impl(
    device_type: str, dtype: torch.dtype = torch.float32, tokens: int = 1, native_ok: bool = True
) -> tuple[str, str]:
    """(implementation, why) over a quantised base. Pure; `doctor` prints it.

    native_ok: the C++ kernel is built and takes these tensors.
    """
    if device_type == "cuda" and dtype != torch.float64:
        return "triton", "W is dequantised in registers; from 256 tokens on, 16 MiB at a time"
    if device_type == "cpu" and native_ok and tokens <= MAX_DECODE_TOKENS:
        return "native", f"at most {MAX_DECODE_TOKENS} tokens: one C++ pass over W's codes"
    return "aten", "some MiB of W are dequantised at a time and multiplied by ATen"


def native_here(x: Tensor, weight: QuantisedWeight, a: Tensor, b: Tensor, p: float) -> bool:
    """Whether these rows, x [M, K], are the C++ kernel's."""
    ok = p == 0.0 and decode_ok(x, weight, a, b)
    return choose_impl(x.device.type, x.dtype, x.shape[0], ok)[0] == "native"


def _learns(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _use_triton(t: Tensor, impl: str) -> bool:
    return (impl or choose_impl(t.device.type, t.dtype)[0]) == "triton"


def _for_kernel(parts: list[Tensor], layout: list[int]) -> tuple[int, tuple[float, ...]]:
    """(step, code) as kernels/lora_quantised.py takes them."""
    if layout[2]:
        return layout[2].bit_length() - 1, NF4_CODE
    return int(parts[1].numel() > 1), ()


def _forward(x, parts, layout, a, b, bias, seed, scale, dropout_p, impl):
    if _use_triton(x, impl):
        from fusedpeft.kernels.lora_quantised import lora_quantised_fwd

        how = _for_kernel(parts, layout)
        return lora_quantised_fwd(x, parts, *how, layout[0], a, b, scale, bias, dropout_p, seed)
    weight = QuantisedWeight.from_parts(parts, layout)
    with torch.autocast(x.device.type, enabled=False):
        if impl in ("", "native") and native_here(x, weight, a, b, dropout_p):
            s = F.linear(x.to(a.dtype), a).to(_up(a))
            return native_decode(x, weight, a, b, bias, scale), s
        return _aten_fwd(x, weight, a, b, bias, seed, scale, dropout_p)


def _backward(dy, x, parts, layout, a, b, s, seed, scale, dropout_p, need, impl):
    dy = dy.contiguous()
    if _use_triton(dy, impl):
        from fusedpeft.kernels.lora_quantised import lora_quantised_bwd

        how = _for_kernel(parts, layout)
        grads = lora_quantised_bwd(dy, x, parts, *how, a, b, s, scale, dropout_p, seed, *need)
        return tuple(dy.new_empty(0) if g is None else g for g in grads)
    weight = QuantisedWeight.from_parts(parts, layout)
    with torch.autocast(dy.device.type, enabled=False):
        return _aten_bwd(dy, x, weight, a, b, s, seed, scale, dropout_p, need)


_lib.impl("lora_linear_quantised", _forward, "CompositeExplicitAutograd")
_lib.impl("lora_linear_quantised_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("fusedpeft::lora_linear_quantised")
def _(x, parts, layout, a, b, bias, seed, scale, dropout_p, impl):
    m = x.shape[0]
    return x.new_empty(m, layout[0]), a.new_empty(m, a.shape[0], dtype=_up(a))


@torch.library.register_fake("fusedpeft::lora_linear_quantised_backward")
def _(dy, x, parts, layout, a, b, s, seed, scale, dropout_p, need, impl):
    shapes = ((dy, (dy.shape[0], layout[1])), (a, a.shape), (b, b.shape), (dy, dy.shape[1:]))
    rows = zip(shapes, need, strict=True)
    return tuple(t.new_empty(shape if n else 0) for (t, shape), n in rows)


def _setup_context(ctx, inputs, output) -> None:
    x, parts, ctx.layout, a, b, _, seed, ctx.scale, ctx.dropout_p, ctx.impl = inputs
    count = len(parts)
    flat = ctx.needs_input_grad  # x, each of the parts, layout, a, b, bias, …
    ctx.need = [flat[0], flat[count + 2], flat[count + 3], flat[count + 4]]
    ctx.set_materialize_grads(False)
    x = x if ctx.need[1] else x.new_empty(0)
    s = output[1] if ctx.need[2] else x.new_empty(0)
    ctx.save_for_backward(x, a, b, s, seed, *parts)


def _gradients(ctx, dy: Tensor | None, _ds) -> tuple:
    x, a, b, s, seed, *parts = ctx.saved_tensors
    none = [None] * len(parts)
    if dy is None:
        return None, none, *(None,) * 8
    args = (dy, x, parts, ctx.layout, a, b, s, seed, ctx.scale, ctx.dropout_p, ctx.need, ctx.impl)
    grads = torch.ops.fusedpeft.lora_linear_quantised_backward(*args)
    dx, da, db, dbias = (g if n else None for g, n in zip(grads, ctx.need, strict=True))
    return dx, none, None, da, db, dbias, None, None, None, None


torch.library.register_autograd(
    "fusedpeft::lora_linear_quantised", _gradients, setup_context=_setup_context
)


def lora_quantised(
    x: Tensor, weight: QuantisedWeight, a: Tensor, b: Tensor, bias: Tensor | None,
    seed: Tensor | None, scale: float, dropout_p: float, impl: str,
) -> Tensor:  # fmt: skip
    """x [M, K] -> y [M, N]: what `ops.lora_linear` calls once all is checked. Saved: x, and S in
    fp32."""
    quick = impl in ("", "native") and native_here(x, weight, a, b, dropout_p)
    if quick and not _learns(x, a, b, bias):
        return native_decode(x, weight, a, b, bias, scale)
    if impl == "native" and not quick:
        raise ValueError(
            f"impl='native': expected <= {MAX_DECODE_TOKENS} rows on a CPU without dropout, of "
            "fp32, bf16 or fp16 with unit inner strides, adapters of the same dtype or fp32, got "
            f"{tuple(x.shape)} of {x.dtype}/{a.dtype} on {x.device}"
        )
    args = (weight.parts(), weight.layout, a, b, bias, seed, scale, dropout_p, impl)
    return torch.ops.fusedpeft.lora_linear_quantised(x, *args)[0]
