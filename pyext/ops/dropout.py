"""Counter-based dropout: the mask is a pure function of (seed, row, column), so it is never stored.

    key1 = mix(mix(row_lo ^ seed_lo) + seed_hi + row_hi),   key2 = mix(key1 ^ 0x9E3779B9)
    keep(row, col) = mix(mix(col + key1) ^ key2) >= floor(p * 2^32)

`mix` is the 32-bit "lowbias32" finaliser (C. Wellons, hash-prospector, 2018). Two keyed rounds give
each row a 64-bit key, so no two rows share a shifted stream. The Triton kernels and the CPU kernels
compute the same function; this file is its specification.
"""

from __future__ import annotations

import torch
from torch import Tensor

_U32 = 0xFFFFFFFF


def _mix(h: Tensor) -> Tensor:
    """lowbias32 on int64 tensors that hold uint32 values."""
    h = h ^ (h >> 16)
    h = (h * 0x7FEB352D) & _U32
    h = h ^ (h >> 15)
    # 0x846CA68B has the top bit set: the product may pass 2^63, but its low 32 bits stay exact.
    h = (h * 0x846CA68B) & _U32
    return h ^ (h >> 16)


def keep_mask_ref(rows: int, cols: int, p: float, seed: Tensor) -> Tensor:
    """bool [rows, cols], True where the element is kept (probability 1 - p). seed: int64, 1 element."""
    seed = seed.reshape(())
    row = torch.arange(rows, dtype=torch.int64, device=seed.device)
    col = torch.arange(cols, dtype=torch.int64, device=seed.device)
    key1 = _mix((row & _U32) ^ (seed & _U32))
    key1 = _mix((key1 + ((seed >> 32) & _U32) + (row >> 32)) & _U32)
    key2 = _mix(key1 ^ 0x9E3779B9)
    h = _mix((col[None, :] + key1[:, None]) & _U32)
    return _mix(h ^ key2[:, None]) >= int(p * 2**32)


def dropout_ref(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """x [M, K] -> x · keep / (1 - p), same dtype. p = 0 or no seed returns x itself."""
    if p == 0.0 or seed is None:
        return x
    mask = keep_mask_ref(x.shape[0], x.shape[1], p, seed.to(x.device))
    return torch.where(mask, x / (1.0 - p), 0.0).to(x.dtype)
