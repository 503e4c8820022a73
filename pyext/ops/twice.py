"""Gradients through which autograd goes back again.

The kernels' backward is not a graph: what it keeps are constants. Where a graph is asked for
(create_graph=True: penalties on gradients, Hessians), a node's gradients come from the op's
specification instead, made anew in plain torch at its price.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def asked() -> bool:
    """Within a backward."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def gradients(
    reference: Callable[..., Tensor | Sequence[Tensor]],
    inputs: Sequence[Tensor | None],
    need: Sequence[bool],
    dys: Tensor | Sequence[Tensor],
) -> tuple[Tensor | None, ...]:
    """dyᵀ ∂reference(*inputs) / ∂input for each that needs it, else None."""
    with torch.enable_grad():
        # Views: one tensor may come as two inputs, each with a gradient of its own.
        own = [None if t is None else t.view_as(t) for t in inputs]
        ys = reference(*own)
        wanted = [t for t, n in zip(own, need, strict=True) if n]
        found = iter(torch.autograd.grad(ys, wanted, dys, create_graph=True, allow_unused=True))
    return tuple(next(found) if n else None for n in need)
