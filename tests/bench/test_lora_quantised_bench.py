"""The bench over quantised bases from the outside: small cases, all contestants, its work."""

import pytest
import torch

from fusedpeft.bench import bench_lora_quantised as bench
from fusedpeft.bench.errors import BenchMismatch
from fusedpeft.bench.harness import run_case

CPU = torch.device("cpu")


def small(kind, weight, m, dtype=torch.float32):
    return bench.Spec(kind, weight, m, 64, 48, 4, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind, m", [("fwd", 3), ("train", 40)])
@pytest.mark.parametrize("weight", bench.WEIGHTS)
def test_every_contestant_is_right(weight, kind, m, dtype):
    case = bench.build(small(kind, weight, m, dtype), CPU, None, warm=True)
    timings = run_case(case, seconds=0.0, min_rounds=2)
    assert {t.name for t in timings} == set(bench.ALL)


def test_a_wrong_contestant_is_named(monkeypatch):
    wrong = lambda x, w, a, b, scale: bench.lora_linear_ref(x, w, a, b, scale * 1.1)  # noqa: E731
    monkeypatch.setattr(bench, "lora_linear", wrong)
    case = bench.build(small("fwd", "nf4", 5), CPU, None, warm=True)
    with pytest.raises(BenchMismatch, match="fusedpeft.y"):
        run_case(case, seconds=0.0, min_rounds=2)


def test_copies_are_cold_and_work_counts_the_bytes_of_the_codes():
    case = bench.build(small("fwd", "fp8", 5), CPU, ("fusedpeft", "frozen"), warm=False)
    assert case.sets > 1
    assert torch.equal(case.impls[0].build(0)(), case.impls[0].build(1)())
    moved = {impl.name: impl.moved_bytes for impl in case.impls}
    assert moved["frozen"] == 4 * (5 * 64 + 48 * 64 + 5 * 48)
    codes = 48 * 64 + 4 * 48  # a byte each, and a scale a row
    assert moved["fusedpeft"] == 4 * (5 * 64 + 4 * (64 + 48) + 5 * 48) + codes


def test_the_list():
    cuda = {(s.kind, s.weight, s.m) for s in bench.specs(torch.device("cuda"), full=False)}
    assert ("fwd", "nf4", 16) in cuda and ("train", "fp8", 8192) in cuda
    cpu = {(s.kind, s.m, s.dtype) for s in bench.specs(CPU, full=False)}
    cases = (("fwd", 1), ("fwd", 16), ("fwd", 64), ("train", 512))
    assert cpu == {(*case, dtype) for case in cases for dtype in (torch.float32, torch.bfloat16)}
