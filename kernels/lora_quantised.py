"""LoRA linear over a frozen base in 4 or 8 bits, which is never whole in memory in another form.

    y[M,N] = x Wᵀ + bias + scale · S Bᵀ,  S = drop(x) Aᵀ      dx[M,K] = dy W + drop(scale · dy B A)

W [N, K] is NF4 in the layout of bitsandbytes (QLoRA, Dettmers et al. 2023, §3), or float8_e4m3fn
with a scale for all or one a row: see `fusedpeft.ops.quantised`. Two ways, by the number of tokens
(lora_quantised_tables.slab):

- few: both products are one kernel, that of lora_gemm.py with other loads of W. A step of the K
  loop reads the bytes of a tile and turns them into the input's dtype in registers, transposed in
  y's direction. Bytes of W a column of blocks: N·K/2 + 4·N·K/block (double: 1.016·N·K/block; FP8:
  N·K) instead of 2·N·K, the floor here. Work: an element costs a load of its code's value, which
  lies in L1, and some ten operations, once more for each of the M/BLOCK_M rows of blocks.
- many, or N or K that 16 does not divide: slabs of W, some of its rows for y or columns for dx, are
  dequantised into one buffer of at most 16 MiB, which L2 holds, and lora_gemm.py multiplies by
  each. An element is dequantised once: N·K/2 bytes read, 2·N·K written and read. No sum is cut.
S, dS, dA and dB are the dense base's kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedpeft.kernels.aligned import aligned, cut, up16
from fusedpeft.kernels.device import arch_of, on_device
from fusedpeft.kernels.dropout import keep_mask, signed_threshold
from fusedpeft.kernels.lora import shrink
from fusedpeft.kernels.lora_bwd import pass_over_dy, pass_over_x
from fusedpeft.kernels.lora_gemm import lora_gemm
from fusedpeft.kernels.lora_quantised_tables import DEQUANTISE_CONFIG, quantised_config, slab
from fusedpeft.kernels.lora_tables import gemm_config, lora_bwd_config, shrink_config, tma_config
from fusedpeft.kernels.sums import ordered_sum


@triton.jit
def _nf4_tile(
    w_ptr, absmax_ptr, book_ptr, absmax2_ptr, offset_ptr, code_ptr,
    rows, pairs, ok, width, block_shift, DOUBLE: tl.constexpr,
):  # fmt: skip
    """w[rows, 2·pairs : 2·pairs + 2] in fp32, [len(rows), 2·len(pairs)]; finite where not `ok`."""
    at = rows[:, None] * (width // 2) + pairs[None, :]
    byte = tl.load(w_ptr + at, mask=ok, other=0).to(tl.int32)
    block = at >> (block_shift - 1)
    if DOUBLE:
        q = tl.load(absmax_ptr + block, mask=ok, other=0).to(tl.int32)
        coarse = tl.load(absmax2_ptr + (block >> 8), mask=ok, other=0.0)
        absmax = tl.load(book_ptr + q) * coarse + tl.load(offset_ptr)
    else:
        absmax = tl.load(absmax_ptr + block, mask=ok, other=0.0)
    high = tl.load(code_ptr + (byte >> 4)) * absmax
    low = tl.load(code_ptr + (byte & 15)) * absmax
    return tl.interleave(high, low)


@triton.jit
def _fp8_tile(w_ptr, scale_ptr, rows, cols, ok, width, scale_step):
    """w[rows, cols] in fp32. By hand, as only some chips convert: e4m3fn moved to the places of
    fp16 is 2^8 too small, subnormals included; the largest code is NaN."""
    byte = tl.load(w_ptr + rows[:, None] * width + cols[None, :], mask=ok, other=0).to(tl.int32)
    half = (((byte & 0x80) << 8) | ((byte & 0x7F) << 7)).to(tl.int16).to(tl.float16, bitcast=True)
    w = tl.where((byte & 0x7F) == 0x7F, float("nan"), half.to(tl.float32) * 256.0)
    return w * tl.load(scale_ptr + rows * scale_step)[:, None]


@triton.jit(do_not_specialize=["threshold"])
def _lora_quantised_kernel(
    x_ptr, w_ptr, absmax_ptr, book_ptr, absmax2_ptr, offset_ptr, code_ptr,
    b_ptr, bias_ptr, s_ptr, out_ptr, seed_ptr,
    scale, threshold, keep_scale,
    M, N, K, R, step,
    stride_xm, stride_xk, stride_bn, stride_br, stride_sm, stride_om,
    FP8: tl.constexpr, DOUBLE: tl.constexpr, FORWARD: tl.constexpr,
    HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):  # fmt: skip
    """out = x Wt + bias + drop(scale · s Bt), Wt [K, N] the transpose of W (FORWARD) or W itself.

    step: log2 of the block (NF4), or 1 where FP8 has a scale a row and 0 where one for all.
    """
    pid = tl.program_id(0)
    blocks_m = tl.cdiv(M, BLOCK_M)
    per_group = GROUP_M * tl.cdiv(N, BLOCK_N)
    first_m = (pid // per_group) * GROUP_M
    group_m = min(blocks_m - first_m, GROUP_M)
    pid_m = first_m + (pid % per_group) % group_m
    pid_n = (pid % per_group) // group_m

    dtype: tl.constexpr = x_ptr.dtype.element_ty
    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows and columns past the end wrap to valid ones: the K loop needs no mask for them.
    rows64 = (rows % M).to(tl.int64)
    cols64 = (cols % N).to(tl.int64)
    ks = tl.arange(0, BLOCK_K)
    rs = tl.arange(0, BLOCK_R)

    s_ptrs = s_ptr + rows64[:, None] * stride_sm + rs[None, :]
    b_ptrs = b_ptr + cols64[None, :] * stride_bn + rs[:, None] * stride_br
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for r0 in tl.range(0, R, BLOCK_R, num_stages=1):
        r_ok = r0 + rs < R
        s = tl.load(s_ptrs + r0, mask=r_ok[None, :], other=0.0)
        b = tl.load(b_ptrs + r0 * stride_br, mask=r_ok[:, None], other=0.0)
        acc = tl.dot((s * scale).to(dtype), b, acc, input_precision="ieee")
    if DROPOUT:
        keep = keep_mask(seed_ptr, rows, cols, threshold)
        acc = tl.where(keep, acc * keep_scale, 0.0)

    x_ptrs = x_ptr + rows64[:, None] * stride_xm + ks[None, :] * stride_xk
    k_pairs = tl.arange(0, BLOCK_K // 2)
    n_pairs = (pid_n * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)) % (N // 2)
    for k0 in range(0, K, BLOCK_K):
        k_ok = k0 + ks < K
        x = tl.load(x_ptrs, mask=k_ok[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        if FP8:
            if FORWARD:
                w = _fp8_tile(w_ptr, absmax_ptr, cols64, k0 + ks, k_ok[None, :], K, step)
            else:
                at = tl.minimum(k0 + ks, K - 1).to(tl.int64)
                w = _fp8_tile(w_ptr, absmax_ptr, at, cols64, k_ok[:, None], N, step)
        else:
            if FORWARD:
                w = _nf4_tile(
                    w_ptr, absmax_ptr, book_ptr, absmax2_ptr, offset_ptr, code_ptr,
                    cols64, k0 // 2 + k_pairs, (k0 // 2 + k_pairs < K // 2)[None, :],
                    K, step, DOUBLE,
                )  # fmt: skip
            else:
                w = _nf4_tile(
                    w_ptr, absmax_ptr, book_ptr, absmax2_ptr, offset_ptr, code_ptr,
                    (k0 + ks).to(tl.int64), n_pairs, k_ok[:, None], N, step, DOUBLE,
                )  # fmt: skip
        if FORWARD:
            w = tl.trans(w)
        acc = tl.dot(x, w.to(dtype), acc, input_precision="ieee")  # w [BLOCK_K, BLOCK_N]
        x_ptrs += BLOCK_K * stride_xk

    if HAS_BIAS:
        acc += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    out_ptrs = out_ptr + rows.to(tl.int64)[:, None] * stride_om + cols[None, :]
    out_ok = (rows < M)[:, None] & (cols < N)[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=out_ok)


@triton.jit
def _dequantise_kernel(
    w_ptr, absmax_ptr, book_ptr, absmax2_ptr, offset_ptr, code_ptr, out_ptr,
    first_row, first_col, rows, cols, width, step, stride_om,
    FP8: tl.constexpr, DOUBLE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out [rows, cols] = w[first_row…, first_col…] in out's dtype; w [*, width], first_col even."""
    r = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(1) * BLOCK_N
    c = first + tl.arange(0, BLOCK_N)
    row_ok = (r < rows)[:, None]
    at = (first_row + r).to(tl.int64)
    if FP8:
        ok = row_ok & (c < cols)[None, :]
        w = _fp8_tile(
            w_ptr, absmax_ptr, tl.where(r < rows, at, first_row), first_col + c, ok, width, step
        )
    else:
        pairs = first // 2 + tl.arange(0, BLOCK_N // 2)
        ok = row_ok & (pairs < cols // 2)[None, :]
        w = _nf4_tile(
            w_ptr, absmax_ptr, book_ptr, absmax2_ptr, offset_ptr, code_ptr,
            at, first_col // 2 + pairs, ok, width, step, DOUBLE,
        )  # fmt: skip
    out_ptrs = out_ptr + r.to(tl.int64)[:, None] * stride_om + c[None, :]
    tl.store(out_ptrs, w.to(out_ptr.dtype.element_ty), mask=row_ok & (c < cols)[None, :])


@functools.cache
def _code(values: tuple[float, ...], device: torch.device) -> Tensor:
    """The 16 values on the device, made once."""
    return torch.tensor(values, dtype=torch.float32, device=device)


class _Base:
    """W [n, k] as the kernels take it. parts, step, code: see `lora_quantised_fwd`."""

    def __init__(self, parts: Sequence[Tensor], step: int, code: tuple[float, ...], n: int, k: int):
        self.n, self.k = n, k
        self.w, self.absmax, *double = (aligned(t.reshape(-1)) for t in parts)
        self.book, self.absmax2, self.offset = double or (self.absmax,) * 3
        self.code = _code(code, self.w.device) if code else self.absmax
        self.step, self.flags = step, dict(FP8=not code, DOUBLE=bool(double))

    def tensors(self) -> tuple[Tensor, ...]:
        return self.w, self.absmax, self.book, self.absmax2, self.offset, self.code

    def dequantise(self, out: Tensor, first_row: int, first_col: int) -> None:
        """out = w[first_row…, first_col…]."""
        (rows, cols), config = out.shape, DEQUANTISE_CONFIG
        grid = (triton.cdiv(rows, config["BLOCK_M"]), triton.cdiv(cols, config["BLOCK_N"]))
        with on_device(out):
            _dequantise_kernel[grid](
                *self.tensors(), out, first_row, first_col, rows, cols, self.k, self.step,
                out.stride(0), **self.flags, **config,
            )  # fmt: skip


def _gemm(
    x: Tensor, base: _Base, forward: bool, bt: Tensor, s: Tensor, out: Tensor, scale: float,
    *, bias: Tensor | None = None, dropout_p: float = 0.0, seed: Tensor | None = None,
) -> None:  # fmt: skip
    """out [M,N] = x [M,K] · (Wᵀ or W) + bias + drop(scale · s [M,R] bt [R,N]), s in fp32.

    N and K are multiples of 16, beyond W's own sizes where these are not.
    """
    (M, K), N, R = x.shape, out.shape[1], bt.shape[0]
    n, k = (base.n, base.k) if forward else (base.k, base.n)
    arch, size, dropout = arch_of(x.device), x.element_size(), dropout_p > 0.0
    columns = slab(M, N, K, size, odd=(n, k) != (N, K))
    if columns:
        # y's update beside S in fp32: of lora_gemm.py that is compiled for fp32 adapters only.
        bt = bt.float() if forward else bt
        w = torch.empty((columns, K) if forward else (K, columns), dtype=x.dtype, device=x.device)
        if k < K:  # zeros behind x meet zeros; what stands behind n meets columns that are cut away
            w.zero_()
        for first in range(0, N, columns):
            last = min(first + columns, N)
            at, wide, own = slice(first, last), last - first, min(last, n) - first
            if forward:
                part = w[:wide]
                base.dequantise(part[:own, :k], first, 0)
            else:
                part = w[:, :wide]
                base.dequantise(part[:k, :own], 0, first)
            lora_gemm(
                x, part.t() if forward else part, bt, bt[:, at], s, out[:, at], scale,
                gemm_config(M, wide, R, arch, size, dropout=dropout),
                tma=tma_config(M, wide, R, arch, size, dropout=dropout),
                bias=None if bias is None else bias[at],
                dropout_p=dropout_p, seed=seed, first_col=first,
            )  # fmt: skip
        return
    bt = bt.to(x.dtype)
    config = quantised_config(M, N, arch, size, dropout=dropout)
    grid = (triton.cdiv(M, config["BLOCK_M"]) * triton.cdiv(N, config["BLOCK_N"]),)
    with on_device(x):
        _lora_quantised_kernel[grid](
            x, *base.tensors(),
            bt, out if bias is None else bias, s, out, seed if dropout else out,
            scale, signed_threshold(dropout_p), 1.0 / (1.0 - dropout_p),
            M, N, K, R, base.step,
            x.stride(0), x.stride(1), bt.stride(1), bt.stride(0), s.stride(0), out.stride(0),
            FORWARD=forward, HAS_BIAS=bias is not None, DROPOUT=dropout, **base.flags, **config,
        )  # fmt: skip


def lora_quantised_fwd(
    x: Tensor,
    parts: Sequence[Tensor],
    step: int,
    code: tuple[float, ...],
    n: int,
    a: Tensor,
    b: Tensor,
    scale: float,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(y [M,N] in x's dtype, S [M,R] in fp32), both fresh.

    parts, step, code: (packed, absmax[, book, absmax2, offset]), log2 of the block and the 16
    values of NF4; or (bytes, scale), 1 for a scale a row and 0 for one, and () for FP8. x [M,K]
    fp32, bf16 or fp16, a [R,K] and b [n,R] that or fp32. Any strides of x, a, b.
    """
    (M, k), R = x.shape, a.shape[0]
    s = torch.empty((M, R), dtype=torch.float32, device=x.device)
    if M == 0 or n == 0:
        return x.new_empty(M, n), s.zero_()
    x, a, b, bias = aligned(x, 1), aligned(a.float(), 1), aligned(b, 0), aligned(bias, 0)
    shrink(x, a, s, dropout_p, seed, shrink_config(M, R, arch_of(x.device), x.element_size()))
    y = torch.empty((M, up16(n)), dtype=x.dtype, device=x.device)
    _gemm(x, _Base(parts, step, code, n, k), True, b.t(), s, y, scale, bias=bias)
    return cut(y, M, n), s


def lora_quantised_bwd(
    dy: Tensor,
    x: Tensor,
    parts: Sequence[Tensor],
    step: int,
    code: tuple[float, ...],
    a: Tensor,
    b: Tensor,
    s: Tensor,
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    need_dx: bool = True,
    need_da: bool = True,
    need_db: bool = True,
    need_dbias: bool = False,
) -> tuple[Tensor | None, ...]:
    """(dx [M,K], da [R,K], db [N,R], dbias [N]), fresh, each in its parameter's dtype.

    None where not needed, and then not computed. As `lora_bwd`, with forward's x and S.
    """
    (M, N), (R, K) = dy.shape, a.shape
    if M == 0 or N == 0:
        shapes = ((need_dx, dy, (M, K)), (need_da, a, (R, K)), (need_db, b, (N, R)))
        shapes += ((need_dbias, dy, (N,)),)
        return tuple(t.new_zeros(shape) if n else None for n, t, shape in shapes)
    dy, a, b32 = aligned(dy, 1), aligned(a, 1), aligned(b.float(), 0)
    N16, K16 = dy.shape[1], a.shape[1]
    arch, size = arch_of(dy.device), dy.element_size()
    cfg = lora_bwd_config(M, N16, K16, R, arch, elem_bytes=size)
    need_t = need_dx or need_da
    dx = da = db = dbias = t = None
    if need_t or need_db or need_dbias:
        sums = pass_over_dy(
            dy, b32, s if need_db else dy, need_t, need_db, need_dbias, cfg["dsdb"],
            cfg["dsdb_splits"],
        )  # fmt: skip
        t = ordered_sum(sums[0], torch.float32, 1.0) if need_t else None
        db = cut(ordered_sum(sums[1], b.dtype, scale), N, R) if need_db else None
        dbias = cut(ordered_sum(sums[2], dy.dtype, 1.0), N) if need_dbias else None
    if need_da:
        part = pass_over_x(aligned(x, 1), t, dropout_p, seed, cfg["da"], cfg["da_splits"])
        da = cut(ordered_sum(part, a.dtype, scale), R, K)
    if need_dx:
        dx = torch.empty((M, K16), dtype=dy.dtype, device=dy.device)
        mask = dict(dropout_p=dropout_p, seed=seed)
        _gemm(dy, _Base(parts, step, code, N, K), False, a, t, dx, scale, **mask)
        dx = cut(dx, M, K)
    return dx, da, db, dbias
