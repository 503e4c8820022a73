"""Which tiles and chunks the linear log-prob kernels take: pure functions, all listed for
ahead-of-time compilation. Nothing is autotuned, so results are the same from run to run."""

from __future__ import annotations

import itertools

from fusedpeft.kernels.device import ARCHS, SMS, SUM_CONFIG

FEW_ROWS = 512  # up to here small tiles, or most SMs would have no block
MERGE_CONFIG = dict(BLOCK_M=32, BLOCK_T=32, num_warps=4, num_stages=1)
FINISH_CONFIG = dict(BLOCK_H=1024, num_warps=4, num_stages=1)
# Ending of a kernel's name in the ahead-of-time table -> whether its rows are wide: as models have
# them; not multiples of 16; those of a transposed head.
LAYOUTS = {"": True, "_odd": False, "_column": False}


def _tile(m: int, n: int, k: int, warps: int, stages: int) -> dict:
    return dict(
        BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, GROUP_M=8, num_warps=warps, num_stages=stages
    )  # fmt: skip


_SMALL = {
    "sm_80": _tile(64, 64, 64, 4, 4),
    "sm_90": _tile(64, 64, 64, 4, 5),
    "gfx942": _tile(64, 64, 64, 4, 2),
}
_MEDIUM = {
    "sm_80": _tile(128, 128, 32, 8, 4),
    "sm_90": _tile(128, 128, 64, 8, 3),
    "gfx942": _tile(128, 128, 64, 8, 2),
}
# dw alone: 256 columns beside exp, or beside an accumulator that is read back, spill on sm_90.
_LARGE = {**_MEDIUM, "sm_90": _tile(128, 256, 64, 8, 4)}
# By TMA there is room for it: 192 KiB of stages. HALF: columns of exp, and of one reference.
_TMA_LOGITS = {**_tile(128, 256, 64, 8, 4), "HALF": 128}
_TMA_SUM = {**_tile(128, 256, 64, 8, 4), "TILE": 128}
# Rows that nothing can load wide: an address for every element, so few elements a thread. Twice as
# many in any direction spill in the sum on sm_90, or are two registers away from it.
_ODD = _tile(64, 64, 32, 8, 2)
# "ieee" products run on FMA units: a small tile fills them. With the other warps each chip spills,
# and with half of K the NVIDIA chips do.
_FP32 = {"sm_80": _ODD, "sm_90": _ODD, "gfx942": _tile(64, 64, 16, 4, 2)}


def _pick(
    rows: int, arch: str, elem_bytes: int, wide: bool, usual: dict[str, dict] = _MEDIUM
) -> dict:
    if not wide:
        return _ODD
    if elem_bytes == 4:
        return _FP32[arch]
    return (_SMALL if rows <= FEW_ROWS else usual)[arch]


def _sum_config(rows: int, arch: str, elem_bytes: int, wide: bool, rescale: bool) -> dict:
    """TILE: the columns that share one reference, a tile of the logits kernel."""
    tile = _pick(rows, arch, elem_bytes, wide)
    if elem_bytes == 4 and rescale:  # two loops in one kernel: with four warps it spills
        tile = {**tile, "num_warps": 8}
    return {**tile, "TILE": tile["BLOCK_N"] if rescale else 0}


def _chunks(M: int, H: int, V: int, arch: str, elem_bytes: int, logits: dict, total: dict) -> dict:
    rows = total["BLOCK_M"] * max(1, SMS[arch] // -(-H // total["BLOCK_N"]))
    rows = min(rows, -(-M // total["BLOCK_M"]) * total["BLOCK_M"])
    wave = logits["BLOCK_N"] * max(1, SMS[arch] // -(-rows // logits["BLOCK_M"]))
    spare = M * V * elem_bytes // 20 - M * H * elem_bytes - 2 * rows * H
    waves = max(1, min(4, spare // (rows * wave * elem_bytes)))
    columns = min(waves * wave, -(-V // logits["BLOCK_N"]) * logits["BLOCK_N"])
    return {"rows": rows, "columns": columns, "logits": logits, "sum": total}


def linear_logprob_fwd_config(
    M: int, H: int, V: int, arch: str, *, elem_bytes: int = 2, wide: bool = True
) -> dict:
    """{"rows", "columns", "logits", "sum", "tma"}: a chunk of p is [rows, columns]; tma: the same
    for the kernels that take the head by TMA, or None.

    One wave of blocks in either product: rows × H blocks of u, rows × columns of p. More waves of p
    where u and the workspace stay within a twentieth of the logits' bytes. wide: the rows of h and
    w are multiples of 16 long and begin at such, so that the compiler loads them wide.
    """
    sizes = (M, H, V, arch, elem_bytes)
    by_tma = arch == "sm_90" and elem_bytes == 2 and M > FEW_ROWS and wide
    total = _sum_config(M, arch, elem_bytes, wide, True)
    return {
        **_chunks(*sizes, _pick(M, arch, elem_bytes, wide), total),
        "tma": _chunks(*sizes, _TMA_LOGITS, _TMA_SUM) if by_tma else None,
    }


def linear_logprob_bwd_config(
    M: int, H: int, V: int, arch: str, *, elem_bytes: int = 2, wide: bool = True
) -> dict:
    """{"columns", "logits", "sum", "dw"}: dz of all M rows and 1/64 of the vocabulary at a time."""
    logits = _pick(M, arch, elem_bytes, wide)
    n = logits["BLOCK_N"]
    return {
        "columns": -(-V // (64 * n)) * n,
        "logits": logits,
        "sum": _sum_config(M, arch, elem_bytes, wide, False),
        "dw": _pick(H, arch, elem_bytes, wide, _LARGE),
    }


def linear_logprob_configs(arch: str) -> list[dict]:
    """Every (kernel, flags, config) that the launchers can choose on `arch`, each once."""
    if arch not in ARCHS:
        raise ValueError(f"arch: expected one of {ARCHS}, got {arch!r}")
    rows: dict[str, dict] = {}

    def add(kernel: str, size: int, config: dict, **flags: bool) -> None:
        row = dict(kernel=kernel, elem_bytes=size, flags=flags, config=config)
        rows.setdefault(str(row), row)

    for size, (layout, wide) in itertools.product((2, 4), LAYOUTS.items()):
        for m in (FEW_ROWS, FEW_ROWS + 1):
            f = linear_logprob_fwd_config(m, m, 32000, arch, elem_bytes=size, wide=wide)
            b = linear_logprob_bwd_config(m, m, 32000, arch, elem_bytes=size, wide=wide)
            for cap in (False, True):
                for keep, grad in ((False, False), (True, False), (False, True)):
                    flags = dict(KEEP=keep, GRAD=grad, SOFTCAP=cap)
                    add(f"logits{layout}", size, f["logits"], **flags)
            add(f"sum{layout}", size, f["sum"], RESCALE=True, SPLIT=size == 2)
            for kernel in ("logits", "sum") if f["tma"] else ():
                add(f"{kernel}_tma", size, f["tma"][kernel])
            add(f"sum{layout}", size, b["sum"], RESCALE=False, SPLIT=size == 2)
            if layout != "_column":  # reads h alone
                add(f"dw{layout}", size, b["dw"])
        for out in (None, "NEED_U", "NEED_DH"):
            flags = dict(STATS=out != "NEED_DH", NEED_U=False, NEED_DH=False, SPLIT=size == 2)
            add(f"finish{layout}", size, FINISH_CONFIG, **flags | ({out: True} if out else {}))
        if layout != "_column":  # of a vocabulary that 16 divides, or not
            add(f"dbias_sum{layout}", size, SUM_CONFIG)
    add("merge", 4, MERGE_CONFIG)
    return list(rows.values())
