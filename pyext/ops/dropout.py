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

from fusedpeft.ops.native import DTYPE_CODES, native

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
    """bool [rows, cols], True where kept (probability 1 - p). seed: int64, 1 element."""
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


def dropout(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """`dropout_ref` in one pass: C++ on a CPU, torch elsewhere. x [M, K], any strides."""
    if p == 0.0 or seed is None:
        return x
    if native is None or x.device.type != "cpu" or x.dtype not in DTYPE_CODES:
        return dropout_ref(x, p, seed)
    x = x if x.stride(1) == 1 else x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype)
    torch.get_num_threads()  # tells OpenMP in this thread what torch.set_num_threads said in any
    native.dropout(
        x.data_ptr(), out.data_ptr(), x.shape[0], x.shape[1], x.stride(0), out.stride(0),
        p, int(seed), DTYPE_CODES[x.dtype],
    )  # fmt: skip
    return out


def as_seed(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """An int64 tensor of one element on `device`; None draws from torch's generator.

    A tensor, not an int: no host synchronisation, no recompilation, capturable in a CUDA graph, and
    checkpointing, which restores the generator, sees the same mask again.
    """
    if seed is None:
        return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device)
    if isinstance(seed, int):
        return torch.tensor([seed], dtype=torch.int64, device=device)
    if not isinstance(seed, Tensor):
        raise TypeError(f"seed: expected an int, an int64 Tensor or None, got {seed!r}")
    if seed.dtype != torch.int64 or seed.numel() != 1:
        raise ValueError(f"seed: expected 1 int64 element, got {seed.numel()} of {seed.dtype}")
    return seed.to(device).reshape(1)
