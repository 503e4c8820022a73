"""The norm that DoRA divides by (Liu et al. 2024, eq. 5 and §4.3)."""

from __future__ import annotations

import torch
from torch import Tensor


def dora_factor(w: Tensor, a: Tensor, b: Tensor, scale: float, magnitude: Tensor) -> Tensor:
    """magnitude / ‖W + scale·B A‖ by row, B·A never formed; the norm is a constant to autograd."""
    with torch.no_grad():
        wf, af, bf = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (w, a, b))
        cross = (bf * (wf @ af.t())).sum(1)
        quad = ((bf @ (af @ af.t())) * bf).sum(1)
        norm = (wf.square().sum(1) + 2 * scale * cross + scale**2 * quad).sqrt()
    return magnitude / norm
