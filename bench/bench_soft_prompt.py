"""Bench of `ops.soft_prompt_embedding`.

    fusedpeft bench soft_prompt --device cpu --json FILE    forward, and forward with dprompt

The floor is PEFT's form: the prompt repeated for each row and concatenated with the embedded
tokens, so that `ratio` is × concatenated. Everyone only copies: forward must be exact.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedpeft.bench.harness import Call, Case, Expected, Impl
from fusedpeft.ops import soft_prompt_embedding

__all__ = ["ALL", "FLOOR", "Spec", "build", "specs"]  # what run.py takes from a bench

BF16, FP32 = torch.bfloat16, torch.float32
FLOOR = "concatenated"
ALL = ("fusedpeft", "torch.compile", FLOOR)


@dataclass(frozen=True)
class Spec:
    kind: str  # fwd, train
    b: int
    t: int
    p: int
    v: int
    d: int
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return f"{self.kind} B{self.b} T{self.t} P{self.p} V{self.v} d{self.d}"

    @property
    def label(self) -> str:
        """What `--case` is matched against."""
        return f"{self.name} {({BF16: 'bf16', FP32: 'fp32'})[self.dtype]}"


def specs(device: torch.device, full: bool) -> list[Spec]:
    if device.type == "cuda":
        shapes = [(16, 512, 20, 128256, 4096), (8, 2048, 100, 128256, 2048)]
    else:
        shapes = [(8, 128, 20, 32000, 1024)]
    if full:
        shapes += [(32, 64, 20, 32000, 2048), (1, 2048, 100, 32000, 2048)]
    dtypes = (BF16,) if device.type == "cuda" else (FP32, BF16)
    return [Spec(kind, *s, dtype) for dtype in dtypes for s in shapes for kind in ("fwd", "train")]


def _concatenated(ids: Tensor, table: Tensor, prompt: Tensor) -> Tensor:
    own = prompt.unsqueeze(0).repeat(len(ids), 1, 1)
    return torch.cat((own, F.embedding(ids, table)), 1)


def build(spec: Spec, device: torch.device, impls: tuple[str, ...] | None, warm: bool) -> Case:
    """One shape with its contestants; each returns y, and dprompt in training."""
    gen = torch.Generator(device=device).manual_seed(spec.b + spec.t + spec.p)
    grad = spec.kind == "train"

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=gen, device=device).to(spec.dtype)

    table, prompt = draw(spec.v, spec.d), draw(spec.p, spec.d).requires_grad_(grad)
    dy = draw(spec.b, spec.p + spec.t, spec.d)
    ids = torch.randint(0, spec.v, (spec.b, spec.t), generator=gen, device=device)

    def call(op: Callable, table: Tensor, prompt: Tensor, dy: Tensor) -> Call:
        if not grad:
            return lambda: op(ids, table, prompt)

        def step() -> tuple[Tensor, ...]:
            y = op(ids, table, prompt)
            return (y.detach(), *torch.autograd.grad(y, prompt, dy))

        return step

    wide = (table.double(), prompt.detach().double().requires_grad_(grad), dy.double())
    ref, low = (call(_concatenated, *t)() for t in (wide, (table, prompt, dy)))
    ref, low = ((t if grad else (t,)) for t in (ref, low))
    expected = Expected(("y", "dprompt")[: 2 if grad else 1], ref, low)
    compiled: list[Callable] = []
    ops: dict[str, Callable] = {"fusedpeft": soft_prompt_embedding, FLOOR: _concatenated}

    def made(name: str) -> Callable[[int], Call]:
        def of(_: int) -> Call:
            if name == "torch.compile" and not compiled:
                torch._dynamo.reset()  # fresh, or this shape would become a dynamic kernel
                compiled.append(torch.compile(_concatenated, dynamic=False, fullgraph=True))
            return call(compiled[0] if name == "torch.compile" else ops[name], table, prompt, dy)

        return of

    gone = {}
    if device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        gone["torch.compile"] = "no C++ compiler (inductor needs g++)"
    chosen = [name for name in ALL if name in (impls or ALL)]
    elements = 2 * spec.b * (spec.p + spec.t) * spec.d + (spec.b * spec.p * spec.d if grad else 0)
    work = (0.0, float(elements * table.element_size()))
    entries = [Impl(n, made(n), expected, *work) for n in chosen if n not in gone]
    left_out = {n: why for n, why in gone.items() if n in chosen}
    # One table: it is far larger than any cache, and its rows come in no order.
    return Case(
        "soft_prompt_embedding", spec.name, spec.dtype, device, entries, FLOOR, 1, grad, left_out
    )
