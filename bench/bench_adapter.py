"""Bench of `ops.bottleneck_adapter`.

    fusedpeft bench adapter --device cpu --json FILE    forward and training of real widths
    fusedpeft bench adapter --device cuda --json FILE   and backward alone, M 8192

Everyone computes y = x + scale · (gelu(x Dᵀ + c) Uᵀ + e), with or without a LayerNorm of x, from
the same tensors, and answers to the same float64 reference. The floor is the eager form, so that a
ratio is the time over eager's. Bar on a CPU: forward and backward 0.9 of it. On a GPU, at d 4096
and E 64: forward 80 % and backward 70 % of the copy bandwidth, 0.5 of torch.compile's time.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fusedpeft.bench.harness import Call, Case, Expected, Impl, cold_sets
from fusedpeft.ops import bottleneck_adapter, bottleneck_adapter_ref

__all__ = ["ALL", "FLOOR", "Spec", "build", "specs"]  # what run.py takes from a bench

BF16, FP32 = torch.bfloat16, torch.float32
FLOOR = "reference"  # plain torch, eager
ALL = ("fusedpeft", "torch.compile", FLOOR)
SCALE = 2.0


@dataclass(frozen=True)
class Spec:
    kind: str  # fwd, bwd, train
    m: int
    d: int
    e: int
    norm: str | None
    dtype: torch.dtype
    impls: tuple[str, ...] = ALL

    @property
    def name(self) -> str:
        return f"{self.kind} d{self.d} M{self.m} E{self.e}{' ' + self.norm if self.norm else ''}"

    @property
    def label(self) -> str:
        """What `--case` is matched against."""
        return f"{self.name} {({BF16: 'bf16', FP32: 'fp32'})[self.dtype]}"


def specs(device: torch.device, full: bool) -> list[Spec]:
    cuda = device.type == "cuda"
    m, dtypes = (8192, (BF16,)) if cuda else (1024, (FP32, BF16))
    kinds = ("fwd", "bwd", "train") if cuda else ("fwd", "train")
    shapes = [(4096, 64)] if cuda else [(768, 48), (2048, 64)]
    if full:
        shapes += [(d, e) for d in (768, 2048, 4096) for e in (8, 64, 256) if (d, e) not in shapes]

    def found() -> Iterator[Spec]:
        for dtype in dtypes:
            for d, e in shapes:
                for norm in (None, "layer_norm"):
                    for kind in kinds:
                        yield Spec(kind, m, d, e, norm, dtype)

    return list(found())


def _work(spec: Spec) -> tuple[float, float]:
    """(FLOPs, bytes) needed at least: inputs read once, outputs written once."""
    product, tokens = 2 * spec.m * spec.d * spec.e, spec.m * spec.d
    weights = 2 * spec.d * spec.e + spec.d + spec.e + (2 * spec.d if spec.norm else 0)
    flops, moved = 2 * product, 2 * tokens + weights
    if spec.kind != "fwd":  # dP, dU, dD and dx; dy and x read, dx and the weights' written
        once = (0, 0) if spec.kind == "bwd" else (flops, moved)
        flops, moved = once[0] + 4 * product, once[1] + 3 * tokens + 2 * weights
    return float(flops), float(moved * spec.dtype.itemsize)


def build(spec: Spec, device: torch.device, impls: tuple[str, ...] | None, warm: bool) -> Case:
    gen = torch.Generator(device=device).manual_seed(spec.m + spec.d + spec.e)
    grad = spec.kind != "fwd"

    def draw(*size: int, std: float = 1.0, mean: float = 0.0) -> Tensor:
        return (torch.randn(size, generator=gen, device=device) * std + mean).to(spec.dtype)

    weights = [
        draw(spec.e, spec.d, std=spec.d**-0.5), draw(spec.e),
        draw(spec.d, spec.e, std=spec.e**-0.5), draw(spec.d),
    ]  # fmt: skip
    if spec.norm:
        weights += [draw(spec.d, mean=1.0, std=0.1), draw(spec.d)]
    x, dy = draw(spec.m, spec.d), draw(spec.m, spec.d)
    count = 1 if warm else cold_sets(sum(t.nbytes for t in weights), device)

    def call(op: Callable, x_: Tensor, ws: list[Tensor], dy_: Tensor) -> Call:
        x_ = x_.detach().requires_grad_(grad)
        ws = [w.detach().requires_grad_(grad) for w in ws]
        norm = dict(norm=spec.norm, norm_weight=ws[4], norm_bias=ws[5]) if spec.norm else {}

        def forward() -> Tensor:
            return op(x_, *ws[:4], activation="gelu", scale=SCALE, residual=x_, **norm)

        def train() -> tuple[Tensor, ...]:
            y = forward()
            return (y, *torch.autograd.grad(y, [x_, *ws], dy_))

        if spec.kind != "bwd":
            return train if grad else forward
        y = forward()
        return lambda: torch.autograd.grad(y, [x_, *ws], dy_, retain_graph=True)

    def outputs(*args) -> tuple[Tensor, ...]:
        out = call(bottleneck_adapter_ref, *args)()
        return tuple(t.detach() for t in (out if isinstance(out, tuple) else (out,)))

    names = ("y", "dx", "dD", "dc", "dU", "de", "dgamma", "dbeta")
    with torch.set_grad_enabled(grad):
        ref = outputs(x.double(), [w.double() for w in weights], dy.double())
        low = outputs(x, weights, dy)
    names = names[1:] if spec.kind == "bwd" else names
    expected = Expected(names[: len(ref)], ref, low)
    sets = [weights, *([w.clone() for w in weights] for _ in range(count - 1))]
    missing = {}
    if device.type == "cpu" and not shutil.which("g++"):
        missing["torch.compile"] = "no C++ compiler (inductor needs g++)"
    ops: dict[str, Callable] = {"fusedpeft": bottleneck_adapter, FLOOR: bottleneck_adapter_ref}
    wanted = impls or spec.impls
    if "torch.compile" in wanted and not missing:
        torch._dynamo.reset()
        compiled = torch.compile(bottleneck_adapter_ref, dynamic=False, fullgraph=True)
        ops["torch.compile"] = compiled
    flops, moved = _work(spec)
    contestants = [
        Impl(name, lambda i, op=ops[name]: call(op, x, sets[i], dy), expected, flops, moved)
        for name in ALL
        if name in wanted and name in ops
    ]
    left_out = {name: why for name, why in missing.items() if name in wanted}
    return Case(
        "bottleneck_adapter", spec.name, spec.dtype, device, contestants, FLOOR, count, grad,
        left_out,
    )  # fmt: skip
