"""The contestants of the LoRA bench: ours, plain torch in three forms, PEFT's module, Unsloth.

On CUDA ours runs as it chooses by itself, as the Triton kernels ("triton"; "pointers" without TMA)
and as cuBLAS with an accumulating pass ("aten"), so that a run says what to choose for which shape:
`python -m fusedpeft.bench.lora_choice` makes the table of it.

Everyone computes y = x Wᵀ + scale·(x Aᵀ) Bᵀ from the same tensors and answers to the same float64
reference; the frozen linear y = x Wᵀ is the floor and answers to its own.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import unittest.mock
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedpeft.bench.harness import Call, Case, Expected, Impl, cold_sets
from fusedpeft.kernels.device import arch_of
from fusedpeft.ops import lora_linear, lora_linear_ref

FLOOR = "frozen"
TRITON, POINTERS, ATEN = "fusedpeft triton", "fusedpeft pointers", "fusedpeft aten"
OURS = ("fusedpeft", TRITON, POINTERS, ATEN)
ALL = (*OURS, "reference", "addmm", "update first", "torch.compile", "peft", "unsloth", FLOOR)
SCALE = 2.0


@dataclass(frozen=True)
class Weights:
    w: Tensor  # [N, K], frozen
    a: Tensor  # [R, K]
    b: Tensor  # [N, R]

    def to(self, dtype: torch.dtype) -> Weights:
        """A copy: the float64 twin, or the next set for a cold cache."""
        w, a, b = (
            t.detach().to(dtype, copy=True).requires_grad_(t.requires_grad)
            for t in (self.w, self.a, self.b)
        )
        return Weights(w, a, b)


Forward = Callable[[Tensor, Weights], Tensor]


def _frozen(x: Tensor, s: Weights) -> Tensor:
    return F.linear(x, s.w)


def _reference(x: Tensor, s: Weights) -> Tensor:
    return lora_linear_ref(x, s.w, s.a, s.b, SCALE)


def _addmm(x: Tensor, s: Weights) -> Tensor:
    return torch.addmm(F.linear(x, s.w), F.linear(x, s.a), s.b.t(), alpha=SCALE)


def _update_first(x: Tensor, s: Weights) -> Tensor:
    return torch.addmm(F.linear(SCALE * F.linear(x, s.a), s.b), x, s.w.t())


def _fusedpeft(x: Tensor, s: Weights) -> Tensor:
    return lora_linear(x, s.w, s.a, s.b, SCALE)


def _fusedpeft_triton(x: Tensor, s: Weights) -> Tensor:
    return lora_linear(x, s.w, s.a, s.b, SCALE, impl="triton")


def _without_tma(call: Call) -> Call:
    """The same call, in which nothing suits TMA."""
    from fusedpeft.kernels import lora_gemm

    def pointers():
        with unittest.mock.patch.object(lora_gemm, "tma_ok", lambda *_: False):
            return call()

    return pointers


def _fusedpeft_aten(x: Tensor, s: Weights) -> Tensor:
    return lora_linear(x, s.w, s.a, s.b, SCALE, impl="aten")


def _unsloth(x: Tensor, s: Weights) -> Tensor:
    from unsloth.kernels.fast_lora import LoRA_W  # patches transformers: only where asked for

    return LoRA_W.apply(x.unsqueeze(0), s.w, None, s.a, s.b, SCALE).squeeze(0)


def _peft_module(s: Weights) -> torch.nn.Module:
    """A real `peft.tuners.lora.Linear` that holds our tensors, none copied."""
    from peft import LoraConfig, get_peft_model

    (n, k), r = s.w.shape, s.a.shape[0]
    with torch.device("meta"):
        base = torch.nn.Sequential()
        base.add_module("proj", torch.nn.Linear(k, n, bias=False, dtype=s.w.dtype))
    base.proj.weight = torch.nn.Parameter(s.w, requires_grad=False)
    config = LoraConfig(r=r, lora_alpha=SCALE * r, lora_dropout=0.0, target_modules=["proj"])
    module = get_peft_model(base, config, autocast_adapter_dtype=False).base_model.model.proj
    module.lora_A.default.weight = s.a if isinstance(s.a, torch.nn.Parameter) else None
    module.lora_B.default.weight = s.b if isinstance(s.b, torch.nn.Parameter) else None
    return module


def missing(device: torch.device) -> dict[str, str]:
    """Contestants that cannot run here, with the reason."""
    gone = {}
    if not importlib.util.find_spec("peft"):
        gone["peft"] = "not installed"
    if device.type != "cuda":
        gone["unsloth"] = "CUDA only"
        gone[ATEN] = "on a CPU it is what fusedpeft takes by itself"
        gone[TRITON] = gone[POINTERS] = "CUDA only"
        gone["update first"] = "CUDA only: on a CPU 16 bits round at every step of a short product"
    else:
        if not importlib.util.find_spec("unsloth"):
            gone["unsloth"] = "not installed"
        if arch_of(device) != "sm_90":
            gone[POINTERS] = f"without Hopper's TMA it is {TRITON}"
    if device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        gone["torch.compile"] = "no C++ compiler (inductor needs g++)"
    return gone


def _call(kind: str, forward: Forward, x: Tensor, s: Weights, dy: Tensor, adapters: bool) -> Call:
    """fwd: y. train: y and the gradients. bwd: the gradients alone, over a graph kept from now."""
    inputs = [x, s.a, s.b] if adapters else [x]
    if kind == "fwd":
        return lambda: forward(x, s)
    if kind == "train":

        def step():
            y = forward(x, s)
            return (y, *torch.autograd.grad(y, inputs, dy))

        return step
    y = forward(x, s)
    return lambda: torch.autograd.grad(y, inputs, dy, retain_graph=True)


def _work(kind: str, m: int, n: int, k: int, r: int, size: int) -> tuple[float, float]:
    """(FLOPs, bytes) needed at least: inputs read once, outputs written once; r = 0: frozen."""
    fwd = 2 * m * n * k + 2 * m * r * (k + n), m * k + n * k + r * (k + n) + m * n
    # dx = dy W + dS A; dS = dy B; dA = dSᵀ x; dB = dyᵀ S
    bwd = (
        2 * m * n * k + 4 * m * r * (k + n),
        m * n + n * k + m * k + (m * k + 2 * r * (k + n) + m * r if r else 0),
    )
    parts = {"fwd": [fwd], "bwd": [bwd], "train": [fwd, bwd]}[kind]
    return float(sum(p[0] for p in parts)), float(sum(p[1] for p in parts) * size)


def make_case(
    kind: str,
    m: int,
    n: int,
    k: int,
    r: int,
    dtype: torch.dtype,
    device: torch.device,
    only: tuple[str, ...] = ALL,
    warm: bool = False,
) -> Case:
    """One shape of `lora_linear` with its contestants; kind is fwd, train or bwd."""
    gen = torch.Generator(device=device).manual_seed(m + n + k + r)
    grad = kind != "fwd"

    def draw(rows: int, cols: int, std: float) -> Tensor:
        return (torch.randn(rows, cols, generator=gen, device=device) * std).to(dtype)

    first = Weights(
        draw(n, k, k**-0.5),
        torch.nn.Parameter(draw(r, k, k**-0.5), requires_grad=grad),
        torch.nn.Parameter(draw(n, r, r**-0.5), requires_grad=grad),
    )
    x, dy = draw(m, k, 1.0).requires_grad_(grad), draw(m, n, 1.0)
    count = 1 if warm else cold_sets(first.w.nbytes + first.a.nbytes + first.b.nbytes, device)
    sets = [first]
    for _ in range(count - 1):
        copy = first.to(dtype)
        sets.append(Weights(copy.w, *(torch.nn.Parameter(t, grad) for t in (copy.a, copy.b))))

    def expected(forward: Forward, adapters: bool) -> Expected:
        names = (["y"] if kind != "bwd" else []) + (["dx", "da", "db"][: 3 if adapters else 1])
        x64, dy64 = x.detach().double().requires_grad_(grad), dy.double()
        outs = [
            _call(kind, forward, *args, adapters)()
            for args in ((x64, first.to(torch.float64), dy64), (x, first, dy))
        ]
        ref, low = (tuple(t.detach() for t in (o if isinstance(o, tuple) else (o,))) for o in outs)
        return Expected(tuple(names if grad else ["y"]), ref, low)

    lora, frozen = expected(_reference, True), expected(_frozen, False)
    gone = missing(device)
    compiled: list[Forward] = []

    def compile_once() -> Forward:
        if not compiled:  # fresh, or the previous shape would make this one a dynamic kernel
            torch._dynamo.reset()
            torch._functorch.config.donated_buffer = False  # `bwd` walks its graph many times
            compiled.append(torch.compile(_reference, dynamic=False, fullgraph=True))
        return compiled[0]

    def build(name: str) -> Callable[[int], Call]:
        def of(i: int) -> Call:
            if name == "peft":
                module = _peft_module(sets[i])
                return _call(kind, lambda x_, _s: module(x_), x, sets[i], dy, True)
            forward = compile_once() if name == "torch.compile" else plain[name]
            call = _call(kind, forward, x, sets[i], dy, name != FLOOR)
            return _without_tma(call) if name == POINTERS else call

        return of

    plain: dict[str, Forward] = {
        "fusedpeft": _fusedpeft,
        TRITON: _fusedpeft_triton,
        POINTERS: _fusedpeft_triton,
        ATEN: _fusedpeft_aten,
        "reference": _reference,
        "addmm": _addmm,
        "update first": _update_first,
        "unsloth": _unsloth,
        FLOOR: _frozen,
    }
    size = x.element_size()
    impls = [
        Impl(
            name,
            build(name),
            frozen if name == FLOOR else lora,
            *_work(kind, m, n, k, 0 if name == FLOOR else r, size),
        )
        for name in ALL
        if name in only and name not in gone
    ]
    label = f"{'decode' if kind == 'fwd' and m <= 16 else kind} {k}->{n} M{m} R{r}"
    left_out = {name: why for name, why in gone.items() if name in only}
    return Case("lora_linear", label, dtype, device, impls, FLOOR, count, grad, left_out)
