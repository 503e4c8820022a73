"""The bench of prefix_decode_attention from the outside: small cases, all contestants, its work."""

import pytest
import torch

from fusedpeft.bench import bench_prefix_decode as bench
from fusedpeft.bench.errors import BenchMismatch
from fusedpeft.bench.harness import run_case

CPU = torch.device("cpu")


def small(t=1, dtype=torch.float32):
    return bench.Spec(3, 4, 2, t, 32, 20, 48, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("t", [1, 3])
def test_every_contestant_is_right(t, dtype):
    case = bench.build(small(t, dtype), CPU, None, warm=True)
    timings = run_case(case, seconds=0.0, min_rounds=2)
    assert {x.name for x in timings} == set(bench.ALL)


def test_a_wrong_contestant_is_named(monkeypatch):
    right = bench.prefix_decode_attention
    monkeypatch.setattr(bench, "prefix_decode_attention", lambda *a, **kw: right(*a, **kw) * 1.01)
    case = bench.build(small(), CPU, ("fusedpeft",), warm=True)
    with pytest.raises(BenchMismatch, match="fusedpeft.out"):
        run_case(case, seconds=0.0, min_rounds=2)


def test_work_and_the_cases_of_the_bars():
    flops, moved = bench._work(small(), 20)
    assert flops == 4 * 3 * 4 * 32 * 68
    assert moved == 4 * (2 * 3 * 4 * 32 + 2 * 2 * 32 * (3 * 48 + 20))
    labels = {s.label for s in bench.specs(CPU, full=False)}
    assert {f"B16 H{h}/8 T1 D{d} P128 S512 {dt}" for h in (8, 32) for d in (64, 128)
            for dt in ("fp32", "bf16")} <= labels  # fmt: skip
    labels = {s.label for s in bench.specs(torch.device("cuda"), full=False)}
    assert "B32 H32/8 T1 D128 P512 S2048 bf16" in labels
