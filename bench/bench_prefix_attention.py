"""Bench of `ops.prefix_attention`.

    fusedpeft bench prefix_attention --device cpu --json FILE    forward and training, causal

Everyone attends from the same q to a shared prefix and to causal keys, and answers to the same
float64 reference. The floor is what one writes without the op: the prefix copied to every row,
concatenated, and one SDPA with a mask. `merged` is two attentions merged by their logsumexp, whole
and in the input's dtype. Bar on a CPU at B 8, P 128, S 512: forward and backward 1.0 of the floor,
memory beyond the results 0.25 of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedpeft.bench.harness import Call, Case, Expected, Impl
from fusedpeft.errors import InputError
from fusedpeft.ops import prefix_attention, prefix_attention_ref

__all__ = ["ALL", "FLOOR", "Spec", "build", "specs"]  # what run.py takes from a bench

BF16, FP32 = torch.bfloat16, torch.float32
FLOOR = "cat+sdpa"
ALL = ("fusedpeft", "merged", FLOOR)


@dataclass(frozen=True)
class Spec:
    kind: str  # fwd, train
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
    if device.type == "cuda":
        raise InputError("bench prefix_attention: --device cpu only, its GPU kernels are not there")
    shapes = [(8, 8, 8, 64, 128, 512), (8, 16, 4, 64, 128, 512)]
    if full:
        shapes += [(2, 8, 8, 64, p, s) for p in (16, 1024) for s in (128, 2048)]
    kinds = ("fwd", "train")
    return [Spec(kind, *x, dtype) for dtype in (FP32, BF16) for x in shapes for kind in kinds]


def _cat_sdpa(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor) -> Tensor:
    rows, (P, S) = len(q), (pk.shape[1], k.shape[2])
    seen = torch.ones(S, P + S, dtype=torch.bool, device=q.device).tril(P)
    k, v = (torch.cat([p.expand(rows, -1, -1, -1), t], 2) for p, t in ((pk, k), (pv, v)))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)


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
    if spec.kind == "train":  # five products for two; q, k, v, out, dout read, dq, dk, dv written
        flops, moved = 3.5 * flops, moved + 4 * queries + 2 * keys
    return flops, float(moved * spec.dtype.itemsize)


def build(spec: Spec, device: torch.device, impls: tuple[str, ...] | None, warm: bool) -> Case:
    """No weights, so nothing to keep out of the cache: warm or not is the same."""
    gen = torch.Generator(device=device).manual_seed(spec.s + spec.p)
    grad = spec.kind == "train"

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=gen, device=device).to(spec.dtype)

    inputs = [
        draw(spec.b, spec.h, spec.s, spec.d),
        *(draw(spec.b, spec.hkv, spec.s, spec.d) for _ in range(2)),
        *(draw(spec.hkv, spec.p, spec.d) for _ in range(2)),
    ]
    dout = draw(*inputs[0].shape)

    def call(op: Callable, tensors: list[Tensor], dout_: Tensor) -> Call:
        leaves = [t.detach().requires_grad_(grad) for t in tensors]

        def run() -> Tensor | tuple[Tensor, ...]:
            out = op(*leaves)
            return (out, *torch.autograd.grad(out, leaves, dout_)) if grad else out

        return run

    def outputs(op: Callable, *args) -> tuple[Tensor, ...]:
        out = call(op, *args)()
        return tuple(t.detach() for t in (out if isinstance(out, tuple) else (out,)))

    with torch.set_grad_enabled(grad):
        ref = outputs(prefix_attention_ref, [t.double() for t in inputs], dout.double())
        low = outputs(_cat_sdpa, inputs, dout)
    names = ("out", "dq", "dk", "dv", "dprefix_k", "dprefix_v")
    expected = Expected(names[: len(ref)], ref, low)
    ops: dict[str, Callable] = {
        "fusedpeft": prefix_attention,
        "merged": _merged,
        FLOOR: _cat_sdpa,
    }
    missing = {}
    if grad:
        missing["merged"] = "torch's flash attention on a CPU gives no gradient of the logsumexp"
    wanted = impls or ALL
    contestants = [
        Impl(name, lambda i, op=ops[name]: call(op, inputs, dout), expected, *_work(spec))
        for name in ALL
        if name in wanted and name not in missing
    ]
    left_out = {name: why for name, why in missing.items() if name in wanted}
    return Case(
        "prefix_attention", spec.name, spec.dtype, device, contestants, FLOOR, 1, grad, left_out
    )
