"""Triton or cuBLAS for a LoRA linear on a GPU: a pure function, so it is tested without one."""

import itertools
import json

import pytest
import torch

from fusedpeft.kernels.device import ARCHS
from fusedpeft.ops import lora, lora_choice
from fusedpeft.ops.lora_choice import (
    NEAR,
    PREDICTED,
    TABLE,
    choose,
    is_wide,
    predict_us,
    use_triton,
)

MODEL = (8192, 4096, 4096, 16)
ROW = dict(
    device="chip", commit="x", arch="sm_90", kind="fwd", m=8192, n=4096, k=4096, r=16, elem_bytes=2
)  # fmt: skip


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kind", ["fwd", "bwd"])
def test_every_shape_has_a_choice_and_says_where_it_comes_from(kind, arch):
    sizes = (1, 16, 63, 1000, 8192, 100_000)
    for m, n, k, r in itertools.product(sizes, (5, 4096), (3, 14336), (1, 16, 200)):
        for size, dropout in itertools.product((2, 4), (False, True)):
            shape = (m, n, k, r, arch)
            impl, why = choose(kind, *shape, elem_bytes=size, dropout=dropout, rows=[])
            assert impl in ("triton", "cublas") and "measured on" not in why
            assert "predicted, not measured" in why or dropout
            assert min(predict_us(kind, *shape, size, size)) > 0
            assert impl == "triton" or not dropout


def test_what_the_rule_says():
    for arch in ARCHS:
        assert choose("fwd", 1, *MODEL[1:], arch, rows=[])[0] == "triton"  # one launch for three
        assert choose("fwd", *MODEL, arch, elem_bytes=4, rows=[])[0] == "cublas"  # true fp32
        assert choose("fwd", *MODEL, arch, adapter_bytes=4, rows=[])[0] == "triton"  # no copies
    ours, theirs = predict_us("fwd", *MODEL, "sm_90", 2, 2)
    assert 348 < theirs < 348 * 1.2 and ours > 348  # the frozen product alone at 790 TFLOP/s


def test_a_base_that_triton_would_copy_goes_to_cublas():
    for rows in ([], [ROW | dict(triton_us=1.0, cublas_us=2.0)]):
        impl, why = choose("fwd", *MODEL, "sm_90", rows=rows, wide=False)
        assert impl == "cublas" and "would copy it" in why
    assert choose("fwd", *MODEL, "sm_90", rows=rows)[0] == "triton"
    assert choose("fwd", *MODEL, "sm_90", wide=False, dropout=True)[0] == "triton"
    for kind in ("fwd", "bwd"):  # whose launchers would divide by the blocks of K
        assert choose(kind, 64, 64, 0, 16, "sm_90", dropout=True)[0] == "cublas"
    w = torch.empty(48, 80)
    assert is_wide(w) and is_wide(w[:16]) and is_wide(torch.empty(48, 90)[:, :80])
    assert not any(is_wide(v) for v in (w[:40], w[:, :40], torch.empty(80, 48).t(), w[:, ::5]))


def test_a_faster_chip_moves_the_choice(monkeypatch):
    slow, fast = (lora_choice.Rates(4.3, (790.0, 50.0), (630.0, 25.0), tma) for tma in (600, 780))
    monkeypatch.setitem(PREDICTED, "sm_90", slow)
    assert choose("fwd", *MODEL, "sm_90", rows=[])[0] == "cublas"
    monkeypatch.setitem(PREDICTED, "sm_90", fast)
    assert choose("fwd", *MODEL, "sm_90", rows=[])[0] == "triton"


@pytest.mark.parametrize("times, impl", [((1.0, 2.0), "triton"), ((2.0, 1.0), "cublas")])
def test_a_measured_neighbour_decides(times, impl):
    rows = [ROW | dict(triton_us=times[0], cublas_us=times[1])]
    for shape in (MODEL, (4096, 4096, 8192, 8), (16384, 2048, 4096, 32)):
        got, why = choose("fwd", *shape, "sm_90", rows=rows)
        assert got == impl and why.startswith("measured on chip at 8192 × 4096 × 4096")
    assert NEAR == 1.0
    others = [
        dict(kind="bwd"), dict(arch="sm_80"), dict(elem_bytes=4), dict(adapter_bytes=4),
        dict(m=2048), dict(n=16384), dict(k=512), dict(r=64),
    ]  # fmt: skip
    for other in others:
        asked = dict(kind="fwd", arch="sm_90", rows=rows, **dict(zip("mnkr", MODEL, strict=True)))
        assert choose(**(asked | other))[1].startswith("predicted"), other


def test_the_nearest_of_the_measured_cases():
    near, far = (ROW | dict(m=m, triton_us=t, cublas_us=5.0) for m, t in ((8192, 1.0), (4096, 9.0)))
    assert choose("fwd", 7000, *MODEL[1:], "sm_90", rows=[far, near])[0] == "triton"
    assert choose("fwd", 4500, *MODEL[1:], "sm_90", rows=[far, near])[0] == "cublas"


def test_the_committed_table_is_measured_or_not_there():
    if TABLE.is_file():
        rows = json.loads(TABLE.read_text())["rows"]
        keys = {*ROW, "triton_us", "cublas_us"}
        assert rows and all(set(row) == keys and row["arch"] in PREDICTED for row in rows)
    with pytest.raises(ValueError, match="expected 'fwd' or 'bwd', got 'train'"):
        choose("train", *MODEL, "sm_90")


@pytest.mark.parametrize("chosen", ["triton", "cublas"])
def test_a_call_runs_what_was_chosen(monkeypatch, chosen):
    """On a stand-in for a CUDA tensor; `impl` is stronger than the choice."""

    class OnCuda:
        is_cuda, device, dtype, shape = True, torch.device("cuda"), torch.bfloat16, (8192, 4096)
        element_size = staticmethod(lambda: 2)

    asked = []
    monkeypatch.setattr(lora_choice, "arch_of", lambda device: "sm_90")
    monkeypatch.setattr(
        lora_choice, "_cached", lambda *t, **more: asked.append((t, more)) or (chosen, "")
    )
    a = torch.empty(16, 4096, dtype=torch.float32)
    ws = [torch.empty(n, 4096, device="meta") for n in (14320, 16)]
    call = lambda impl: use_triton("bwd", OnCuda, impl, ws, a, 0.0)  # noqa: E731
    assert call("") == (chosen == "triton")
    more = dict(elem_bytes=2, adapter_bytes=4, dropout=False, wide=True)
    assert asked == [(("bwd", 8192, 14336, 4096, 16, "sm_90"), more)]
    assert call("triton") and not call("aten") and len(asked) == 1
    cpu = torch.empty(2, 3)
    assert not use_triton("fwd", cpu, "", ws, a, 0.0) and len(asked) == 1
    ws[0] = ws[0][:7]
    call("")
    assert asked[1] == (("bwd", 8192, 23, 4096, 16, "sm_90"), more | dict(wide=False))


def test_forward_and_backward_ask_with_their_own_sizes(monkeypatch):
    asked = []
    monkeypatch.setattr(lora, "use_triton", lambda *t: asked.append(t) and False)
    x, w = torch.randn(5, 7, requires_grad=True), torch.randn(3, 7)
    a, b = torch.randn(2, 7, requires_grad=True), torch.randn(3, 2, requires_grad=True)
    lora.lora_linear(x, w, a, b, 1.0).sum().backward()
    assert all(t[3] == (w,) for t in asked)
    seen = [(t[0], tuple(t[1].shape), t[2], tuple(t[4].shape), t[5]) for t in asked]
    assert seen == [("fwd", (5, 7), "", (2, 7), 0.0), ("bwd", (5, 3), "", (2, 7), 0.0)]
