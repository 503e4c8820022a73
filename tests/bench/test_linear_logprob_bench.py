"""The linear log-prob bench from the outside: small cases, real contestants."""

import pytest
import torch

from fusedpeft.bench import bench_linear_logprob as bench
from fusedpeft.bench.errors import BenchMismatch
from fusedpeft.bench.harness import run_case

CPU = torch.device("cpu")
EAGER = ("fusedpeft", "reference")


@pytest.mark.parametrize("kind", bench.KINDS)
def test_every_contestant_is_right(kind):
    case = bench.build(bench.Spec(kind, 64, 32, 200, torch.float32), CPU, EAGER, True)
    timings = run_case(case, seconds=0.0, min_rounds=2)
    assert {t.name for t in timings} == set(EAGER)
    assert all(t.median_us > 0 for t in timings)


def test_a_wrong_contestant_is_named(monkeypatch):
    eager = bench._eager("frozen")
    monkeypatch.setattr(bench, "_ours", lambda kind: lambda *t: eager(*t) * 1.01)
    case = bench.build(bench.Spec("frozen", 64, 32, 200, torch.float32), CPU, EAGER, True)
    with pytest.raises(BenchMismatch, match="fusedpeft.loss"):
        run_case(case, seconds=0.0, min_rounds=2)


def test_the_list_holds_what_the_bars_name():
    assert "pro M1024 H1024 V32000 fp32" in {s.label for s in bench.specs(CPU, False)}
    gpu = {s.label for s in bench.specs(torch.device("cuda"), False)}
    assert "frozen M4096 H4096 V128256 bf16" in gpu
    assert bench._work(bench.Spec("frozen", 4, 8, 16, torch.bfloat16), 2)[0] == 4 * 4 * 8 * 16
    assert set(bench.missing(CPU, "pro")) >= {"liger", "quack"}
