"""The kernels of prefix attention; prefix_attention.py says how they are put together.

A query stands at `at` = S − T + its index; it sees the key at c where −left < c − at < right. Each
block walks its tiles in two kinds of loop: one over tiles that all its queries see whole, without
any check, one over the edges. Scores are kept times log2 e. A row of q is a token: of row b, or of
packed sequence b, whose blocks are numbered from cu[b] // BLOCK + b on, so that nobody has to read
the lengths before the launch; a block past its sequence's end leaves at once.
"""

from __future__ import annotations

import triton
import triton.language as tl

NEVER = tl.constexpr(-1e30)  # a maximum below any score; finite, so that differences are defined
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INF = tl.constexpr(float("inf"))
FULL = tl.constexpr(0)  # every query sees every key of the tile
RAGGED = tl.constexpr(1)  # every query sees the keys that are there
NEAR = tl.constexpr(2)  # by position, and by the mask
_SIZES = [
    "groups", "heads_kv", "T", "S", "P", "blocks", "packed", "has_ids", "table", "left", "right",
]  # fmt: skip


@triton.jit
def _span(cu_ptr, i, T):
    """(first token, tokens) of packed sequence i, within [0, T) whatever cu holds."""
    first = tl.minimum(tl.maximum(tl.load(cu_ptr + i).to(tl.int32), 0), T)
    end = tl.minimum(tl.maximum(tl.load(cu_ptr + i + 1).to(tl.int32), first), T)
    return first, end - first


@triton.jit
def _place(cu_ptr, packed, b, block, T, S, BLOCK: tl.constexpr):
    """(row, its row in memory, first token, T, S, block in it) of a block; packed: sequences or 0.

    The sequence is the last that starts at or before the block: found by halving.
    """
    memory = b
    first = b * 0
    length = T + 0
    keys = S + 0
    if packed != 0:
        low = b * 0
        high = low + packed
        while low + 1 < high:
            middle = (low + high) // 2
            start = tl.load(cu_ptr + middle).to(tl.int32) // BLOCK + middle
            low = tl.where(start <= block, middle, low)
            high = tl.where(start <= block, high, middle)
        b = low
        block = block - (tl.load(cu_ptr + b).to(tl.int32) // BLOCK + b)
        first, length = _span(cu_ptr, b, T)
        keys = length
        block = tl.where(block < 0, tl.cdiv(length, BLOCK), block)  # of a cu that is not ascending
    return b, memory, first, length, keys, block


@triton.jit
def _prefix_of(ids_ptr, has_ids, b, table, P):
    """(index, length, whether the id is outside the table) of the prefix of row b."""
    own = tl.load(ids_ptr + b, mask=has_ids != 0, other=0).to(tl.int64)
    outside = (has_ids != 0) & ((own < -1) | (own >= table))
    none = (has_ids != 0) & ((own < 0) | outside)
    index = tl.where(has_ids != 0, own, b.to(tl.int64))
    return tl.where(none, 0, index), tl.where(none, 0, P), outside


@triton.jit
def _load(ptr, stride, start, rows, ds, end, D):
    """Rows start + rows of a matrix with D columns, [len(rows), len(ds)]; zeros past D and end."""
    ok = (start + rows < end)[:, None] & (ds < D)[None, :]
    ptr += tl.cast(start, tl.int64) * stride  # what is left within a tile is 32 bits wide
    return tl.load(ptr + rows[:, None] * stride + ds[None, :], mask=ok, other=0.0)


@triton.jit
def _load_other(ptr, stride, start, rows, ds, end, D, CHECK: tl.constexpr):
    """As `_load` for the other operand of a product: past D anything, as that one has zeros there
    or nobody stores the result. Rows are checked only where asked."""
    ptr += tl.cast(start, tl.int64) * stride
    ptrs = ptr + rows[:, None] * stride + (ds % D)[None, :]
    if CHECK:
        return tl.load(ptrs, mask=(start + rows < end)[:, None], other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def _seen(first, last, S, left, right, BLOCK: tl.constexpr, SKIP: tl.constexpr):
    """For queries at first … last: keys [a, b) are whole tiles, [low, a) and [b, high) edges.

    SKIP: no whole tiles, as a mask is to be added everywhere.
    """
    low = tl.maximum(first - left + 1, 0) // BLOCK * BLOCK
    high = tl.minimum(last + right, S)
    a = high
    b = high
    if not SKIP:
        whole_a = tl.cdiv(tl.maximum(last - left + 1, low), BLOCK) * BLOCK
        whole_b = tl.minimum(first + right, S) // BLOCK * BLOCK
        a = tl.where(whole_a < whole_b, whole_a, high)
        b = tl.where(whole_a < whole_b, whole_b, high)
    return low, a, b, high


@triton.jit
def _limits(at, S, left, right):
    """Queries at `at` see the keys c with since < c < until."""
    return at - left, tl.minimum(at + right, S)


@triton.jit
def _hide(
    z, cols, end, since, until, rows, T, mask_ptr, stride_mt, stride_ms,
    MODE: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """z [rows, cols] plus the mask, −inf where a query does not see the key."""
    if MODE == RAGGED:
        ok = (cols < end)[None, :]
    else:
        ok = (cols[None, :] > since[:, None]) & (cols[None, :] < until[:, None])
        if MASK:
            # Past the ends the last is read: a check would cost a predicate an element.
            ptrs = mask_ptr + tl.minimum(rows, T - 1).to(tl.int64)[:, None] * stride_mt
            ptrs += tl.minimum(cols, end - 1).to(tl.int64)[None, :] * stride_ms
            bias = tl.load(ptrs)
            z += bias.to(tl.float32) * LOG2E
    return tl.where(ok, z, -INF)


@triton.jit
def _attend(
    acc, top, total, q, k_ptr, v_ptr, mask_ptr, low, a, b, high, end, since, until, rows, T,
    scale, D, stride_k, stride_v, stride_mt, stride_ms,
    MODE: tl.constexpr, MASK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One pass of online softmax over the tiles of keys [low, a) and [b, high), of `end`."""
    ns = tl.arange(0, BLOCK_N)
    ds = tl.arange(0, BLOCK_D)
    tiles = tl.cdiv(a - low, BLOCK_N)
    for i in range(tiles + tl.cdiv(high - b, BLOCK_N)):
        start = tl.where(i < tiles, low + i * BLOCK_N, b + (i - tiles) * BLOCK_N)
        k = _load_other(k_ptr, stride_k, start, ns, ds, end, D, MODE != FULL)
        z = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        if MODE == FULL:  # scale ≥ 0: one multiply-add for an element
            new = tl.maximum(top, tl.max(z, 1) * scale)
            p = tl.exp2(z * scale - new[:, None])
        else:
            z = _hide(z * scale, start + ns, end, since, until, rows, T, mask_ptr,
                      stride_mt, stride_ms, MODE, MASK)  # fmt: skip
            new = tl.maximum(top, tl.max(z, 1))
            p = tl.exp2(z - new[:, None])
        shrink = tl.exp2(top - new)
        total = total * shrink + tl.sum(p, 1)
        top = new
        v = _load_other(v_ptr, stride_v, start, ns, ds, end, D, MODE != FULL)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, top, total


@triton.jit(do_not_specialize=_SIZES)
def _prefix_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, pk_ptr, pv_ptr, mask_ptr, cu_ptr, ids_ptr, out_ptr, lse_ptr, scale,
    groups, heads_kv, T, S, P, D, blocks, packed, has_ids, table, left, right,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs, stride_pkb, stride_pkh, stride_pks,
    stride_pvb, stride_pvh, stride_pvs, stride_mb, stride_mh, stride_mt, stride_ms,
    MASK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out [b, h, BLOCK_M rows, D] and their logsumexp: the prefix's tiles, then the keys'.

    Heads of a group follow each other, as they read the same keys; the longest rows come first.
    """
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
    q_ptr += memory * stride_qb + head * stride_qh + token * stride_qt
    q = _load(q_ptr, stride_qt, start, ms, ds, length, D)  # [BLOCK_M, BLOCK_D]
    scale = scale * LOG2E
    acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    top = tl.full((BLOCK_M,), NEVER, tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)

    since, until = _limits(keys - length + rows, keys, left, right)
    index, P, outside = _prefix_of(ids_ptr, has_ids, b, table, P)
    pk_ptr += index * stride_pkb + kv * stride_pkh
    pv_ptr += index * stride_pvb + kv * stride_pvh
    acc, top, total = _attend(
        acc, top, total, q, pk_ptr, pv_ptr, mask_ptr, 0, P, P, P, P, since, until, rows, length,
        scale, D, stride_pks, stride_pvs, 0, 0, RAGGED, False, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    k_ptr += memory * stride_kb + kv * stride_kh + token * stride_ks
    v_ptr += memory * stride_vb + kv * stride_vh + token * stride_vs
    mask_ptr += memory * stride_mb + head * stride_mh
    at0 = keys - length + start
    last = tl.minimum(at0 + BLOCK_M, keys) - 1
    low, a, c, high = _seen(at0, last, keys, left, right, BLOCK_N, MASK)
    if not MASK:
        acc, top, total = _attend(
            acc, top, total, q, k_ptr, v_ptr, mask_ptr, a, c, c, c, keys, since, until, rows,
            length, scale, D, stride_ks, stride_vs, 0, 0, FULL, False, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    acc, top, total = _attend(
        acc, top, total, q, k_ptr, v_ptr, mask_ptr, low, a, c, high, keys, since, until, rows,
        length, scale, D, stride_ks, stride_vs, stride_mt, stride_ms, NEAR, MASK, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    alive = total != 0.0
    total = tl.where(alive, total, 1.0)
    out = acc / total[:, None]
    lse = tl.where(alive, (top + tl.log2(total)) * LN2, -INF)
    out = tl.where(outside, float("nan"), out)
    lse = tl.where(outside, float("nan"), lse)
    there = (memory * (heads_kv * groups) + head) * T + token + rows
    ok = rows < length
    tl.store(lse_ptr + there, lse, mask=ok)
    out_ptrs = out_ptr + there[:, None] * D + ds[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=ok[:, None] & (ds < D)[None, :])
