"""Linear log-prob with u on Hopper: the two products of a chunk in tiles of 128 × 256, the head by
TMA.

What linear_logprob_kernels.py does by pointers, in tiles twice as wide, for a head without bias or
softcap. There 256 columns spill in every epilogue. Here W and p need no address for every 16 bytes,
exp takes half a tile at a time, each half with a reference of its own, and the accumulator is read
back by quarters after the products instead of before them. h comes by pointers, as its rows are
taken through `order`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fusedpeft.kernels.device import on_device
from fusedpeft.kernels.linear_logprob_kernels import (
    _GATHERED,
    _SIZES,
    NEVER,
    _block,
    _load_halves,
    _move_reference,
    _store_halves,
)
from fusedpeft.kernels.lora_gemm import tma_ok


@triton.jit
def _halves(x):
    """x [M, N] -> its left and right [M, N / 2]."""
    m: tl.constexpr = x.shape[0]
    half: tl.constexpr = x.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(x, (m, 2, half)), (0, 2, 1)))


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_GATHERED)
def _linear_logprob_logits_tma_kernel(
    h_ptr, w_desc, p_desc, order_ptr, count_ptr, labels_ptr, label_z_ptr,
    ref_ptr, top_ptr, total_ptr, inv_temperature, jump,
    row0, M, v0, N, H, stride_hm, stride_tm,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    HALF: tl.constexpr,
):  # fmt: skip
    """p [M, N] = exp(z − top), its sums and references by HALF = BLOCK_N / 2 words: `KEEP` there.

    H is a multiple of BLOCK_K. Rows that do not count leave a p that nobody uses.
    """
    dtype: tl.constexpr = h_ptr.dtype.element_ty
    pid_m, pid_n = _block(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    count = tl.load(count_ptr)
    if row0 + pid_m * BLOCK_M >= count:
        return
    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = (rows < M) & (row0 + rows < count)
    source = tl.load(order_ptr + row0 + rows, mask=row_ok, other=0)  # int64
    h_ptrs = h_ptr + source[:, None] * stride_hm + tl.arange(0, BLOCK_K)[None, :]
    z = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k0 in range(0, H, BLOCK_K):
        h = tl.load(h_ptrs, mask=row_ok[:, None], other=0.0)  # [BLOCK_M, BLOCK_K]
        w = w_desc.load([v0 + pid_n * BLOCK_N, k0]).T  # [BLOCK_K, BLOCK_N]
        z = tl.dot(h, w, z)
        h_ptrs += BLOCK_K

    label = tl.load(labels_ptr + source, mask=row_ok, other=-1) - v0
    ref = tl.load(ref_ptr + rows, mask=row_ok, other=NEVER)
    left, right = _halves(z)
    for half in tl.static_range(2):
        first = pid_n * BLOCK_N + half * HALF
        cols = first + tl.arange(0, HALF)
        y = (left if half == 0 else right) * inv_temperature
        y = tl.where((cols < N)[None, :], y, float("-inf"))
        here = (label >= first) & (label < tl.minimum(first + HALF, N))
        label_z = tl.sum(tl.where(cols[None, :] == label[:, None], y, 0.0), 1)
        tl.store(label_z_ptr + source, label_z, mask=row_ok & here)
        top = tl.max(y, 1)
        top = tl.where(top > ref + jump, top, ref)
        e = tl.exp(y - top[:, None])
        at = (2 * pid_n + half).to(tl.int64) * stride_tm + rows
        tl.store(top_ptr + at, top, mask=row_ok)
        tl.store(total_ptr + at, tl.sum(e, 1), mask=row_ok)
        p_desc.store([pid_m * BLOCK_M, first], e.to(dtype))


@triton.jit(do_not_specialize=[*_SIZES, "first"])
def _linear_logprob_sum_tma_kernel(
    p_desc, w_desc, order_ptr, count_ptr, hi_ptr, lo_ptr,
    ref_ptr, sum_ptr, next_ref_ptr, next_sum_ptr, top_ptr, total_ptr,
    row0, M, v0, N, H, first, tiles, stride_om, stride_tm,
    TILE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """acc[M, H] = acc · exp(ref − new) + p[M, N] · w[v0 + N, H]: `RESCALE` there, acc in halves."""
    dtype: tl.constexpr = p_desc.dtype
    pid_m, pid_n = _block(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(H, BLOCK_N), GROUP_M)
    count = tl.load(count_ptr)
    if row0 + pid_m * BLOCK_M >= count:
        return
    row = pid_m * BLOCK_M
    col = pid_n * BLOCK_N
    rows = row + tl.arange(0, BLOCK_M)
    row_ok = (rows < M) & (row0 + rows < count)
    rows64 = tl.where(row_ok, rows, 0).to(tl.int64)
    new, shrink, jumped = _move_reference(
        ref_ptr, sum_ptr, next_ref_ptr, next_sum_ptr, top_ptr, total_ptr, rows, row_ok,
        tiles, stride_tm, pid_n == 0,
    )  # fmt: skip

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if jumped != 0:
        for k0 in range(0, N, BLOCK_K):
            p = p_desc.load([row, k0])
            w = w_desc.load([v0 + k0, col])
            top = tl.load(top_ptr + (k0 // TILE) * stride_tm + rows64)
            p = (p.to(tl.float32) * tl.exp(top - new)[:, None]).to(dtype)
            acc = tl.dot(p, w, acc)
    else:
        for k0 in range(0, N, BLOCK_K):
            p = p_desc.load([row, k0])  # [BLOCK_M, BLOCK_K]
            w = w_desc.load([v0 + k0, col])  # [BLOCK_K, BLOCK_N]
            acc = tl.dot(p, w, acc)

    target = tl.load(order_ptr + row0 + rows, mask=row_ok, other=0)
    left, right = _halves(acc)
    for half in tl.static_range(2):
        one, two = _halves(left if half == 0 else right)
        for quarter in tl.static_range(2):
            x = one if quarter == 0 else two
            cols = col + (2 * half + quarter) * (BLOCK_N // 4) + tl.arange(0, BLOCK_N // 4)
            ok = row_ok[:, None] & (cols < H)[None, :]
            hi_ptrs = hi_ptr + target[:, None] * stride_om + cols[None, :]
            lo_ptrs = lo_ptr + rows64[:, None] * H + cols[None, :]
            old = _load_halves(hi_ptrs, lo_ptrs, ok & (first == 0), True)
            _store_halves(hi_ptrs, lo_ptrs, x + old * shrink[:, None], ok)


def fits_tma(h: Tensor, w: Tensor, bias: Tensor | None, softcap: float, config: dict) -> bool:
    """Whether these kernels compute it."""
    whole = h.shape[1] % config["BLOCK_K"] == 0 and h.stride(1) == 1
    return whole and bias is None and softcap == 0.0 and tma_ok(w)


class ByTma:
    """The launches over chunks of one call. p [rows, columns]: a chunk's, used again and again."""

    def __init__(self, h: Tensor, w: Tensor, p: Tensor, logits: dict, total: dict):
        self.h, self.H, self.config = h, w.shape[1], (logits, total)
        m, n, k = (logits[f"BLOCK_{d}"] for d in "MNK")
        self.w_in = TensorDescriptor.from_tensor(w, [n, k])
        self.p_out = TensorDescriptor.from_tensor(p, [m, logits["HALF"]])
        m, n, k = (total[f"BLOCK_{d}"] for d in "MNK")
        self.p_in = TensorDescriptor.from_tensor(p, [m, k])
        self.w_by = TensorDescriptor.from_tensor(w, [k, n])

    def logits(
        self, order: Tensor, count: Tensor, labels: Tensor, label_z: Tensor, where: tuple,
        ref: Tensor, top: Tensor, total: Tensor, inv_temperature: float, jump: float,
    ) -> None:  # fmt: skip
        """where: first row, rows, first word, words."""
        config, (_, rows, _, columns) = self.config[0], where
        grid = (triton.cdiv(rows, config["BLOCK_M"]) * triton.cdiv(columns, config["BLOCK_N"]),)
        with on_device(self.h):
            _linear_logprob_logits_tma_kernel[grid](
                self.h, self.w_in, self.p_out, order, count, labels, label_z,
                ref, top, total, inv_temperature, jump,
                *where, self.H, self.h.stride(0), top.stride(0), **config,
            )  # fmt: skip

    def add_product(
        self, order: Tensor, count: Tensor, out: Tensor, lo: Tensor, where: tuple, first: bool,
        running: tuple[Tensor, ...], tiles: int,
    ) -> None:  # fmt: skip
        """out, lo += p · w; running: ref, sum, the next two, top and total of p."""
        config = self.config[1]
        grid = (triton.cdiv(where[1], config["BLOCK_M"]) * triton.cdiv(self.H, config["BLOCK_N"]),)
        with on_device(self.h):
            _linear_logprob_sum_tma_kernel[grid](
                self.p_in, self.w_by, order, count, out.view(torch.int16), lo, *running,
                *where, self.H, int(first), tiles, out.stride(0), running[4].stride(0), **config,
            )  # fmt: skip
