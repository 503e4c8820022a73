"""What this device can do at most, measured in the run that quotes it.

Bandwidth: a copy of a buffer far beyond the caches, bytes read plus bytes written. Arithmetic: a
large square product in the case's dtype, halved until it takes at most PRODUCT_S; in 16 bits at
least fp32's rate, for who has no unit for 16 bits may convert. The ceiling of a task is the slower
of its bytes at that bandwidth and its FLOPs at that rate; `pct_of_ceiling` is that time over the
measured one. A task that only reads may pass 100 % of a copy's bandwidth.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fusedpeft.bench.harness import Call, Clock, percentile

COPY_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}
MATMUL_SIZE = {"cpu": 2048, "cuda": 8192}
PRODUCT_S = 0.2  # a CPU without fast 16-bit products would take minutes at full size


@dataclass(frozen=True)
class Ceilings:
    gb_per_s: float
    tflop_per_s: dict[torch.dtype, float]

    def percent(
        self, flops: float, moved_bytes: float, dtype: torch.dtype, measured_us: float
    ) -> float:
        floor_s = max(moved_bytes / (self.gb_per_s * 1e9), flops / (self.tflop_per_s[dtype] * 1e12))
        return 100 * floor_s / (measured_us * 1e-6)


def _median_s(device: torch.device, call: Call, repeats: int) -> float:
    clock = Clock(device, cold=False)
    for _ in range(2):
        call()
    for _ in range(repeats):
        clock.call("x", call)
    clock.collect()
    return percentile(sorted(clock.times_us["x"]), 0.5) * 1e-6


def _copy_s(device: torch.device, nbytes: int, repeats: int) -> float:
    src = torch.ones(nbytes // 4, dtype=torch.float32, device=device)
    dst = torch.empty_like(src)
    return _median_s(device, lambda: dst.copy_(src), repeats)


def _product_rate(device: torch.device, size: int, dtype: torch.dtype, repeats: int) -> float:
    """FLOP/s of a square product, of `size` or the largest half of it that is not too slow."""
    probe = 256
    seconds = _product_s(device, probe, dtype, 1)
    while size > probe and seconds * (size / probe) ** 3 > PRODUCT_S:
        size //= 2
    return 2 * size**3 / _product_s(device, size, dtype, repeats)


def _product_s(device: torch.device, size: int, dtype: torch.dtype, repeats: int) -> float:
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return _median_s(device, lambda: torch.mm(a, b, out=out), repeats)


def measure(device: torch.device, dtypes: list[torch.dtype], repeats: int = 7) -> Ceilings:
    """Copy bandwidth in GB/s and the product's TFLOP/s for each dtype."""
    nbytes, size = COPY_BYTES[device.type], MATMUL_SIZE[device.type]
    bandwidth = 2 * nbytes / _copy_s(device, nbytes, repeats) / 1e9
    wanted = {torch.float32, *dtypes} if device.type == "cpu" else set(dtypes)
    rates = {d: _product_rate(device, size, d, repeats) / 1e12 for d in wanted}
    if device.type == "cpu":
        rates |= {d: max(rates[d], rates[torch.float32]) for d in wanted if d.itemsize == 2}
    return Ceilings(bandwidth, {d: rates[d] for d in dtypes})
