"""Which tiles the bottleneck adapter's kernels take: pure functions over finite tables, all listed
for ahead-of-time compilation. Nothing is autotuned, so results are the same from run to run."""

from __future__ import annotations

import itertools

from fusedpeft.kernels.device import ARCHS, SMS, SUM_CONFIG

ACTIVATIONS = ("gelu", "relu", "gelu_tanh", "silu", "tanh", "leaky_relu")
# Bytes of an element -> the widest E of one kernel. Backward holds P and dP: at 256 it spills.
MAX_FWD_E = {2: 256, 4: 64}
MAX_BWD_E = {2: 128, 4: 64}
FOLD_CONFIG = dict(BLOCK=1024, num_warps=4, num_stages=1)
NORM_GRADS_CONFIG = dict(BLOCK_N=32, BLOCK_E=64, num_warps=4, num_stages=1)


def _rows(m: int, n: int, e: int, warps: int, stages: int) -> dict:
    """A kernel that owns m rows and walks over d by n."""
    tile = dict(BLOCK_M=m, BLOCK_N=n, BLOCK_E=e, STAGES=stages)
    return {**tile, "num_warps": warps, "num_stages": stages}


# By the padded E. Weights come from L2 once a block: rows buy traffic, up to one block an SM.
_MANY = {
    "sm_80": {
        32: _rows(64, 64, 32, 8, 4), 64: _rows(64, 64, 64, 8, 3),
        128: _rows(64, 64, 128, 8, 3), 256: _rows(64, 32, 256, 8, 3),
    },
    "sm_90": {
        32: _rows(64, 128, 32, 8, 4), 64: _rows(64, 128, 64, 8, 4),
        128: _rows(64, 128, 128, 8, 3), 256: _rows(64, 64, 256, 8, 4),
    },
    "gfx942": {
        32: _rows(64, 128, 32, 8, 2), 64: _rows(64, 128, 64, 8, 2),
        128: _rows(64, 64, 128, 8, 2), 256: _rows(64, 32, 256, 8, 2),
    },
}  # fmt: skip
_FEW = {
    "sm_80": {
        32: _rows(16, 128, 32, 4, 4), 64: _rows(16, 128, 64, 4, 3),
        128: _rows(16, 64, 128, 4, 3), 256: _rows(16, 32, 256, 4, 3),
    },
    "sm_90": {
        32: _rows(16, 128, 32, 4, 4), 64: _rows(16, 128, 64, 4, 4),
        128: _rows(16, 128, 128, 4, 3), 256: _rows(16, 64, 256, 4, 3),
    },
    "gfx942": {
        32: _rows(16, 128, 32, 4, 2), 64: _rows(16, 128, 64, 4, 2),
        128: _rows(16, 64, 128, 4, 2), 256: _rows(16, 32, 256, 4, 2),
    },
}  # fmt: skip
# "ieee" products run on FMA units: a small tile fills them.
_FP32 = {32: _rows(32, 32, 32, 4, 2), 64: _rows(32, 32, 64, 4, 2)}
_UP = {"sm_80": (128, 128, 32, 8, 4), "sm_90": (128, 128, 64, 8, 3), "gfx942": (128, 128, 32, 8, 2)}
_DW_FP32 = _rows(32, 32, 32, 4, 2)


def _many(M: int, arch: str) -> bool:
    return 2 * -(-M // 64) >= SMS[arch]


def _down_config(M: int, E: int, arch: str, elem_bytes: int, whole: bool) -> dict:
    padded = max(32, 1 << (E - 1).bit_length())
    if elem_bytes == 4:
        return _FP32[padded if whole else 64]
    return (_MANY if _many(M, arch) else _FEW)[arch][padded if whole else 128]


def _up_config(arch: str, elem_bytes: int) -> dict:
    m, n, k, warps, stages = (64, 64, 16, 4, 2) if elem_bytes == 4 else _UP[arch]
    return dict(BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, num_warps=warps, num_stages=stages)


def _dw_config(E: int, arch: str, elem_bytes: int) -> dict:
    """Two accumulators [BLOCK_N, BLOCK_E]; past BLOCK_E x and dy are read once more."""
    if elem_bytes == 4:  # with four warps sm_90 is at the last register, or spills, by activation
        return {**_DW_FP32, "num_warps": 8} if arch == "sm_90" else _DW_FP32
    e = 32 if E <= 32 else 64 if E <= 64 else 128
    m, stages = {"sm_80": (32 if e == 64 else 64, 2), "sm_90": (64, 3), "gfx942": (32, 1)}[arch]
    return _rows(m, 8192 // max(e, 64), e, 8, stages)  # with other m each chip spills


def adapter_fwd_config(M: int, d: int, E: int, arch: str, *, elem_bytes: int = 2) -> dict:
    """{"whole": one kernel or two, "down": …, "up": … or None}."""
    whole = E <= MAX_FWD_E[elem_bytes]
    return {
        "whole": whole,
        "down": _down_config(M, E, arch, elem_bytes, whole),
        "up": None if whole else _up_config(arch, elem_bytes),
    }


def adapter_bwd_config(M: int, d: int, E: int, arch: str, *, elem_bytes: int = 2) -> dict:
    """{"whole", "down", "dx": … or None, "dw": …, "dw_splits": parts of M}."""
    whole = E <= MAX_BWD_E[elem_bytes]
    dw = _dw_config(E, arch, elem_bytes)
    blocks = -(-d // dw["BLOCK_N"]) * -(-E // dw["BLOCK_E"])
    splits = max(1, min(-(-2 * SMS[arch] // blocks), -(-M // (4 * dw["BLOCK_M"]))))
    return {
        "whole": whole,
        "down": _down_config(M, E, arch, elem_bytes, whole),
        "dx": None if whole else _up_config(arch, elem_bytes),
        "dw": dw,
        "dw_splits": splits,
    }


_SIZES = (1, 64, 8192, 65536)  # of M; of E both sides of every threshold
_WIDTHS = (8, 33, 65, 129, 257)


def adapter_configs(arch: str) -> list[dict]:
    """Every (kernel, flags, config) that the launchers can choose on `arch`, each once.

    One activation for each combination of flags and tile, every one for each tile but the smallest.
    fp32 adapters beside a 16-bit x, where P and biases are wider and all else is cast, with the
    flags that take the most registers. E is a multiple of 16, which the launchers see to.
    """
    if arch not in ARCHS:
        raise ValueError(f"arch: expected one of {ARCHS}, got {arch!r}")
    rows: dict[str, dict] = {}

    def add(kernel: str, size: int, config: dict, **flags: bool | str) -> None:
        most = flags.get("NORM") and (flags.get("DROPOUT") or not flags.get("WHOLE", True))
        for adapter in sorted({size, 4}) if most or kernel == "fold" else (size,):
            row = dict(kernel=kernel, elem_bytes=size, adapter_bytes=adapter)
            rows.setdefault(str((row, flags, config)), row | dict(flags=flags, config=config))

    both = (False, True)
    for size, m, e in itertools.product((2, 4), _SIZES, _WIDTHS):
        f = adapter_fwd_config(m, 4096, e, arch, elem_bytes=size)
        b = adapter_bwd_config(m, 4096, e, arch, elem_bytes=size)
        for norm, drop in itertools.product(both, both):
            flags = dict(NORM=norm, DROPOUT=drop)
            every = norm and not drop and b["down"]["BLOCK_M"] > 16
            for act in ACTIVATIONS if every else ACTIVATIONS[:1]:
                if f["whole"] or not drop:
                    add("fwd", size, f["down"], **flags, ACT=act, WHOLE=f["whole"])
                add("bwd", size, b["down"], **flags, ACT=act, WHOLE=b["whole"])
                add("dw", size, b["dw"], **flags, ACT=act, READ_X=True, READ_DY=True)
            add("bwd", size, b["down"], **flags, ACT=ACTIVATIONS[0], WHOLE=False)
            if not norm:
                add("dw", size, b["dw"], **flags, ACT=ACTIVATIONS[0], READ_X=False, READ_DY=True)
        for norm in both:
            flags = dict(NORM=norm, DROPOUT=False, ACT=ACTIVATIONS[0])
            add("dw", size, b["dw"], **flags, READ_X=True, READ_DY=False)
            if not b["whole"]:
                add("dx", size, b["dx"], NORM=norm)
            if not f["whole"]:
                add("up", size, f["up"], DROPOUT=norm)
    for size in (2, 4):
        add("fold", size, FOLD_CONFIG)
        add("norm_grads", size, NORM_GRADS_CONFIG)
        add("sum", size, SUM_CONFIG)
    return list(rows.values())
