"""The bench of whole models with each method on them, from the outside: a tiny model."""

import functools
from dataclasses import replace

import pytest
import torch

from fusedpeft.bench import bench_methods as bench
from fusedpeft.bench.errors import BenchMismatch
from fusedpeft.bench.harness import run_case
from fusedpeft.layers import bottleneck

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


@pytest.mark.parametrize(
    "method, what, dtype",
    [(*case, torch.float32) for case in bench.FLOORS] + [("lora", "step", torch.bfloat16)],
)
def test_every_contestant_is_right(method, what, dtype):
    pytest.importorskip("peft", reason="peft is not installed")
    case = bench.build(bench.Spec(method, what, "tiny", dtype), CPU, None, warm=True)
    found = {t.name for t in run_case(replace(case, apart=None), seconds=0.0, min_rounds=2)}
    assert {"fusedpeft", case.floor} <= found <= set(bench.ALL)
    assert ("accelerated" in found) == (method == "lora")


def test_each_is_timed_in_a_process_of_its_own():
    spec = bench.Spec("bottleneck", "step", "tiny", torch.float32)
    case = bench.build(spec, CPU, ("fusedpeft",), warm=True)
    assert all(t.median_us > 0 and t.rounds == 2 for t in run_case(case, seconds=0, min_rounds=2))
    with pytest.raises(RuntimeError, match="a contestant's process ended"):
        broken = functools.partial(bench.contestant, replace(spec, model="none"), CPU)
        run_case(replace(case, apart=broken, impls=case.impls[:1]), seconds=0, min_rounds=2)


def test_a_wrong_adapter_is_seen(monkeypatch):
    spec = bench.Spec("bottleneck", "step", "tiny", torch.float32)
    case = bench.build(spec, CPU, ("fusedpeft",), warm=True)
    op = bottleneck.bottleneck_adapter
    monkeypatch.setattr(bottleneck, "bottleneck_adapter", lambda *a, **kw: 1.01 * op(*a, **kw))
    with pytest.raises(BenchMismatch, match="fusedpeft.loss"):
        run_case(case, seconds=0.0, min_rounds=2)


def test_the_cases_of_the_bars():
    labels = [s.label for s in bench.specs(CPU, False)]
    assert len(labels) == 6 and labels[0] == "lora step llama-20m 4x256 fp32"
    assert bench.SHAPES["llama-20m"][:3] == (512, 1536, 4)
