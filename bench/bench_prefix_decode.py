"""Bench of `ops.prefix_decode_attention`.

    fusedpeft bench prefix_decode --device cpu --json FILE
    fusedpeft bench prefix_decode --device cuda --json FILE

One decode step of B requests that share a prefix of P keys, each with S keys of its own. The floor
is what one writes without the op: the prefix copied to every row, concatenated, and one SDPA.
`no prefix` is the op with no slot named, which is decode attention with less to do; `sdpa` is
torch's, also without a prefix. Bars: on a CPU at B 16, P 128, S 512 0.7 of the floor; on a GPU at
B 32, P 512 1.05 of `no prefix`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedpeft.bench.harness import Case, Expected, Impl
from fusedpeft.ops import prefix_decode_attention, prefix_decode_attention_ref
from fusedpeft.ops.slots import PrefixSlots

__all__ = ["ALL", "FLOOR", "Spec", "build", "specs"]  # what run.py takes from a bench

BF16, FP32 = torch.bfloat16, torch.float32
FLOOR = "cat+sdpa"
ALL = ("fusedpeft", "paged", "no prefix", FLOOR, "sdpa")
BLOCK = 16  # keys of a block, in `paged`


@dataclass(frozen=True)
class Spec:
    b: int
    h: int
    hkv: int
    t: int
    d: int
    p: int
    s: int
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return f"B{self.b} H{self.h}/{self.hkv} T{self.t} D{self.d} P{self.p} S{self.s}"

    @property
    def label(self) -> str:
        """What `--case` is matched against."""
        return f"{self.name} {({BF16: 'bf16', FP32: 'fp32'})[self.dtype]}"


def specs(device: torch.device, full: bool) -> list[Spec]:
    if device.type == "cuda":
        shapes = [(32, 32, 8, 1, 128, 512, s) for s in (2048, 8192)]
        more = [(b, 32, 8, t, 128, 512, 2048) for b in (1, 8, 64) for t in (1, 4)]
        return [Spec(*x, BF16) for x in shapes + (more if full else [])]
    shapes = [(16, h, 8, 1, d, 128, 512) for h in (8, 32) for d in (64, 128)]
    more = [(1, 8, 8, 1, 64, 128, 512), (16, 32, 8, 4, 128, 128, 512)]
    return [Spec(*x, dtype) for dtype in (FP32, BF16) for x in shapes + (more if full else [])]


def _cat_sdpa(q: Tensor, k: Tensor, v: Tensor, prefix: PrefixSlots) -> Tensor:
    (B, _, T, _), P, S = q.shape, prefix.k.shape[2], k.shape[2]
    parts = ((prefix.k, k), (prefix.v, v))
    k, v = (torch.cat([p.expand(B, -1, -1, -1), t], 2) for p, t in parts)
    return _sdpa(q, k, v) if T == 1 else _masked(q, k, v, P + S - T)


def _masked(q: Tensor, k: Tensor, v: Tensor, first: int) -> Tensor:
    seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(first)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if q.shape[2] > 1:
        return _masked(q, k, v, k.shape[2] - q.shape[2])
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])


def _work(spec: Spec, p: int) -> tuple[float, float]:
    """(FLOPs, bytes) needed at least: keys and the prefix read once, q read and out written."""
    queries = spec.b * spec.h * spec.t
    moved = 2 * queries * spec.d + 2 * spec.hkv * spec.d * (spec.b * spec.s + p)
    return 4.0 * queries * spec.d * (p + spec.s), float(moved * spec.dtype.itemsize)


def _blocks(t: Tensor) -> Tensor:
    """[B, HKV, S, D] -> [B · S / BLOCK, HKV, BLOCK, D]."""
    B, HKV, S, D = t.shape
    return t.view(B, HKV, S // BLOCK, BLOCK, D).transpose(1, 2).reshape(-1, HKV, BLOCK, D)


def build(spec: Spec, device: torch.device, impls: tuple[str, ...] | None, warm: bool) -> Case:
    """Keys are larger than a cache: warm or not is the same."""
    gen = torch.Generator(device=device).manual_seed(spec.s + spec.p)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=gen, device=device).to(spec.dtype)

    q = draw(spec.b, spec.h, spec.t, spec.d)
    k, v = (draw(spec.b, spec.hkv, spec.s, spec.d) for _ in range(2))
    pk, pv = (draw(1, spec.hkv, spec.p, spec.d) for _ in range(2))
    prefix = PrefixSlots(pk, pv, torch.tensor([spec.p], dtype=torch.int32, device=device))
    slots = torch.zeros(spec.b, dtype=torch.int32, device=device)
    none = torch.full_like(slots, -1)
    kb, vb = _blocks(k), _blocks(v)
    table = torch.arange(len(kb), dtype=torch.int32, device=device).view(spec.b, -1)
    wide = [t.double() for t in (q, k, v)]
    prefix64 = PrefixSlots(pk.double(), pv.double(), prefix.length)

    def expected(named: Tensor, low: Callable[[], Tensor]) -> Expected:
        ref = prefix_decode_attention_ref(*wide, prefix64, named)
        return Expected(("out",), (ref,), (low(),))

    calls: dict[str, Callable[[], Tensor]] = {
        "fusedpeft": lambda: prefix_decode_attention(q, k, v, prefix, slots),
        "paged": lambda: prefix_decode_attention(q, kb, vb, prefix, slots, block_table=table),
        FLOOR: lambda: _cat_sdpa(q, k, v, prefix),
        "no prefix": lambda: prefix_decode_attention(q, k, v, prefix, none),
        "sdpa": lambda: _sdpa(q, k, v),
    }
    with torch.no_grad():
        shared = expected(slots, calls[FLOOR])
        alone = expected(none, calls["sdpa"])
    contestants = [
        Impl(
            name,
            lambda _i, call=calls[name]: call,
            alone if name in ("no prefix", "sdpa") else shared,
            *_work(spec, 0 if name in ("no prefix", "sdpa") else spec.p),
        )
        for name in ALL
        if name in (impls or ALL)
    ]
    return Case("prefix_decode", spec.name, spec.dtype, device, contestants, FLOOR)
