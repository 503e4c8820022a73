"""The dropout mask as a device function: same bits as `fusedpeft.ops.dropout`, its specification.

    key1 = mix(mix(row_lo ^ seed_lo) + seed_hi + row_hi),   key2 = mix(key1 ^ 0x9E3779B9)
    keep(row, col) = mix(mix(col + key1) ^ key2) >= floor(p * 2^32)

About 21 integer operations an element, no memory. The keys cost a row, not an element.
"""

import triton
import triton.language as tl


@triton.jit
def _mix(h):
    """lowbias32 on uint32."""
    h = h ^ (h >> 16)
    h = h * tl.full([], 0x7FEB352D, tl.uint32)
    h = h ^ (h >> 15)
    h = h * tl.full([], 0x846CA68B, tl.uint32)
    return h ^ (h >> 16)


@triton.jit
def keep_mask(seed_ptr, rows, cols, threshold):
    """bool [len(rows), len(cols)], True where kept.

    seed_ptr: int64, one element. rows, cols: integer vectors. threshold: floor(p * 2^32) with its
    bits in a signed int32 (`signed_threshold`), so that one compiled kernel serves every p.
    """
    seed = tl.load(seed_ptr).to(tl.int64)
    seed_lo = seed.to(tl.uint32)
    seed_hi = (seed >> 32).to(tl.uint32)
    row = rows.to(tl.int64)
    key1 = _mix(_mix(row.to(tl.uint32) ^ seed_lo) + seed_hi + (row >> 32).to(tl.uint32))
    key2 = _mix(key1 ^ tl.full([], 0x9E3779B9, tl.uint32))
    h = _mix(cols.to(tl.uint32)[None, :] + key1[:, None])
    return _mix(h ^ key2[:, None]) >= threshold.to(tl.uint32, bitcast=True)


def signed_threshold(p: float) -> int:
    """floor(p * 2^32) as the int32 with the same bits."""
    t = int(p * 2**32)
    return t - 2**32 if t >= 2**31 else t
