"""What the checks under Triton's interpreter share."""

import math
import os

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch):
    """Every fresh buffer starts as NaN: an element that no kernel writes shows."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    empty = torch.empty

    def poisoned(*args, **kwargs):
        out = empty(*args, **kwargs)
        return out.fill_(math.nan) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", poisoned)
