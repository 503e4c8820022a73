"""Bench of `ops.multi_lora_linear`.

    fusedpeft bench multi_lora --device cpu --json FILE

    fusedpeft bench multi_lora --device cuda --json FILE

Each token has an adapter of its own, or they share some, of rank 16, 8 and 64 in turn. `peft` is
PEFT's mixed batch (`adapter_names`) over the same tensors, `aten` our path slot by slot. On a GPU
`shrink+expand` is the base and two batched products, every rank padded to the largest, as servers
do it, and `triton` our path for more tokens. The floor is the frozen linear, which answers to its
own reference. All run as CUDA graphs but `peft` and `aten`, which read on the host who goes where.
Bars on a GPU, up to 64 tokens: 1.10 of the floor beyond the bytes of A and B, and 1.5 times as fast
as `shrink+expand`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedpeft.bench.harness import Call, Case, Expected, Impl, cold_sets
from fusedpeft.ops import multi_lora_linear, multi_lora_linear_ref
from fusedpeft.ops.slots import LoRASlots, lora_slots

__all__ = ["ALL", "FLOOR", "Spec", "build", "specs"]  # what run.py takes from a bench

BF16, FP32 = torch.bfloat16, torch.float32
FLOOR = "frozen"
ALL = ("fusedpeft", "triton", "shrink+expand", "aten", "peft", FLOOR)
ON_CUDA = ("triton", "shrink+expand")
EAGER = ("aten", "peft")
RANKS = (16, 8, 64)
SCALE = 2.0


@dataclass(frozen=True)
class Spec:
    m: int
    k: int
    n: int
    dtype: torch.dtype
    adapters: int = 0  # that the tokens share; 0: each has its own

    @property
    def name(self) -> str:
        shared = f" of {self.adapters} adapters" if self.adapters else ""
        return f"fwd {self.k}->{self.n} M{self.m} R8/16/64{shared}"

    @property
    def label(self) -> str:
        """What `--case` is matched against."""
        return f"{self.name} {({BF16: 'bf16', FP32: 'fp32'})[self.dtype]}"

    @property
    def ranks(self) -> list[int]:
        return [RANKS[i % len(RANKS)] for i in range(self.adapters or self.m)]


def specs(device: torch.device, full: bool) -> list[Spec]:
    cuda = device.type == "cuda"
    # Llama-3-8B's: q and o; k and v; q, k, v as one; gate, up; down.
    llama = [(4096, 4096), (4096, 1024), (4096, 6144), (4096, 14336), (14336, 4096)]
    shapes = llama if cuda else [(2048, 2048), (4096, 1024)]
    tokens = [(1, 0), (8, 0), (64, 8), (64, 0)] if cuda else [(m, 0) for m in (1, 4, 8, 16)]
    tokens += [(2, 0), (32, 0), (48, 0), (128, 8)] if full else []
    dtypes = (BF16,) if cuda else (FP32, BF16)
    return [
        Spec(m, *s, dtype, a)
        for dtype in dtypes
        for s in shapes
        for m, a in (tokens if full or s in shapes[:1] or not cuda else tokens[:3])
    ]


def _shrink_expand(x: Tensor, w: Tensor, pool: LoRASlots, slots: Tensor) -> Call:
    """Where tokens share adapters each has a copy of its own, made before anything is timed."""
    adapters, most = [pool.get(i)[0] for i in range(int(slots.max()) + 1)], pool.max_rank
    a = x.new_zeros(len(adapters), most, x.shape[1])
    b = x.new_zeros(len(adapters), w.shape[0], most)
    for i, adapter in enumerate(adapters):
        a[i, : len(adapter.a)] = adapter.a
        b[i, :, : len(adapter.a)] = adapter.b * adapter.scale
    if len(adapters) < len(x):
        a, b = a[slots.long()], b[slots.long()]

    def call() -> Tensor:
        s = torch.bmm(a, x.unsqueeze(2))
        return F.linear(x, w).unsqueeze(2).baddbmm_(b, s).squeeze(2)

    return call


def _peft(x: Tensor, w: Tensor, pool: LoRASlots, slots: Tensor) -> Call:
    from peft import LoraConfig, get_peft_model

    with torch.device("meta"):
        base = torch.nn.Sequential()
        base.add_module("proj", torch.nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=w.dtype))
    base.proj.weight = torch.nn.Parameter(w, requires_grad=False)
    names = [f"a{i}" for i in range(int(slots.max()) + 1)]
    model = None
    for i, name in enumerate(names):
        ((a, b, scale),) = pool.get(i)
        config = LoraConfig(r=len(a), lora_alpha=scale * len(a), target_modules=["proj"])
        if model is None:
            model = get_peft_model(base, config, name, autocast_adapter_dtype=False)
        else:
            model.add_adapter(name, config)
        proj = model.base_model.model.proj
        proj.lora_A[name].weight = torch.nn.Parameter(a.contiguous(), requires_grad=False)
        proj.lora_B[name].weight = torch.nn.Parameter(b.contiguous(), requires_grad=False)
    proj.eval()
    named = [names[slot] for slot in slots.tolist()]
    return lambda: proj(x, adapter_names=named)


def _work(spec: Spec, ranks: list[int]) -> tuple[float, float]:
    """(FLOPs, bytes) needed at least; no ranks: the frozen linear."""
    m, k, n, r = spec.m, spec.k, spec.n, sum(ranks)
    return 2.0 * (m * n * k + r * (k + n)), float(
        (n * k + r * (k + n) + m * (k + n)) * spec.dtype.itemsize
    )


def build(spec: Spec, device: torch.device, impls: tuple[str, ...] | None, warm: bool) -> Case:
    """One shape with its contestants."""
    gen = torch.Generator(device=device).manual_seed(spec.m + spec.k)

    def draw(rows: int, cols: int, std: float) -> Tensor:
        return (torch.randn(rows, cols, generator=gen, device=device) * std).to(spec.dtype)

    k, n = spec.k, spec.n
    x, w = draw(spec.m, k, 1.0), draw(n, k, k**-0.5)
    adapters = [(draw(r, k, k**-0.5), draw(n, r, r**-0.5), SCALE) for r in spec.ranks]
    size = (n * k + sum(spec.ranks) * (k + n)) * spec.dtype.itemsize
    count = 1 if warm else cold_sets(size, device)
    sets = [(w.clone(), lora_slots(adapters)) for _ in range(count)]
    slots = torch.arange(spec.m, dtype=torch.int32, device=device) % len(adapters)

    def expected(op: Callable, x: Tensor, w: Tensor, pool: LoRASlots) -> Tensor:
        return F.linear(x, w) if op is None else op(x, w, pool, slots)

    def both(op: Callable | None) -> Expected:
        w, pool = sets[0]
        wide = pool._replace(a=pool.a.double(), b=pool.b.double())
        ref = expected(op, x.double(), w.double(), wide)
        return Expected(("y",), (ref,), (expected(op, x, w, pool),))

    makers: dict[str, Callable[[Tensor, LoRASlots], Call]] = {
        "fusedpeft": lambda w, pool: lambda: multi_lora_linear(x, w, pool, slots),
        "triton": lambda w, pool: lambda: multi_lora_linear(x, w, pool, slots, impl="triton"),
        "shrink+expand": lambda w, pool: _shrink_expand(x, w, pool, slots),
        "aten": lambda w, pool: lambda: multi_lora_linear(x, w, pool, slots, impl="aten"),
        "peft": lambda w, pool: _peft(x, w, pool, slots),
        FLOOR: lambda w, pool: lambda: F.linear(x, w),
    }
    gone = {} if importlib.util.find_spec("peft") else {"peft": "not installed"}
    if device.type != "cuda":
        gone |= dict.fromkeys(ON_CUDA, "for CUDA tensors")
    chosen = [name for name in ALL if name in (impls or ALL)]
    adapted, frozen = both(multi_lora_linear_ref), both(None)
    entries = [
        Impl(
            name, lambda i, make=makers[name]: make(*sets[i]),
            frozen if name == FLOOR else adapted,
            *_work(spec, [] if name == FLOOR else spec.ranks), graph=name not in EAGER,
        )
        for name in chosen if name not in gone
    ]  # fmt: skip
    left_out = {name: why for name, why in gone.items() if name in chosen}
    return Case(
        "multi_lora_linear", spec.name, spec.dtype, device, entries, FLOOR, count, False, left_out
    )
