"""Which tiles the LoRA GEMM of many adapters takes: see lora_tables.py for how tables work here."""

from __future__ import annotations

import itertools

from fusedpeft.kernels.device import ARCHS, SMS
from fusedpeft.kernels.lora_tables import add_config

PLAN_CONFIG = dict(CHUNK=1024, num_warps=4, num_stages=1)


# Where rows cannot be loaded 16 bytes at a time: an address for every element leaves little room.
_ODD = dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, GROUP_M=8, num_warps=8, num_stages=2)


def multi_lora_config(
    M: int, N: int, max_rank: int, arch: str, *, elem_bytes: int = 2, wide: bool = True
) -> dict[str, dict]:
    """{"plan", "shrink", "gemm"} for y[M,N] over slots of up to max_rank.

    The shrink's tile has the rows of one adapter: 64 where there can be enough such tiles, else 16,
    as a batch of few tokens has few of each. The GEMM's is that of a single adapter. wide: 16
    divides K, each part's N and the addresses.
    """
    rank = 16 if max_rank <= 16 else 32 if max_rank <= 32 or elem_bytes == 4 else 64
    k = 32 if elem_bytes == 4 or not wide else 64 if arch == "sm_80" else 128
    shrink = dict(
        BLOCK_M=64 if -(-M // 64) >= SMS[arch] // 2 else 16, BLOCK_K=k, BLOCK_R=rank,
        num_warps=4, num_stages=2 if arch == "gfx942" or elem_bytes == 4 else 3,
    )  # fmt: skip
    gemm = {k: v for k, v in add_config(M, N, arch, elem_bytes).items() if k != "HOLD"}
    if not wide:
        gemm = _ODD | dict(BLOCK_K=16 if elem_bytes == 4 else 32)
    # Of the narrowest tile, 32 spill on sm_80.
    full = arch != "gfx942" and gemm["BLOCK_N"] == 256  # 32 of an fp32 B spill there
    gemm["BLOCK_R"] = 16 if max_rank <= 16 or elem_bytes == 4 or M <= 16 or full else 32
    return {"plan": {**PLAN_CONFIG, "ROWS": shrink["BLOCK_M"]}, "shrink": shrink, "gemm": gemm}


_SIZES = (1, 16, 17, 64, 128, 512, 1024, 2048, 4096, 8192, 32768)  # both sides of every threshold


def multi_lora_configs(arch: str) -> list[dict]:
    """Every (kernel, flags, config) that the launcher can choose on `arch`, each once."""
    if arch not in ARCHS:
        raise ValueError(f"arch: expected one of {ARCHS}, got {arch!r}")
    rows: dict[str, dict] = {}
    for sizes, m, n, r, wide in itertools.product(
        ((2, 2), (2, 4), (4, 4)), _SIZES, _SIZES, (16, 32, 64), (True, False)
    ):
        cfg = multi_lora_config(m, n, r, arch, elem_bytes=sizes[0], wide=wide)
        for kernel, flags in (
            ("plan", {}),
            ("shrink", {}),
            ("gemm", {"HAS_BIAS": False}),
            ("gemm", {"HAS_BIAS": True}),
        ):
            row = dict(kernel=kernel, elem_bytes=sizes[0], adapter_bytes=sizes[1], flags=flags)
            if kernel == "plan":  # reads slots alone
                row |= dict(elem_bytes=4, adapter_bytes=4)
            elif not wide:
                row["kernel"] += "_odd"
            rows.setdefault(str((row, cfg[kernel])), {**row, "config": cfg[kernel]})
    return list(rows.values())
