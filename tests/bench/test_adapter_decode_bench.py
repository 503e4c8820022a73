"""The bench of multi_bottleneck_adapter: small cases, all contestants, its work."""

import pytest
import torch

from fusedpeft.bench import bench_adapter_decode as bench
from fusedpeft.bench.errors import BenchMismatch
from fusedpeft.bench.harness import run_case

CPU = torch.device("cpu")
BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize("places", [1, 3])
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("adapters, norm", [(0, None), (2, "layer_norm")])
def test_every_contestant_is_right(adapters, norm, dtype, places, monkeypatch):
    monkeypatch.setattr(bench, "places_of", lambda device: places)
    case = bench.build(bench.Spec(3, 48, 8, dtype, adapters, norm), CPU, None, warm=True)
    timings = run_case(case, seconds=0.0, min_rounds=2)
    assert {t.name for t in timings} == {"fusedpeft", "aten", "bmm", "eager"}


def test_a_step_of_a_model():
    case = bench.build(bench.Spec(3, 64, 8, FP32, model="tiny"), CPU, None, warm=True)
    assert case.floor == bench.BARE
    timings = {t.name: t for t in run_case(case, seconds=0.0, min_rounds=2)}
    assert {"fusedpeft", "eager", bench.BARE} == set(timings)


@pytest.mark.parametrize("model", ["", "tiny"])
def test_a_wrong_contestant_is_named(monkeypatch, model):
    right = bench.multi_bottleneck_adapter
    monkeypatch.setattr(bench, "multi_bottleneck_adapter", lambda *a, **kw: right(*a, **kw) * 1.01)
    case = bench.build(bench.Spec(3, 64, 8, FP32, model=model), CPU, ("fusedpeft",), warm=True)
    with pytest.raises(BenchMismatch, match="fusedpeft"):
        run_case(case, seconds=0.0, min_rounds=2)


def test_work_and_the_cases_of_the_bars():
    flops, moved = bench._work(bench.Spec(4, 16, 8, FP32, adapters=2), 3)
    assert flops == 4 * 3 * 4 * 16 * 8
    assert moved == 3 * 4 * (2 * (2 * 16 * 8 + 16 + 8) + 2 * 4 * 16)
    labels = {s.label for s in bench.specs(CPU, full=False)}
    assert {f"d2048 E64 T{m} {dtype}" for m in (1, 4, 8) for dtype in ("fp32", "bf16")} <= labels
    assert "step llama-64m E64 T8 fp32" in labels
    labels = {s.label for s in bench.specs(torch.device("cuda"), full=False)}
    assert {"d4096 E64 T1 bf16", "d4096 E64 T32 bf16", "step llama-1b E64 T8 bf16"} <= labels
