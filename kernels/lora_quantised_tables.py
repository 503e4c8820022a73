"""How a quantised base is read, and in which tiles: see lora_tables.py for how tables work here."""

from __future__ import annotations

import itertools

from fusedpeft.kernels.device import ARCHS, SMS


def _tile(m: int, n: int, k: int, warps: int, stages: int) -> dict:
    return dict(
        BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, BLOCK_R=16, GROUP_M=8, num_warps=warps, num_stages=stages
    )  # fmt: skip


_GEMM = {
    "sm_80": {
        "rows16": _tile(16, 32, 128, 4, 3),
        "small": _tile(64, 64, 64, 4, 3),
        "large": _tile(128, 128, 32, 8, 3),
    },
    "sm_90": {
        "rows16": _tile(16, 32, 128, 4, 3),
        "small": _tile(64, 64, 64, 4, 3),
        "large": _tile(128, 128, 64, 8, 3),
        "tall": _tile(256, 128, 32, 8, 3),
    },
    "gfx942": {
        "rows16": _tile(16, 32, 128, 4, 2),
        "small": _tile(64, 64, 64, 4, 2),
        "large": _tile(128, 128, 32, 8, 2),
    },
}
_GEMM_FP32 = _tile(64, 64, 16, 4, 2)  # "ieee" products run on FMA units


def quantised_config(M: int, N: int, arch: str, elem_bytes: int, *, dropout: bool = False) -> dict:
    """The largest tile that still gives every SM a block: rows share what a tile of W costs.

    With a mask in it (dx under dropout) the tall one spills.
    """
    if elem_bytes == 4:
        return dict(_GEMM_FP32)
    tiles = _GEMM[arch]
    if M <= 16:
        return dict(tiles["rows16"])
    for name in ("tall", "large"):
        tile = tiles.get(name)
        if tile is None or (dropout and name == "tall"):
            continue
        if -(-M // tile["BLOCK_M"]) * -(-N // tile["BLOCK_N"]) >= SMS[arch]:
            return dict(tile)
    return dict(tiles["small"])


# Of the kernel that dequantises a slab: a row of a tile is 128 bytes of NF4 and 512 of its values.
DEQUANTISE_CONFIG = dict(BLOCK_M=16, BLOCK_N=256, num_warps=4, num_stages=1)
SLAB_TOKENS = 256  # from here on it pays: W's codes would be looked up in four rows of blocks
SLAB_BYTES = 16 << 20  # a third of Hopper's L2


def slab(M: int, N: int, K: int, elem_bytes: int, *, odd: bool = False) -> int:
    """How many of the N rows (or columns) of W, K long, are dequantised at once; 0: only tiles are.

    A multiple of 256 columns of `out`, which keeps whole tiles and TMA's alignment, or all N of
    them rounded up to 16. odd: of W's own sizes, which 16 does not both divide: tiles would spill.
    """
    if M < SLAB_TOKENS and not odd:
        return 0
    step = max(256, SLAB_BYTES // (K * elem_bytes) // 256 * 256)
    return min(step, -(-N // 16) * 16)


_SIZES = (1, 16, 64, 512, 2048, 8192)


def lora_quantised_configs(arch: str) -> list[dict]:
    """Every (kernel, flags, config) that the launchers can choose on `arch`, each once.

    The kernels are nf4, nf4_double and fp8: y's direction, dx's, and a slab. Adapters come in the
    input's dtype and S in fp32, so there is no adapter_bytes.
    """
    if arch not in ARCHS:
        raise ValueError(f"arch: expected one of {ARCHS}, got {arch!r}")
    rows: dict[str, dict] = {}
    for size, m, n in itertools.product((2, 4), _SIZES, _SIZES):
        for kind, forward, wide, more in itertools.product(
            ("nf4", "nf4_double", "fp8"), (True, False), (True, False), (True, False)
        ):
            config = quantised_config(m, n, arch, size, dropout=not forward and more)
            row = dict(kernel=f"{kind}_{'y' if forward else 'dx'}", elem_bytes=size, wide_rank=wide)
            row["flags"] = dict(
                FP8=kind == "fp8", DOUBLE=kind == "nf4_double", FORWARD=forward,
                HAS_BIAS=forward and more, DROPOUT=not forward and more,
            )  # fmt: skip
            rows.setdefault(str((row, config)), {**row, "config": config})
    for size, kind in itertools.product((2, 4), ("nf4", "nf4_double", "fp8")):
        row = dict(kernel=f"{kind}_slab", elem_bytes=size)
        row["flags"] = dict(FP8=kind == "fp8", DOUBLE=kind == "nf4_double")
        for kernel in (row["kernel"], f"{row['kernel']}_odd"):
            rows[kernel + str(row)] = {**row, "kernel": kernel, "config": dict(DEQUANTISE_CONFIG)}
    return list(rows.values())
