"""Bench of `ops.lora_linear`.

    fusedpeft bench lora --device cpu --json FILE    decode, training, slices of models
    fusedpeft bench lora --device cpu --full         every linear of the models at 1 to 16 tokens
    fusedpeft bench lora --device cuda --save        throughput shapes; then
    python -m fusedpeft.bench.lora_choice            ... what to choose between Triton and cuBLAS

Bars (ratio to the frozen `F.linear` in the same run): decode 2048² rank 16, bf16 0.45 / 0.65 / 0.90
and fp32 0.60 / 0.40 / 0.45 at 1 / 4 / 8 tokens; 1.05 for every linear below at 1 to 16 tokens;
training 1024 tokens 1.06 (fp32) and 1.10 (bf16) of the frozen forward + dx. CUDA: forward 1.05,
backward 1.10 of the frozen GEMM at M 8192, 4096², R 16.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fusedpeft.bench.harness import Case
from fusedpeft.bench.lora_impls import ALL, FLOOR, make_case

__all__ = ["ALL", "FLOOR", "Spec", "build", "specs"]  # what run.py takes from a bench

BF16, FP32 = torch.bfloat16, torch.float32
LLAMA_1B = [(2048, 2048), (2048, 512), (2048, 8192), (8192, 2048)]  # (K, N)
GPT2 = [(768, 2304), (768, 768), (768, 3072), (3072, 768)]
LLAMA_8B = [(4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096)]
SHORT = ("fusedpeft", "peft", "frozen")  # for the long lists of shapes


@dataclass(frozen=True)
class Spec:
    kind: str  # fwd, train, bwd
    m: int
    k: int
    n: int
    r: int
    dtype: torch.dtype
    impls: tuple[str, ...] = ALL

    @property
    def label(self) -> str:
        """What `--case` is matched against."""
        kind = "decode" if self.kind == "fwd" and self.m <= 16 else self.kind
        dtype = {BF16: "bf16", FP32: "fp32"}[self.dtype]
        return f"{kind} {self.k}->{self.n} M{self.m} R{self.r} {dtype}"


def cpu_specs(full: bool) -> Iterator[Spec]:
    for dtype in (BF16, FP32):
        for m in (1, 4, 8, 16):
            yield Spec("fwd", m, 2048, 2048, 16, dtype)
    # Without a bf16 unit ATen multiplies by W one number at a time: 30 s at 1024 tokens.
    fast = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    yield Spec("train", 1024 if fast else 32, 2048, 2048, 16, BF16)
    yield Spec("train", 1024, 2048, 2048, 16, FP32)
    for dtype in (BF16, FP32):
        for k, n in LLAMA_1B + GPT2:
            for m in range(1, 17) if full else (1, 4, 16):
                if (k, n) != (2048, 2048) or m not in (1, 4, 8, 16):
                    yield Spec("fwd", m, k, n, 16, dtype, SHORT)


def cuda_specs(full: bool) -> Iterator[Spec]:
    for kind in ("fwd", "bwd"):
        yield Spec(kind, 8192, 4096, 4096, 16, BF16)
        yield Spec(kind, 1024, 4096, 4096, 16, FP32)
    for m in (1, 16, 64):
        yield Spec("fwd", m, 4096, 4096, 16, BF16)
    tokens, ranks = ((512, 1024, 2048, 4096, 8192, 16384), (8, 16, 32, 64, 128)) if full else (
        (512, 4096, 16384),
        (8, 128),
    )  # fmt: skip
    for m in tokens:
        for r in ranks:
            for k, n in LLAMA_8B:
                for kind in ("fwd", "bwd"):
                    yield Spec(kind, m, k, n, r, BF16)


def specs(device: torch.device, full: bool) -> list[Spec]:
    return list((cuda_specs if device.type == "cuda" else cpu_specs)(full))


def build(spec: Spec, device: torch.device, impls: tuple[str, ...] | None, warm: bool) -> Case:
    return make_case(
        spec.kind, spec.m, spec.n, spec.k, spec.r, spec.dtype, device, impls or spec.impls, warm
    )
