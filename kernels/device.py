"""What the tables and launchers of every op share: the chips, which table a device takes, the
device that a launch goes to. No triton needed."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

ARCHS = ("sm_80", "sm_90", "gfx942")
SMS = {"sm_80": 108, "sm_90": 132, "gfx942": 304}  # SMs or CUs of the largest chip
SUM_CONFIG = dict(BLOCK=1024, num_warps=4, num_stages=1)  # of sums.py, for every op's table


def arch_of(device: torch.device) -> str:
    """The table that `device` takes. Chips with 99 KiB of shared memory take sm_80's."""
    if device.type != "cuda":
        return "sm_80"  # the interpreter
    if torch.version.hip is not None:
        return "gfx942"
    return "sm_90" if torch.cuda.get_device_capability(device)[0] in (9, 10) else "sm_80"


def on_device(t: Tensor) -> contextlib.AbstractContextManager:
    """Launches go to the current device: make it the tensor's."""
    return torch.cuda.device(t.device) if t.is_cuda else contextlib.nullcontext()
