"""Bench of `ops.prefix_attention`.

    fusedpeft bench prefix_attention --device cpu --json FILE    forward and training, causal
    fusedpeft bench prefix_attention --device cuda --json FILE   and backward alone, 32/8 heads

Everyone attends from the same q to a shared prefix and to causal keys, and answers to the same
float64 reference. The floor is what one writes without the op: the prefix copied to every row,
concatenated, and one SDPA with a mask. `merged` is two attentions merged by their logsumexp, whole
and in the input's dtype. `sdpa` has no prefix to attend to, and FLOPs of its own. Bar on a CPU at
B 8, P 128, S 512: forward and backward 1.0 of the floor, memory beyond the results 0.25 of it. On a
GPU at B 4, P 128, S 2048 and 8192: time a FLOP 1.05 of `sdpa` forward and 1.15 backward, memory
beyond the results 0.1 of the floor's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from fusedpeft.bench.harness import Call, Case, Expected, Impl
from fusedpeft.ops import prefix_attention, prefix_attention_ref

__all__ = ["ALL", "FLOOR", "Spec", "build", "specs"]  # what run.py takes from a bench

BF16, FP32 = torch.bfloat16, torch.float32
FLOOR = "cat+sdpa"
ALL = ("fusedpeft", "merged", FLOOR, "sdpa")


@dataclass(frozen=True)
class Spec:
    kind: str  # fwd, bwd, train
    b: int
    h: int
    hkv: int
    d: int
    p: int
    s: int
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return f"{self.kind} B{self.b} H{self.h}/{self.hkv} D{self.d} P{self.p} S{self.s}"

    @property
    def label(self) -> str:
        """What `--case` is matched against."""
        return f"{self.name} {({BF16: 'bf16', FP32: 'fp32'})[self.dtype]}"


def specs(device: torch.device, full: bool) -> list[Spec]:
    cuda = device.type == "cuda"
    if cuda:
        shapes = [(4, 32, 8, 128, 128, s) for s in (2048, 8192)]
        more = [(4, 32, 8, 128, p, s) for p in (16, 1024) for s in (512, 2048)]
    else:
        shapes = [(8, 8, 8, 64, 128, 512), (8, 16, 4, 64, 128, 512)]
        more = [(2, 8, 8, 64, p, s) for p in (16, 1024) for s in (128, 2048)]
    kinds, dtypes = (("fwd", "bwd", "train"), (BF16,)) if cuda else (("fwd", "train"), (FP32, BF16))
    shapes += more if full else []
    return [Spec(kind, *x, dtype) for dtype in dtypes for x in shapes for kind in kinds]


def _cat_sdpa(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor) -> Tensor:
    rows, (P, S) = len(q), (pk.shape[1], k.shape[2])
    k, v = (torch.cat([p.expand(rows, -1, -1, -1), t], 2) for p, t in ((pk, k), (pv, v)))
    if q.is_cuda:  # the form that its flash attention takes
        seen = causal_lower_right(S, P + S)
    else:
        seen = torch.ones(S, P + S, dtype=torch.bool, device=q.device).tril(P)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def _bare_ref(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    none = k[0, :, :0]
    return prefix_attention_ref(q, k, v, none, none)


def _merged(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor) -> Tensor:
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = flash(q, k, v, 0.0, True)
    out_p, lse_p = flash(q, *(p.expand(len(q), -1, -1, -1) for p in (pk, pv)))
    return out.lerp(out_p, torch.sigmoid(lse_p - lse).to(out.dtype).unsqueeze(-1))


def _work(spec: Spec) -> tuple[float, float]:
    """(FLOPs, bytes) needed at least: inputs read once, outputs written once."""
    flops = 4 * spec.b * spec.h * spec.d * spec.s * (spec.p + spec.s / 2)
    queries = spec.b * spec.h * spec.s * spec.d
    keys = 2 * spec.hkv * spec.d * (spec.b * spec.s + spec.p)
    moved = 2 * queries + keys
    if spec.kind != "fwd":  # five products for two; q, k, v, out, dout read, dq, dk, dv written
        once = (0, 0) if spec.kind == "bwd" else (flops, moved)
        flops, moved = once[0] + 2.5 * flops, once[1] + 4 * queries + 2 * keys
    return flops, float(moved * spec.dtype.itemsize)


def _call(kind: str, op: Callable, tensors: list[Tensor], dout: Tensor) -> Call:
    leaves = [t.detach().requires_grad_(kind != "fwd") for t in tensors]

    def train() -> tuple[Tensor, ...]:
        out = op(*leaves)
        return (out.detach(), *torch.autograd.grad(out, leaves, dout))

    if kind != "bwd":
        return train if kind == "train" else lambda: op(*leaves)
    out = op(*leaves)
    return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)


def _outputs(*args) -> tuple[Tensor, ...]:
    out = _call(*args)()
    return out if isinstance(out, tuple) else (out,)


def _reference(kind: str, op: Callable, tensors: list[Tensor], dout: Tensor) -> tuple[Tensor, ...]:
    """In float64, a row and a key head at a time: the scores of all would not fit a GPU."""
    tensors, heads = [t.double() for t in tensors], tensors[1].shape[1]
    group = dout.shape[1] // heads
    wholes = {"fwd": [dout], "bwd": tensors, "train": [dout, *tensors]}[kind]
    results = [torch.zeros_like(t, dtype=torch.float64) for t in wholes]
    for b in range(len(dout)):
        for h in range(heads):
            kv, of_q = slice(h, h + 1), slice(h * group, (h + 1) * group)
            at = [(slice(b, b + 1), of_q), *[(slice(b, b + 1), kv)] * 2, *[(kv,)] * 2]
            part = [t[i] for t, i in zip(tensors, at, strict=False)]
            at = {"fwd": at[:1], "bwd": at, "train": [at[0], *at]}[kind]
            outs = _outputs(kind, op, part, dout[b : b + 1, of_q].double())
            for whole, i, out in zip(results, at, outs, strict=False):
                whole[i] += out
    return tuple(results)


def build(spec: Spec, device: torch.device, impls: tuple[str, ...] | None, warm: bool) -> Case:
    """No weights, so nothing to keep out of the cache: warm or not is the same."""
    gen = torch.Generator(device=device).manual_seed(spec.s + spec.p)
    grad = spec.kind != "fwd"

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=gen, device=device).to(spec.dtype)

    inputs = [
        draw(spec.b, spec.h, spec.s, spec.d),
        *(draw(spec.b, spec.hkv, spec.s, spec.d) for _ in range(2)),
        *(draw(spec.hkv, spec.p, spec.d) for _ in range(2)),
    ]
    dout = draw(*inputs[0].shape)
    missing = {}
    if device.type == "cuda":
        missing["merged"] = "its flash attention takes no grouped heads and returns another layout"
    else:
        missing["sdpa"] = "the bar on a CPU is the floor"
        if grad:
            missing["merged"] = "torch's flash attention on a CPU has no gradient of the logsumexp"
    wanted = [name for name in ALL if name in (impls or ALL)]
    names = {"fwd": ["out"], "bwd": [], "train": ["out"]}[spec.kind]
    names += [f"d{n}" for n in ("q", "k", "v", "prefix_k", "prefix_v")] if grad else []

    def expected(reference: Callable, low: Callable, tensors: list[Tensor]) -> Expected:
        args = (spec.kind, reference, tensors, dout)
        with torch.set_grad_enabled(grad):
            wide, own = _reference(*args), _outputs(spec.kind, low, tensors, dout)
        return Expected(tuple(names[: len(wide)]), wide, own)

    ours = expected(prefix_attention_ref, _cat_sdpa, inputs)
    ops = {"fusedpeft": prefix_attention, "merged": _merged, FLOOR: _cat_sdpa}
    work = _work(spec)
    contestants = [
        Impl(name, lambda i, op=op: _call(spec.kind, op, inputs, dout), ours, *work)
        for name, op in ops.items()
        if name in wanted and name not in missing
    ]
    if "sdpa" in wanted and "sdpa" not in missing:
        alone, bare = expected(_bare_ref, _sdpa, inputs[:3]), replace(spec, p=0)
        made = lambda i: _call(spec.kind, _sdpa, inputs[:3], dout)  # noqa: E731
        contestants.append(Impl("sdpa", made, alone, *_work(bare)))
    left_out = {name: why for name, why in missing.items() if name in wanted}
    return Case(
        "prefix_attention", spec.name, spec.dtype, device, contestants, FLOOR, 1, grad, left_out
    )
