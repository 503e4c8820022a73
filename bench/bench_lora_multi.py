"""Bench of `ops.lora_linear_multi`.

    fusedpeft bench lora_multi --device cpu --json FILE    q, k, v and gate, up of Llama-3.2-1B
    fusedpeft bench lora_multi --device cuda --json FILE   of Llama-3-8B

Everyone computes the same projections of one x and answers to the same float64 reference. The floor
is the frozen linears, which answer to their own; `separate` is `ops.lora_linear` for each.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedpeft.bench.harness import Call, Case, Expected, Impl, cold_sets
from fusedpeft.ops import lora_linear, lora_linear_multi, lora_linear_multi_ref

__all__ = ["ALL", "FLOOR", "Spec", "build", "specs"]  # what run.py takes from a bench

BF16, FP32 = torch.bfloat16, torch.float32
FLOOR = "frozen"
ALL = ("fusedpeft", "separate", "reference", "torch.compile", FLOOR)
SCALE = 2.0
LLAMA_1B = (2048, {"qkv": (2048, 512, 512), "gate_up": (8192, 8192)})  # K, N of each
LLAMA_8B = (4096, {"qkv": (4096, 1024, 1024), "gate_up": (14336, 14336)})


@dataclass(frozen=True)
class Spec:
    kind: str  # fwd, train
    which: str
    m: int
    k: int
    ns: tuple[int, ...]
    r: int
    dtype: torch.dtype

    @property
    def name(self) -> str:
        widths = "+".join(str(n) for n in self.ns)
        return f"{self.kind} {self.which} {self.k}->{widths} M{self.m} R{self.r}"

    @property
    def label(self) -> str:
        """What `--case` is matched against."""
        return f"{self.name} {({BF16: 'bf16', FP32: 'fp32'})[self.dtype]}"


def specs(device: torch.device, full: bool) -> list[Spec]:
    if device.type == "cuda":
        (k, named), dtypes = LLAMA_8B, (BF16,)
        cases = [(kind, m) for m in (512, 8192) for kind in ("fwd", "train")]
    else:
        (k, named), dtypes = LLAMA_1B, (FP32, BF16)
        cases = [("fwd", 1), ("fwd", 8), ("train", 512)]
    ranks = (8, 16, 64) if full else (16,)
    return [
        Spec(kind, which, m, k, ns, r, dtype)
        for dtype in dtypes
        for which, ns in named.items()
        for kind, m in cases
        for r in ranks
        # Without a bf16 unit ATen multiplies by W one number at a time: minutes.
        if device.type == "cuda"
        or (kind, dtype) != ("train", BF16)
        or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    ]


Parts = tuple[list[Tensor], list[Tensor], list[Tensor]]  # W, A, B of each


def _multi(op: Callable) -> Callable:
    return lambda x, ws, as_, bs: op(x, ws, as_, bs, [SCALE] * len(ws))


def _separate(x: Tensor, ws: list[Tensor], as_: list[Tensor], bs: list[Tensor]):
    rows = zip(ws, as_, bs, strict=True)
    return tuple(lora_linear(x, w, a, b, SCALE) for w, a, b in rows)


def _frozen(x: Tensor, ws: list[Tensor], *_: list[Tensor]):
    return tuple(F.linear(x, w) for w in ws)


def _work(spec: Spec, r: int) -> tuple[float, float]:
    """(FLOPs, bytes) needed at least: inputs read once, outputs written once; r = 0: frozen."""
    m, k, n, count = spec.m, spec.k, sum(spec.ns), len(spec.ns)
    low = m * r * (count * k + n)
    flops, moved = 2 * m * n * k + 2 * low, m * k + n * k + r * (count * k + n) + m * n
    if spec.kind == "train":
        flops += 2 * m * n * k + 4 * low
        moved += m * n + n * k + m * k + (m * k + 2 * r * (count * k + n) if r else 0)
    return float(flops), float(moved * spec.dtype.itemsize)


def build(spec: Spec, device: torch.device, impls: tuple[str, ...] | None, warm: bool) -> Case:
    gen = torch.Generator(device=device).manual_seed(spec.m + spec.k + spec.r)
    grad = spec.kind == "train"

    def draw(rows: int, cols: int, std: float) -> Tensor:
        return (torch.randn(rows, cols, generator=gen, device=device) * std).to(spec.dtype)

    first: Parts = (
        [draw(n, spec.k, spec.k**-0.5) for n in spec.ns],
        [draw(spec.r, spec.k, spec.k**-0.5) for _ in spec.ns],
        [draw(n, spec.r, spec.r**-0.5) for n in spec.ns],
    )
    x, dys = draw(spec.m, spec.k, 1.0), [draw(spec.m, n, 1.0) for n in spec.ns]
    count = 1 if warm else cold_sets(sum(t.nbytes for part in first for t in part), device)
    sets = [first, *(tuple([t.clone() for t in p] for p in first) for _ in range(count - 1))]

    def call(op: Callable, x_: Tensor, parts: Parts, dys_: list[Tensor], adapters: bool) -> Call:
        x_ = x_.detach().requires_grad_(grad)
        ws, *small = parts
        as_, bs = ([t.detach().requires_grad_(grad) for t in part] for part in small)
        inputs = [x_, *as_, *bs] if adapters else [x_]

        def run() -> tuple[Tensor, ...]:
            ys = op(x_, ws, as_, bs)
            return (*ys, *torch.autograd.grad(ys, inputs, dys_)) if grad else ys

        return run

    def expected(op: Callable, adapters: bool) -> Expected:
        names = [f"{name}{i}" for name in ("y", "da", "db") for i in range(len(spec.ns))]
        names.insert(len(spec.ns), "dx")
        up = tuple([t.double() for t in part] for part in first)
        with torch.set_grad_enabled(grad):
            ref = call(op, x.double(), up, [dy.double() for dy in dys], adapters)()
            low = call(op, x, first, dys, adapters)()
        ref, low = (tuple(t.detach() for t in out) for out in (ref, low))
        return Expected(tuple(names[: len(ref)]), ref, low)

    missing = {}
    if device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        missing["torch.compile"] = "no C++ compiler (inductor needs g++)"
    reference = _multi(lora_linear_multi_ref)
    calls = {"fusedpeft": _multi(lora_linear_multi), "separate": _separate}
    calls |= {"reference": reference, FLOOR: _frozen}
    wanted = impls or ALL
    if "torch.compile" in wanted and not missing:
        torch._dynamo.reset()
        calls["torch.compile"] = torch.compile(reference, dynamic=False, fullgraph=True)
    lora, frozen = expected(reference, True), expected(_frozen, False)

    def impl(name: str) -> Impl:
        op, adapters = calls[name], name != FLOOR
        work = _work(spec, spec.r if adapters else 0)
        return Impl(
            name, lambda i: call(op, x, sets[i], dys, adapters), lora if adapters else frozen, *work
        )

    contestants = [impl(name) for name in ALL if name in wanted and name in calls]
    left_out = {name: why for name, why in missing.items() if name in wanted}
    return Case(
        "lora_linear_multi", spec.name, spec.dtype, device, contestants, FLOOR, count, grad,
        left_out,
    )  # fmt: skip
