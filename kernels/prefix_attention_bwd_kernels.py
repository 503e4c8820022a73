"""The backward kernels of prefix attention; prefix_attention.py says how they are put together.

With p = exp(z − logsumexp) and delta = Σ_d dout·out − dlse by row:
    dz = p ∘ (dout vᵀ − delta)    dq = scale · dz [k]    dk = scale · dzᵀ q    dv = pᵀ dout
A row that sees nothing has a logsumexp of −inf, taken as +inf here: its p is 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusedpeft.kernels.prefix_attention_kernels import (
    _SIZES,
    FULL,
    INF,
    LOG2E,
    NEAR,
    RAGGED,
    _hide,
    _limits,
    _load,
    _load_other,
    _place,
    _prefix_of,
    _seen,
    _span,
)


@triton.jit
def _by_pieces(
    a_ptr, b_ptr, stride_a, stride_b, row0, start, ms, ns, T, end, D,
    BLOCK_D: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """Rows row0 + ms of a times rows start + ns of b, transposed: PIECE columns at a time."""
    z = tl.zeros((ms.shape[0], ns.shape[0]), dtype=tl.float32)
    for d0 in range(0, BLOCK_D, PIECE):
        ds = d0 + tl.arange(0, PIECE)
        a = _load(a_ptr, stride_a, row0, ms, ds, T, D)
        b = _load(b_ptr, stride_b, start, ns, ds, end, D)
        z = tl.dot(a, tl.trans(b), z, input_precision="ieee")
    return z


@triton.jit
def _add_keys(
    dq, q, dout, q_ptr, dout_ptr, stride_q, stride_o, row0, ms, lse, delta,
    k_ptr, v_ptr, mask_ptr, low, a, b, high, end, since, until, T,
    scale, D, stride_k, stride_v, stride_mt, stride_ms, MODE: tl.constexpr, MASK: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """dq / scale over the tiles of keys [low, a) and [b, high): `_attend`'s walk. lse · log2 e.

    PIECE: q and dout are read again for each tile, so many columns at a time. A product on FMA
    units keeps its operands in registers, where rows of 256 in fp32 do not fit.
    """
    rows = row0 + ms
    ns = tl.arange(0, BLOCK_N)
    ds = tl.arange(0, BLOCK_D)
    tiles = tl.cdiv(a - low, BLOCK_N)
    for i in range(tiles + tl.cdiv(high - b, BLOCK_N)):
        start = tl.where(i < tiles, low + i * BLOCK_N, b + (i - tiles) * BLOCK_N)
        if PIECE == 0:
            k = _load_other(k_ptr, stride_k, start, ns, ds, end, D, MODE != FULL)
            z = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # [BLOCK_M, BLOCK_N]
        else:
            z = scale * _by_pieces(q_ptr, k_ptr, stride_q, stride_k, row0, start, ms, ns,
                                   T, end, D, BLOCK_D, PIECE)  # fmt: skip
        if MODE != FULL:
            z = _hide(z, start + ns, end, since, until, rows, T, mask_ptr,
                      stride_mt, stride_ms, MODE, MASK)  # fmt: skip
        p = tl.exp2(z - lse[:, None])
        if PIECE == 0:
            v = _load_other(v_ptr, stride_v, start, ns, ds, end, D, MODE != FULL)
            dp = tl.dot(dout, tl.trans(v), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        else:
            dp = _by_pieces(dout_ptr, v_ptr, stride_o, stride_v, row0, start, ms, ns,
                            T, end, D, BLOCK_D, PIECE)  # fmt: skip
            k = _load_other(k_ptr, stride_k, start, ns, ds, end, D, MODE != FULL)
        dz = p * (dp - delta[:, None])
        dq = tl.dot(dz.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@triton.jit(do_not_specialize=[*_SIZES, "has_dlse", "need_dq"])
def _prefix_attention_dq_kernel(
    q_ptr, k_ptr, v_ptr, pk_ptr, pv_ptr, mask_ptr, cu_ptr, ids_ptr, out_ptr, lse_ptr,
    dout_ptr, dlse_ptr, dq_ptr, delta_ptr, scale,
    groups, heads_kv, T, S, P, D, blocks, packed, has_ids, table, left, right, has_dlse, need_dq,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs, stride_pkb, stride_pkh, stride_pks,
    stride_pvb, stride_pvh, stride_pvs, stride_mb, stride_mh, stride_mt, stride_ms,
    stride_ob, stride_oh, stride_ot,
    MASK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PIECE: tl.constexpr,
):  # fmt: skip
    """delta [b, h, BLOCK_M rows], which the other kernels read, and dq, as forward makes out."""
    pid = tl.program_id(0)
    group = pid % groups
    block = blocks - 1 - (pid // groups) % blocks
    head_kv = (pid // groups // blocks) % heads_kv
    b = pid // groups // blocks // heads_kv
    b, memory, first, length, keys, block = _place(cu_ptr, packed, b, block, T, S, BLOCK_M)
    if block * BLOCK_M >= length:
        return
    head = (head_kv * groups + group).to(tl.int64)
    kv, memory = head_kv.to(tl.int64), memory.to(tl.int64)
    start = block * BLOCK_M
    ms = tl.arange(0, BLOCK_M)
    rows = start + ms
    ds = tl.arange(0, BLOCK_D)
    token = first.to(tl.int64)
    there = (memory * (heads_kv * groups) + head) * T + token
    out = _load(out_ptr + there * D, D, start, ms, ds, length, D)  # [BLOCK_M, BLOCK_D]
    dout_ptr += memory * stride_ob + head * stride_oh + token * stride_ot
    dout = _load(dout_ptr, stride_ot, start, ms, ds, length, D)
    ok = rows < length
    lse = tl.load(lse_ptr + there + rows, mask=ok, other=-INF)
    dlse = tl.load(dlse_ptr + there + rows, mask=ok & (has_dlse != 0), other=0.0)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1) - dlse
    delta = tl.where(lse == -INF, 0.0, delta)
    tl.store(delta_ptr + there + rows, delta, mask=ok)
    if need_dq != 0:
        lse = tl.where(lse == -INF, INF, lse * LOG2E)
        q_ptr += memory * stride_qb + head * stride_qh + token * stride_qt
        q = _load(q_ptr, stride_qt, start, ms, ds, length, D)  # [BLOCK_M, BLOCK_D]
        dq = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
        since, until = _limits(keys - length + rows, keys, left, right)
        scale2 = scale * LOG2E
        index, P, outside = _prefix_of(ids_ptr, has_ids, b, table, P)
        pk_ptr += index * stride_pkb + kv * stride_pkh
        pv_ptr += index * stride_pvb + kv * stride_pvh
        dq = _add_keys(
            dq, q, dout, q_ptr, dout_ptr, stride_qt, stride_ot, start, ms, lse, delta,
            pk_ptr, pv_ptr, mask_ptr, 0, P, P, P, P, since, until, length,
            scale2, D, stride_pks, stride_pvs, 0, 0, RAGGED, False, BLOCK_N, BLOCK_D, PIECE,
        )  # fmt: skip
        k_ptr += memory * stride_kb + kv * stride_kh + token * stride_ks
        v_ptr += memory * stride_vb + kv * stride_vh + token * stride_vs
        mask_ptr += memory * stride_mb + head * stride_mh
        at0 = keys - length + start
        last = tl.minimum(at0 + BLOCK_M, keys) - 1
        low, a, c, high = _seen(at0, last, keys, left, right, BLOCK_N, MASK)
        if not MASK:
            dq = _add_keys(
                dq, q, dout, q_ptr, dout_ptr, stride_qt, stride_ot, start, ms, lse, delta,
                k_ptr, v_ptr, mask_ptr, a, c, c, c, keys, since, until, length,
                scale2, D, stride_ks, stride_vs, 0, 0, FULL, False, BLOCK_N, BLOCK_D, PIECE,
            )  # fmt: skip
        dq = _add_keys(
            dq, q, dout, q_ptr, dout_ptr, stride_qt, stride_ot, start, ms, lse, delta,
            k_ptr, v_ptr, mask_ptr, low, a, c, high, keys, since, until, length,
            scale2, D, stride_ks, stride_vs, stride_mt, stride_ms, NEAR, MASK,
            BLOCK_N, BLOCK_D, PIECE,
        )  # fmt: skip
        dq = tl.where(outside, float("nan"), dq * scale)
        dq_ptrs = dq_ptr + (there + rows)[:, None] * D + ds[None, :]
        tl.store(dq_ptrs, dq.to(dq_ptr.dtype.element_ty), mask=ok[:, None] & (ds < D)[None, :])


@triton.jit
def _by_query(ptr, ms, there, other, MODE: tl.constexpr):
    """A number a query. NEAR, past the last of `there`: that one again, as their p is 0; a check
    would cost a register each."""
    if MODE == FULL:
        return tl.load(ptr + ms)
    elif MODE == NEAR:
        return tl.load(ptr + tl.minimum(ms, there - 1))
    else:
        return tl.load(ptr + ms, mask=ms < there, other=other)


@triton.jit
def _add_queries(
    dk, dv, k, v, q_ptr, dout_ptr, lse_ptr, delta_ptr, mask_ptr, low, a, b, high, T, cols, end,
    since, until, scale, D, stride_q, stride_o, stride_mt, stride_ms,
    MODE: tl.constexpr, MASK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dk / scale and dv over the queries [low, a) and [b, high) of one head; FULL: tiles whole.

    What is subtracted by query, the logsumexp and delta, is where the products' accumulators start:
    beside a tile of keys by queries each of the two costs a register a query and thread.
    Keys past the end gather what nobody stores; queries past T have a p of 0.
    """
    ms = tl.arange(0, BLOCK_M)
    ds = tl.arange(0, BLOCK_D)
    less = -LOG2E / scale
    zero = tl.zeros((k.shape[0], BLOCK_M), dtype=tl.float32)
    tiles = tl.cdiv(a - low, BLOCK_M)
    for i in range(tiles + tl.cdiv(high - b, BLOCK_M)):
        start = tl.where(i < tiles, low + i * BLOCK_M, b + (i - tiles) * BLOCK_M)
        rows = start + ms
        lse = _by_query(lse_ptr + start, ms, T - start, -INF, MODE)
        lse = tl.where(lse == -INF, INF, lse) * less
        q = _load_other(q_ptr, stride_q, start, ms, ds, T, D, MODE != FULL)  # [BLOCK_M, BLOCK_D]
        z = tl.dot(k, tl.trans(q), zero + lse[None, :], input_precision="ieee") * scale
        if MODE == NEAR:  # z [BLOCK_N, BLOCK_M]
            ok = (rows[None, :] > since[:, None]) & (rows[None, :] < until[:, None])
            if MASK:
                ptrs = mask_ptr + tl.minimum(rows, T - 1).to(tl.int64)[None, :] * stride_mt
                bias = tl.load(ptrs + tl.minimum(cols, end - 1).to(tl.int64)[:, None] * stride_ms)
                z += bias.to(tl.float32) * LOG2E
            z = tl.where(ok, z, -INF)
        p = tl.exp2(z)
        dout = _load_other(dout_ptr, stride_o, start, ms, ds, T, D, MODE != FULL)
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
        delta = _by_query(delta_ptr + start, ms, T - start, 0.0, MODE)
        # [BLOCK_N, BLOCK_M]
        dz = p * tl.dot(v, tl.trans(dout), zero - delta[None, :], input_precision="ieee")
        dk = tl.dot(dz.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=_SIZES)
def _prefix_attention_dkv_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, cu_ptr, lse_ptr, dout_ptr, delta_ptr, dk_ptr, dv_ptr, scale,
    groups, heads_kv, T, S, D, blocks, packed, left, right,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs, stride_mb, stride_mh, stride_mt, stride_ms,
    stride_ob, stride_oh, stride_ot,
    MASK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dk, dv [b, kv, BLOCK_N keys, D], over the group's heads in order; longest columns first."""
    pid = tl.program_id(0)
    block = pid % blocks
    head_kv = (pid // blocks) % heads_kv
    b = pid // blocks // heads_kv
    b, memory, first, length, keys, block = _place(cu_ptr, packed, b, block, T, S, BLOCK_N)
    if block * BLOCK_N >= keys:
        return
    kv, memory, token = head_kv.to(tl.int64), memory.to(tl.int64), first.to(tl.int64)
    start = block * BLOCK_N
    ns = tl.arange(0, BLOCK_N)
    cols = start + ns
    ds = tl.arange(0, BLOCK_D)
    k_ptr += memory * stride_kb + kv * stride_kh + token * stride_ks
    v_ptr += memory * stride_vb + kv * stride_vh + token * stride_vs
    k = _load(k_ptr, stride_ks, start, ns, ds, keys, D)  # [BLOCK_N, BLOCK_D]
    v = _load(v_ptr, stride_vs, start, ns, ds, keys, D)
    dk = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    # The queries that see these keys: `_seen` from the other side, left and right exchanged.
    before = keys - length
    last = tl.minimum(start + BLOCK_N, keys) - 1
    low, a, c, high = _seen(start - before, last - before, length, right, left, BLOCK_M, MASK)
    # Where the window reaches past the last query, the whole tiles do not end with it.
    to_end = (c > a) & (start - before + left >= length)
    c = tl.where(to_end, tl.maximum(length // BLOCK_M * BLOCK_M, c), c)
    since, until = _limits(cols - before, length, right, left)
    for group in range(groups):
        head = kv * groups + group
        there = (memory * (heads_kv * groups) + head) * T + token
        q_head = q_ptr + memory * stride_qb + head * stride_qh + token * stride_qt
        dout_head = dout_ptr + memory * stride_ob + head * stride_oh + token * stride_ot
        mask_head = mask_ptr + memory * stride_mb + head * stride_mh
        if not MASK:
            dk, dv = _add_queries(
                dk, dv, k, v, q_head, dout_head, lse_ptr + there, delta_ptr + there, mask_head,
                a, c, c, c, length, cols, keys, since, until, scale * LOG2E, D,
                stride_qt, stride_ot, 0, 0, FULL, False, BLOCK_M, BLOCK_D,
            )  # fmt: skip
        dk, dv = _add_queries(
            dk, dv, k, v, q_head, dout_head, lse_ptr + there, delta_ptr + there, mask_head,
            low, a, c, high, length, cols, keys, since, until, scale * LOG2E, D,
            stride_qt, stride_ot, stride_mt, stride_ms, NEAR, MASK, BLOCK_M, BLOCK_D,
        )  # fmt: skip
    place = ((memory * heads_kv + kv) * S + token + start) * D
    dk_ptr += place
    dv_ptr += place
    at = ns[:, None] * D + ds[None, :]
    ok = (cols < keys)[:, None] & (ds < D)[None, :]
    tl.store(dk_ptr + at, (dk * scale).to(dk_ptr.dtype.element_ty), mask=ok)
    tl.store(dv_ptr + at, dv.to(dv_ptr.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=[*_SIZES, "batch", "prefixes", "own", "parts"])
def _prefix_attention_dprefix_kernel(
    q_ptr, pk_ptr, pv_ptr, cu_ptr, ids_ptr, lse_ptr, dout_ptr, delta_ptr, dpk_ptr, dpv_ptr, scale,
    groups, heads_kv, T, P, D, packed, has_ids, batch, prefixes, own, parts,
    stride_qb, stride_qh, stride_qt, stride_pkb, stride_pkh, stride_pks,
    stride_pvb, stride_pvh, stride_pvs, stride_ob, stride_oh, stride_ot,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dpk, dpv [part, prefix, kv, BLOCK_N keys, D]: this part's queries of every row that has it.

    Rows ascending; own: row i has prefix i. Part c takes the share (c + row) mod parts of a row's
    blocks of queries, so that short rows spread over the parts.
    """
    pid = tl.program_id(0)
    blocks = tl.cdiv(P, BLOCK_N)
    start = pid % blocks * BLOCK_N
    ns = tl.arange(0, BLOCK_N)
    cols = start + ns
    head_kv = (pid // blocks) % heads_kv
    prefix = (pid // blocks // heads_kv) % prefixes
    part = pid // blocks // heads_kv // prefixes
    kv = head_kv.to(tl.int64)
    ds = tl.arange(0, BLOCK_D)
    pk_ptr += prefix.to(tl.int64) * stride_pkb + kv * stride_pkh
    pv_ptr += prefix.to(tl.int64) * stride_pvb + kv * stride_pvh
    k = _load(pk_ptr, stride_pks, start, ns, ds, P, D)  # [BLOCK_N, BLOCK_D]
    v = _load(pv_ptr, stride_pvs, start, ns, ds, P, D)
    dk = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    row0 = tl.where(own != 0, prefix, 0)
    for i in range(tl.where(own != 0, 1, batch)):
        b = row0 + i
        first = b * 0
        length = T + 0
        memory = b.to(tl.int64)
        if packed != 0:
            first, length = _span(cu_ptr, b, T)
            memory = memory * 0
        wanted = tl.load(ids_ptr + b, mask=has_ids != 0, other=0)
        length = tl.where((has_ids != 0) & (wanted != prefix), 0, length)
        tiles = tl.cdiv(length, BLOCK_M)
        share = (part + b) % parts
        low = tiles * share // parts * BLOCK_M
        high = tl.minimum(tiles * (share + 1) // parts * BLOCK_M, length)
        token = first.to(tl.int64)
        for group in range(groups):
            head = kv * groups + group
            there = (memory * (heads_kv * groups) + head) * T + token
            q_head = q_ptr + memory * stride_qb + head * stride_qh + token * stride_qt
            dout_head = dout_ptr + memory * stride_ob + head * stride_oh + token * stride_ot
            dk, dv = _add_queries(
                dk, dv, k, v, q_head, dout_head, lse_ptr + there, delta_ptr + there, q_ptr,
                low, high, high, high, length, cols, P, 0, 0, scale * LOG2E, D,
                stride_qt, stride_ot, 0, 0, RAGGED, False, BLOCK_M, BLOCK_D,
            )  # fmt: skip
    at = (part.to(tl.int64) * prefixes + prefix) * heads_kv + kv
    at = (at * P + cols)[:, None] * D + ds[None, :]
    ok = (cols < P)[:, None] & (ds < D)[None, :]
    tl.store(dpk_ptr + at, (dk * scale).to(dpk_ptr.dtype.element_ty), mask=ok)
    tl.store(dpv_ptr + at, dv.to(dpv_ptr.dtype.element_ty), mask=ok)
