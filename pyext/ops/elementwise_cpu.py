"""What stands between the frozen products of a block, on a CPU in one pass each: RMSNorm, the gate
of an FFN and rotary positions (csrc/cpu/elementwise.h).

Eager torch makes seven passes of the first, two of the second and five of the third, and keeps what
most of them read for the gradients. Here x alone is kept, gate and up, or cos and sin; sums are in
fp32 and a result is rounded once.
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


def rotary_ref(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x1, x2 = x.chunk(2, -1)
    return x * cos.unsqueeze(1) + torch.cat((-x2, x1), -1) * sin.unsqueeze(1)


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

    gate, up [*] of one shape and dtype, contiguous, or without gradients two parts of such rows.
    Returns [*].
    """
    if not _runs_here((gate, up)) or gate.shape != up.shape or gate.ndim == 0:
        return None
    whole = gate.is_contiguous() and up.is_contiguous()
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        return _Gated.apply(gate, up, activation) if whole else None
    apart = None if whole else (_apart(gate), _apart(up))
    if apart is not None and None in apart:
        return None
    out = gate.new_empty(gate.shape)
    _gate(gate, up, None, out, None, activation, apart)
    return out


Weights = tuple[Tensor, Tensor | None]  # of a linear, and its bias


def gated_mlp(
    x: Tensor, gate: Weights, up: Weights, down: Weights, activation: str
) -> Tensor | None:
    """down(act(gate(x)) · up(x)) of three frozen linears, with the gradient of x alone, or None
    where that is eager torch's to compute: where x needs none, with a bias, else as of `rms_norm`.

    Beyond what `gated` saves: a buffer of the FFN's width in backward, the sum of two gradients.
    x [*, K], gate and up [I, K], down [N, I]. Returns [*, N].
    """
    weights = [w for w, _ in (gate, up, down)]
    if not (
        torch.is_grad_enabled()
        and x.requires_grad
        and gate[1] is up[1] is down[1] is None
        and _runs_here((x, *weights))
        and not any([w.requires_grad for w in weights])
        and x.is_contiguous()
    ):
        return None
    return _GatedMlp.apply(x, *weights, activation)[0]


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor] | None:
    """q and k turned by their tokens' positions (Su et al. 2021, "RoFormer", eq. 34), or None where
    that is eager torch's to compute, as of `rms_norm`; cos and sin do not learn.

        y1 = x1 cos1 - x2 sin1,  y2 = x2 cos2 + x1 sin2        of the halves of a token's D numbers

    q [B, H, T, D], k [B, HKV, T, D], cos and sin [B or 1, T, D], of one dtype. Returns as q and k,
    laid out as they are.
    """
    given = (q, k, cos, sin)
    if not _runs_here(given) or not q.ndim == k.ndim == 4 or not cos.ndim == sin.ndim == 3:
        return None
    (batch, _, tokens, dim), rows = q.shape, cos.shape[0]
    if not (
        k.shape[0::2] == (batch, tokens)
        and k.shape[3] == dim
        and cos.shape == sin.shape == (rows, tokens, dim)
        and rows in (1, batch)
        and dim % 2 == 0
        and all([t.stride(-1) == 1 for t in given])
    ):
        return None
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        return None
    return _rotated(q, cos, sin), _rotated(k, cos, sin)


def _runs_here(tensors: tuple[Tensor, ...]) -> bool:
    dtype = tensors[0].dtype
    return (
        native is not None
        and dtype in DTYPE_CODES
        and all([t.is_cpu and t.dtype == dtype and t.numel() > 0 for t in tensors])
        and is_plain(tensors)
        and not torch.is_autocast_enabled("cpu")
    )


def _takes(a: Tensor, b: Tensor) -> bool:
    return _runs_here((a, b)) and a.is_contiguous() and b.is_contiguous()


def _norm(x: Tensor, w: Tensor, dy: Tensor | None, eps: float, offset: float) -> Tensor:
    out, d = torch.empty_like(x), x.shape[-1]
    torch.get_num_threads()  # tells OpenMP in this thread what torch.set_num_threads said in any
    native.rms_norm(
        x.data_ptr(), w.data_ptr(), 0 if dy is None else dy.data_ptr(), out.data_ptr(),
        x.numel() // d, d, eps, offset, DTYPE_CODES[x.dtype],
    )  # fmt: skip
    return out


def _gate(
    gate: Tensor, up: Tensor, dy: Tensor | None, out: Tensor, dup: Tensor | None, activation: str,
    apart: tuple[int, int] | None = None,
) -> None:  # fmt: skip
    """apart: between rows of gate and of up; None: all is contiguous."""
    count = gate.numel()
    width, steps = (count, (count, count)) if apart is None else (gate.shape[-1], apart)
    torch.get_num_threads()
    native.gated(
        gate.data_ptr(), steps[0], up.data_ptr(), steps[1], 0 if dy is None else dy.data_ptr(),
        out.data_ptr(), 0 if dup is None else dup.data_ptr(), count // width, width,
        GATES[activation][0], DTYPE_CODES[gate.dtype],
    )  # fmt: skip


def _apart(t: Tensor) -> int | None:
    """How far apart the rows of t [*, d] lie, or None where that is not one distance."""
    if t.is_contiguous():
        return t.shape[-1]
    shape, strides = t.shape, t.stride()
    if t.ndim < 2 or strides[-1] != 1:
        return None
    even = [strides[i] == strides[i + 1] * shape[i + 1] for i in range(t.ndim - 2)]
    return strides[-2] if all(even) and strides[-2] >= shape[-1] else None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    if torch.is_grad_enabled() and x.requires_grad:
        return _Rotary.apply(x, cos, sin)
    return _turn(x, cos, sin, False)


def _turn(x: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> Tensor:
    (batch, heads, tokens, dim), out = x.shape, torch.empty_like(x)
    torch.get_num_threads()
    native.rotary(
        x.data_ptr(), x.stride()[:3], *_by_token(cos), *_by_token(sin), out.data_ptr(),
        out.stride()[:3], batch, heads, tokens, dim, backward, DTYPE_CODES[x.dtype],
    )  # fmt: skip
    return out


def _by_token(t: Tensor) -> tuple[int, tuple[int, int, int]]:
    of_batch, of_token, _ = t.stride()
    return t.data_ptr(), (of_batch if t.shape[0] > 1 else 0, 0, of_token)


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


class _GatedMlp(torch.autograd.Function):
    """Its results gate and up are for itself: second gradients go through them."""

    @staticmethod
    def forward(ctx, x: Tensor, wg: Tensor, wu: Tensor, wd: Tensor, activation: str):
        rows = x.view(-1, x.shape[-1])
        gate, up = torch.mm(rows, wg.t()), torch.mm(rows, wu.t())
        h = torch.empty_like(gate)
        _gate(gate, up, None, h, None, activation)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(gate, up, wg, wu, wd)
        ctx.shape, ctx.activation = x.shape, activation
        return torch.mm(h, wd.t()).view(*x.shape[:-1], -1), gate, up

    @staticmethod
    def backward(ctx, dy: Tensor | None, dgate: Tensor | None, dup: Tensor | None):
        gate, up, wg, wu, wd = ctx.saved_tensors
        if dy is not None:
            dh = torch.mm(dy.reshape(-1, len(wd)), wd)
            if twice.asked():
                made = twice.gradients(
                    lambda g, u: gated_ref(g, u, ctx.activation), (gate, up), (True, True), dh
                )
            else:
                made = dh, torch.empty_like(dh)
                _gate(gate, up, dh, *made, ctx.activation)  # gate's in dh's place
            pairs = zip(made, (dgate, dup), strict=True)
            dgate, dup = (a if b is None else a + b for a, b in pairs)
        dx = None
        for d, w in ((dgate, wg), (dup, wu)):
            if d is not None:
                dx = torch.mm(d, w) if dx is None else dx.addmm_(d, w)
        return None if dx is None else dx.view(ctx.shape), None, None, None, None


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, False)

    @staticmethod
    def backward(ctx, dy: Tensor):
        cos, sin = ctx.saved_tensors
        if twice.asked():  # linear: any x does
            x = torch.zeros_like(dy).requires_grad_()
            (dx,) = twice.gradients(lambda x: rotary_ref(x, cos, sin), (x,), (True,), dy)
        else:
            dx = _turn(dy if dy.stride(-1) == 1 else dy.contiguous(), cos, sin, True)
        return dx, None, None
