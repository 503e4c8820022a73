"""Bench of `ops.lora_linear` over bases in 4 and 8 bits.

    fusedpeft bench lora_quantised --device cpu --json FILE     few and many tokens
    fusedpeft bench lora_quantised --device cuda --json FILE

`dequantised` makes all of W in the input's dtype in every call and multiplies by it, which is what
quantised layers do elsewhere; both answer to float64 over the same W. The floor is a frozen linear
that holds W dequantised already, in up to four times the memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedpeft.bench.harness import Call, Case, Expected, Impl, cold_sets
from fusedpeft.ops import FP8Weight, NF4Weight, lora_linear, lora_linear_ref
from fusedpeft.ops.quantised import QuantisedWeight

__all__ = ["ALL", "FLOOR", "Spec", "build", "specs"]  # what run.py takes from a bench

BF16, FP32 = torch.bfloat16, torch.float32
FLOOR = "frozen"
ALL = ("fusedpeft", "dequantised", FLOOR)
SCALE = 2.0
WEIGHTS: dict[str, Callable[[Tensor], QuantisedWeight]] = {
    "nf4": lambda w: NF4Weight.quantise(w, double=True),
    "fp8": FP8Weight.quantise,
}


@dataclass(frozen=True)
class Spec:
    kind: str  # fwd, train
    weight: str
    m: int
    k: int
    n: int
    r: int
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return f"{self.kind} {self.weight} {self.k}->{self.n} M{self.m} R{self.r}"

    @property
    def label(self) -> str:
        """What `--case` is matched against."""
        return f"{self.name} {({BF16: 'bf16', FP32: 'fp32'})[self.dtype]}"


def specs(device: torch.device, full: bool) -> list[Spec]:
    if device.type == "cuda":
        shapes = [(4096, 4096)] + ([(4096, 14336), (14336, 4096)] if full else [])
        dtypes = (BF16,)
        cases = [("fwd", 1), ("fwd", 16), ("fwd", 512), ("train", 512), ("train", 8192)]
    else:
        shapes, dtypes = [(2048, 2048)] + ([(2048, 8192)] if full else []), (FP32, BF16)
        cases = [("fwd", 1), ("fwd", 16), ("fwd", 64), ("train", 512)]
    return [
        Spec(kind, weight, m, k, n, 16, dtype)
        for weight in WEIGHTS
        for k, n in shapes
        for dtype in dtypes
        for kind, m in cases
    ]


def _dequantised(x: Tensor, w: QuantisedWeight, a: Tensor, b: Tensor, scale: float) -> Tensor:
    return lora_linear_ref(x, w, a, b, scale)


def _work(spec: Spec, w_bytes: int, r: int) -> tuple[float, float]:
    """(FLOPs, bytes) needed at least: inputs read once, outputs written once; r = 0: frozen."""
    m, k, n = spec.m, spec.k, spec.n
    flops, moved = 2 * m * n * k + 2 * m * r * (k + n), m * k + r * (k + n) + m * n
    passes = 1
    if spec.kind == "train":
        flops, passes = flops + 2 * m * n * k + 4 * m * r * (k + n), 2
        moved += m * n + m * k + (m * k + 2 * r * (k + n) if r else 0)
    return float(flops), float(moved * spec.dtype.itemsize + passes * w_bytes)


def build(spec: Spec, device: torch.device, impls: tuple[str, ...] | None, warm: bool) -> Case:
    gen = torch.Generator(device=device).manual_seed(spec.m + spec.k + spec.n)
    grad = spec.kind == "train"

    def draw(rows: int, cols: int, std: float, dtype: torch.dtype = spec.dtype) -> Tensor:
        return (torch.randn(rows, cols, generator=gen, device=device) * std).to(dtype)

    weight = WEIGHTS[spec.weight](draw(spec.n, spec.k, spec.k**-0.5, FP32))
    dense = weight.dequantise(spec.dtype)
    x, dy = draw(spec.m, spec.k, 1.0), draw(spec.m, spec.n, 1.0)
    a, b = draw(spec.r, spec.k, spec.k**-0.5), draw(spec.n, spec.r, spec.r**-0.5)
    w_bytes = sum(t.nbytes for t in weight.parts())
    count = 1 if warm else cold_sets(w_bytes, device)
    copies = [(weight, dense)]
    for _ in range(count - 1):
        parts = [t.clone() for t in weight.parts()]
        copies.append((QuantisedWeight.from_parts(parts, weight.layout), dense.clone()))

    def call(op: Callable, *tensors: object) -> Call:
        x_, w, *rest, dy_ = tensors
        leaves = [t.detach().requires_grad_(grad) for t in (x_, *rest)]

        def run() -> Tensor | tuple[Tensor, ...]:
            y = op(leaves[0], w, *leaves[1:], *((SCALE,) if rest else ()))
            return (y, *torch.autograd.grad(y, leaves, dy_)) if grad else y

        return run

    def expected(op: Callable, w: object, up: object, *rest: Tensor) -> Expected:
        with torch.set_grad_enabled(grad):
            ref = call(op, x.double(), up, *(t.double() for t in rest), dy.double())()
            low = call(op, x, w, *rest, dy)()
        ref, low = (
            tuple(t.detach() for t in (o if isinstance(o, tuple) else (o,))) for o in (ref, low)
        )
        return Expected(("y", "dx", "da", "db")[: len(ref)], ref, low)

    lora = expected(_dequantised, weight, weight, a, b)
    frozen = expected(F.linear, dense, dense.double())
    work = _work(spec, w_bytes, spec.r)
    makers = {
        "fusedpeft": (lambda i: call(lora_linear, x, copies[i][0], a, b, dy), lora, *work),
        "dequantised": (lambda i: call(_dequantised, x, copies[i][0], a, b, dy), lora, *work),
        FLOOR: (lambda i: call(F.linear, x, copies[i][1], dy), frozen)
        + _work(spec, dense.nbytes, 0),
    }
    contestants = [Impl(name, *makers[name]) for name in ALL if name in (impls or ALL)]
    return Case(
        "lora_linear_quantised", spec.name, spec.dtype, device, contestants, FLOOR, count, grad
    )
