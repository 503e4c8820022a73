"""Bench of `ops.linear_logprob`.

    fusedpeft bench linear_logprob --device cpu --json FILE    small vocabulary, fp32
    fusedpeft bench linear_logprob --device cuda --json FILE   heads of models, bf16

Kinds, each forward and backward: `frozen` (summed cross-entropy and dh), `head` (dh and dw), `pro`
(the log-probabilities of four candidates through `ops.pro_loss`, down to dh: a gradient a token,
which the peers do not take). The floor is the eager form, so that
`ratio` is × eager. Bars on a CPU: PRO at V 32000, 4 × 256 tokens, time 1.0 × and peak memory 0.35 ×
eager. CUDA: M 4096, H 4096, V 128256, frozen, 11.5 ms (H200) and extra memory 5 % of the logits'.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fusedpeft import ops
from fusedpeft.bench.harness import Call, Case, Expected, Impl, cold_sets

__all__ = ["ALL", "FLOOR", "Spec", "build", "specs"]  # what run.py takes from a bench

FLOOR = "reference"  # eager log_softmax and gather
ALL = ("fusedpeft", FLOOR, "torch.compile", "liger", "quack")
CANDIDATES = 4
KINDS = ("frozen", "head", "pro")
BF16, FP32 = torch.bfloat16, torch.float32
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # (h, w, labels) -> scalar, fp32


@dataclass(frozen=True)
class Spec:
    kind: str  # frozen, head, pro
    m: int
    d: int
    v: int
    dtype: torch.dtype

    @property
    def label(self) -> str:
        """What `--case` is matched against."""
        dtype = {BF16: "bf16", FP32: "fp32"}[self.dtype]
        return f"{self.kind} M{self.m} H{self.d} V{self.v} {dtype}"


def specs(device: torch.device, full: bool) -> list[Spec]:
    if device.type == "cpu":
        shapes = [(1024, 1024, 32000)] + ([(1024, 768, 50257), (2048, 2048, 32000)] if full else [])
        return [Spec(kind, *shape, FP32) for shape in shapes for kind in reversed(KINDS)]
    shapes = [(4096, 4096, 128256), (2048, 2048, 128256)]  # Llama-3-8B, -3.2-1B
    if full:
        shapes += [(16384, 4096, 128256), (8192, 2048, 32000), (512, 4096, 128256)]
    return [Spec(kind, *shape, BF16) for shape in shapes for kind in KINDS]


def _pro(logp: Tensor) -> Tensor:
    total = logp.view(CANDIDATES, -1).to(torch.promote_types(logp.dtype, torch.float32)).sum(1)
    length = torch.full_like(total, logp.numel() // CANDIDATES)
    reward = torch.linspace(1.0, -1.0, CANDIDATES, device=logp.device)
    return ops.pro_loss(total, length, reward, torch.zeros_like(reward, dtype=torch.int64))


def _ours(kind: str) -> Loss:
    if kind == "pro":
        return lambda h, w, t: _pro(ops.linear_logprob(h, w, t))
    return lambda h, w, t: ops.linear_cross_entropy(h, w, t, reduction="sum")


def _eager(kind: str) -> Loss:
    if kind == "pro":
        return lambda h, w, t: _pro(ops.linear_logprob_ref(h, w, t))
    return lambda h, w, t: ops.linear_cross_entropy_ref(h, w, t, reduction="sum")


def _liger(h: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction as Function

    out = Function.apply(h, w, labels, None, None, -100, 0.0, 0.0, "sum")
    return (out[0] if isinstance(out, tuple) else out).float()


def _quack(h: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(h, w, labels, chunk_size=4096, reduction="sum").float()


def missing(device: torch.device, kind: str) -> dict[str, str]:
    """Contestants that cannot run here, with the reason."""
    gone = {}
    for name, package in (("liger", "liger_kernel"), ("quack", "quack")):
        if device.type != "cuda":
            gone[name] = "CUDA only"
        elif not importlib.util.find_spec(package):
            gone[name] = "not installed"
        elif kind == "pro":
            gone[name] = "takes no gradient by token"
    if device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        gone["torch.compile"] = "no C++ compiler (inductor needs g++)"
    return gone


def _work(spec: Spec, size: int) -> tuple[float, float]:
    """(FLOPs, bytes) needed at least: 4·M·d·V with a frozen head, 8·M·d·V where it learns."""
    m, d, v = spec.m, spec.d, spec.v
    head = spec.kind == "head"
    flops = (8 if head else 4) * m * d * v
    return float(flops), float((2 * m * d + (2 if head else 1) * v * d) * size)


def build(spec: Spec, device: torch.device, impls: tuple[str, ...] | None, warm: bool) -> Case:
    """One shape with its contestants; each returns the loss and the gradients."""
    gen = torch.Generator(device=device).manual_seed(spec.m + spec.d + spec.v)
    head = spec.kind == "head"

    def draw(rows: int, std: float) -> Tensor:
        return (torch.randn(rows, spec.d, generator=gen, device=device) * std).to(spec.dtype)

    h = draw(spec.m, 1.0).requires_grad_()
    first = draw(spec.v, 2.0 * spec.d**-0.5).requires_grad_(head)
    labels = torch.randint(0, spec.v, (spec.m,), generator=gen, device=device)
    labels[: spec.m // 16] = -100
    count = 1 if warm else cold_sets(first.nbytes, device)
    heads = [first, *(first.detach().clone().requires_grad_(head) for _ in range(count - 1))]

    def call(loss: Loss, h: Tensor, w: Tensor) -> Call:
        inputs = [h, w] if head else [h]

        def step() -> tuple[Tensor, ...]:
            value = loss(h, w, labels)
            return (value.detach(), *torch.autograd.grad(value, inputs))

        return step

    def reference(*tensors: Tensor) -> tuple[Tensor, ...]:
        return call(_eager(spec.kind), *tensors)()

    wide = [t.detach().double().requires_grad_(t.requires_grad) for t in (h, first)]
    names = ("loss", "dh", "dw")[: 3 if head else 2]
    expected = Expected(names, reference(*wide), reference(h, first))
    gone = missing(device, spec.kind)
    losses: dict[str, Loss] = {
        "fusedpeft": _ours(spec.kind),
        FLOOR: _eager(spec.kind),
        "liger": _liger,
        "quack": _quack,
    }
    compiled: list[Loss] = []

    def made(name: str) -> Callable[[int], Call]:
        def of(i: int) -> Call:
            if name == "torch.compile" and not compiled:
                torch._dynamo.reset()  # fresh, or this shape would become a dynamic kernel
                compiled.append(torch.compile(_eager(spec.kind), dynamic=False, fullgraph=True))
            return call(compiled[0] if name == "torch.compile" else losses[name], h, heads[i])

        return of

    chosen = [n for n in ALL if n in (impls or ALL)]
    work = _work(spec, h.element_size())
    entries = [Impl(n, made(n), expected, *work) for n in chosen if n not in gone]
    left_out = {n: why for n, why in gone.items() if n in chosen}
    label = spec.label.rpartition(" ")[0]
    return Case("linear_logprob", label, spec.dtype, device, entries, FLOOR, count, True, left_out)
