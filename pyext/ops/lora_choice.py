"""LoRA linear on a GPU: the Triton kernels, or cuBLAS with a second pass that accumulates?

    "triton"   y = [x | S]·[W | B]ᵀ in one accumulator; backward dx = [dy | dS]·[W ; A] alike
    "cublas"   y = x Wᵀ by the library, then y += scale · S Bᵀ in place: one more read and write of
               y, and of dx in backward. It is `impl="aten"`: lora_cpu.aten_fwd and aten_bwd

`choose` is a pure function of sizes, dtypes and architecture. Where lora_choice.json, which
`python -m fusedpeft.bench.lora_choice` makes from the results of GPU runs, holds a case within a
factor of two in every size, the times measured there decide. Elsewhere each of the two is predicted
as the sum of its kernels, the longer of FLOPs and bytes each, at the rates of `PREDICTED`: a guess
that no run has confirmed, and the reason it gives says so.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fusedpeft.kernels.device import arch_of
from fusedpeft.kernels.lora_tables import lora_bwd_config, lora_fwd_config

TABLE = Path(__file__).with_name("lora_choice.json")
NEAR = 1.0  # octaves, in every size, to the nearest measured case
LAUNCH_US = 2.0  # what a further kernel costs where the one before it ends


@dataclass(frozen=True)
class Rates:
    """FLOP/µs and bytes/µs, both in millions (TFLOP/s, TB/s); pairs are of 16 bits and of fp32."""

    tb_per_s: float
    cublas: tuple[float, float]
    triton: tuple[float, float]
    tma: float = 0.0  # Triton's persistent TMA kernel, 16 bits


# Not measured. cuBLAS: what it is known to reach in large products, in true fp32. Triton: pointers
# keep 0.9 of that on sm_80 and 0.8 on Hopper, where loads by pointers cost issue slots and
# registers; TMA 0.9, as without clusters each tile of x and W comes out of L2 once a block.
# fp32 on FMA units in tiles of 64 × 64: half of it.
PREDICTED = {
    "sm_80": Rates(1.7, (250.0, 17.0), (225.0, 8.5)),
    "sm_90": Rates(4.3, (790.0, 50.0), (630.0, 25.0), 710.0),
    "gfx942": Rates(4.0, (600.0, 100.0), (450.0, 50.0)),
}


def _measured() -> list[dict]:
    return json.loads(TABLE.read_text())["rows"] if TABLE.is_file() else []


_ROWS = _measured()


def _nearest(rows: list[dict], kind: str, sizes: tuple, arch: str, elem_bytes: int) -> dict | None:
    def far(row: dict) -> float:
        return max(abs(math.log2(row[d] / v)) for d, v in zip("mnkr", sizes, strict=True))

    same = [r for r in rows if (r["kind"], r["arch"], r["elem_bytes"]) == (kind, arch, elem_bytes)]
    best = min(same, key=far, default=None)
    return best if best is not None and far(best) <= NEAR else None


def predict_us(
    kind: str, m: int, n: int, k: int, r: int, arch: str, elem_bytes: int, adapter_bytes: int
) -> tuple[float, float]:
    """(Triton's µs, cuBLAS's µs) by `PREDICTED`. kind "fwd": y [m, n]; "bwd": dx, dA and dB."""
    rates, fp32 = PREDICTED[arch], int(elem_bytes == 4)
    sizes = (m, n, k, r, arch)
    if kind == "fwd":
        config = lora_fwd_config(*sizes, elem_bytes=elem_bytes)
        fused = config["fuse_shrink"]
        # S in the K loop is 16 columns more for each 256; else a kernel that reads x once more.
        columns, inner, out = (n * (1 + 16 / 256) if fused else n), k, m * n
        passes, launches = (0 if fused else m * k * elem_bytes), 1 if fused else 2
    else:
        config = lora_bwd_config(*sizes, elem_bytes=elem_bytes)
        columns, inner, out = k, n, m * k
        partials = 8 * -(-m // config["dsdb"]["BLOCK_M"]) * n * r  # of dB: written, then summed
        passes, launches = (m * n + m * k) * elem_bytes + partials, 6
    rate = rates.tma if config["tma"] else rates.triton[fp32]
    least = (m * k + n * k + m * n) * elem_bytes / rates.tb_per_s
    ours = max(2.0 * m * columns * (inner + r) / rate, least)
    ours += passes / rates.tb_per_s + launches * LAUNCH_US * 1e6

    # cuBLAS: S (backward: dS, dB, dA) read the activations once each, `out` is read and written.
    # Adapters of another dtype make fp32 copies of what they meet, and a product of their own.
    reads = m * k if kind == "fwd" else 2 * m * n + m * k
    if adapter_bytes == elem_bytes:
        extra = (reads + 2 * out) * elem_bytes
    else:
        copies = m * k if kind == "fwd" else m * n + m * k
        extra = copies * (elem_bytes + 4) + reads * 4 + out * (5 * 4 + 2 * elem_bytes)
    launches = 3 if kind == "fwd" else 8
    theirs = max(2.0 * m * n * k / rates.cublas[fp32], least)
    theirs += extra / rates.tb_per_s + launches * LAUNCH_US * 1e6
    return ours / 1e6, theirs / 1e6


def choose(
    kind: str,
    m: int,
    n: int,
    k: int,
    r: int,
    arch: str,
    *,
    elem_bytes: int = 2,
    adapter_bytes: int | None = None,
    dropout: bool = False,
    wide: bool = True,
    rows: list[dict] = _ROWS,
) -> tuple[str, str]:
    """("triton" or "cublas", why) for x [m, k], W [n, k] and rank r. Pure.

    kind: "fwd" or "bwd". adapter_bytes: of an element of A and B, as x's unless given. wide: W lies
    as the Triton kernels take it (`is_wide`). rows: the measured cases, as in lora_choice.json.
    `doctor` prints some of these choices.
    """
    if kind not in ("fwd", "bwd"):
        raise ValueError(f"kind: expected 'fwd' or 'bwd', got {kind!r}")
    adapter_bytes = adapter_bytes or elem_bytes
    if k == 0:
        return "cublas", "no K: torch's products of nothing are the bias, and zeros"
    if min(m, n) == 0:
        return "triton", "nothing to multiply"
    if dropout:
        return "triton", "dropout: torch would make the masked copy of x in twenty passes"
    if not wide:
        return "cublas", "W transposed, or of sizes that 16 does not divide: Triton would copy it"
    source = "predicted, not measured"
    near = None
    if adapter_bytes == elem_bytes:  # what the bench measures
        near = _nearest(rows, kind, (m, n, k, r), arch, elem_bytes)
    if near:
        times = near["triton_us"], near["cublas_us"]
        source = f"measured on {near['device']} at {near['m']} × {near['n']} × {near['k']}"
    else:
        times = predict_us(kind, m, n, k, r, arch, elem_bytes, adapter_bytes)
    impl = "triton" if times[0] <= times[1] else "cublas"
    return impl, f"{source}: Triton {times[0]:.0f} µs, cuBLAS and its passes {times[1]:.0f} µs"


_cached = functools.lru_cache(4096)(choose)


def is_wide(w: Tensor) -> bool:
    """Whether the Triton kernels read W [N, K] where it lies: see kernels/aligned.py."""
    return w.stride(1) == 1 and w.shape[0] % 16 == 0 and w.shape[1] % 16 == 0


def use_triton(
    kind: str, t: Tensor, impl: str, ws: Sequence[Tensor], a: Tensor, p: float
) -> bool:  # fmt: skip
    """What a call runs: `impl` where it says one, else by device and shape.

    t: x or dy [M, *]. ws: one W [N, K], or several of the same K, as for one of all their rows. a:
    A [R, K]. fp64 and the CPU take ATen.
    """
    if impl or not t.is_cuda or t.dtype == torch.float64:
        return impl == "triton"
    n, k = sum(w.shape[0] for w in ws), ws[0].shape[1]
    sizes = (t.shape[0], n, k, a.shape[0], arch_of(t.device))
    more = dict(elem_bytes=t.element_size(), adapter_bytes=a.element_size(), dropout=p > 0.0)
    more["wide"] = all(map(is_wide, ws))
    return _cached(kind, *sizes, **more)[0] == "triton"
