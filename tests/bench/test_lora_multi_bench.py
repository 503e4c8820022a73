"""The bench of lora_linear_multi from the outside: small cases, all contestants, its work."""

import pytest
import torch

from fusedpeft.bench import bench_lora_multi as bench
from fusedpeft.bench.errors import BenchMismatch
from fusedpeft.bench.harness import run_case

CPU = torch.device("cpu")
EAGER = ("fusedpeft", "separate", "reference", "frozen")


def small(kind, m, dtype=torch.float32):
    return bench.Spec(kind, "qkv", m, 64, (48, 16, 16), 4, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind, m", [("fwd", 3), ("train", 40)])
def test_every_contestant_is_right(kind, m, dtype):
    case = bench.build(small(kind, m, dtype), CPU, EAGER, warm=True)
    timings = run_case(case, seconds=0.0, min_rounds=2)
    assert {t.name for t in timings} == set(EAGER)


def test_a_wrong_contestant_is_named(monkeypatch):
    def wrong(x, ws, as_, bs, scales):
        return bench.lora_linear_multi_ref(x, ws, as_, bs, [s * 1.1 for s in scales])

    monkeypatch.setattr(bench, "lora_linear_multi", wrong)
    case = bench.build(small("fwd", 5), CPU, EAGER, warm=True)
    with pytest.raises(BenchMismatch, match="fusedpeft.y0"):
        run_case(case, seconds=0.0, min_rounds=2)


def test_work():
    case = bench.build(small("fwd", 5), CPU, EAGER, warm=True)
    flops = {impl.name: impl.flops for impl in case.impls}
    assert flops["frozen"] == 2 * 5 * 80 * 64
    assert flops["fusedpeft"] - flops["frozen"] == 2 * 5 * 4 * (3 * 64 + 80)
    moved = {impl.name: impl.moved_bytes for impl in case.impls}
    assert moved["frozen"] == 4 * (5 * 64 + 80 * 64 + 5 * 80)


def test_the_list_holds_what_a_model_has():
    labels = {s.label for s in bench.specs(CPU, full=False)}
    assert "train qkv 2048->2048+512+512 M512 R16 fp32" in labels
    assert "fwd gate_up 2048->8192+8192 M1 R16 bf16" in labels
    cuda = {(s.kind, s.which, s.m) for s in bench.specs(torch.device("cuda"), full=True)}
    assert ("train", "qkv", 8192) in cuda and ("fwd", "gate_up", 512) in cuda
