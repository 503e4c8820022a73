"""LoRA linear with an adapter for each row, beyond the few tokens of decode. Of row m, in slot s:

    y[m] = x[m] Wᵀ + bias + scale_s · (x[m] A_sᵀ) B_sᵀ    x [M,K] W [N,K] A_s [R_s,K] B_s [N,R_s]

W may be stacked of parts by rows, each with its own A, B, rank and scale (ops/slots.py).

1. plan: rows sorted by slot on the device (stable, by counting, no atomics), and the list of tiles
   that have rows of one slot only. Its length is bounded by M and the number of slots: the grid
   needs no look at the values.
2. shrink: S = scale_s · x A_sᵀ, a tile of one slot at a time.
3. GEMM over the sorted rows; behind the K loop, for each slot that its rows have, S B_sᵀ is added
   to these. Rows leave to their own places.

A slot costs its own rank: tiles of the shrink beyond it leave at once, the loop over it in the GEMM
ends there. Bytes beside the GEMM's: x and S once more, A and B of the slots in use. FLOPs beside
it: 2·M·(K + N)·BLOCK_R, and 2·BLOCK_M·BLOCK_N·BLOCK_R more for each further slot of a tile.
K or a part's N that 16 does not divide: tiles of their own, smaller, as the pool stays as it is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedpeft.kernels.aligned import aligned, up16
from fusedpeft.kernels.device import arch_of, on_device
from fusedpeft.kernels.multi_lora_tables import multi_lora_config

MAX_PARTS = 4  # of W in one launch
RANK_STEP = 8  # ops/slots.py: max_rank and the rows of B are multiples of it


@triton.jit(do_not_specialize=["M"])
def _multi_lora_plan_kernel(
    slots_ptr, order_ptr, tiles_ptr, M, slots,
    ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """A block a group: slot −1, each slot, whatever is no slot. order[M]: rows, group by group.

    tiles[·, 3] = (slot or −1, first, stop) in places of `order`. Group g begins at tile
    first // ROWS + g: enough for all before it, whatever their remainders.
    """
    group = tl.program_id(0)
    places = tl.arange(0, CHUNK)
    before = 0
    count = 0
    for m0 in range(0, M, CHUNK):
        slot = tl.load(slots_ptr + m0 + places, mask=m0 + places < M, other=-1)
        other = tl.where((slot < -1) | (slot >= slots), slots + 1, slot + 1)
        other = tl.where(m0 + places < M, other, slots + 2)
        before += tl.sum((other < group).to(tl.int32), 0)
        count += tl.sum((other == group).to(tl.int32), 0)
    at = before
    for m0 in range(0, M, CHUNK):
        slot = tl.load(slots_ptr + m0 + places, mask=m0 + places < M, other=-1)
        other = tl.where((slot < -1) | (slot >= slots), slots + 1, slot + 1)
        mine = ((other == group) & (m0 + places < M)).to(tl.int32)
        tl.store(order_ptr + at + tl.cumsum(mine, 0) - 1, m0 + places, mask=mine != 0)
        at += tl.sum(mine, 0)
    stop = before + count
    tile0 = before // ROWS + group
    end = stop // ROWS + group + 1  # where the next group begins
    adapter = (group > 0) & (group <= slots)
    for t0 in range(tile0, end, CHUNK):
        t = t0 + places
        first = before + (t - tile0) * ROWS
        ok = t < end
        slot = tl.where(adapter & (first < stop), group - 1, -1)
        tl.store(tiles_ptr + t * 3, slot, mask=ok)
        tl.store(tiles_ptr + t * 3 + 1, first, mask=ok)
        tl.store(tiles_ptr + t * 3 + 2, tl.minimum(first + ROWS, stop), mask=ok)


@triton.jit
def _multi_lora_shrink_kernel(
    x_ptr, a_ptr, rank_ptr, scale_ptr, order_ptr, tiles_ptr, s_ptr,
    K, parts, blocks_r, rank_steps,
    stride_xm, stride_xk, stride_as, stride_ar, stride_sm,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """s[place, part · max_rank + r] = scale · x[order[place]] · a[slot, part · max_rank + r]."""
    tile = tl.program_id(0) * 3
    slot = tl.load(tiles_ptr + tile)
    if slot < 0:
        return
    part = tl.program_id(1) // blocks_r
    r0 = (tl.program_id(1) % blocks_r) * BLOCK_R
    R = tl.load(rank_ptr + slot * parts + part)
    if r0 >= R:
        return
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    places = tl.load(tiles_ptr + tile + 1) + tl.arange(0, BLOCK_M)
    row_ok = places < tl.load(tiles_ptr + tile + 2)
    rows = tl.load(order_ptr + places, mask=row_ok, other=0).to(tl.int64)
    rs = r0 + tl.arange(0, BLOCK_R)
    ks = tl.arange(0, BLOCK_K)
    max_rank = rank_steps * 8  # said so that loads are wide
    a_rows = slot.to(tl.int64) * stride_as + (part * max_rank + rs).to(tl.int64) * stride_ar
    x_ptrs = x_ptr + rows[:, None] * stride_xm + ks[None, :] * stride_xk
    a_ptrs = a_ptr + a_rows[None, :] + ks[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k_ok = ks < K - k0
        x = tl.load(x_ptrs, mask=row_ok[:, None] & k_ok[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        a = tl.load(a_ptrs, mask=k_ok[:, None] & (rs < R)[None, :], other=0.0)  # [BLOCK_K, BLOCK_R]
        acc = tl.dot(x, a.to(dtype), acc, input_precision="ieee")
        x_ptrs += BLOCK_K * stride_xk
        a_ptrs += BLOCK_K
    s = acc * tl.load(scale_ptr + slot * parts + part)
    s_ptrs = s_ptr + places.to(tl.int64)[:, None] * stride_sm + part * max_rank + rs[None, :]
    whole = (R + 7) // 8 * 8  # zeros up to where a row of B ends
    tl.store(s_ptrs, s.to(dtype), mask=row_ok[:, None] & (rs < whole)[None, :])


@triton.jit(do_not_specialize=["M"])
def _multi_lora_gemm_kernel(
    x_ptr, w_ptr, bias_ptr, b_ptr, rank_ptr, slots_ptr, order_ptr, s_ptr, out_ptr,
    M, K, n0, n1, n2, n3, slots, parts, part0, start0, rank_steps,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_bs, stride_sm, stride_om,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):  # fmt: skip
    """Up to four parts of W, from `part0` and row `start0` on; a tile has columns of one."""
    blocks_m = tl.cdiv(M, BLOCK_M)
    end0 = tl.cdiv(n0, BLOCK_N)
    end1 = end0 + tl.cdiv(n1, BLOCK_N)
    end2 = end1 + tl.cdiv(n2, BLOCK_N)
    blocks_n = end2 + tl.cdiv(n3, BLOCK_N)
    pid = tl.program_id(0)
    per_group = GROUP_M * blocks_n
    first_m = (pid // per_group) * GROUP_M
    group_m = min(blocks_m - first_m, GROUP_M)
    pid_m = first_m + (pid % per_group) % group_m
    pid_n = (pid % per_group) // group_m

    in1, in2, in3 = pid_n >= end0, pid_n >= end1, pid_n >= end2
    part = part0 + in1.to(tl.int32) + in2.to(tl.int32) + in3.to(tl.int32)
    width = tl.where(in3, n3, tl.where(in2, n2, tl.where(in1, n1, n0)))
    start = start0 + tl.where(in1, n0, 0) + tl.where(in2, n1, 0) + tl.where(in3, n2, 0)
    block = pid_n - tl.where(in3, end2, tl.where(in2, end1, tl.where(in1, end0, 0)))

    dtype: tl.constexpr = x_ptr.dtype.element_ty
    places = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = places < M
    # Rows and columns past the end wrap to valid ones: the K loop needs no mask for them.
    source = tl.load(order_ptr + places % M)
    rows = source.to(tl.int64)
    cols = block * BLOCK_N + tl.arange(0, BLOCK_N)  # within the part
    col_ok = cols < width
    cols64 = (cols % width).to(tl.int64)
    ks = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + rows[:, None] * stride_xm + ks[None, :] * stride_xk
    w_ptrs = w_ptr + (start + cols64)[None, :] * stride_wn + ks[:, None] * stride_wk
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k_ok = ks < K - k0
        x = tl.load(x_ptrs, mask=k_ok[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        w = tl.load(w_ptrs, mask=k_ok[:, None], other=0.0)  # [BLOCK_K, BLOCK_N]
        acc = tl.dot(x, w, acc, input_precision="ieee")
        x_ptrs += BLOCK_K * stride_xk
        w_ptrs += BLOCK_K * stride_wk

    slot = tl.load(slots_ptr + source)
    known = row_ok & (slot >= 0) & (slot < slots)
    nan = row_ok & (slot != -1) & ~known
    slot = tl.where(known, slot, slots)  # behind all others
    max_rank = rank_steps * 8  # said so that loads are wide
    s_ptrs = s_ptr + places.to(tl.int64)[:, None] * stride_sm + part * max_rank
    now = tl.min(slot, 0)
    while now < slots:
        R = tl.load(rank_ptr + now * parts + part)
        mine = slot == now
        nan |= mine & (R < 0)  # nothing was loaded there
        length = (R + 7) // 8 * 8  # a row of B, zeros at its end
        b_base = b_ptr + now.to(tl.int64) * stride_bs + start.to(tl.int64) * max_rank
        for r0 in tl.range(0, length, BLOCK_R, num_stages=1):
            rs = r0 + tl.arange(0, BLOCK_R)
            r_ok = rs < length
            s = tl.load(s_ptrs + rs[None, :], mask=mine[:, None] & r_ok[None, :], other=0.0)
            b_ptrs = b_base + cols64[None, :] * length + rs[:, None]
            b = tl.load(b_ptrs, mask=r_ok[:, None], other=0.0).to(dtype)  # [BLOCK_R, BLOCK_N]
            # 0 · inf would reach the rows of others: an adapter that is not finite harms its own.
            finite = tl.abs(b.to(tl.float32)) < float("inf")
            nan |= mine & (tl.min(tl.min(finite.to(tl.int32), 1), 0) == 0)
            b = tl.where(finite, b, 0.0)
            acc = tl.dot(s, b, acc, input_precision="ieee")
        now = tl.min(tl.where(slot > now, slot, slots), 0)

    if HAS_BIAS:
        bias = tl.load(bias_ptr + start + cols, mask=col_ok, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    acc = tl.where(nan[:, None], float("nan"), acc)
    out_ptrs = out_ptr + rows[:, None] * stride_om + start + cols[None, :]
    tl.store(out_ptrs, acc.to(dtype), mask=row_ok[:, None] & col_ok[None, :])


def _wide(K: int, pool: tuple) -> bool:
    """Whether all rows begin at multiples of 16: of x, W, A, B and y, part by part."""
    where = (pool.a.data_ptr(), pool.b.data_ptr(), pool.a.stride(0), pool.a.stride(1))
    return all(n % 16 == 0 for n in (K, *pool.sizes, *where))


def multi_lora_fwd(
    x: Tensor, w: Tensor, pool: tuple, slots: Tensor, bias: Tensor | None = None
) -> Tensor:
    """y [M,N] in x's dtype, fresh. No host synchronisation; can be captured.

    x [M,K] and w [N,K] share fp32, bf16 or fp16, any strides; pool is an `ops.slots.LoRASlots`, a
    and b in x's dtype or fp32 (cast to x's dtype for the tensor cores); slots int32 [M]. A row
    comes back NaN where its slot holds no adapter or does not exist, and, tile by tile of columns,
    where B is not finite.
    """
    (M, K), N = x.shape, w.shape[0]
    y = torch.empty((M, N), dtype=x.dtype, device=x.device)
    if M == 0 or N == 0:
        return y
    count, parts = pool.rank.shape
    max_rank, steps = pool.max_rank, pool.max_rank // RANK_STEP
    x, w, bias, slots = aligned(x), aligned(w), aligned(bias), aligned(slots)
    cfg = multi_lora_config(
        M, N, max_rank, arch_of(x.device), elem_bytes=x.element_size(), wide=_wide(K, pool)
    )
    whole = dict(dtype=torch.int32, device=x.device)
    tiles = M // cfg["shrink"]["BLOCK_M"] + count + 2
    order, table = torch.empty(M, **whole), torch.empty((tiles, 3), **whole)
    s = torch.empty((M, up16(parts * max_rank)), dtype=x.dtype, device=x.device)
    blocks_r = triton.cdiv(max_rank, cfg["shrink"]["BLOCK_R"])
    with on_device(x):
        _multi_lora_plan_kernel[(count + 2,)](slots, order, table, M, count, **cfg["plan"])
        _multi_lora_shrink_kernel[(tiles, parts * blocks_r)](
            x, pool.a, pool.rank, pool.scale, order, table, s,
            K, parts, blocks_r, steps,
            x.stride(0), x.stride(1), pool.a.stride(0), pool.a.stride(1), s.stride(0),
            **cfg["shrink"],
        )  # fmt: skip
        for part0 in range(0, parts, MAX_PARTS):
            sizes = pool.sizes[part0 : part0 + MAX_PARTS]
            blocks = sum(triton.cdiv(n, cfg["gemm"]["BLOCK_N"]) for n in sizes)
            if blocks == 0:
                continue
            _multi_lora_gemm_kernel[(triton.cdiv(M, cfg["gemm"]["BLOCK_M"]) * blocks,)](
                x, w, y if bias is None else bias, pool.b, pool.rank, slots, order, s, y,
                M, K, *sizes, *(0,) * (MAX_PARTS - len(sizes)),
                count, parts, part0, sum(pool.sizes[:part0]), steps,
                x.stride(0), x.stride(1), w.stride(0), w.stride(1), pool.b.stride(0), s.stride(0),
                y.stride(0),
                HAS_BIAS=bias is not None, **cfg["gemm"],
            )  # fmt: skip
    return y
