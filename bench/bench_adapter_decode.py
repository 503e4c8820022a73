"""Bench of `ops.multi_bottleneck_adapter`.

    fusedpeft bench adapter_decode --device cpu --json FILE    one adapter a token, d 2048; a step
    fusedpeft bench adapter_decode --device cuda --json FILE   as CUDA graphs, d 4096; a step

y = x + scale · (gelu(x Dᵀ + c) Uᵀ + e), with a LayerNorm of x where the case says so. The floor is
plain torch, row by row; `bmm` gathers the adapters and multiplies in batches, `aten` is our own
path slot by slot. On a GPU a call is the 32 places of a model, each over its own adapters and over
what the one before made, as one graph: its time divided by 32 is that of one place.

step: the forward pass of one token a request through a whole Llama with Houlsby adapters, of each
request its own; the floor is the bare model.

Bars: 0.5 of the floor on a CPU; 160 µs for the 32 places on an H200; a step 1.10 of the bare model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedpeft.bench.bench_multi_lora_model import Spec as Model
from fusedpeft.bench.bench_multi_lora_model import llama
from fusedpeft.bench.harness import Call, Case, Expected, Impl, cold_sets
from fusedpeft.ops import multi_bottleneck_adapter, multi_bottleneck_adapter_ref
from fusedpeft.ops.slots import Adapter, AdapterSlots, adapter_slots

__all__ = ["ALL", "FLOOR", "Spec", "build", "specs"]  # what run.py takes from a bench

BF16, FP32 = torch.bfloat16, torch.float32
FLOOR, BARE = "eager", "bare model"  # of one place, of a step
ALL = ("fusedpeft", "aten", "bmm", FLOOR, BARE)
PLACES = 32  # of a model on a GPU
SCALE = 0.5


@dataclass(frozen=True)
class Spec:
    m: int  # tokens
    d: int
    e: int
    dtype: torch.dtype
    adapters: int = 0  # that the tokens share; 0: each has its own
    norm: str | None = None
    model: str = ""  # of bench_multi_lora_model: a step of it

    @property
    def name(self) -> str:
        shared = f" of {self.adapters} adapters" if self.adapters else ""
        what = f"step {self.model}" if self.model else f"d{self.d}"
        return f"{what} E{self.e} T{self.m}{shared}{' ' + self.norm if self.norm else ''}"

    @property
    def label(self) -> str:
        """What `--case` is matched against."""
        return f"{self.name} {({BF16: 'bf16', FP32: 'fp32'})[self.dtype]}"


def specs(device: torch.device, full: bool) -> list[Spec]:
    if device.type == "cuda":
        cases = [(1, 0, None), (8, 0, None), (32, 0, None), (32, 1, None), (8, 0, "layer_norm")]
        cases += [(m, 0, None) for m in (2, 4, 16, 64)] if full else []
        found = [Spec(m, 4096, 64, BF16, a, norm) for m, a, norm in cases]
        return [*found, Spec(8, 2048, 64, BF16, model="llama-1b")]
    cases = [(1, 0, None), (4, 0, None), (8, 0, None)]
    cases += [(2, 0, None), (8, 2, None), (8, 0, "layer_norm"), (16, 0, None)] if full else []
    dtypes = (FP32, BF16)
    found = [Spec(m, 2048, 64, dtype, a, norm) for dtype in dtypes for m, a, norm in cases]
    return found + [Spec(8, 1024, 64, dtype, model="llama-64m") for dtype in dtypes]


def places_of(device: torch.device) -> int:
    return PLACES if device.type == "cuda" else 1


def _adapters(spec: Spec, count: int, gen: torch.Generator, device: torch.device) -> list[Adapter]:
    def draw(*size: int, std: float = 1.0, mean: float = 0.0) -> Tensor:
        return (torch.randn(size, generator=gen, device=device) * std + mean).to(spec.dtype)

    d, e = spec.d, spec.e
    norm = (draw(d, std=0.1, mean=1.0), draw(d)) if spec.norm else (None, None)
    return [
        Adapter(draw(e, d, std=d**-0.5), draw(e), draw(d, e, std=e**-0.5), draw(d), SCALE, *norm)
        for _ in range(count)
    ]


def _rows(spec: Spec, adapters: list[Adapter], slots: list[int]) -> Callable[[Tensor], Tensor]:
    """Row by row, as the adapter's modules would."""

    def one(x: Tensor, a: Adapter) -> Tensor:
        h = F.layer_norm(x, x.shape[-1:], a.norm_weight, a.norm_bias) if spec.norm else x
        h = F.gelu(F.linear(h, a.down_w, a.down_b))
        return x + SCALE * F.linear(h, a.up_w, a.up_b)

    return lambda x: torch.cat([one(x[i : i + 1], adapters[slot]) for i, slot in enumerate(slots)])


def _bmm(spec: Spec, adapters: list[Adapter], slots: Tensor) -> Callable[[Tensor], Tensor]:
    """All of one size: gathered, then two products in batches."""
    down, c, up, e = (torch.stack([a[i] for a in adapters]) for i in range(4))
    weight, bias = adapters[0][5:]

    def call(x: Tensor) -> Tensor:
        h = F.layer_norm(x, x.shape[-1:], weight, bias) if spec.norm else x
        h = F.gelu(torch.baddbmm(c[slots].unsqueeze(2), down[slots], h.unsqueeze(2)))
        return x + SCALE * torch.baddbmm(e[slots].unsqueeze(2), up[slots], h).squeeze(2)

    return call


def _work(spec: Spec, places: int) -> tuple[float, float]:
    """(FLOPs, bytes) needed at least: the adapters that are named once, x read and y written."""
    d, e, count = spec.d, spec.e, spec.adapters or spec.m
    each = 2 * d * e + d + e
    moved = count * each + 2 * spec.m * d
    return 4.0 * places * spec.m * d * e, float(places * moved * spec.dtype.itemsize)


def build(spec: Spec, device: torch.device, impls: tuple[str, ...] | None, warm: bool) -> Case:
    if spec.model:
        return _step(spec, device, impls)
    places = places_of(device)
    gen = torch.Generator(device=device).manual_seed(spec.m + spec.d)
    count = spec.adapters or spec.m
    x = torch.randn(spec.m, spec.d, generator=gen, device=device).to(spec.dtype)
    slots = torch.arange(spec.m, dtype=torch.int32, device=device) % count
    named, index = slots.tolist(), slots.long()
    sets = 1 if warm else cold_sets(2 * count * spec.d * spec.e * spec.dtype.itemsize, device)
    all_places = [[_adapters(spec, count, gen, device) for _ in range(places)] for _ in range(sets)]

    def ours(pool: AdapterSlots, impl: str | None, op: Callable = multi_bottleneck_adapter):
        kw = {} if impl is None else {"impl": impl}
        return lambda x: op(x, pool, slots, residual=x, activation="gelu", norm=spec.norm, **kw)

    makers: dict[str, Callable[[list[Adapter]], Callable[[Tensor], Tensor]]] = {
        "fusedpeft": lambda a: ours(adapter_slots(a), None),
        "aten": lambda a: ours(adapter_slots(a), "aten"),
        "bmm": lambda a: _bmm(spec, a, index),
        FLOOR: lambda a: _rows(spec, a, named),
    }

    def through(places: list[Callable[[Tensor], Tensor]], x: Tensor) -> Tensor:
        for place in places:
            x = place(x)
        return x

    def by_reference(dtype: torch.dtype) -> Tensor:
        def wide(a: Adapter) -> Adapter:
            return Adapter(*(t.to(dtype) if isinstance(t, Tensor) else t for t in a))

        pools = [adapter_slots([wide(a) for a in held]) for held in all_places[0]]
        calls = [ours(pool, None, multi_bottleneck_adapter_ref) for pool in pools]
        return through(calls, x.to(dtype))

    expected = Expected(("y",), (by_reference(torch.float64),), (by_reference(spec.dtype),))
    missing = {"aten": "waits for the GPU: no graph of it"} if device.type == "cuda" else {}

    def made(name: str) -> Callable[[int], Call]:
        def build_(i: int) -> Call:
            calls = [makers[name](held) for held in all_places[i]]
            return lambda: through(calls, x)

        return build_

    entries = [
        Impl(name, made(name), expected, *_work(spec, places), graph=True)
        for name in makers
        if name in (impls or ALL) and name not in missing
    ]
    return Case(
        "multi_bottleneck_adapter", spec.name, spec.dtype, device, entries, FLOOR, sets, False,
        missing,
    )  # fmt: skip


# --- a whole model ------------------------------------------------------------------------------


class _Adapted(nn.Module):
    """A model's module and, after it, h + A(h) of each row."""

    def __init__(self, inner: nn.Module, adapt: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.adapt = inner, adapt

    def forward(self, *args, **kwargs):
        out = self.inner(*args, **kwargs)
        h, rest = (out[0], out[1:]) if isinstance(out, tuple) else (out, None)
        y = self.adapt(h.flatten(0, -2)).view(h.shape)
        return y if rest is None else (y, *rest)


def _step(spec: Spec, device: torch.device, impls: tuple[str, ...] | None) -> Case:
    """One token a request, which sees no other: attention is not what differs."""
    base = llama(Model(spec.model, spec.m, spec.dtype), device)
    gen = torch.Generator(device=device).manual_seed(spec.m)
    token = torch.randint(0, base.config.vocab_size, (spec.m, 1), generator=gen, device=device)
    slots = torch.arange(spec.m, dtype=torch.int32, device=device)
    held = [_adapters(spec, spec.m, gen, device) for _ in range(2 * len(base.model.layers))]

    def adapted(adapt: Callable[[list[Adapter]], Callable], dtype: torch.dtype) -> nn.Module:
        model, at = copy.deepcopy(base).to(dtype), iter(held)
        for layer in model.model.layers:
            layer.self_attn = _Adapted(layer.self_attn, adapt(next(at)))
            layer.mlp = _Adapted(layer.mlp, adapt(next(at)))
        return model

    def call(model: nn.Module) -> Call:
        return lambda: model(token, use_cache=False).logits[:, -1]

    def by(op: Callable, dtype: torch.dtype = spec.dtype) -> Callable:
        def make(adapters: list[Adapter]) -> Callable[[Tensor], Tensor]:
            wide = [
                Adapter(*(t.to(dtype) if isinstance(t, Tensor) else t for t in a)) for a in adapters
            ]
            pool = adapter_slots(wide)
            return lambda x: op(x, pool, slots, residual=x, activation="gelu")

        return make

    ref = multi_bottleneck_adapter_ref
    with torch.no_grad():
        with_them = Expected(
            ("logits",),
            (call(adapted(by(ref, torch.float64), torch.float64))(),),
            (call(adapted(by(ref), spec.dtype))(),),
        )
        bare = Expected(("logits",), (call(copy.deepcopy(base).double())(),), (call(base)(),))
    rows = slots.tolist()
    models: dict[str, Callable[[], nn.Module]] = {
        "fusedpeft": lambda: adapted(by(multi_bottleneck_adapter), spec.dtype),
        "eager": lambda: adapted(lambda a: _rows(spec, a, rows), spec.dtype),
        BARE: lambda: base,
    }
    weights = sum(p.numel() for p in base.parameters())
    more = len(held) * spec.m * (2 * spec.d * spec.e + spec.d + spec.e)
    entries = [
        Impl(
            name, lambda _, make=make: call(make()), bare if name == BARE else with_them,
            2.0 * (spec.m * weights + (0 if name == BARE else more)),
            float((weights + (0 if name == BARE else more)) * spec.dtype.itemsize),
            graph=True,
        )
        for name, make in models.items()
        if name in (*(impls or models), BARE)
    ]  # fmt: skip
    return Case("multi_bottleneck_adapter", spec.name, spec.dtype, device, entries, BARE, 1, False)
