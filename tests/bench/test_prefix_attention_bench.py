"""The bench of prefix_attention from the outside: small cases, all contestants, its work."""

import pytest
import torch

from fusedpeft.bench import bench_prefix_attention as bench
from fusedpeft.bench.errors import BenchMismatch
from fusedpeft.bench.harness import run_case

CPU = torch.device("cpu")


def small(kind, dtype=torch.float32):
    return bench.Spec(kind, 2, 4, 2, 32, 16, 40, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["fwd", "bwd", "train"])
def test_every_contestant_is_right(kind, dtype):
    case = bench.build(small(kind, dtype), CPU, None, warm=True)
    timings = run_case(case, seconds=0.0, min_rounds=2)
    assert {t.name for t in timings} == set(bench.ALL) - set(case.missing)
    assert set(case.missing) == {"sdpa"} | ({"merged"} if kind != "fwd" else set())


def test_a_wrong_contestant_is_named(monkeypatch):
    wrong = lambda *args: bench.prefix_attention_ref(*args) * 1.01  # noqa: E731
    monkeypatch.setattr(bench, "prefix_attention", wrong)
    case = bench.build(small("fwd"), CPU, None, warm=True)
    with pytest.raises(BenchMismatch, match="fusedpeft.out"):
        run_case(case, seconds=0.0, min_rounds=2)


def test_work_and_the_case_of_the_bar():
    flops, moved = bench._work(small("fwd"))
    assert flops == 4 * 2 * 4 * 32 * 40 * (16 + 20)
    assert moved == 4 * (2 * 2 * 4 * 40 * 32 + 2 * 2 * 32 * (2 * 40 + 16))
    labels = {s.label for s in bench.specs(CPU, full=False)}
    assert {f"train B8 H{h} D64 P128 S512 fp32" for h in ("8/8", "16/4")} <= labels
    labels = {s.label for s in bench.specs(torch.device("cuda"), full=False)}
    for kind in ("fwd", "bwd"):
        assert {f"{kind} B4 H32/8 D128 P128 S{s} bf16" for s in (2048, 8192)} <= labels
    assert bench._work(small("bwd"))[0] == 2.5 * flops


def test_the_reference_by_slices_is_the_whole():
    spec = small("train")
    case = bench.build(spec, CPU, ("fusedpeft",), warm=True)
    names = case.impls[0].expected.names
    assert names == ("out", "dq", "dk", "dv", "dprefix_k", "dprefix_v")
    gen = torch.Generator().manual_seed(3)
    draw = lambda *size: torch.randn(size, generator=gen)  # noqa: E731
    tensors = [draw(2, 4, 40, 32), *(draw(2, 2, 40, 32) for _ in range(2)),
               *(draw(2, 16, 32) for _ in range(2))]  # fmt: skip
    dout = draw(2, 4, 40, 32)
    sliced = bench._reference("train", bench.prefix_attention_ref, tensors, dout)
    wide = [t.double() for t in tensors]
    whole = bench._outputs("train", bench.prefix_attention_ref, wide, dout.double())
    for a, b in zip(sliced, whole, strict=True):
        torch.testing.assert_close(a, b)
