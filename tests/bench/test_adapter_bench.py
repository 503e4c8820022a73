"""The bench of bottleneck_adapter from the outside: small cases, all contestants, its work."""

import pytest
import torch

from fusedpeft.bench import bench_adapter
from fusedpeft.bench.errors import BenchMismatch
from fusedpeft.bench.harness import run_case

CPU = torch.device("cpu")
EAGER = ("fusedpeft", "reference")


def small(kind, norm, dtype):
    return bench_adapter.Spec(kind, 40, 96, 8, norm, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", [None, "layer_norm"])
@pytest.mark.parametrize("kind", ["fwd", "bwd", "train"])
def test_every_contestant_is_right(kind, norm, dtype):
    case = bench_adapter.build(small(kind, norm, dtype), CPU, EAGER, warm=True)
    timings = run_case(case, seconds=0.0, min_rounds=2)
    assert {t.name for t in timings} == set(EAGER)
    outputs = 8 if norm else 6
    names = {"fwd": 1, "bwd": outputs - 1, "train": outputs}
    assert len(case.impls[0].expected.names) == names[kind]


def test_a_wrong_contestant_is_named(monkeypatch):
    wrong = lambda *args, **kw: bench_adapter.bottleneck_adapter_ref(*args, **kw) * 1.01  # noqa: E731
    monkeypatch.setattr(bench_adapter, "bottleneck_adapter", wrong)
    case = bench_adapter.build(small("fwd", None, torch.float32), CPU, EAGER, warm=True)
    with pytest.raises(BenchMismatch, match="fusedpeft.y"):
        run_case(case, seconds=0.0, min_rounds=2)


def test_work_and_the_case_of_the_gpu_bar():
    flops, moved = bench_adapter._work(small("fwd", None, torch.float32))
    assert flops == 2 * 2 * 40 * 96 * 8
    assert moved == 4 * (2 * 40 * 96 + 2 * 96 * 8 + 96 + 8)
    parts = [bench_adapter._work(small(k, "rms_norm", torch.float32)) for k in ("fwd", "bwd")]
    assert bench_adapter._work(small("train", "rms_norm", torch.float32)) == tuple(
        a + b for a, b in zip(*parts, strict=True)
    )
    labels = {s.label for s in bench_adapter.specs(torch.device("cuda"), full=False)}
    assert {f"{kind} d4096 M8192 E64 bf16" for kind in ("fwd", "bwd", "train")} <= labels
    cpu = bench_adapter.specs(CPU, full=False)
    assert {s.kind for s in cpu} == {"fwd", "train"}
