"""Rows of a batch by the adapter that they take: see rows.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fusedpeft.errors import InputError


class Route(NamedTuple):
    """count: rows of the batch. groups: name -> its rows, an index."""

    count: int
    groups: dict[str, Tensor]


def check_rows(x: Tensor, count: int) -> None:
    if x.shape[0] != count:
        raise InputError(f"rows: expected a batch of {count}, as there are names, got {x.shape[0]}")


def route_of(names: Sequence[str | None] | None, device: torch.device) -> Route | None:
    if names is None:
        return None
    found: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        if name is not None:
            found.setdefault(name, []).append(row)
    return Route(len(names), {n: torch.tensor(r, device=device) for n, r in found.items()})
