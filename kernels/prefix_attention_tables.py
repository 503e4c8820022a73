"""Which tiles the prefix attention kernels take: pure functions, all listed for ahead-of-time
compilation. Nothing is autotuned, so results are the same from run to run."""

from __future__ import annotations

from fusedpeft.kernels.device import ARCHS, SMS, SUM_CONFIG

HEAD_TILES = (64, 128, 256)
KERNELS = ("fwd", "dq", "dkv", "dprefix")
FAR = 2**30  # a window that hides nothing

# By head tile of 64, 128, 256: (BLOCK_M, BLOCK_N, num_warps, num_stages), with a row of its own
# where a mask asks for other tiles. The largest tried that compile without a spill under Triton 3.6
# and 3.7, which allocate registers differently; 99 KiB suffice on sm_80.
_TILES: dict[tuple, list[tuple[int, int, int, int]]] = {
    ("sm_80", 2, "fwd"): [(128, 64, 8, 3), (64, 64, 4, 2), (64, 32, 8, 2)],
    ("sm_80", 2, "fwd", "mask"): [(128, 64, 8, 3), (64, 32, 8, 2), (32, 16, 4, 2)],
    ("sm_80", 2, "dq"): [(128, 64, 8, 2), (64, 64, 8, 1), (64, 16, 8, 2)],
    ("sm_80", 2, "dkv"): [(32, 64, 4, 2), (32, 64, 8, 2), (16, 32, 8, 1)],
    ("sm_80", 2, "dkv", "mask"): [(32, 32, 4, 2), (32, 64, 8, 2), (16, 32, 8, 1)],
    ("sm_80", 2, "dprefix"): [(32, 64, 4, 2), (32, 64, 8, 2), (16, 32, 8, 1)],
    ("sm_80", 4, "fwd"): [(64, 32, 8, 2), (32, 32, 8, 1), (16, 16, 8, 1)],
    ("sm_80", 4, "fwd", "mask"): [(32, 32, 8, 2), (16, 16, 8, 1), (16, 16, 16, 2)],
    ("sm_80", 4, "dq"): [(32, 32, 8, 2), (32, 16, 8, 1), (32, 32, 8, 1)],
    ("sm_80", 4, "dq", "mask"): [(32, 32, 8, 1), (32, 16, 8, 1), (32, 32, 8, 1)],
    ("sm_80", 4, "dkv"): [(32, 32, 8, 1), (16, 16, 8, 2), (32, 16, 8, 1)],
    ("sm_80", 4, "dkv", "mask"): [(32, 32, 8, 1), (32, 32, 8, 2), (16, 16, 8, 1)],
    ("sm_80", 4, "dprefix"): [(16, 64, 8, 1), (32, 32, 8, 1), (16, 32, 8, 1)],
    ("sm_90", 2, "fwd"): [(128, 128, 8, 3), (128, 64, 8, 3), (64, 32, 8, 2)],
    ("sm_90", 2, "fwd", "mask"): [(128, 64, 8, 3), (128, 32, 8, 3), (64, 32, 8, 2)],
    ("sm_90", 2, "dq"): [(128, 64, 8, 3), (128, 32, 8, 3), (64, 16, 8, 2)],
    ("sm_90", 2, "dkv"): [(64, 128, 8, 3), (32, 64, 8, 3), (32, 32, 8, 2)],
    ("sm_90", 2, "dkv", "mask"): [(64, 64, 8, 3), (32, 64, 8, 3), (32, 32, 8, 2)],
    ("sm_90", 2, "dprefix"): [(64, 64, 8, 3), (32, 64, 8, 3), (32, 32, 8, 2)],
    ("sm_90", 4, "fwd"): [(64, 32, 8, 2), (32, 32, 8, 1), (16, 16, 8, 1)],
    ("sm_90", 4, "fwd", "mask"): [(32, 32, 8, 2), (32, 16, 8, 2), (16, 16, 16, 1)],
    ("sm_90", 4, "dq"): [(64, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 1)],
    ("sm_90", 4, "dq", "mask"): [(64, 16, 8, 2), (32, 32, 8, 1), (32, 32, 8, 1)],
    ("sm_90", 4, "dkv"): [(32, 32, 8, 2), (16, 16, 8, 1), (16, 32, 8, 1)],
    ("sm_90", 4, "dkv", "mask"): [(32, 32, 8, 2), (16, 32, 8, 1), (16, 16, 8, 1)],
    ("sm_90", 4, "dprefix"): [(16, 32, 8, 2), (32, 32, 8, 1), (16, 32, 8, 1)],
    ("gfx942", 2, "fwd"): [(128, 64, 4, 2), (128, 64, 4, 1), (64, 32, 4, 1)],
    ("gfx942", 2, "dq"): [(64, 64, 4, 2), (64, 64, 4, 1), (64, 32, 4, 1)],
    ("gfx942", 2, "dkv"): [(64, 64, 4, 1), (16, 64, 4, 1), (16, 32, 4, 1)],
    ("gfx942", 2, "dkv", "mask"): [(64, 64, 4, 1), (32, 64, 4, 1), (32, 32, 4, 1)],
    ("gfx942", 2, "dprefix"): [(64, 64, 4, 1), (32, 64, 4, 1), (32, 32, 4, 1)],
    ("gfx942", 4, "fwd"): [(64, 32, 4, 1), (32, 32, 4, 1), (32, 16, 4, 1)],
    ("gfx942", 4, "dq"): [(64, 32, 4, 1), (32, 32, 4, 1), (32, 16, 4, 1)],
    ("gfx942", 4, "dkv"): [(32, 64, 4, 1), (16, 32, 4, 1), (16, 32, 4, 1)],
    ("gfx942", 4, "dkv", "mask"): [(64, 32, 4, 1), (32, 32, 4, 1), (32, 16, 4, 1)],
    ("gfx942", 4, "dprefix"): [(64, 32, 4, 1), (32, 32, 4, 1), (32, 16, 4, 1)],
}


def head_tile(D: int) -> int:
    """The tile that holds a head of D ≤ 256."""
    return next(t for t in HEAD_TILES if t >= D)


def prefix_attention_config(
    kernel: str, D: int, arch: str, *, elem_bytes: int = 2, mask: bool = False
) -> dict:
    """The tile of `kernel`, one of KERNELS, for heads of D, with or without a mask."""
    tile, row = head_tile(D), (arch, elem_bytes, kernel)
    tiles = _TILES.get((*row, "mask"), _TILES[row]) if mask else _TILES[row]
    m, n, warps, stages = tiles[HEAD_TILES.index(tile)]
    config = dict(BLOCK_M=m, BLOCK_N=n, BLOCK_D=tile, num_warps=warps, num_stages=stages)
    if kernel == "dq":  # two operands that stay: on FMA units more than the registers hold
        config["PIECE"] = 64 if elem_bytes == 4 and tile > 64 else 0
    return config


def prefix_parts(
    P: int, heads_kv: int, prefixes: int, tiles: int, arch: str, *, block_n: int
) -> int:
    """In how many parts a prefix's gradients are made, of which each takes some of its `tiles` of
    queries: blocks for every SM, and no more. So the parts, in fp32, are never larger than the
    gradients of one block on every SM.
    """
    return max(1, min(tiles, SMS[arch] // max(1, -(-P // block_n) * heads_kv * prefixes)))


def prefix_attention_configs(arch: str) -> list[dict]:
    """Every (kernel, flags, config) that the launchers can choose on `arch`, each once."""
    if arch not in ARCHS:
        raise ValueError(f"arch: expected one of {ARCHS}, got {arch!r}")
    rows = []
    for size in (2, 4):
        for d in HEAD_TILES:
            for kernel in KERNELS[:3]:
                for mask in (False, True):
                    config = prefix_attention_config(kernel, d, arch, elem_bytes=size, mask=mask)
                    rows.append(
                        dict(kernel=kernel, elem_bytes=size, flags={"MASK": mask}, config=config)
                    )
            config = prefix_attention_config("dprefix", d, arch, elem_bytes=size)
            for kernel in ("dprefix", "dprefix_parts")[: 2 if size == 2 else 1]:
                rows.append(dict(kernel=kernel, elem_bytes=size, flags={}, config=config))
        rows.append(dict(kernel="parts_sum", elem_bytes=size, flags={}, config=SUM_CONFIG))
    return rows
