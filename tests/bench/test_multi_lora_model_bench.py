"""The bench of a model that serves many adapters, from the outside: a tiny model."""

from dataclasses import replace

import pytest
import torch

from fusedpeft.bench import bench_multi_lora_model as bench
from fusedpeft.bench.errors import BenchMismatch
from fusedpeft.bench.harness import run_case

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_contestant_is_right(dtype):
    pytest.importorskip("peft")
    spec = bench.Spec("tiny", 4, dtype)
    case = replace(bench.build(spec, CPU, None, warm=True), apart=None)
    assert {t.name for t in run_case(case, seconds=0.0, min_rounds=2)} == set(bench.ALL)
    with torch.no_grad():  # what its own process would compute
        for impl in bench.build(spec, CPU, None, warm=True).impls:
            assert torch.equal(bench.contestant(spec, CPU, impl.name)(), impl.build(0)())


def test_an_adapter_too_few_is_seen(monkeypatch):
    case = bench.build(bench.Spec("tiny", 4, torch.float32), CPU, ("fusedpeft",), warm=True)
    linear = bench.fp.AdapterPool.batch
    monkeypatch.setattr(
        bench.fp.AdapterPool, "batch", lambda pool, names: linear(pool, [*names[:3], None])
    )
    with pytest.raises(BenchMismatch, match="fusedpeft.logits"):
        run_case(case, seconds=0.0, min_rounds=2)


def test_the_case_of_the_bar():
    labels = [s.label for s in bench.specs(CPU, False)]
    assert labels == ["llama-64m B8+16 R8/16/64 fp32", "llama-64m B8+16 R8/16/64 bf16"]
    assert bench.SHAPES["llama-64m"][0] == 1024 and bench.SHAPES["llama-64m"][2] == 4
