"""The bench of soft_prompt_embedding from the outside: small cases, all contestants, its work."""

import pytest
import torch

from fusedpeft.bench import bench_soft_prompt as bench
from fusedpeft.bench.errors import BenchMismatch
from fusedpeft.bench.harness import run_case

CPU = torch.device("cpu")
EAGER = ("fusedpeft", "concatenated")


def small(kind, dtype=torch.float32):
    return bench.Spec(kind, 3, 5, 4, 11, 16, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["fwd", "train"])
def test_every_contestant_is_right(kind, dtype):
    case = bench.build(small(kind, dtype), CPU, EAGER, warm=True)
    assert {t.name for t in run_case(case, seconds=0.0, min_rounds=2)} == set(EAGER)
    rows = 3 * (4 + 5) * 16
    moved = 2 * rows + (3 * 4 * 16 if kind == "train" else 0)
    assert case.impls[0].moved_bytes == moved * (4 if dtype == torch.float32 else 2)


def test_a_wrong_contestant_is_named(monkeypatch):
    wrong = lambda ids, table, prompt: bench._concatenated(ids, table, prompt.flip(0))  # noqa: E731
    monkeypatch.setattr(bench, "soft_prompt_embedding", wrong)
    case = bench.build(small("fwd"), CPU, EAGER, warm=True)
    with pytest.raises(BenchMismatch, match="fusedpeft.y"):
        run_case(case, seconds=0.0, min_rounds=2)
