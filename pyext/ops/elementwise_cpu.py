"""What stands between the frozen products of a block, on a CPU in one pass each: RMSNorm and the
gate of an FFN (csrc/cpu/elementwise.h).

Eager torch makes seven passes of the first and two of the second, and keeps what each of them read
for the gradients. Here x alone is kept, gate and up; sums are in fp32 and a result is rounded once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedpeft.ops import twice
from fusedpeft.ops.arguments import is_plain
from fusedpeft.ops.native import DTYPE_CODES, native

GATES: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {  # codes of csrc/cpu/cpu.h
    "gelu": (1, F.gelu),
    "gelu_tanh": (2, lambda x: F.gelu(x, approximate="tanh")),
    "silu": (3, F.silu),
}


def rms_norm_ref(x: Tensor, w: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * (w + offset)


def gated_ref(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return GATES[activation][1](gate) * up


def rms_norm(x: Tensor, w: Tensor, eps: float, offset: float = 0.0) -> Tensor | None:
    """x / √(mean(x²) + eps) · (w + offset) (Zhang and Sennrich 2019, eq. 4), or None where that is
    eager torch's to compute: for a weight that learns, on other devices, under autocast, for other
    dtypes and shapes.

    x [*, d], w [d] of one dtype (fp32, bf16, fp16), contiguous. Returns [*, d].
    """
    if not _takes(x, w) or w.shape != x.shape[-1:]:
        return None
    if torch.is_grad_enabled():
        if w.requires_grad:
            return None
        if x.requires_grad:
            return _RmsNorm.apply(x, w, eps, offset)
    return _norm(x, w, None, eps, offset)


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor | None:
    """act(gate) · up (Shazeer 2020, section 2), activation "silu", "gelu" or "gelu_tanh", or None
    where that is eager torch's to compute, as of `rms_norm`.

    gate, up [*] of one shape and dtype. Returns [*].
    """
    if not _takes(gate, up) or gate.shape != up.shape:
        return None
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        return _Gated.apply(gate, up, activation)
    out = torch.empty_like(gate)
    _gate(gate, up, None, out, None, activation)
    return out


def _takes(a: Tensor, b: Tensor) -> bool:
    return (
        native is not None
        and a.is_cpu
        and b.is_cpu
        and a.dtype == b.dtype
        and a.dtype in DTYPE_CODES
        and is_plain((a, b))
        and a.numel() > 0
        and a.is_contiguous()
        and b.is_contiguous()
        and not torch.is_autocast_enabled("cpu")
    )


def _norm(x: Tensor, w: Tensor, dy: Tensor | None, eps: float, offset: float) -> Tensor:
    out, d = torch.empty_like(x), x.shape[-1]
    torch.get_num_threads()  # tells OpenMP in this thread what torch.set_num_threads said in any
    native.rms_norm(
        x.data_ptr(), w.data_ptr(), 0 if dy is None else dy.data_ptr(), out.data_ptr(),
        x.numel() // d, d, eps, offset, DTYPE_CODES[x.dtype],
    )  # fmt: skip
    return out


def _gate(
    gate: Tensor, up: Tensor, dy: Tensor | None, out: Tensor, dup: Tensor | None, activation: str
) -> None:
    torch.get_num_threads()
    native.gated(
        gate.data_ptr(), up.data_ptr(), 0 if dy is None else dy.data_ptr(), out.data_ptr(),
        0 if dup is None else dup.data_ptr(), gate.numel(), GATES[activation][0],
        DTYPE_CODES[gate.dtype],
    )  # fmt: skip


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, eps: float, offset: float) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.numbers = eps, offset
        return _norm(x, w, None, eps, offset)

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, w = ctx.saved_tensors
        if twice.asked():
            (dx,) = twice.gradients(lambda x: rms_norm_ref(x, w, *ctx.numbers), (x,), (True,), dy)
        else:
            dx = _norm(x, w, dy.contiguous(), *ctx.numbers)
        return dx, None, None, None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation, out = activation, torch.empty_like(gate)
        _gate(gate, up, None, out, None, activation)
        return out

    @staticmethod
    def backward(ctx, dy: Tensor):
        inputs, need = ctx.saved_tensors, ctx.needs_input_grad[:2]
        if twice.asked():
            made = twice.gradients(lambda g, u: gated_ref(g, u, ctx.activation), inputs, need, dy)
            return *made, None
        grads = [torch.empty_like(t) for t in inputs]
        _gate(*inputs, dy.contiguous(), *grads, ctx.activation)
        return *(g if n else None for g, n in zip(grads, need, strict=True)), None
