"""What the ops have in common in taking their arguments."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from fusedpeft.ops.native import DTYPE_CODES

_transforms_active = torch._C._are_functorch_transforms_active  # each decoded token asks


def device_of(x: object) -> str:
    """The device type by which a call is told; what is no tensor is left to the checks."""
    return x.device.type if isinstance(x, Tensor) else "cpu"


PLAIN = (Tensor, torch.nn.Parameter)


def is_plain(tensors: Iterable[Tensor]) -> bool:
    """Ordinary tensors in eager mode, whose memory can be handed on. Compilers and subclasses need
    the dispatcher, as does torch.jit's tracer: it sees no call into C++ and would keep what the
    call wrote as a constant."""
    return (
        all([type(t) in PLAIN for t in tensors])
        and not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
        and not transformed()
    )


def autocasts(device: str) -> bool:
    return device != "meta" and torch.is_autocast_enabled(device)


def autocast(device: str, *given: object) -> list:
    """As torch casts for its own products: floating tensors but fp64, and nothing else."""
    dtype = torch.get_autocast_dtype(device)
    return [
        t.to(dtype)
        if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64
        else t
        for t in given
    ]


def transformed() -> bool:
    """Whether torch.func (vmap, grad, jvp) or forward-mode AD is at work."""
    return _transforms_active() or forward_ad._current_level >= 0


def refuse_transforms(op: str) -> None:
    """Their tensors have no memory of their own, and tangents would be lost in silence."""
    if (_transforms_active() or forward_ad._current_level >= 0) and not is_compiling():
        raise NotImplementedError(
            f"{op}: expected plain autograd, got a transform of torch.func or forward-mode AD, for "
            f"which the op has no rule: ops.{op}_ref has"
        )


def check_number(name: str, value: object) -> None:
    """A finite number, or a tensor of one that no gradient is expected for."""
    if isinstance(value, Tensor) and value.requires_grad:
        raise TypeError(f"{name}: expected a number, got a Tensor that requires a gradient")
    try:
        found = float(value if not isinstance(value, str) else None)
    except (TypeError, ValueError, RuntimeError):
        kind = type(value).__name__
        raise TypeError(f"{name}: expected a number, got {value!r} ({kind})") from None
    if not -math.inf < found < math.inf:  # isfinite takes no symbol of a compiler
        raise ValueError(f"{name}: expected a finite number, got {found}")


def check_probability(name: str, value: object) -> None:
    check_number(name, value)
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name}: expected 0 <= p < 1, got {value}")


def check_triton(t: Tensor) -> None:
    """What impl="triton" asks of the tensors' device and dtype."""
    if t.dtype not in DTYPE_CODES:
        raise TypeError(f"impl='triton': expected fp32, bf16 or fp16, got {t.dtype}; use 'aten'")
    if not t.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"impl='triton': expected CUDA tensors, got {t.device.type}; use 'aten' or None"
        )
