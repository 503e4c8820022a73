"""What test_interpret.py runs in a process of its own, under Triton's interpreter.

    TRITON_INTERPRET=1 pytest tests/kernels/prefix_attention_interpret_checks.py

fp32 and fp16 only: the interpreter's bf16 products are wrong.
"""

import importlib
import math
import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 from the start", allow_module_level=True)

from fusedpeft import ops
from fusedpeft.kernels import prefix_attention as launchers
from fusedpeft.kernels.device import ARCHS

module = importlib.import_module("fusedpeft.ops.prefix_attention")
INF = math.inf
NAMES = ("out", "lse", "dq", "dk", "dv", "dprefix_k", "dprefix_v")
SHAPES = {  # b, h, hkv, t, s, p, d
    "one": (1, 1, 1, 1, 1, 1, 1),
    "one_query": (3, 8, 2, 1, 70, 5, 64),
    "odd": (1, 4, 2, 37, 90, 19, 33),
    "whole_tiles": (1, 2, 1, 140, 203, 70, 32),
    "no_prefix": (1, 2, 2, 65, 65, 0, 48),
    "wide": (1, 2, 1, 20, 40, 17, 136),
}


def make(shape, dtype=torch.float32, lead=()):
    b, h, hkv, t, s, p, d = shape
    g = torch.Generator().manual_seed(sum(shape))
    sizes = [(b, h, t, d), (b, hkv, s, d), (b, hkv, s, d), *[(*lead, hkv, p, d)] * 2]
    return [torch.randn(x, generator=g, dtype=torch.float64).to(dtype) for x in sizes]


def run(op, tensors, dlse=0.0, **kw):
    """(out, lse, gradients of Σ dout·out + dlse · Σ random·lse)."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out, lse = op(*leaves, **kw, return_lse=True)
    g = torch.Generator().manual_seed(1)
    up, down = (torch.randn(t.shape, generator=g, dtype=torch.float64) for t in (out, lse))
    loss = (out.double() * up).sum()
    if dlse:
        loss = loss + dlse * (lse.double() * down).masked_fill(lse == -INF, 0.0).sum()
    return (out.detach(), lse.detach(), *torch.autograd.grad(loss, leaves))


def check(tensors, dlse=0.0, **kw):
    """max|got − ref64| ≤ 2 · max|low − ref64| + eps for every result; in fp32 4 eps, as scores are
    rounded once more than torch's (times log2 e, for exp2), and 3 ·: the interpreter multiplies by
    numpy's BLAS, whose sums depend on the chip (with OPENBLAS_CORETYPE=Haswell other checks than
    without come out beyond 2 ·)."""
    got = run(ops.prefix_attention, tensors, dlse, impl="triton", **kw)
    low = run(ops.prefix_attention_ref, tensors, dlse, **kw)
    up = {k: v.double() if k == "mask" else v for k, v in kw.items()}
    ref = run(ops.prefix_attention_ref, [t.double() for t in tensors], dlse, **up)
    for name, a, b, r in zip(NAMES, got, low, ref, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape, name
        if name == "lse":
            assert torch.equal(a == -INF, r == -INF)
            a, b, r = (x.masked_fill(x == -INF, 0.0) for x in (a, b, r))
        if r.numel() == 0:
            continue
        error = (a.double() - r).abs().max()
        times, steps = (3, 4) if b.dtype == torch.float32 else (2, 1)
        eps = steps * torch.finfo(b.dtype).eps
        bar = times * (b.double() - r).abs().max() + eps * r.abs().max()
        assert error <= bar, f"{name}: error {error:.3g}, allowed {bar:.3g}"
    return got


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", SHAPES)
def test_against_float64(name, dtype, causal):
    check(make(SHAPES[name], dtype), dlse=1.0, causal=causal)


@pytest.mark.parametrize("kernel_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("arch", ARCHS)
def test_every_table(arch, kernel_dtype, monkeypatch):
    monkeypatch.setattr(launchers, "arch_of", lambda device: arch)
    for d in (64, 80, 160):
        check(make((1, 2, 1, 70, 150, 20, d), kernel_dtype))
    mask = torch.randn(1, 1, 30, 40)
    check(make((1, 2, 1, 30, 40, 20, 64), kernel_dtype), mask=mask)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [1, 30, 130])
def test_a_window(window, causal):
    check(make((1, 1, 1, 150, 203, 20, 32)), causal=causal, window=window)


@pytest.mark.parametrize(
    "parts, dtype", [(1, torch.float32), (1, torch.float16), (3, torch.float16)], ids=str
)
@pytest.mark.parametrize("lead", ["shared", "row", "table"])
def test_every_form_of_prefix(lead, parts, dtype, monkeypatch):
    """In one part, which is the gradient itself, and in several that are added up."""
    monkeypatch.setattr(launchers, "prefix_parts", lambda *a, **kw: parts)
    b = 3
    size = {"shared": (), "row": (b,), "table": (4,)}[lead]
    kw = {"prefix_ids": torch.tensor([2, -1, 2])} if lead == "table" else {}
    got = check(make((b, 2, 1, 70, 70, 19, 32), dtype, size), **kw)
    if lead == "table":
        assert got[5][[0, 1, 3]].count_nonzero() == 0  # nobody asked for them


@pytest.mark.parametrize("p, dtype", [(0, torch.float32), (19, torch.float16)], ids=str)
@pytest.mark.parametrize("lead", [(1, 1), (2, 1), (1, 2), (2, 2)], ids=str)
def test_masks_and_rows_that_see_no_key(lead, p, dtype):
    g = torch.Generator().manual_seed(0)
    mask = torch.randn(*lead, 70, 80, generator=g)
    mask[torch.rand(mask.shape, generator=g) < 0.3] = -INF
    mask[..., 5, :] = -INF
    mask[..., 60, :71] = -INF
    tensors = make((2, 2, 1, 70, 80, p, 32), dtype)
    out, lse, *_ = check(tensors, dlse=1.0, mask=mask.to(dtype))
    assert (lse[..., 5] == -INF).all() == (p == 0) and out[..., 5, :].any() == (p > 0)
    if lead == (2, 1):
        check(tensors, mask=mask.to(dtype), causal=False, window=20)


def test_a_mask_of_the_smallest_number_hides_as_infinity_does():
    """What Hugging Face's masks hold."""
    tensors = make((1, 2, 1, 20, 20, 5, 32))
    hide = torch.rand(1, 1, 20, 20, generator=torch.Generator().manual_seed(0)) < 0.4
    masks = [torch.zeros(hide.shape).masked_fill(hide, x) for x in (-INF, torch.finfo().min)]
    for a, b in zip(*(run(ops.prefix_attention, tensors, mask=m, impl="triton") for m in masks),
                    strict=True):  # fmt: skip
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "lead, dtype",
    [("shared", torch.float32), ("row", torch.float16), ("table", torch.float32)],
    ids=str,
)
def test_packed_sequences(lead, dtype):
    """Lengths 1, 0, 140, 64, 9: each answers as it would alone."""
    cu = torch.tensor([0, 1, 1, 141, 205, 214], dtype=torch.int32)
    size = {"shared": (), "row": (5,), "table": (3,)}[lead]
    tensors = make((1, 2, 1, 214, 214, 19, 32), dtype, size)
    kw = {"prefix_ids": torch.tensor([2, 0, -1, 1, 2])} if lead == "table" else {}
    check(tensors, dlse=1.0, cu_seqlens=cu, **kw)
    if lead == "row":
        check(tensors, cu_seqlens=cu.long(), causal=False, window=30)


@pytest.mark.parametrize("scale", [0.3, -0.5, 0.0])
def test_any_scale(scale):
    check(make((1, 2, 1, 40, 90, 9, 32)), scale=scale)


def test_as_on_a_gpu_nobody_reads_ids_and_lengths(monkeypatch):
    """A row with an id outside the table, and a token in no sequence, are NaN; the others stand."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    tensors = make((3, 2, 1, 20, 20, 9, 32), lead=(2,))
    for bad in (2, -2, 2**40):
        ids = torch.tensor([1, bad, 0])
        out, lse = module._forward(*tensors, None, None, ids, True, 0.2, 0, "triton")
        assert out[1].isnan().all() and lse[1].isnan().all()
        assert torch.isfinite(out[[0, 2]]).all()
    q, k, v, pk, pv = make((1, 2, 1, 100, 100, 9, 32))
    for cu in ([0, 30, 80], [20, 100], [0, 500], [0, 60, 20, 100], [-7, 50, 100], [0]):
        args = (None, torch.tensor(cu), None, True, 0.2, 0, "triton")
        out, _ = module._forward(q, k, v, pk, pv, *args)
        assert out.shape == q.shape
        if cu == [0, 30, 80]:
            assert out[:, :, 80:].isnan().all() and torch.isfinite(out[:, :, :80]).all()


@pytest.mark.parametrize("sizes", [(0, 2, 1, 5, 5, 3, 32), (2, 2, 1, 0, 5, 3, 32)], ids=str)
def test_empty_inputs_give_zeros(sizes):
    tensors = make(sizes)
    out, lse, *grads = run(ops.prefix_attention, tensors, impl="triton")
    assert out.shape == tensors[0].shape and lse.shape == out.shape[:3]
    for g, t in zip(grads, tensors, strict=True):
        assert g.shape == t.shape and g.count_nonzero() == 0


def test_any_strides_and_the_same_bits():
    tensors = make((2, 4, 2, 50, 60, 9, 32))
    want = run(ops.prefix_attention, tensors, impl="triton")
    for other in (
        [t.transpose(-3, -2).contiguous().transpose(-3, -2) for t in tensors],  # [B, T, H, D]
        [torch.stack((t, t), -1)[..., 0] for t in tensors],
    ):
        for a, b in zip(run(ops.prefix_attention, other, impl="triton"), want, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("first, more", [(0, 1), (1, 15), (0, 0)], ids=["rows", "address", "none"])
def test_rows_at_odd_places_are_copied(first, more):
    """The ahead-of-time table has no kernel for them: they spill there."""
    wide = torch.randn(2, 3, 5, first + 64 + more, dtype=torch.float16)
    t = wide[..., first : first + 64]
    got = launchers._aligned(t)
    assert torch.equal(got, t) and (got is t) == (more == 0)
    assert got.data_ptr() % 16 == 0 and all(n % 16 == 0 for n in got.stride()[:3])


def test_only_what_is_needed():
    tensors = make((2, 4, 2, 40, 50, 9, 32))
    want = run(ops.prefix_attention, tensors, impl="triton")[2:]
    dout = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(1),
                       dtype=torch.float64)  # fmt: skip
    for i, whole in enumerate(want):
        leaves = [t.detach().clone().requires_grad_(i == j) for j, t in enumerate(tensors)]
        ops.prefix_attention(*leaves, impl="triton").backward(dout.float())
        assert [t.grad is not None for t in leaves] == [i == j for j in range(5)]
        assert torch.equal(leaves[i].grad, whole)
