"""The bench of multi_lora_linear from the outside: small cases, all contestants, its work."""

import pytest
import torch

from fusedpeft.bench import bench_multi_lora as bench
from fusedpeft.bench.errors import BenchMismatch
from fusedpeft.bench.harness import run_case

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("m", [1, 5])
def test_every_contestant_is_right(m, dtype):
    case = bench.build(bench.Spec(m, 24, 40, dtype), CPU, None, warm=True)
    found = {t.name for t in run_case(case, seconds=0.0, min_rounds=2)}
    assert found | set(case.missing) == set(bench.ALL)
    ranks = sum([16, 8, 64, 16, 8][:m])
    moved = 40 * 24 + ranks * (24 + 40) + m * (24 + 40)
    assert case.impls[0].moved_bytes == moved * dtype.itemsize


def test_a_wrong_contestant_is_named(monkeypatch):
    wrong = lambda x, w, pool, slots, impl=None: x @ w.T  # noqa: E731
    monkeypatch.setattr(bench, "multi_lora_linear", wrong)
    case = bench.build(bench.Spec(3, 24, 40, torch.float32), CPU, ("fusedpeft",), warm=True)
    with pytest.raises(BenchMismatch, match="fusedpeft.y"):
        run_case(case, seconds=0.0, min_rounds=2)
