"""The GEMM that carries a low-rank update: forward's y and backward's dx are both this kernel.

    out[M, N] = x[M, K] Wt[K, N] + bias + drop(scale · s[M, R] Bt[R, N])   (+ out: ACCUMULATE)

Forward: W as given, s = drop(x)Aᵀ, B as given, no mask on the update. Backward dx: x is dy, W and
A enter by their transposed strides, s is dy·B, and the update takes the mask of (row, column).

The update is summed first, masked, and the K loop then accumulates on top of it: one accumulator,
with or without dropout, where a masked update added at the end would need a second. Two exceptions
without a mask. FUSE_S: the K loop also makes s = x Aᵀ from the tile of x that it holds, and the
update comes last. HOLD: where a block has its SM to itself, nobody covers the wait for s and B, so
these are loaded into registers, the K loop starts, and the update comes last.

Two kernels. `_lora_gemm_kernel` loads by pointers: any strides, any chip. `_lora_gemm_tma_kernel`
is Hopper's for large products: a block an SM walks its tiles one after the other, x, W and out move
by TMA, which needs one thread where pointers need an address for every 16 bytes, and the update is
held. It has no mask and makes no s.
Blocks walk in groups of GROUP_M rows so that their tiles of W and x meet in L2.
FLOPs 2·M·N·(K + R); bytes at least (M·K + N·K + M·N)·elem.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fusedpeft.kernels.device import SMS, on_device
from fusedpeft.kernels.dropout import keep_mask, signed_threshold


@triton.jit
def _block_of(
    tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr
):  # fmt: skip
    """(block of rows, block of columns): GROUP_M rows of blocks walk over the columns together."""
    per_group = GROUP_M * tl.cdiv(N, BLOCK_N)
    first_m = (tile // per_group) * GROUP_M
    group_m = min(tl.cdiv(M, BLOCK_M) - first_m, GROUP_M)
    return first_m + (tile % per_group) % group_m, (tile % per_group) // group_m


@triton.jit(do_not_specialize=["threshold"])
def _lora_gemm_kernel(
    x_ptr, w_ptr, a_ptr, b_ptr, bias_ptr, s_ptr, out_ptr, seed_ptr,
    scale, threshold, keep_scale,
    M, N, K, R, first_col,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_ar, stride_ak, stride_bn, stride_br,
    stride_sm, stride_om,
    HAS_BIAS: tl.constexpr, FUSE_S: tl.constexpr, DROPOUT: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr, HOLD: tl.constexpr,
):  # fmt: skip
    pid_m, pid_n = _block_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
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
        # Zeros beyond R come after the loop: untouched, B would go to shared memory at once, and
        # the first tile of the loop would be asked for when B is there.
        b_held = tl.load(b_ptrs, mask=(rs < R)[:, None])  # [BLOCK_R, BLOCK_N]
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
        keep = keep_mask(seed_ptr, rows, first_col + cols, threshold)
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
    if HOLD:
        b_held = tl.where((rs < R)[:, None], b_held, 0.0)
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


@triton.jit
def _lora_gemm_tma_kernel(
    x_desc, w_desc, out_desc, b_ptr, bias_ptr, s_ptr,
    scale,
    M, N, K, R,
    stride_bn, stride_br, stride_sm,
    HAS_BIAS: tl.constexpr, W_IS_NK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_OUT: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """out = x Wt + bias + scale · s Bt. W_IS_NK: w_desc is over [N, K], else over [K, N].

    TMA reads zeros past the ends and writes nothing there. BLOCK_OUT = BLOCK_N / 2 columns are
    stored at once.
    """
    dtype: tl.constexpr = x_desc.dtype
    rs = tl.arange(0, BLOCK_R)
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        pid_m, pid_n = _block_of(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        row = pid_m * BLOCK_M
        col = pid_n * BLOCK_N
        cols = col + tl.arange(0, BLOCK_N)
        rows64 = ((row + tl.arange(0, BLOCK_M)) % M).to(tl.int64)
        cols64 = (cols % N).to(tl.int64)
        s_ptrs = s_ptr + rows64[:, None] * stride_sm + rs[None, :]
        b_ptrs = b_ptr + cols64[None, :] * stride_bn + rs[:, None] * stride_br
        b_held = tl.load(b_ptrs, mask=(rs < R)[:, None])  # [BLOCK_R, BLOCK_N], zeros: see above
        s_held = tl.load(s_ptrs, mask=(rs < R)[None, :], other=0.0)  # [BLOCK_M, BLOCK_R]

        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k0 in range(0, K, BLOCK_K):
            x = x_desc.load([row, k0])  # [BLOCK_M, BLOCK_K]
            if W_IS_NK:
                w = w_desc.load([col, k0]).T  # [BLOCK_K, BLOCK_N]
            else:
                w = w_desc.load([k0, col])
            acc = tl.dot(x, w, acc)

        s_held = (s_held.to(tl.float32) * scale).to(dtype)
        b_held = tl.where((rs < R)[:, None], b_held, 0.0)
        acc = tl.dot(s_held, b_held.to(dtype), acc)
        for r0 in tl.range(BLOCK_R, R, BLOCK_R, num_stages=1):
            r_ok = r0 + rs < R
            s = tl.load(s_ptrs + r0, mask=r_ok[None, :], other=0.0)
            b = tl.load(b_ptrs + r0 * stride_br, mask=r_ok[:, None], other=0.0)
            s = (s.to(tl.float32) * scale).to(dtype)
            acc = tl.dot(s, b.to(dtype), acc)
        if HAS_BIAS:
            acc += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
        # In halves: the whole tile would not fit beside the stages of the K loop.
        halves = tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_OUT)), (0, 2, 1))
        left, right = tl.split(halves)  # [BLOCK_M, BLOCK_OUT] each
        out_desc.store([row, col], left.to(dtype))
        out_desc.store([row, col + BLOCK_OUT], right.to(dtype))


def tma_ok(*matrices: Tensor) -> bool:
    """Whether TMA can address them: rows without gaps inside, each at a multiple of 16 bytes."""
    return all(
        t.stride(1) == 1
        and t.stride(0) >= t.shape[1]
        and t.stride(0) * t.element_size() % 16 == 0
        and t.data_ptr() % 16 == 0
        for t in matrices
    )


def _blocks(x: Tensor) -> int:
    """Of a persistent kernel with one on each SM; the table's chip in the interpreter."""
    if x.is_cuda:
        return torch.cuda.get_device_properties(x.device).multi_processor_count
    return SMS["sm_90"]


def _lora_gemm_tma(
    x: Tensor, wt: Tensor, bt: Tensor, s: Tensor, out: Tensor, scale: float, tile: dict,
    bias: Tensor | None,
) -> None:  # fmt: skip
    (M, K), N, R = x.shape, wt.shape[1], bt.shape[0]
    block_m, block_n, block_k = (tile[f"BLOCK_{d}"] for d in "MNK")
    w_is_nk = wt.stride(0) == 1
    w, w_block = (wt.t(), [block_n, block_k]) if w_is_nk else (wt, [block_k, block_n])
    grid = (min(triton.cdiv(M, block_m) * triton.cdiv(N, block_n), _blocks(x)),)
    with on_device(x):
        _lora_gemm_tma_kernel[grid](
            TensorDescriptor.from_tensor(x, [block_m, block_k]),
            TensorDescriptor.from_tensor(w, w_block),
            TensorDescriptor.from_tensor(out, [block_m, tile["BLOCK_OUT"]]),
            bt, out if bias is None else bias, s,
            scale,
            M, N, K, R,
            bt.stride(1), bt.stride(0), s.stride(0),
            HAS_BIAS=bias is not None, W_IS_NK=w_is_nk, **tile,
        )  # fmt: skip


def lora_gemm(
    x: Tensor, wt: Tensor, at: Tensor, bt: Tensor, s: Tensor, out: Tensor, scale: float,
    config: dict, *, tma: dict | None = None, bias: Tensor | None = None, fuse_s: bool = False,
    dropout_p: float = 0.0, seed: Tensor | None = None, first_col: int = 0,
    accumulate: bool = False,
) -> None:  # fmt: skip
    """out = x @ wt + bias + drop(scale · s @ bt), shapes [M,K] [K,N] [K,R] [R,N] [M,R] -> [M,N].

    All strides free but those of `s` and `out`, whose rows are contiguous. With fuse_s, s = x @ at
    is written too; else it is read. accumulate adds to what `out` holds. first_col: where `out`
    begins in the matrix that the dropout mask is of. Needs M, N ≥ 1; R may be 0. config: the tile
    of the pointer kernel. tma: of the TMA kernel, or None; where strides or addresses are not
    TMA's, or the call asks for more than that kernel does, the pointer kernel runs.
    """
    plain = not (fuse_s or accumulate or dropout_p > 0.0)
    if tma and plain and tma_ok(x, wt.t() if wt.stride(0) == 1 else wt, out):
        _lora_gemm_tma(x, wt, bt, s, out, scale, tma, bias)
        return
    (M, K), N, R = x.shape, wt.shape[1], bt.shape[0]
    dropout = dropout_p > 0.0
    grid = (triton.cdiv(M, config["BLOCK_M"]) * triton.cdiv(N, config["BLOCK_N"]),)
    with on_device(x):
        _lora_gemm_kernel[grid](
            x, wt, at, bt, out if bias is None else bias, s, out, seed if dropout else out,
            scale, signed_threshold(dropout_p), 1.0 / (1.0 - dropout_p),
            M, N, K, R, first_col,
            x.stride(0), x.stride(1), wt.stride(1), wt.stride(0), at.stride(1), at.stride(0),
            bt.stride(1), bt.stride(0), s.stride(0), out.stride(0),
            HAS_BIAS=bias is not None, FUSE_S=fuse_s, DROPOUT=dropout,
            ACCUMULATE=accumulate, **config,
        )  # fmt: skip
