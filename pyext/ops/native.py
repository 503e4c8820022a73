"""The compiled extension as the ops see it."""

from __future__ import annotations

import importlib

import torch

try:
    native = importlib.import_module("fusedpeft._C")
except ModuleNotFoundError:  # a source tree that was never built; `fusedpeft doctor` reports it
    native = None

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
