"""The GEMM that carries a low-rank update: forward's y and backward's dx are both this kernel.

    out[M, N] = x[M, K] Wt[K, N] + bias + drop(scale · s[M, R] Bt[R, N])   (+ out: ACCUMULATE)

Forward: W as given, s = drop(x)Aᵀ, B as given, no mask on the update. Backward dx: x is dy, W and
A enter by their transposed strides, s is dy·B, and the update takes the mask of (row, column).

The update is summed first, masked, and the K loop then accumulates on top of it: one accumulator,
with or without dropout, where a masked update added at the end would need a second. Two exceptions
without a mask. FUSE_S: the K loop also makes s = x Aᵀ from the tile of x that it holds, and the
update comes last. HOLD: where a block has its SM to itself, nobody covers the wait for s and B, so
these are loaded into registers, the K loop starts, and the update comes last.
Blocks walk in groups of GROUP_M rows so that their tiles of W and x meet in L2.
FLOPs 2·M·N·(K + R); bytes at least (M·K + N·K + M·N)·elem.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fusedpeft.kernels.device import on_device
from fusedpeft.kernels.dropout import keep_mask, signed_threshold


@triton.jit(do_not_specialize=["threshold"])
def _lora_gemm_kernel(
    x_ptr, w_ptr, a_ptr, b_ptr, bias_ptr, s_ptr, out_ptr, seed_ptr,
    scale, threshold, keep_scale,
    M, N, K, R,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_ar, stride_ak, stride_bn, stride_br,
    stride_sm, stride_om,
    HAS_BIAS: tl.constexpr, FUSE_S: tl.constexpr, DROPOUT: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr, HOLD: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    blocks_m = tl.cdiv(M, BLOCK_M)
    blocks_n = tl.cdiv(N, BLOCK_N)
    per_group = GROUP_M * blocks_n
    first_m = (pid // per_group) * GROUP_M
    group_m = min(blocks_m - first_m, GROUP_M)
    pid_m = first_m + (pid % per_group) % group_m
    pid_n = (pid % per_group) // group_m

    dtype: tl.constexpr = x_ptr.dtype.element_ty
    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok = rows < M
    col_ok = cols < N
    # Rows and columns past the end wrap to valid ones: the K loop needs no mask for them.
    rows64 = (rows % M).to(tl.int64)
    cols64 = (cols % N).to(tl.int64)
    ks = tl.arange(0, BLOCK_K)
    rs = tl.arange(0, BLOCK_R)

    s_ptrs = s_ptr + rows64[:, None] * stride_sm + rs[None, :]
    b_ptrs = b_ptr + cols64[None, :] * stride_bn + rs[:, None] * stride_br
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    s_acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    if HOLD:  # the first step of the rank: it arrives behind the K loop
        b_held = tl.load(b_ptrs, mask=(rs < R)[:, None], other=0.0)  # [BLOCK_R, BLOCK_N]
        s_held = tl.load(s_ptrs, mask=(rs < R)[None, :], other=0.0)  # [BLOCK_M, BLOCK_R]
    if not FUSE_S:
        for r0 in tl.range(BLOCK_R if HOLD else 0, R, BLOCK_R, num_stages=1):
            r_ok = r0 + rs < R
            s = tl.load(s_ptrs + r0, mask=r_ok[None, :], other=0.0)
            b = tl.load(b_ptrs + r0 * stride_br, mask=r_ok[:, None], other=0.0)
            s = (s.to(tl.float32) * scale).to(dtype)
            acc = tl.dot(s, b.to(dtype), acc, input_precision="ieee")
    tl.static_assert(not (DROPOUT and (FUSE_S or HOLD)), "the mask is for what is summed first")
    if DROPOUT:
        keep = keep_mask(seed_ptr, rows, cols, threshold)
        acc = tl.where(keep, acc * keep_scale, 0.0)

    x_ptrs = x_ptr + rows64[:, None] * stride_xm + ks[None, :] * stride_xk
    w_ptrs = w_ptr + cols64[None, :] * stride_wn + ks[:, None] * stride_wk
    a_ptrs = a_ptr + rs[None, :] * stride_ar + ks[:, None] * stride_ak
    for k0 in range(0, K, BLOCK_K):
        k_ok = ks < K - k0
        x = tl.load(x_ptrs, mask=k_ok[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        w = tl.load(w_ptrs, mask=k_ok[:, None], other=0.0)  # [BLOCK_K, BLOCK_N]
        acc = tl.dot(x, w, acc, input_precision="ieee")
        if FUSE_S:
            a = tl.load(a_ptrs, mask=k_ok[:, None] & (rs < R)[None, :], other=0.0)
            s_acc = tl.dot(x, a.to(dtype), s_acc, input_precision="ieee")
            a_ptrs += BLOCK_K * stride_ak
        x_ptrs += BLOCK_K * stride_xk
        w_ptrs += BLOCK_K * stride_wk

    if FUSE_S:
        s_held = s_acc.to(s_ptr.dtype.element_ty)
        s_ptrs = s_ptr + rows.to(tl.int64)[:, None] * stride_sm + rs[None, :]
        tl.store(s_ptrs, s_held, mask=row_ok[:, None] & (rs < R)[None, :] & (pid_n == 0))
        b_held = tl.load(b_ptrs, mask=(rs < R)[:, None], other=0.0)
    if FUSE_S or HOLD:
        s_held = (s_held.to(tl.float32) * scale).to(dtype)
        acc = tl.dot(s_held, b_held.to(dtype), acc, input_precision="ieee")
    if HAS_BIAS:
        acc += tl.load(bias_ptr + cols, mask=col_ok, other=0.0).to(tl.float32)[None, :]
    out_ptrs = out_ptr + rows.to(tl.int64)[:, None] * stride_om + cols[None, :]
    out_ok = row_ok[:, None] & col_ok[None, :]
    if ACCUMULATE:
        acc += tl.load(out_ptrs, mask=out_ok, other=0.0).to(tl.float32)
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=out_ok)


def lora_gemm(
    x: Tensor, wt: Tensor, at: Tensor, bt: Tensor, s: Tensor, out: Tensor, scale: float,
    config: dict, *, bias: Tensor | None = None, fuse_s: bool = False,
    dropout_p: float = 0.0, seed: Tensor | None = None, accumulate: bool = False,
) -> None:  # fmt: skip
    """out = x @ wt + bias + drop(scale · s @ bt), shapes [M,K] [K,N] [K,R] [R,N] [M,R] -> [M,N].

    All strides free but those of `s` and `out`, whose rows are contiguous. With fuse_s, s = x @ at
    is written too; else it is read. accumulate adds to what `out` holds. Needs
    M, N ≥ 1; R may be 0.
    """
    (M, K), N, R = x.shape, wt.shape[1], bt.shape[0]
    dropout = dropout_p > 0.0
    grid = (triton.cdiv(M, config["BLOCK_M"]) * triton.cdiv(N, config["BLOCK_N"]),)
    with on_device(x):
        _lora_gemm_kernel[grid](
            x, wt, at, bt, out if bias is None else bias, s, out, seed if dropout else out,
            scale, signed_threshold(dropout_p), 1.0 / (1.0 - dropout_p),
            M, N, K, R,
            x.stride(0), x.stride(1), wt.stride(1), wt.stride(0), at.stride(1), at.stride(0),
            bt.stride(1), bt.stride(0), s.stride(0), out.stride(0),
            HAS_BIAS=bias is not None, FUSE_S=fuse_s, DROPOUT=dropout,
            ACCUMULATE=accumulate, **config,
        )  # fmt: skip
