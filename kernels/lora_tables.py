"""Which tile each LoRA kernel takes: a finite table by architecture and pure functions over it.

Everything that the launchers can choose is listed by `lora_configs`, so ahead-of-time compilation
covers it all (`python -m fusedpeft.bench.aot`). Nothing is autotuned at run time: the choice hangs
on shapes and architecture only, so results are the same from run to run.
"""

from __future__ import annotations

import itertools

from fusedpeft.kernels.device import ARCHS, SMS, SUM_CONFIG


def _tile(m: int, n: int, k: int, warps: int, stages: int) -> dict:
    return dict(
        BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, GROUP_M=8, num_warps=warps, num_stages=stages
    )  # fmt: skip


# GEMM tiles for 16-bit inputs, by the amount of work. sm_80's fit the 99 KiB of sm_86/89/120 too.
_GEMM = {
    "sm_80": {
        "rows16": _tile(16, 32, 128, 4, 4),
        "small": _tile(64, 64, 64, 4, 4),
        "medium": _tile(128, 128, 32, 8, 4),
        "large": _tile(128, 256, 32, 8, 3),
    },
    "sm_90": {
        "rows16": _tile(16, 32, 128, 4, 5),
        "small": _tile(64, 64, 64, 4, 5),
        "medium": _tile(128, 128, 64, 8, 3),  # 96 KiB: two blocks share an SM
        "large": _tile(128, 256, 64, 8, 4),
    },
    "gfx942": {
        "rows16": _tile(16, 32, 128, 4, 2),
        "small": _tile(64, 64, 64, 4, 2),
        "medium": _tile(128, 128, 64, 4, 2),
        "large": _tile(128, 256, 32, 8, 2),
    },
}
_GEMM_FP32 = _tile(64, 64, 16, 4, 2)  # "ieee" products run on FMA units: a small tile fills them
# The TMA kernel's, for Hopper: 192 KiB of stages and 32 KiB of half a tile on its way out.
_TMA = {**_tile(128, 256, 64, 8, 4), "BLOCK_OUT": 128}
MAX_BLOCK_R = 64


def block_r(rank: int, elem_bytes: int) -> int:
    """Columns of the adapter tile: 16 or 64 (16 in fp32). Higher ranks loop or take more blocks."""
    return 16 if rank <= 16 or elem_bytes == 4 else MAX_BLOCK_R


def gemm_config(
    M: int, N: int, R: int, arch: str, elem_bytes: int, *, dropout: bool = False, fuse: bool = False
) -> dict:
    """The largest tile that still gives every SM a block and does not spill.

    With a mask in it (dx under dropout) not the largest: the hash of so many elements spills.
    sm_80 keeps operands in registers: no room there for x Aᵀ as well.
    """
    if elem_bytes == 4:
        return {**_GEMM_FP32, "BLOCK_R": 16, "HOLD": False}
    tiles = _GEMM[arch]
    large_ok = not dropout and not (fuse and arch == "sm_80")
    if M <= 16:
        tile = tiles["rows16"]
    elif large_ok and -(-M // 128) * -(-N // 256) >= SMS[arch]:
        tile = tiles["large"]
    elif -(-M // 128) * -(-N // 128) >= SMS[arch]:
        tile = tiles["medium"]
    else:
        tile = tiles["small"]
    # Inside the K loop the whole rank must fit. Else it is a loop, in narrow steps where the rank
    # allows no wide loads: an address for every element of the tile is what spills.
    high = MAX_BLOCK_R if fuse else 32 if R % 16 == 0 else 16
    if fuse and arch == "sm_80" and R > 16:  # else A's stages in fp32 exceed the 99 KiB
        tile = {**tile, "BLOCK_K": 64}
    hold = arch == "sm_90" and tile is tiles["large"] and R <= 16 and not fuse
    return {**tile, "BLOCK_R": 16 if R <= 16 or dropout else high, "HOLD": hold}


def tma_config(
    M: int, N: int, R: int, arch: str, elem_bytes: int, *, dropout: bool = False, fuse: bool = False
) -> dict | None:
    """The tile of the persistent TMA kernel, or None where `gemm_config`'s pointer kernel is meant.

    Hopper, 16 bits, a tile for every SM; no mask, and S made beforehand. The launcher takes the
    pointer kernel all the same where TMA cannot address an operand (`lora_gemm.tma_ok`).
    """
    few = -(-M // _TMA["BLOCK_M"]) * -(-N // _TMA["BLOCK_N"]) < SMS["sm_90"]
    if arch != "sm_90" or elem_bytes == 4 or dropout or fuse or few:
        return None
    return {**_TMA, "BLOCK_R": 32 if R > 16 and R % 16 == 0 else 16}


def _skinny(arch: str, elem_bytes: int) -> dict:
    """Warps and stages of the memory-bound kernels."""
    return dict(num_warps=4, num_stages=2 if arch == "gfx942" or elem_bytes == 4 else 3)


def shrink_config(M: int, R: int, arch: str, elem_bytes: int) -> dict:
    """Rows enough to give half of the SMs a block, else 16."""
    rows = 64 if -(-M // 64) >= SMS[arch] // 2 else 16
    k = 32 if elem_bytes == 4 else 128 if arch != "sm_80" else 64
    cfg = dict(BLOCK_M=rows, BLOCK_K=k, BLOCK_R=block_r(R, elem_bytes))
    cfg |= _skinny(arch, elem_bytes)
    if rows * cfg["BLOCK_R"] > 1024 and arch != "gfx942":
        cfg["num_warps"] = 8  # four spill under dropout; on gfx942 eight do
    return cfg


def add_config(M: int, N: int, arch: str, elem_bytes: int) -> dict:
    """Of the GEMM that adds to dx a further projection's share, without an update."""
    config = gemm_config(M, N, 17, arch, elem_bytes)
    # Four warps spill 8 bytes there under Triton 3.6.
    return {**config, "num_warps": 8} if elem_bytes == 4 and arch == "sm_90" else config


def strided_rank(rank: int, first: int, total: int) -> int:
    """The rank to choose a tile by where S is `total` wide and this rank starts at `first`.

    The tiles of a multiple of 16 take wide loads of S for granted; where a neighbour's rank has
    spoilt these, the tiles of the rank beside it do not.
    """
    return rank - (rank > 0 and rank % 16 == 0 and (first % 16 > 0 or total % 16 > 0))


def _fuse_shrink(M: int, N: int, R: int, dropout: bool) -> bool:
    """S inside the GEMM's K loop instead of a kernel of its own: see lora.py for the arithmetic."""
    if dropout:
        return False
    return R <= MAX_BLOCK_R if M <= 16 else R <= 16 and (M <= 64 or N <= 1024)


def lora_fwd_config(
    M: int, N: int, K: int, R: int, arch: str, *, dropout: bool = False, elem_bytes: int = 2
) -> dict:
    """{"fuse_shrink": bool, "gemm": …, "tma": … or None, "shrink": … or None} for y[M,N] over K."""
    fuse = _fuse_shrink(M, N, R, dropout) and R <= block_r(R, elem_bytes)
    return {
        "fuse_shrink": fuse,
        "gemm": gemm_config(M, N, R, arch, elem_bytes, fuse=fuse),
        "tma": tma_config(M, N, R, arch, elem_bytes, fuse=fuse),
        "shrink": None if fuse else shrink_config(M, R, arch, elem_bytes),
    }


def _dsdb_config(R: int, arch: str, elem_bytes: int) -> dict:
    r = block_r(R, elem_bytes)
    if elem_bytes == 4:
        return dict(BLOCK_M=32, BLOCK_N=32, BLOCK_R=r, num_warps=4, num_stages=2)
    # dB leaves once per BLOCK_M rows: rows buy traffic. More than these spill, on sm_80 with a rank
    # that cannot be loaded wide even sooner.
    wide = r > 16
    rows, columns, warps = {
        "sm_80": (64 if wide and R % 16 else 128, 32 if wide else 64, 8),
        "sm_90": (256, 64, 8),
        "gfx942": (64, 64, 4) if wide else (128, 64, 8),
    }[arch]
    return dict(BLOCK_M=rows, BLOCK_N=columns, BLOCK_R=r, num_warps=warps, num_stages=2)


def _da_config(R: int, arch: str, elem_bytes: int) -> dict:
    r = block_r(R, elem_bytes)
    # On sm_80 128 columns of a high rank spill where 16 does not divide the number of rows.
    k, m = (32, 32) if elem_bytes == 4 else (64 if (arch, r) == ("sm_80", 64) else 128, 64)
    return dict(BLOCK_M=m, BLOCK_K=k, BLOCK_R=r, **_skinny(arch, elem_bytes))


def _splits(blocks: int, length: int, step: int, arch: str) -> int:
    """Parts of a loop over `length`, so that blocks · parts is about two blocks an SM."""
    return max(1, min(-(-2 * SMS[arch] // blocks), -(-length // step)))


def lora_bwd_config(
    M: int, N: int, K: int, R: int, arch: str, *, dropout: bool = False, elem_bytes: int = 2
) -> dict:
    """{"gemm": …, "tma": … or None, "dsdb": …, "dsdb_splits": int, "da": …, "da_splits": int}.

    gemm and tma are for dx[M,K]; dsdb's pass over dy[M,N] splits N, da's pass over x[M,K] splits M.
    """
    dsdb = _dsdb_config(R, arch, elem_bytes)
    da = _da_config(R, arch, elem_bytes)
    ranks = -(-R // dsdb["BLOCK_R"])
    return {
        "gemm": gemm_config(M, K, R, arch, elem_bytes, dropout=dropout),
        "tma": tma_config(M, K, R, arch, elem_bytes, dropout=dropout),
        "dsdb": dsdb,
        "dsdb_splits": _splits(-(-M // dsdb["BLOCK_M"]) * ranks, N, 4 * dsdb["BLOCK_N"], arch),
        "da": da,
        "da_splits": _splits(-(-K // da["BLOCK_K"]) * ranks, M, 4 * da["BLOCK_M"], arch),
    }


# Sizes on both sides of every threshold above; tests/kernels compares with random shapes.
_SIZES = (1, 16, 64, 128, 512, 1024, 2048, 4096, 8192, 32768)
_RANKS = (8, 16, 24, 64)
_NEEDS = [(t, b, c) for t in (True, False) for b in (True, False) for c in (True, False)][:-1]


def lora_configs(arch: str) -> list[dict]:
    """Every (kernel, flags, config) that the launchers can choose on `arch`, each once.

    Rows {"kernel", "elem_bytes", "adapter_bytes", "wide_rank", "flags", "config"}, made by running
    the heuristics over a grid of shapes, for 16-bit inputs with adapters alike or fp32, and for
    fp32. wide_rank: R is a multiple of 16, which the compiler knows and loads wide.
    """
    if arch not in ARCHS:
        raise ValueError(f"arch: expected one of {ARCHS}, got {arch!r}")
    rows: dict[str, dict] = {}

    def add(kernel: str, sizes: tuple[int, int], wide: bool, config: dict, **flags: bool) -> None:
        row = dict(kernel=kernel, elem_bytes=sizes[0], adapter_bytes=sizes[1])
        row |= dict(wide_rank=wide, flags=flags)
        rows.setdefault(str((row, config)), {**row, "config": config})

    for sizes in ((2, 2), (2, 4), (4, 4)):
        for m, n, r, p in itertools.product(_SIZES, _SIZES, _RANKS, (False, True)):
            f = lora_fwd_config(m, n, n, r, arch, dropout=p, elem_bytes=sizes[0])
            g = lora_bwd_config(m, n, n, r, arch, dropout=p, elem_bytes=sizes[0])
            fuse, wide = f["fuse_shrink"], r % 16 == 0
            plain = dict(HAS_BIAS=False, FUSE_S=False, DROPOUT=False, ACCUMULATE=False)
            for bias in (True, False):
                add("gemm", sizes, wide, f["gemm"], **{**plain, "HAS_BIAS": bias, "FUSE_S": fuse})
            if not fuse:
                add("shrink", sizes, wide, f["shrink"], DROPOUT=p)
            add("gemm_dx", sizes, wide, g["gemm"], **{**plain, "DROPOUT": p})
            for bias in (True, False) if f["tma"] else ():
                add("gemm_tma", sizes, wide, f["tma"], HAS_BIAS=bias, W_IS_NK=True)
            if g["tma"]:
                add("gemm_tma_dx", sizes, wide, g["tma"], HAS_BIAS=False, W_IS_NK=False)
            own = (sizes[0], sizes[0])
            more = add_config(m, n, arch, sizes[0])
            add("gemm_add", own, True, more, **{**plain, "ACCUMULATE": True})
            add("da", own, wide, g["da"], DROPOUT=p)
            for t, b, c in _NEEDS:
                add("dsdb", sizes, wide, g["dsdb"], NEED_DS=t, NEED_DB=b, NEED_DBIAS=c)
        add("sum", (sizes[1], 4), True, SUM_CONFIG)
    return list(rows.values())
