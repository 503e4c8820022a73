"""The norm that DoRA divides by (Liu et al. 2024, eq. 5 and §4.3), B·A never formed:

    ‖w_n + s·b_n A‖² = ‖w_n‖² + 2s · b_n·(W Aᵀ)_n + s² · b_n (A Aᵀ) b_nᵀ      w_n, b_n rows of W, B

It reads all of W, and changes only when a parameter does: it is kept until then, once per B. Micro-
batches, recomputation under checkpointing and generation take it from there. That a parameter has
changed is seen by its version, its address and its owner; fused optimisers leave all three as they
were, so a step of any torch.optim.Optimizer forgets every norm. Writes through `.data` (averaged
weights) leave no trace either: on a CPU sums over A, B and some of W tell, on a GPU, which would
have to be waited for, `forget_norms` is to be called.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

from fusedpeft.ops.arguments import PLAIN
from fusedpeft.ops.quantised import QuantisedWeight


class _Kept(NamedTuple):
    owners: list[weakref.ref]
    state: tuple
    norm: Tensor


_kept = WeakIdKeyDictionary()  # B -> _Kept; gone when B is


def forget_norms(*_: object) -> None:
    """For code that writes parameters on a GPU without a trace: through `.data`, or by replaying a
    CUDA graph that an optimiser steps in."""
    _kept.clear()


register_optimizer_step_post_hook(forget_norms)


def _norm(w: Tensor | QuantisedWeight, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """‖W + scale·B A‖ by row, in fp32 at least; W in 4 or 8 bits some rows at a time."""
    if isinstance(w, QuantisedWeight):
        dtype = torch.promote_types(a.dtype, torch.float32)
        return torch.cat([_norm(rows, a, b[at], scale) for at, rows in w.chunks(dtype)])
    wf, af, bf = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (w, a, b))
    cross = (bf * (wf @ af.t())).sum(1)
    quad = ((bf @ (af @ af.t())) * bf).sum(1)
    alone = wf.square().sum(1)
    # Where s·BA all but cancels W the sum is no better than this, and may fall below zero.
    least = torch.finfo(alone.dtype).eps * alone
    return (alone + 2 * scale * cross + scale**2 * quad).maximum(least).sqrt()


def _unknowable(t: Tensor) -> bool:
    """No version to go by; or a CUDA graph is being captured, whose replays must make the norm."""
    return type(t) not in PLAIN or t.is_inference() or (t.is_cuda and _capturing())


def _capturing() -> bool:
    return torch.cuda.is_current_stream_capturing()


def _owner(t: Tensor) -> Tensor:
    """The tensor that lives on: a view such as `weight.t()` is made for each call."""
    return t if t._base is None else t._base


def _looks(tensors: list[Tensor]) -> tuple[float, ...]:
    """What a CPU can read of the values in some microseconds: of A and B, the last two, all."""
    if not tensors[-1].is_cpu:
        return ()
    *ws, a, b = tensors
    parts = [t for t in (a, b) for t in (t, t.abs())]
    for w in ws:
        if w.ndim == 2:
            n, k = (max(1, size // 16) for size in w.shape)
            parts.append(w[::n, ::k])
    return tuple(torch.stack([t.sum(dtype=torch.float64) for t in parts]).tolist())


def _kept_norm(w: Tensor | QuantisedWeight, a: Tensor, b: Tensor, scale: float) -> Tensor:
    tensors = [*(w.tensors() if isinstance(w, QuantisedWeight) else [w]), a, b]
    if torch.compiler.is_compiling() or any(map(_unknowable, tensors)):
        return _norm(w, a, b, scale)
    owners, key = [_owner(t) for t in tensors], _owner(b)
    state = (scale, *((t._version, t.data_ptr(), t.shape, t.stride()) for t in tensors))
    state += _looks(tensors)
    kept = _kept.get(key)
    if kept is not None and kept.state == state:
        if all(ref() is t for ref, t in zip(kept.owners, owners, strict=True)):
            return kept.norm
    norm = _norm(w, a, b, scale)
    _kept[key] = _Kept([weakref.ref(t) for t in owners], state, norm)
    return norm


def dora_factor(
    w: Tensor | QuantisedWeight, a: Tensor, b: Tensor, scale: float, magnitude: Tensor
) -> Tensor:
    """magnitude / ‖W + scale·B A‖ by row; the norm is a constant to autograd."""
    device = "cpu" if a.is_meta else a.device.type  # there is no autocast on meta
    with torch.no_grad(), torch.autocast(device, enabled=False):
        norm = _kept_norm(w, a, b, scale)
    return magnitude / norm
