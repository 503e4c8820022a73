"""LoRA linear, forward, for training and prefill (Hu et al. 2021, "LoRA", §4.1).

    y[M,N] = x Wᵀ + bias + scale · S Bᵀ,  S[M,R] = drop(x) Aᵀ    x [M,K] W [N,K] A [R,K] B [N,R]

1. shrink: S in one pass over x, the dropout mask recomputed from (seed, row, column).
2. GEMM: [scale·S | x]·[B | W]ᵀ, R more of K in the same accumulator (lora_gemm.py).
Where it pays, S is made inside the GEMM's K loop and there is one launch.
Which of the two, at M 8192, K = N = 4096, R 16 in bf16 on a chip of 790 TFLOP/s and 4.3 TB/s: the
GEMM is 275 GFLOP, 348 µs. A shrink kernel reads x once more, 67 MB, 15.6 µs (4.5 %). In the loop
it costs 2·M·K·16 FLOP *per column of blocks*: 16/256 of the GEMM, 21.7 µs (6.3 %), and maybe twice
that, as products 16 wide leave the tensor cores waiting for shared memory. The loop wins where
columns of blocks are few (N/256 · 1.4 µs against 15.6 µs: N ≤ 1024, with a margin), and up to 64
tokens, where W's bytes are the floor and a launch is not free. Dropout needs a second, masked copy
of the tile and always takes the shrink kernel. Saved for backward: x and S.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedpeft.kernels.aligned import aligned, cut
from fusedpeft.kernels.device import arch_of, on_device
from fusedpeft.kernels.dropout import keep_mask, signed_threshold
from fusedpeft.kernels.lora_bwd import lora_bwd
from fusedpeft.kernels.lora_gemm import lora_gemm
from fusedpeft.kernels.lora_tables import lora_bwd_config, lora_configs, lora_fwd_config

__all__ = ["lora_bwd", "lora_bwd_config", "lora_configs", "lora_fwd", "lora_fwd_config"]


@triton.jit(do_not_specialize=["threshold"])
def _lora_shrink_kernel(
    x_ptr, a_ptr, s_ptr, seed_ptr, threshold, keep_scale,
    M, K, R,
    stride_xm, stride_xk, stride_ar, stride_ak, stride_sm,
    DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """s[M, R] = drop(x)[M, K] · a[R, K]ᵀ; a block owns BLOCK_M rows and all of K."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rs = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    ks = tl.arange(0, BLOCK_K)
    row_ok = rows < M
    r_ok = rs < R
    x_ptrs = x_ptr + rows.to(tl.int64)[:, None] * stride_xm + ks[None, :] * stride_xk
    a_ptrs = a_ptr + rs.to(tl.int64)[None, :] * stride_ar + ks[:, None] * stride_ak
    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k_ok = ks < K - k0
        x = tl.load(x_ptrs, mask=row_ok[:, None] & k_ok[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        a = tl.load(a_ptrs, mask=k_ok[:, None] & r_ok[None, :], other=0.0)  # [BLOCK_K, BLOCK_R]
        if DROPOUT:
            keep = keep_mask(seed_ptr, rows, k0 + ks, threshold)
            x = tl.where(keep, x.to(tl.float32) * keep_scale, 0.0).to(dtype)
        acc = tl.dot(x, a.to(dtype), acc, input_precision="ieee")
        x_ptrs += BLOCK_K * stride_xk
        a_ptrs += BLOCK_K * stride_ak
    s_ptrs = s_ptr + rows.to(tl.int64)[:, None] * stride_sm + rs[None, :]
    tl.store(s_ptrs, acc.to(s_ptr.dtype.element_ty), mask=row_ok[:, None] & r_ok[None, :])


def shrink(x: Tensor, a: Tensor, s: Tensor, dropout_p: float, seed: Tensor | None, config) -> None:
    """s = drop(x) aᵀ."""
    (M, K), R = x.shape, a.shape[0]
    dropout = dropout_p > 0.0
    grid = (triton.cdiv(M, config["BLOCK_M"]), triton.cdiv(R, config["BLOCK_R"]))
    with on_device(x):
        _lora_shrink_kernel[grid](
            x, a, s, seed if dropout else s, signed_threshold(dropout_p), 1.0 / (1.0 - dropout_p),
            M, K, R,
            x.stride(0), x.stride(1), a.stride(0), a.stride(1), s.stride(0),
            DROPOUT=dropout, **config,
        )  # fmt: skip


def lora_fwd(
    x: Tensor,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(y [M,N] in x's dtype, S [M,R] in the adapter's dtype), both fresh.

    x [M,K] and w [N,K] share fp32, bf16 or fp16; a [R,K] and b [N,R] share that or fp32 (cast to
    x's dtype for the tensor cores). Any strides. seed: int64 [1] on the device, read if
    dropout_p > 0.
    """
    M, n, R = x.shape[0], w.shape[0], a.shape[0]
    s = torch.empty((M, R), dtype=a.dtype, device=x.device)
    if M == 0 or n == 0:
        return x.new_empty(M, n), s.zero_()  # no output, so no gradient will read S
    x, w = aligned(x, 1), aligned(w, 0, 1)
    a, b, bias = aligned(a, 1), aligned(b, 0), aligned(bias, 0)
    N, K = w.shape
    y = torch.empty((M, N), dtype=x.dtype, device=x.device)
    cfg = lora_fwd_config(
        M, N, K, R, arch_of(x.device), dropout=dropout_p > 0.0, elem_bytes=x.element_size()
    )
    fuse = cfg["fuse_shrink"]
    if not fuse:
        shrink(x, a, s, dropout_p, seed, cfg["shrink"])
    args = (x, w.t(), a.t(), b.t(), s, y, scale, cfg["gemm"])
    lora_gemm(*args, tma=cfg["tma"], bias=bias, fuse_s=fuse)
    return cut(y, M, n), s
