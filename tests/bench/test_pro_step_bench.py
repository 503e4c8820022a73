"""The bench of a whole PRO step from the outside: a tiny model, all contestants."""

import pytest
import torch

from fusedpeft.bench import bench_pro_step as bench
from fusedpeft.bench.errors import BenchMismatch
from fusedpeft.bench.harness import run_case

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_contestant_is_right(dtype):
    pytest.importorskip("peft")
    case = bench.build(bench.Spec("tiny", 40, dtype), CPU, None, warm=True)
    timings = {t.name: t for t in run_case(case, seconds=0.0, min_rounds=2)}
    assert set(timings) == set(bench.ALL)
    assert timings["fusedpeft"].peak_bytes < timings[bench.FLOOR].peak_bytes


def test_a_wrong_contestant_is_named(monkeypatch):
    pytest.importorskip("peft")
    ours = bench._ours

    def wrong(model):
        return lambda ids, labels: ours(model)(ids, labels) * 1.05

    monkeypatch.setattr(bench, "_ours", wrong)
    spec = bench.Spec("tiny", 16, torch.float32)
    case = bench.build(spec, CPU, ("fusedpeft", bench.FLOOR), warm=True)
    with pytest.raises(BenchMismatch, match="fusedpeft.logp"):
        run_case(case, seconds=0.0, min_rounds=2)


def test_the_case_of_the_gpu_bar():
    assert [s.label for s in bench.specs(torch.device("cuda"), False)] == [
        "llama-1b 4x512 R16 bf16"
    ]
    assert bench.SHAPES["llama-1b"] == (2048, 8192, 16, 32, 8, 128256)
