"""The kernels of the bottleneck adapter; adapter.py says how they are put together.

A block of the two main kernels owns BLOCK_M rows and walks over d twice: once to sum [BLOCK_M, E],
once, backwards, to write its rows of y or dx, so that what it reads again is what it read last.
Weights are [E, d] and [d, E], contiguous, of x's dtype. Rows past M read row 0 and store nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusedpeft.kernels.dropout import keep_mask


@triton.jit
def _sigmoid(z):
    """(value, slope), neither a difference of large numbers."""
    e = tl.exp(-tl.abs(z))
    return tl.where(z >= 0.0, 1.0, e) / (1.0 + e), e / ((1.0 + e) * (1.0 + e))


@triton.jit
def _activation(p, ACT: tl.constexpr):
    """(value, slope) at p; 0 at 0, NaN at NaN."""
    if ACT == "relu":
        value = tl.where(p <= 0.0, 0.0, p)
        slope = tl.where(p <= 0.0, 0.0, 1.0)
    elif ACT == "leaky_relu":
        slope = tl.where(p > 0.0, 1.0, 0.01)
        value = p * slope
    elif ACT == "gelu":
        half = 0.5 + 0.5 * tl.erf(p * 0.7071067811865476)
        value = p * half
        slope = half + p * 0.3989422804014327 * tl.exp(-0.5 * p * p)
    elif ACT == "gelu_tanh":  # ½ (1 + tanh z) = σ(2 z)
        s, ds = _sigmoid(1.5957691216057308 * p * (1.0 + 0.044715 * p * p))
        value = p * s
        slope = s + ds * 1.5957691216057308 * p * (1.0 + 0.134145 * p * p)
    elif ACT == "silu":
        s, ds = _sigmoid(p)
        value = p * s
        slope = s + p * ds
    else:
        tl.static_assert(ACT == "tanh", "no such activation")
        s, ds = _sigmoid(2.0 * p)
        value = 2.0 * s - 1.0
        slope = 4.0 * ds
    return value, slope


@triton.jit
def _by_eights(t):
    """[M, N] -> [M, N / 8]: what a thread can sum by itself; the rest after the loop."""
    return tl.sum(tl.reshape(t, (t.shape[0], t.shape[1] // 8, 8)), 2)


@triton.jit
def _store_y(
    u, rows, cols, row_ok, e_ptr, res_ptr, seed_ptr, y_ptr, scale, threshold, D, stride_rm,
    has_e, has_res, DROPOUT: tl.constexpr,
):  # fmt: skip
    """y = residual + scale · drop(u + e)."""
    col_ok = cols < D
    u += tl.load(e_ptr + cols, mask=col_ok & (has_e != 0), other=0.0).to(tl.float32)[None, :]
    if DROPOUT:
        u = tl.where(keep_mask(seed_ptr, rows, cols, threshold), u, 0.0)
    rows64 = rows.to(tl.int64)[:, None]
    ok = row_ok[:, None] & col_ok[None, :]
    res_ptrs = res_ptr + rows64 * stride_rm + cols[None, :]
    res = tl.load(res_ptrs, mask=ok & (has_res != 0), other=0.0).to(tl.float32)
    y = (res + scale * u).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + rows64 * D + cols[None, :], y, mask=ok)


@triton.jit
def _store_dx(
    t, rows, cols, row_ok, mean, rstd, m1, m2, x_ptr, dy_ptr, dx_ptr, D, stride_xm, stride_dym,
    add, NORM: tl.constexpr,
):  # fmt: skip
    """dx = r·(t − m1 − x̂ m2) + add · dy, t = dP D'."""
    ok = row_ok[:, None] & (cols < D)[None, :]
    rows64 = rows.to(tl.int64)[:, None]
    if NORM:
        x = tl.load(x_ptr + rows64 * stride_xm + cols[None, :], mask=ok, other=0.0)
        xhat = (x.to(tl.float32) - mean[:, None]) * rstd[:, None]
        t = rstd[:, None] * (t - m1[:, None] - xhat * m2[:, None])
    dy_ptrs = dy_ptr + rows64 * stride_dym + cols[None, :]
    t += tl.load(dy_ptrs, mask=ok & (add != 0), other=0.0).to(tl.float32)
    tl.store(dx_ptr + rows64 * D + cols[None, :], t.to(dx_ptr.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["threshold", "has_c", "has_e", "has_res"])
def _adapter_fwd_kernel(
    x_ptr, w_ptr, g_ptr, c_ptr, up_ptr, e_ptr, res_ptr, seed_ptr,
    y_ptr, p_ptr, h_ptr, stats_ptr,
    center, eps, scale, threshold,
    M, D, E, has_c, has_e, has_res, stride_xm, stride_rm,
    NORM: tl.constexpr, DROPOUT: tl.constexpr, ACT: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """p[M, E] and stats[M, 2]; WHOLE (E ≤ BLOCK_E): y[M, D] as well, else h = act(p) for later.

    center: 1 for layer_norm, 0 for rms_norm. The sums of a norm are of x − shift, the shift being
    the mean of the row's first columns: squares of a row far from zero would lose its variance.
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    es = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    ns = tl.arange(0, BLOCK_N)
    row_ok = rows < M
    e_ok = es < E
    x_ptrs = x_ptr + tl.where(row_ok, rows, 0).to(tl.int64)[:, None] * stride_xm
    w_ptrs = w_ptr + es.to(tl.int64)[None, :] * D
    if NORM:
        some = tl.load(x_ptrs + ns[None, :], mask=(ns < D)[None, :], other=0.0)
        shift = tl.sum(some.to(tl.float32), 1) * (center / min(BLOCK_N, D))
        total = tl.zeros((BLOCK_M, BLOCK_N // 8), dtype=tl.float32)
        square = tl.zeros((BLOCK_M, BLOCK_N // 8), dtype=tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_E), dtype=tl.float32)
    for n0 in tl.range(0, D, BLOCK_N, num_stages=STAGES):
        cols = n0 + ns
        n_ok = cols < D
        x = tl.load(x_ptrs + cols[None, :], mask=n_ok[None, :], other=0.0)  # [BLOCK_M, BLOCK_N]
        w_ok = n_ok[:, None] & e_ok[None, :]
        w = tl.load(w_ptrs + cols[:, None], mask=w_ok, other=0.0)  # [BLOCK_N, BLOCK_E]
        if NORM:
            far = tl.where(n_ok[None, :], x.to(tl.float32) - shift[:, None], 0.0)
            total += _by_eights(far)
            square += _by_eights(far * far)
            if dtype == tl.float32:
                x = far
        acc = tl.dot(x, w, acc, input_precision="ieee")

    if NORM:
        rest = center * tl.sum(total, 1) / D
        mean = shift + rest
        rstd = tl.rsqrt(tl.maximum(tl.sum(square, 1) / D - rest * rest, 0.0) + eps)
        g = tl.load(g_ptr + es, mask=e_ok, other=0.0)
        held = rest if dtype == tl.float32 else mean  # of what the product holds
        acc = rstd[:, None] * (acc - held[:, None] * g[None, :])
        mine = row_ok & (tl.program_id(1) == 0)
        tl.store(stats_ptr + rows.to(tl.int64) * 2, mean, mask=mine)
        tl.store(stats_ptr + rows.to(tl.int64) * 2 + 1, rstd, mask=mine)
    acc += tl.load(c_ptr + es, mask=e_ok & (has_c != 0), other=0.0).to(tl.float32)[None, :]
    at = rows.to(tl.int64)[:, None] * E + es[None, :]
    ok = row_ok[:, None] & e_ok[None, :]
    tl.store(p_ptr + at, acc.to(p_ptr.dtype.element_ty), mask=ok)
    value, _ = _activation(acc, ACT)
    h = tl.where(e_ok[None, :], value, 0.0).to(dtype)  # [BLOCK_M, BLOCK_E]
    if WHOLE:
        tiles = tl.cdiv(D, BLOCK_N)
        for i in tl.range(0, tiles, num_stages=STAGES):
            cols = (tiles - 1 - i) * BLOCK_N + ns
            up_ptrs = up_ptr + cols.to(tl.int64)[None, :] * E + es[:, None]
            up_ok = (cols < D)[None, :] & e_ok[:, None]
            up = tl.load(up_ptrs, mask=up_ok, other=0.0)  # [BLOCK_E, BLOCK_N]
            u = tl.dot(h, up, input_precision="ieee")
            _store_y(
                u, rows, cols, row_ok, e_ptr, res_ptr, seed_ptr, y_ptr, scale, threshold, D,
                stride_rm, has_e, has_res, DROPOUT,
            )  # fmt: skip
    else:
        tl.store(h_ptr + at, h, mask=ok)


@triton.jit(do_not_specialize=["threshold", "has_e", "has_res"])
def _adapter_up_kernel(
    h_ptr, up_ptr, e_ptr, res_ptr, seed_ptr, y_ptr, scale, threshold,
    M, D, E, has_e, has_res, stride_rm,
    DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of y[M, D] from h[M, E], where E is too wide for one kernel."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)
    row_ok = rows < M
    h_ptrs = h_ptr + tl.where(row_ok, rows, 0).to(tl.int64)[:, None] * E
    up_ptrs = up_ptr + tl.where(cols < D, cols, 0).to(tl.int64)[None, :] * E
    u = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for e0 in range(0, E, BLOCK_K):
        es = e0 + ks
        h = tl.load(h_ptrs + es[None, :], mask=(es < E)[None, :], other=0.0)
        up = tl.load(up_ptrs + es[:, None], mask=(es < E)[:, None], other=0.0)
        u = tl.dot(h, up, u, input_precision="ieee")
    _store_y(
        u, rows, cols, row_ok, e_ptr, res_ptr, seed_ptr, y_ptr, scale, threshold, D,
        stride_rm, has_e, has_res, DROPOUT,
    )  # fmt: skip


@triton.jit(do_not_specialize=["threshold", "has_c", "add", "need_dp", "need_dc"])
def _adapter_bwd_kernel(
    dy_ptr, up_ptr, p_ptr, w_ptr, g_ptr, c_ptr, x_ptr, stats_ptr, seed_ptr,
    dx_ptr, dp_ptr, dc_ptr, means_ptr,
    center, scale, threshold,
    M, D, E, has_c, add, need_dp, need_dc, stride_dym, stride_xm,
    NORM: tl.constexpr, DROPOUT: tl.constexpr, ACT: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dp[M, E], dc[row block, E]; WHOLE (E ≤ BLOCK_E): dx[M, D] as well.

    Not WHOLE, with a norm: means[block of E, M, 2], this block's part of m1 and m2 of `_store_dx`.
    """
    dtype: tl.constexpr = dy_ptr.dtype.element_ty
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    es = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    ns = tl.arange(0, BLOCK_N)
    row_ok = rows < M
    e_ok = es < E
    rows64 = rows.to(tl.int64)
    dy_ptrs = dy_ptr + tl.where(row_ok, rows64, 0)[:, None] * stride_dym
    acc = tl.zeros((BLOCK_M, BLOCK_E), dtype=tl.float32)
    for n0 in tl.range(0, D, BLOCK_N, num_stages=STAGES):
        cols = n0 + ns
        n_ok = cols < D
        dy = tl.load(dy_ptrs + cols[None, :], mask=n_ok[None, :], other=0.0)  # [BLOCK_M, BLOCK_N]
        up_ptrs = up_ptr + cols.to(tl.int64)[:, None] * E + es[None, :]
        up = tl.load(up_ptrs, mask=n_ok[:, None] & e_ok[None, :], other=0.0)  # [BLOCK_N, BLOCK_E]
        if DROPOUT:
            dy = tl.where(keep_mask(seed_ptr, rows, cols, threshold), dy, 0.0).to(dtype)
        acc = tl.dot(dy, up, acc, input_precision="ieee")

    at = rows64[:, None] * E + es[None, :]
    ok = row_ok[:, None] & e_ok[None, :]
    p = tl.load(p_ptr + at, mask=ok, other=0.0).to(tl.float32)
    _, slope = _activation(p, ACT)
    acc = tl.where(ok, acc * scale * slope, 0.0)
    dc_ptrs = dc_ptr + tl.program_id(0).to(tl.int64) * E + es
    tl.store(dc_ptrs, tl.sum(acc, 0), mask=e_ok & (need_dc != 0))
    dp = acc.to(dtype)  # [BLOCK_M, BLOCK_E]
    tl.store(dp_ptr + at, dp, mask=ok & (need_dp != 0))
    mean = tl.zeros((BLOCK_M,), dtype=tl.float32)
    rstd, m1, m2 = mean, mean, mean
    if NORM:
        low = dp.to(tl.float32)
        g = tl.load(g_ptr + es, mask=e_ok, other=0.0)
        c = tl.load(c_ptr + es, mask=e_ok & (has_c != 0), other=0.0).to(tl.float32)
        m1 = tl.sum(low * g[None, :], 1) * (center / D)
        m2 = tl.sum(low * (p - c[None, :]), 1) / D
        if WHOLE:
            mean = tl.load(stats_ptr + rows64 * 2, mask=row_ok, other=0.0)
            rstd = tl.load(stats_ptr + rows64 * 2 + 1, mask=row_ok, other=0.0)
        else:
            out = means_ptr + (tl.program_id(1).to(tl.int64) * M + rows64) * 2
            tl.store(out, m1, mask=row_ok)
            tl.store(out + 1, m2, mask=row_ok)
    if WHOLE:
        tiles = tl.cdiv(D, BLOCK_N)
        for i in tl.range(0, tiles, num_stages=STAGES):
            cols = (tiles - 1 - i) * BLOCK_N + ns
            w_ptrs = w_ptr + es.to(tl.int64)[:, None] * D + cols[None, :]
            w_ok = e_ok[:, None] & (cols < D)[None, :]
            w = tl.load(w_ptrs, mask=w_ok, other=0.0)  # [BLOCK_E, BLOCK_N]
            t = tl.dot(dp, w, input_precision="ieee")
            _store_dx(
                t, rows, cols, row_ok, mean, rstd, m1, m2, x_ptr, dy_ptr, dx_ptr, D,
                stride_xm, stride_dym, add, NORM,
            )  # fmt: skip


@triton.jit(do_not_specialize=["parts", "add"])
def _adapter_dx_kernel(
    dp_ptr, w_ptr, x_ptr, dy_ptr, stats_ptr, means_ptr, dx_ptr,
    M, D, E, parts, add, stride_dym, stride_xm,
    NORM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of dx[M, D] from dp[M, E], where E is too wide for one kernel."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)
    row_ok = rows < M
    safe = tl.where(row_ok, rows, 0).to(tl.int64)
    dp_ptrs = dp_ptr + safe[:, None] * E
    w_ptrs = w_ptr + tl.where(cols < D, cols, 0)[None, :]
    t = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for e0 in range(0, E, BLOCK_K):
        es = e0 + ks
        dp = tl.load(dp_ptrs + es[None, :], mask=(es < E)[None, :], other=0.0)
        w = tl.load(w_ptrs + es.to(tl.int64)[:, None] * D, mask=(es < E)[:, None], other=0.0)
        t = tl.dot(dp, w, t, input_precision="ieee")
    mean = tl.zeros((BLOCK_M,), dtype=tl.float32)
    rstd, m1, m2 = mean, mean, mean
    if NORM:
        mean = tl.load(stats_ptr + safe * 2)
        rstd = tl.load(stats_ptr + safe * 2 + 1)
        means_ptrs = means_ptr + safe * 2
        for _ in range(parts):
            m1 += tl.load(means_ptrs)
            m2 += tl.load(means_ptrs + 1)
            means_ptrs += 2 * M
    _store_dx(
        t, rows, cols, row_ok, mean, rstd, m1, m2, x_ptr, dy_ptr, dx_ptr, D,
        stride_xm, stride_dym, add, NORM,
    )  # fmt: skip


@triton.jit(do_not_specialize=["threshold", "need_du", "need_de"])
def _adapter_dw_kernel(
    x_ptr, dp_ptr, stats_ptr, dy_ptr, p_ptr, seed_ptr, dd_ptr, du_ptr, de_ptr, threshold,
    M, D, E, rows_per_split, need_du, need_de, stride_xm, stride_dym,
    NORM: tl.constexpr, DROPOUT: tl.constexpr, ACT: tl.constexpr,
    READ_X: tl.constexpr, READ_DY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sums over a split's rows, fp32. READ_X: dd[split, E, D] = dpᵀ x̂ (x̂ = x without a norm).
    READ_DY: du[split, D, E] = dropped dyᵀ act(p) and de[split, D] = Σ dropped dy."""
    dtype: tl.constexpr = dy_ptr.dtype.element_ty
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    es = tl.program_id(2) * BLOCK_E + tl.arange(0, BLOCK_E)
    col_ok = cols < D
    e_ok = es < E
    dd = tl.zeros((BLOCK_N, BLOCK_E), dtype=tl.float32)
    du = tl.zeros((BLOCK_N, BLOCK_E), dtype=tl.float32)
    de = tl.zeros((BLOCK_N,), dtype=tl.float32)
    last = min(split * rows_per_split + rows_per_split, M)
    for m0 in tl.range(split * rows_per_split, last, BLOCK_M, num_stages=STAGES):
        rows = m0 + tl.arange(0, BLOCK_M)
        row_ok = rows < last
        rows64 = rows.to(tl.int64)
        ok = row_ok[:, None] & col_ok[None, :]
        low = rows64[:, None] * E + es[None, :]
        low_ok = row_ok[:, None] & e_ok[None, :]
        if READ_X:
            x = tl.load(x_ptr + rows64[:, None] * stride_xm + cols[None, :], mask=ok, other=0.0)
            if NORM:
                mean = tl.load(stats_ptr + rows64 * 2, mask=row_ok, other=0.0)
                rstd = tl.load(stats_ptr + rows64 * 2 + 1, mask=row_ok, other=0.0)
                x = ((x.to(tl.float32) - mean[:, None]) * rstd[:, None]).to(dtype)
            dp = tl.load(dp_ptr + low, mask=low_ok, other=0.0)  # [BLOCK_M, BLOCK_E]
            dd = tl.dot(tl.trans(x), dp, dd, input_precision="ieee")
        if READ_DY:
            dy = tl.load(dy_ptr + rows64[:, None] * stride_dym + cols[None, :], mask=ok, other=0.0)
            if DROPOUT:
                dy = tl.where(keep_mask(seed_ptr, rows, cols, threshold), dy, 0.0).to(dtype)
            de += tl.sum(dy.to(tl.float32), 0)
            p = tl.load(p_ptr + low, mask=low_ok & (need_du != 0), other=0.0).to(tl.float32)
            h, _ = _activation(p, ACT)
            du = tl.dot(tl.trans(dy), h.to(dtype), du, input_precision="ieee")
    if READ_X:
        dd_ptrs = dd_ptr + (split.to(tl.int64) * E + es)[:, None] * D + cols[None, :]
        tl.store(dd_ptrs, tl.trans(dd), mask=e_ok[:, None] & col_ok[None, :])
    if READ_DY:
        out = split.to(tl.int64) * D + cols
        du_ok = col_ok[:, None] & e_ok[None, :] & (need_du != 0)
        tl.store(du_ptr + out[:, None] * E + es[None, :], du, mask=du_ok)
        mine = (need_de != 0) & (tl.program_id(2) == 0)
        tl.store(de_ptr + out, de, mask=col_ok & mine)
