"""Many LoRA adapters in one batch, by ATen: any number of rows. See multi_lora.py."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedpeft.ops.lora_cpu import wide, widens
from fusedpeft.ops.slots import LoRASlots, check_slots


def aten_fwd(x: Tensor, w: Tensor, pool: LoRASlots, slots: Tensor, bias: Tensor | None) -> Tensor:
    """Rows that share a slot together. Reads the slots, for which a GPU is waited for."""
    if widens(x):
        x_up, w_up, bias_up = wide(x, w, bias)
        with torch.autocast("cpu", enabled=False):
            return aten_fwd(x_up, w_up, pool, slots, bias_up).to(x.dtype)
    if not slots.is_cpu:
        slots, rank = slots.cpu(), pool.rank.cpu()
        check_slots(slots, x.shape[0], rank)
    y = F.linear(x, w, bias)
    dtype = torch.promote_types(x.dtype, pool.a.dtype)
    named, where = slots.unique(return_inverse=True)
    for i, slot in enumerate(named.tolist()):
        if slot < 0:
            continue
        rows = slice(None) if named.numel() == 1 else (where == i).nonzero()[:, 0].to(x.device)
        own, at = x[rows].to(dtype), 0
        for (a, b, scale), n in zip(pool.get(slot), pool.sizes, strict=True):
            update = F.linear(F.linear(own, a.to(dtype)), b.to(dtype)).mul_(scale)
            y[rows, at : at + n] += update.to(y.dtype)
            at += n
    return y
