"""The kernels of linear log-prob; linear_logprob.py says how they are put together.

Rows are taken through `order`: the rows that count first, `count` of them, read from the device, so
that ignored rows cost no work and no synchronisation. A block past `count` leaves at once.
An fp32 accumulator [rows, H] of a 16-bit result is kept as two halves of its bits (SPLIT): the
upper in the result's own memory, the lower in a workspace. It is exact and costs half the memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

NEVER = tl.constexpr(-1e30)  # a reference below any logit; finite, so that differences are defined
# Of any size, and at any address: one kernel for all of them.
_SIZES = ["row0", "M", "v0", "N", "V", "tiles", "stride_tm"]
_GATHERED = ["labels_ptr", "g_ptr"]


@triton.jit
def _block(pid, blocks_m, blocks_n, GROUP_M: tl.constexpr):
    """Blocks walk in groups of GROUP_M rows so that their tiles meet in L2."""
    per_group = GROUP_M * blocks_n
    first_m = (pid // per_group) * GROUP_M
    group_m = min(blocks_m - first_m, GROUP_M)
    return first_m + (pid % per_group) % group_m, (pid % per_group) // group_m


@triton.jit
def _load_halves(hi_ptrs, lo_ptrs, mask, SPLIT: tl.constexpr):
    if SPLIT:
        hi = tl.load(hi_ptrs, mask=mask, other=0).to(tl.int32)
        lo = tl.load(lo_ptrs, mask=mask, other=0).to(tl.int32)
        return ((hi << 16) | (lo & 0xFFFF)).to(tl.float32, bitcast=True)
    else:
        return tl.load(hi_ptrs, mask=mask, other=0.0)


@triton.jit
def _whole(N):
    """Columns of p that are written and read for N words: zeros up to a multiple of 16, which the
    compiler then knows and moves wide."""
    return tl.cdiv(N, 16) * 16


@triton.jit(
    do_not_specialize=[*_SIZES, "has_bias", "need_dbias"], do_not_specialize_on_alignment=_GATHERED
)
def _linear_logprob_logits_kernel(
    h_ptr, w_ptr, bias_ptr, order_ptr, count_ptr, labels_ptr, label_z_ptr,
    ref_ptr, top_ptr, total_ptr, lse_ptr, g_ptr, p_ptr, dbias_ptr,
    softcap, inv_temperature, jump,
    row0, M, v0, N, H, has_bias, need_dbias,
    stride_hm, stride_hk, stride_wv, stride_wk, stride_tm, stride_pm,
    KEEP: tl.constexpr, GRAD: tl.constexpr, SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """A tile of logits z of rows row0…row0+M and words v0…v0+N, and what is wanted of it.

    top, total [tile, row]: a reference of the tile and Σ exp(z − top). top is `ref`, the row's
    running reference, unless the tile's largest logit is beyond ref + jump: then it is that.
    KEEP: p [M, N] = exp(z − top) · (1 − tanh²). GRAD: p is dz instead, and dbias [row block, N] its
    sums over rows. label_z [order]: the label's logit, from the tile that has it.
    """
    dtype: tl.constexpr = h_ptr.dtype.element_ty
    pid_m, pid_n = _block(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    count = tl.load(count_ptr)
    if row0 + pid_m * BLOCK_M >= count:
        return
    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok = (rows < M) & (row0 + rows < count)
    col_ok = cols < N
    source = tl.load(order_ptr + row0 + rows, mask=row_ok, other=0)  # int64
    word = (v0 + cols % N).to(tl.int64)  # past the end wraps: the K loop needs no mask for it
    ks = tl.arange(0, BLOCK_K)
    h_ptrs = h_ptr + source[:, None] * stride_hm + ks[None, :] * stride_hk
    w_ptrs = w_ptr + word[None, :] * stride_wv + ks[:, None] * stride_wk
    z = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k0 in range(0, H, BLOCK_K):
        k_ok = ks < H - k0
        h = tl.load(h_ptrs, mask=k_ok[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        w = tl.load(w_ptrs, mask=k_ok[:, None], other=0.0)  # [BLOCK_K, BLOCK_N]
        z = tl.dot(h, w, z, input_precision="ieee")
        h_ptrs += BLOCK_K * stride_hk
        w_ptrs += BLOCK_K * stride_wk

    bias = tl.load(bias_ptr + v0 + cols, mask=col_ok & (has_bias != 0), other=0.0)
    z += bias.to(tl.float32)[None, :]
    if SOFTCAP:  # c · tanh(z / c)
        z = softcap - 2.0 * softcap / (tl.exp(z * (2.0 / softcap)) + 1.0)
    z = tl.where(col_ok[None, :], z * inv_temperature, float("-inf"))
    label = tl.load(labels_ptr + source, mask=row_ok, other=-1) - v0
    is_label = cols[None, :] == label[:, None]
    p_ptrs = p_ptr + rows.to(tl.int64)[:, None] * stride_pm + cols[None, :]
    if GRAD:
        lse = tl.load(lse_ptr + source, mask=row_ok, other=0.0)
        g = tl.load(g_ptr + source, mask=row_ok, other=0.0).to(tl.float32) * inv_temperature
        dz = g[:, None] * (tl.where(is_label, 1.0, 0.0) - tl.exp(z - lse[:, None]))
        if SOFTCAP:
            tanh = tl.where(col_ok[None, :], z / (softcap * inv_temperature), 0.0)
            dz *= 1.0 - tanh * tanh
        dz = tl.where(row_ok[:, None] & col_ok[None, :], dz, 0.0)
        tl.store(p_ptrs, dz.to(dtype), mask=(rows < M)[:, None] & (cols < _whole(N))[None, :])
        out = dbias_ptr + pid_m.to(tl.int64) * N + cols
        tl.store(out, tl.sum(dz, 0), mask=col_ok & (need_dbias != 0))
    else:
        here = (label >= pid_n * BLOCK_N) & (label < min(pid_n * BLOCK_N + BLOCK_N, N))
        label_z = tl.sum(tl.where(is_label, z, 0.0), 1)
        tl.store(label_z_ptr + source, label_z, mask=row_ok & here)
        ref = tl.full((BLOCK_M,), NEVER, tl.float32)
        if KEEP:
            ref = tl.load(ref_ptr + rows, mask=row_ok, other=NEVER)
        top = tl.max(z, 1)
        top = tl.where(top > ref + jump, top, ref)
        e = tl.exp(z - top[:, None])
        at = pid_n.to(tl.int64) * stride_tm + rows
        tl.store(top_ptr + at, top, mask=row_ok)
        tl.store(total_ptr + at, tl.sum(e, 1), mask=row_ok)
        if KEEP:
            if SOFTCAP:
                tanh = tl.where(col_ok[None, :], z / (softcap * inv_temperature), 0.0)
                e *= 1.0 - tanh * tanh
            tl.store(p_ptrs, e.to(dtype), mask=row_ok[:, None] & (cols < _whole(N))[None, :])


@triton.jit
def _store_halves(hi_ptrs, lo_ptrs, acc, mask):
    bits = acc.to(tl.int32, bitcast=True)
    tl.store(lo_ptrs, bits.to(tl.int16), mask=mask)
    tl.store(hi_ptrs, (bits >> 16).to(tl.int16), mask=mask)


@triton.jit
def _move_reference(
    ref_ptr, sum_ptr, next_ref_ptr, next_sum_ptr, top_ptr, total_ptr, rows, row_ok,
    tiles, stride_tm, mine,
):  # fmt: skip
    """(the rows' new reference, exp(old − new), 1 if one has moved): the largest of the tiles'.

    mine: writes it and the running Σ exp(z − reference) for the next chunk.
    """
    rows64 = tl.where(row_ok, rows, 0).to(tl.int64)
    ref = tl.load(ref_ptr + rows64)
    new = ref
    for t in range(tiles):
        new = tl.maximum(new, tl.load(top_ptr + t * stride_tm + rows64))
    shrink = tl.exp(ref - new)
    total = tl.load(sum_ptr + rows64) * shrink
    for t in range(tiles):
        top = tl.load(top_ptr + t * stride_tm + rows64)
        total += tl.load(total_ptr + t * stride_tm + rows64) * tl.exp(top - new)
    tl.store(next_ref_ptr + rows, new, mask=row_ok & mine)
    tl.store(next_sum_ptr + rows, total, mask=row_ok & mine)
    return new, shrink, tl.max(tl.where(row_ok & (new > ref), 1, 0), 0)


@triton.jit(do_not_specialize=[*_SIZES, "first"])
def _linear_logprob_sum_kernel(
    p_ptr, w_ptr, order_ptr, count_ptr, hi_ptr, lo_ptr,
    ref_ptr, sum_ptr, next_ref_ptr, next_sum_ptr, top_ptr, total_ptr,
    row0, M, v0, N, H, first, tiles,
    stride_pm, stride_wv, stride_wk, stride_om, stride_tm,
    RESCALE: tl.constexpr, SPLIT: tl.constexpr, TILE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """acc[M, H] (+)= p[M, N] · w[v0 + N, H], at the rows order[row0…]; acc as said above.

    RESCALE: acc is relative to exp(ref) and p to exp(top) by tile of TILE words. The new reference
    is the largest; acc is scaled to it, and p too where some tile of the block's rows has jumped,
    which is rare: the first words and outliers. next_ref and next_sum get the running reference and
    Σ exp(z − ref).
    """
    dtype: tl.constexpr = p_ptr.dtype.element_ty
    pid_m, pid_n = _block(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(H, BLOCK_N), GROUP_M)
    count = tl.load(count_ptr)
    if row0 + pid_m * BLOCK_M >= count:
        return
    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok = (rows < M) & (row0 + rows < count)
    ok = row_ok[:, None] & (cols < H)[None, :]
    target = tl.load(order_ptr + row0 + rows, mask=row_ok, other=0)
    rows64 = tl.where(row_ok, rows, 0).to(tl.int64)
    hi_ptrs = hi_ptr + target[:, None] * stride_om + cols[None, :]
    lo_ptrs = lo_ptr + rows64[:, None] * H + cols[None, :]
    acc = _load_halves(hi_ptrs, lo_ptrs, ok & (first == 0), SPLIT)

    jumped = 0
    new = tl.zeros((BLOCK_M,), dtype=tl.float32)
    if RESCALE:
        new, shrink, jumped = _move_reference(
            ref_ptr, sum_ptr, next_ref_ptr, next_sum_ptr, top_ptr, total_ptr, rows, row_ok,
            tiles, stride_tm, pid_n == 0,
        )  # fmt: skip
        acc *= shrink[:, None]

    ks = tl.arange(0, BLOCK_K)
    whole = _whole(N)
    words = (v0 + ks).to(tl.int64)
    p_ptrs = p_ptr + rows64[:, None] * stride_pm + ks[None, :]
    w_ptrs = w_ptr + words[:, None] * stride_wv + (cols % H)[None, :] * stride_wk
    if jumped != 0:
        for k0 in range(0, N, BLOCK_K):
            p = tl.load(p_ptrs, mask=(ks < whole - k0)[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=(ks < N - k0)[:, None], other=0.0)
            if RESCALE:
                top = tl.load(top_ptr + (k0 // TILE) * stride_tm + rows64)
                p = (p.to(tl.float32) * tl.exp(top - new)[:, None]).to(dtype)
            acc = tl.dot(p, w, acc, input_precision="ieee")
            p_ptrs += BLOCK_K
            w_ptrs += BLOCK_K * stride_wv
    else:
        for k0 in range(0, N, BLOCK_K):
            p = tl.load(p_ptrs, mask=(ks < whole - k0)[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
            w = tl.load(w_ptrs, mask=(ks < N - k0)[:, None], other=0.0)  # [BLOCK_K, BLOCK_N]
            acc = tl.dot(p, w, acc, input_precision="ieee")
            p_ptrs += BLOCK_K
            w_ptrs += BLOCK_K * stride_wv
    if SPLIT:
        _store_halves(hi_ptrs, lo_ptrs, acc, ok)
    else:
        tl.store(hi_ptrs, acc, mask=ok)


@triton.jit(do_not_specialize=_SIZES)
def _linear_logprob_dw_kernel(
    dz_ptr, h_ptr, order_ptr, count_ptr, dw_ptr,
    N, H, stride_zm, stride_hm, stride_hk, stride_dv,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """dw[N, H] = dz[count, N]ᵀ · h[order, H]: BLOCK_M words, all rows, in one accumulator."""
    pid_m, pid_n = _block(tl.program_id(0), tl.cdiv(N, BLOCK_M), tl.cdiv(H, BLOCK_N), GROUP_M)
    words = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    count = tl.load(count_ptr)
    ks = tl.arange(0, BLOCK_K)
    dz_ptrs = dz_ptr + ks.to(tl.int64)[None, :] * stride_zm + (words % _whole(N))[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k0 in range(0, count, BLOCK_K):
        k_ok = ks < count - k0
        source = tl.load(order_ptr + k0 + ks, mask=k_ok, other=0)
        h_ptrs = h_ptr + source[:, None] * stride_hm + (cols % H)[None, :] * stride_hk
        dz = tl.load(dz_ptrs, mask=k_ok[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        h = tl.load(h_ptrs, mask=k_ok[:, None], other=0.0)  # [BLOCK_K, BLOCK_N]
        acc = tl.dot(dz, h, acc, input_precision="ieee")
        dz_ptrs += BLOCK_K * stride_zm
    out = dw_ptr + words.to(tl.int64)[:, None] * stride_dv + cols[None, :]
    ok = (words < N)[:, None] & (cols < H)[None, :]
    tl.store(out, acc.to(dw_ptr.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=_SIZES)
def _linear_logprob_merge_kernel(
    top_ptr, total_ptr, ref_ptr, sum_ptr, M, tiles, stride_tm,
    BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """The tiles' references and sums of each row into one: ref, Σ total · exp(top − ref)."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    ts = tl.arange(0, BLOCK_T)
    row_ok = rows < M
    ref = tl.full((BLOCK_M,), NEVER, tl.float32)
    acc = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for t0 in range(0, tiles, BLOCK_T):
        at = (t0 + ts).to(tl.int64)[None, :] * stride_tm + rows[:, None]
        ok = row_ok[:, None] & (t0 + ts < tiles)[None, :]
        top = tl.load(top_ptr + at, mask=ok, other=NEVER)  # [BLOCK_M, BLOCK_T]
        total = tl.load(total_ptr + at, mask=ok, other=0.0)
        new = tl.maximum(ref, tl.max(top, 1))
        acc = acc * tl.exp(ref - new) + tl.sum(total * tl.exp(top - new[:, None]), 1)
        ref = new
    tl.store(ref_ptr + rows, ref, mask=row_ok)
    tl.store(sum_ptr + rows, acc, mask=row_ok)


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_GATHERED)
def _linear_logprob_finish_kernel(
    order_ptr, count_ptr, labels_ptr, label_z_ptr, ref_ptr, sum_ptr, w_ptr,
    hi_ptr, lo_ptr, logp_ptr, lse_ptr, out_ptr,
    softcap, inv_temperature,
    row0, V, H, stride_wv, stride_wk, stride_om,
    STATS: tl.constexpr, NEED_U: tl.constexpr, NEED_DH: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    """A row: log p and the logsumexp from its sums (STATS); u or dh from the accumulator, in place.

    Ignored rows get zeros. A label outside [0, V) gives NaN and reads nothing.
    """
    row = tl.program_id(0)
    target = tl.load(order_ptr + row0 + row)
    ok = row0 + row < tl.load(count_ptr)
    label = tl.load(labels_ptr + target)
    good = ok & (label >= 0) & (label < V)
    total = 1.0
    label_z = 0.0
    if STATS:
        total = tl.load(sum_ptr + row, mask=ok, other=1.0)
        lse = tl.load(ref_ptr + row, mask=ok, other=0.0) + tl.log(total)
        label_z = tl.load(label_z_ptr + target, mask=good, other=0.0)
        logp = tl.where(good, label_z - lse, float("nan"))
        tl.store(logp_ptr + target, tl.where(ok, logp, 0.0))
        tl.store(lse_ptr + target, tl.where(ok, lse, 0.0))
    if NEED_U or NEED_DH:
        slope = 1.0
        if softcap > 0.0:
            tanh = label_z / (softcap * inv_temperature)
            slope = 1.0 - tanh * tanh
        for c0 in range(0, H, BLOCK_H):
            cols = c0 + tl.arange(0, BLOCK_H)
            col_ok = cols < H
            at = target * stride_om + cols
            lo_ptrs = lo_ptr + row.to(tl.int64) * H + cols
            value = _load_halves(hi_ptr + at, lo_ptrs, col_ok & ok, SPLIT)
            if NEED_U:
                w_ptrs = w_ptr + label * stride_wv + cols * stride_wk
                own = tl.load(w_ptrs, mask=col_ok & good, other=0.0).to(tl.float32)
                value = (own * slope - value / total) * inv_temperature
            value = tl.where(ok, value, 0.0)
            tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), mask=col_ok)
