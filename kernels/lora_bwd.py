"""LoRA linear, backward. With T = dy·B (so dS = scale·T), all sums in a fixed order:

    dx = dy W + drop(scale · T A)    da = scale · Tᵀ drop(x)    db = scale · dyᵀ S    dbias = Σ_m dy

1. `_lora_dsdb_kernel`: T, db and dbias in one pass over dy. A block owns BLOCK_M rows and a part of
   N; T is summed over its columns in registers, db and dbias leave as one partial per row block.
2. `_lora_da_kernel`: da in one pass over x, one partial per part of M, the mask recomputed.
3. `ordered_sum` adds partials in order (no float atomics, so every run gives the same bits).
4. `lora_gemm`: dx, the update masked as x was.
A trainable base (dw = dyᵀ x) is rare and plain: it is left to torch.matmul.

At M 8192, K = N = 4096, R 16, bf16: dx 275 GFLOP; dy and x once more each (67 MB); partials of T
4.2 MB, db 8.4 MB, da 2.4 MB, each written and read once; from R 64 on db's cost a pass over dy.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedpeft.kernels.aligned import aligned, cut
from fusedpeft.kernels.device import arch_of, on_device
from fusedpeft.kernels.dropout import keep_mask, signed_threshold
from fusedpeft.kernels.lora_gemm import lora_gemm
from fusedpeft.kernels.lora_tables import lora_bwd_config
from fusedpeft.kernels.sums import ordered_sum


@triton.jit
def _lora_dsdb_kernel(
    dy_ptr, b_ptr, s_ptr, t_ptr, db_ptr, dbias_ptr,
    M, N, R, columns,
    stride_dym, stride_dyn, stride_bn, stride_br, stride_sm,
    NEED_DS: tl.constexpr, NEED_DB: tl.constexpr, NEED_DBIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """t[split, M, R], db[row block, N, R], dbias[row block, N], fp32; `columns` of N a split."""
    dtype: tl.constexpr = dy_ptr.dtype.element_ty
    pid_m = tl.program_id(0)
    split = tl.program_id(1)
    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    rs = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    row_ok = rows < M
    r_ok = rs < R
    rows64 = rows.to(tl.int64)
    if NEED_DB:
        s = tl.load(
            s_ptr + rows64[:, None] * stride_sm + rs[None, :],
            mask=row_ok[:, None] & r_ok[None, :], other=0.0,
        ).to(dtype)  # fmt: skip
    t = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    last = min(split * columns + columns, N)
    for n0 in range(split * columns, last, BLOCK_N):
        ns = n0 + tl.arange(0, BLOCK_N)
        n_ok = ns < last
        dy = tl.load(
            dy_ptr + rows64[:, None] * stride_dym + ns[None, :] * stride_dyn,
            mask=row_ok[:, None] & n_ok[None, :], other=0.0,
        )  # [BLOCK_M, BLOCK_N]  # fmt: skip
        if NEED_DS:
            b = tl.load(
                b_ptr + ns.to(tl.int64)[:, None] * stride_bn + rs[None, :] * stride_br,
                mask=n_ok[:, None] & r_ok[None, :], other=0.0,
            )  # [BLOCK_N, BLOCK_R]  # fmt: skip
            t = tl.dot(dy, b.to(dtype), t, input_precision="ieee")
        out = pid_m.to(tl.int64) * N + ns
        if NEED_DB:
            db = tl.dot(tl.trans(dy), s, input_precision="ieee")
            ok = n_ok[:, None] & r_ok[None, :]
            tl.store(db_ptr + out[:, None] * R + rs[None, :], db, mask=ok)
        if NEED_DBIAS:
            dbias = tl.sum(dy.to(tl.float32), axis=0)
            tl.store(dbias_ptr + out, dbias, mask=n_ok & (tl.program_id(2) == 0))
    if NEED_DS:
        t_ptrs = t_ptr + (split.to(tl.int64) * M + rows64)[:, None] * R + rs[None, :]
        tl.store(t_ptrs, t, mask=row_ok[:, None] & r_ok[None, :])


@triton.jit(do_not_specialize=["threshold", "M"])
def _lora_da_kernel(
    x_ptr, t_ptr, da_ptr, seed_ptr, threshold, keep_scale,
    M, K, R, rows_per_split,
    stride_xm, stride_xk,
    DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """da[split, R, K] = t[rows of the split, R]ᵀ · drop(x), fp32."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    split = tl.program_id(1)
    ks = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    rs = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    k_ok = ks < K
    r_ok = rs < R
    acc = tl.zeros((BLOCK_K, BLOCK_R), dtype=tl.float32)
    last = min(split * rows_per_split + rows_per_split, M)
    for m0 in range(split * rows_per_split, last, BLOCK_M):
        rows = m0 + tl.arange(0, BLOCK_M)
        row_ok = rows < last
        rows64 = rows.to(tl.int64)
        x = tl.load(
            x_ptr + rows64[:, None] * stride_xm + ks[None, :] * stride_xk,
            mask=row_ok[:, None] & k_ok[None, :], other=0.0,
        )  # [BLOCK_M, BLOCK_K]  # fmt: skip
        t = tl.load(
            t_ptr + rows64[:, None] * R + rs[None, :],
            mask=row_ok[:, None] & r_ok[None, :], other=0.0,
        )  # [BLOCK_M, BLOCK_R]  # fmt: skip
        if DROPOUT:
            keep = keep_mask(seed_ptr, rows, ks, threshold)
            x = tl.where(keep, x.to(tl.float32) * keep_scale, 0.0).to(dtype)
        acc = tl.dot(tl.trans(x), t.to(dtype), acc, input_precision="ieee")
    da_ptrs = da_ptr + (split.to(tl.int64) * R + rs)[:, None] * K + ks[None, :]
    tl.store(da_ptrs, tl.trans(acc), mask=r_ok[:, None] & k_ok[None, :])


def pass_over_dy(dy, b, s, need_t: bool, need_db: bool, need_dbias: bool, config, splits: int):
    """Partials (t [splits,M,R], db [row blocks,N,R], dbias [row blocks,N]) in fp32."""
    (M, N), R = dy.shape, b.shape[1]
    blocks = triton.cdiv(M, config["BLOCK_M"])
    columns = triton.cdiv(triton.cdiv(N, splits), config["BLOCK_N"]) * config["BLOCK_N"]
    splits = triton.cdiv(N, columns)
    fp32 = dict(dtype=torch.float32, device=dy.device)
    t = torch.empty((splits, M, R) if need_t else (0,), **fp32)
    db = torch.empty((blocks, N, R) if need_db else (0,), **fp32)
    dbias = torch.empty((blocks, N) if need_dbias else (0,), **fp32)
    with on_device(dy):
        _lora_dsdb_kernel[(blocks, splits, triton.cdiv(R, config["BLOCK_R"]))](
            dy, b, s, t, db, dbias,
            M, N, R, columns,
            dy.stride(0), dy.stride(1), b.stride(0), b.stride(1), s.stride(0),
            NEED_DS=need_t, NEED_DB=need_db, NEED_DBIAS=need_dbias, **config,
        )  # fmt: skip
    return t, db, dbias


def pass_over_x(x, t, dropout_p: float, seed: Tensor | None, config, splits: int) -> Tensor:
    """Partials of da [splits, R, K] in fp32."""
    (M, K), R = x.shape, t.shape[1]
    rows = triton.cdiv(triton.cdiv(M, splits), config["BLOCK_M"]) * config["BLOCK_M"]
    splits = triton.cdiv(M, rows)
    dropout = dropout_p > 0.0
    part = torch.empty((splits, R, K), dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(K, config["BLOCK_K"]), splits, triton.cdiv(R, config["BLOCK_R"]))
    with on_device(x):
        _lora_da_kernel[grid](
            x, t, part, seed if dropout else t,
            signed_threshold(dropout_p), 1.0 / (1.0 - dropout_p),
            M, K, R, rows,
            x.stride(0), x.stride(1),
            DROPOUT=dropout, **config,
        )  # fmt: skip
    return part


def lora_bwd(
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    s: Tensor,
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    need_dx: bool = True,
    need_dw: bool = False,
    need_da: bool = True,
    need_db: bool = True,
    need_dbias: bool = False,
) -> tuple[Tensor | None, ...]:
    """(dx [M,K], dw [N,K], da [R,K], db [N,R], dbias [N]), fresh, each in its parameter's dtype.

    None where not needed, and then not computed. dy [M,N]; x [M,K] and s [M,R] are forward's (x is
    not read unless dw or da is needed, s not unless db is). dbias comes in dy's dtype.
    """
    (M, N), (R, K) = dy.shape, a.shape
    if M == 0 or N == 0:
        shapes = ((need_dx, dy, (M, K)), (need_dw, w, (N, K)), (need_da, a, (R, K)))
        shapes += ((need_db, b, (N, R)), (need_dbias, dy, (N,)))
        return tuple(t.new_zeros(shape) if n else None for n, t, shape in shapes)
    dy, a, b = aligned(dy, 1), aligned(a, 1), aligned(b, 0)
    N16, K16 = dy.shape[1], a.shape[1]
    arch, dropout = arch_of(dy.device), dropout_p > 0.0
    cfg = lora_bwd_config(M, N16, K16, R, arch, dropout=dropout, elem_bytes=dy.element_size())
    need_t = need_dx or need_da
    dx = dw = da = db = dbias = t = None
    if need_t or need_db or need_dbias:
        parts = pass_over_dy(
            dy, b, s if need_db else dy, need_t, need_db, need_dbias, cfg["dsdb"],
            cfg["dsdb_splits"],
        )  # fmt: skip
        if need_t:
            t = parts[0][0] if parts[0].shape[0] == 1 else ordered_sum(parts[0], torch.float32, 1.0)
        if need_db:
            db = cut(ordered_sum(parts[1], b.dtype, scale), N, R)
        if need_dbias:
            dbias = cut(ordered_sum(parts[2], dy.dtype, 1.0), N)
    if need_da:
        parts = pass_over_x(aligned(x, 1), t, dropout_p, seed, cfg["da"], cfg["da_splits"])
        da = cut(ordered_sum(parts, a.dtype, scale), R, K)
    if need_dx:
        dx = torch.empty((M, K16), dtype=dy.dtype, device=dy.device)
        args = (dy, aligned(w, 0, 1), b, a, t, dx, scale, cfg["gemm"])
        lora_gemm(*args, tma=cfg["tma"], dropout_p=dropout_p, seed=seed)
        dx = cut(dx, M, K)
    if need_dw:
        dw = torch.matmul(dy[:, :N].t(), x)
    return dx, dw, da, db, dbias
