"""What test_interpret.py runs in a process of its own, under Triton's interpreter.

    TRITON_INTERPRET=1 pytest tests/kernels/linear_logprob_interpret_checks.py

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
from fusedpeft.kernels import linear_logprob as launchers
from fusedpeft.kernels import linear_logprob_tables as tables
from fusedpeft.kernels.device import ARCHS, SMS

SHAPES = {  # M, d, V, ignored rows
    "one_row": (1, 17, 33, 0),
    "odd": (63, 65, 129, 5),
    "many_tiles": (70, 48, 600, 30),  # the only d that 16 divides
    "whole_blocks_ignored": (200, 33, 150, 150),
    "few_words": (5, 20, 3, 1),
}
OPTIONS = {"plain": {}, "both": {"softcap": 3.0, "temperature": 0.7}}


def make(shape, dtype, bias=True):
    """Ignored rows are everywhere and hold NaN: nothing of them may reach anything."""
    m, d, v, ignored = shape
    g = torch.Generator().manual_seed(m + d + v)
    h = torch.randn(m, d, generator=g)
    w = torch.randn(v, d, generator=g) * (2.0 / d**0.5)
    labels = torch.randint(0, v, (m,), generator=g)
    at = torch.randperm(m, generator=g)[:ignored]
    labels[at], h[at] = -100, math.nan
    c = torch.randn(v, generator=g).to(dtype) if bias else None
    return h.to(dtype), w.to(dtype), labels, c, torch.randn(m, generator=g).to(dtype)


def run(op, h, w, labels, bias, g, head, **kw):
    h = h.detach().clone().requires_grad_()
    w, bias = (None if t is None else t.detach().clone().requires_grad_(head) for t in (w, bias))
    y = op(h, w, labels, bias, **kw)
    leaves = [t for t in (h, w, bias) if t is not None and t.requires_grad]
    return (y.detach(), *torch.autograd.grad(y, leaves, g.to(y.dtype)))


def check(t, head, size=1.0, **kw):
    """size: of the logits, whose rounding is in everybody's p. In fp32 torch's error counts thrice:
    the interpreter multiplies by numpy's BLAS, whose sums depend on the chip."""
    h, w, labels, bias, g = t
    got = run(ops.linear_logprob, *t, head, impl="triton", **kw)
    clean = h.where((labels != -100)[:, None], 0.0)
    low = run(ops.linear_logprob_ref, clean, w, labels, bias, g, head, **kw)
    wide = (clean.double(), w.double(), labels, None if bias is None else bias.double(), g.double())
    ref = run(ops.linear_logprob_ref, *wide, head, **kw)
    for name, a, b, r in zip(("logp", "dh", "dw", "dbias"), got, low, ref, strict=False):
        assert a.dtype == b.dtype and a.shape == b.shape, name
        error = (a.double() - r).abs().max()
        times = 3 if b.dtype == torch.float32 else 2
        eps = 2 * size * torch.finfo(b.dtype).eps
        bar = times * (b.double() - r).abs().max() + eps * r.abs().max()
        assert error <= bar, f"{name}: error {error:.3g}, allowed {bar:.3g}"
    assert all((a[labels == -100] == 0).all() for a in got[:2])
    with torch.no_grad():  # statistics alone
        again = ops.linear_logprob(h, w, labels, bias, impl="triton", **kw)
    torch.testing.assert_close(again, got[0], rtol=0, atol=32 * torch.finfo(h.dtype).eps + 2e-4)
    return got


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("head", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", SHAPES)
def test_against_float64(name, dtype, head, options):
    check(make(SHAPES[name], dtype), head, **OPTIONS[options])


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("arch", ARCHS)
def test_every_table_by_chunks(arch, large, monkeypatch):
    """On a chip of one SM every chunk is one tile: rows and words in many chunks."""
    monkeypatch.setattr(launchers, "arch_of", lambda device: arch)
    monkeypatch.setitem(SMS, arch, 1)
    if large:
        monkeypatch.setattr(tables, "FEW_ROWS", 0)
    t = make((150, 80, 530, 12), torch.float16)
    cfg = tables.linear_logprob_fwd_config(150, 80, 530, arch)
    assert cfg["rows"] < 150 and cfg["columns"] < 530
    for head in (False, True):
        check(t, head)
        check(t, head, softcap=3.0)


@pytest.fixture
def hopper(monkeypatch):
    """Hopper with one SM, which takes everything by TMA that it can; the launches there were."""
    monkeypatch.setattr(launchers, "arch_of", lambda device: "sm_90")
    monkeypatch.setitem(SMS, "sm_90", 1)
    monkeypatch.setattr(tables, "FEW_ROWS", 0)
    seen, launch = [], launchers.ByTma.add_product

    def add_product(self, *args):
        seen.append(args)
        launch(self, *args)

    monkeypatch.setattr(launchers.ByTma, "add_product", add_product)
    return seen


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_by_tma(temperature, hopper):
    """Chunks of rows and words, the last of each ragged; rows out of order, ignored ones NaN."""
    check(make((150, 320, 530, 12), torch.float16, bias=False), False, temperature=temperature)
    assert len(hopper) == 6  # two chunks of 128 rows, three of 256 words


def test_references_that_jump_by_tma(hopper):
    """Logits from -60 to 60 along the words, up and down: p must fit fp16 (a jump beyond 8)."""
    h, w, labels, _, g = make((140, 128, 600, 6), torch.float16, bias=False)
    h[:, 0], w[:, 1:] = torch.where(h[:, 0].isnan(), h[:, 0], 8.0), w[:, 1:] / 4
    for ramp in (torch.linspace(-7.5, 7.5, 600), torch.linspace(7.5, -7.5, 600)):
        w[:, 0] = ramp.to(w.dtype)
        counts = (labels >= 0).nonzero().flatten()
        labels[counts] = w[:, 0].argmax()
        labels[counts[10:20]] = w[:, 0].argmin()  # else every gradient is of one word
        got = check((h, w, labels, None, g), False)
        assert got[0].min() < -80
    assert hopper


@pytest.mark.parametrize("what", ["bias", "softcap", "width", "odd", "strides"])
def test_what_tma_does_not_take(what, hopper):
    """Goes by pointers, and is as right."""
    d = {"width": 80, "odd": 70}.get(what, 64)
    h, w, *rest = make((140, d, 300, 5), torch.float16, bias=what == "bias")
    w = w.t().contiguous().t() if what == "strides" else w
    check((h, w, *rest), False, **({"softcap": 3.0} if what == "softcap" else {}))
    assert not hopper


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_references_that_jump(dtype, monkeypatch):
    """Logits grow along the vocabulary by far more than exp can hold from a fixed reference."""
    monkeypatch.setitem(SMS, "sm_80", 1)
    h, w, labels, _, g = make((70, 24, 500, 6), dtype)
    ramp = torch.linspace(-300.0, 300.0, 500).to(dtype)
    for bias in (ramp, ramp.flip(0)):
        labels[labels >= 0] = bias.argmax()  # else every gradient is of one word
        labels[10:20] = bias.argmin()
        size = 300.0 if dtype == torch.float32 else 1.0
        got = check((h, w, labels, bias, g), False, size)
        check((h, w, labels, bias, g), True, size)
        assert got[0].min() < -400


def test_words_masked_by_infinite_bias():
    h, w, labels, bias, g = make((20, 24, 300, 0), torch.float32)
    bias[:200] = -math.inf  # whole tiles
    labels[:] = 250
    got = run(ops.linear_logprob, h, w, labels, bias, g, False, impl="triton")
    low = run(ops.linear_logprob_ref, h, w, labels, bias, g, False)
    for a, b in zip(got, low, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_labels_out_of_range_are_nan_rows(monkeypatch):
    """As on a GPU, where nobody reads the labels."""
    h, w, labels, bias, g = make((9, 24, 50, 0), torch.float32)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    labels[2], labels[5] = 50, -7
    module = importlib.import_module("fusedpeft.ops.linear_logprob")
    logp, _, u = module._forward(h, w, labels, bias, -100, 0.0, 1.0, True, "triton")
    assert logp.isnan().nonzero().flatten().tolist() == [2, 5]
    good = torch.ones(9, dtype=torch.bool)
    good[[2, 5]] = False
    assert torch.isfinite(u[good]).all()


@pytest.mark.parametrize("head", [False, True])
def test_empty_and_all_ignored(head):
    for m in (0, 4):
        t = make((m, 8, 10, m), torch.float32)
        for a in run(ops.linear_logprob, *t, head, impl="triton"):
            assert a.count_nonzero() == 0 and torch.isfinite(a).all()


def test_any_strides():
    t = make((40, 34, 90, 4), torch.float32)
    h, w, labels, bias, g = t
    wide = torch.stack((h, h), -1)[..., 0]
    for head in (False, True):
        ref = run(ops.linear_logprob, *t, head, impl="triton")
        for other in (wide, h.t().contiguous().t()):
            turned = w.t().contiguous().t()
            args = (other, turned, torch.stack((labels, labels), -1)[..., 0], bias, g)
            for a, b in zip(run(ops.linear_logprob, *args, head, impl="triton"), ref, strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("what", ["d", "rows of h", "rows of w", "address", "column", "bias"])
def test_what_is_not_wide_has_tiles_of_its_own(what, monkeypatch):
    """Else a kernel runs that the ahead-of-time table has not seen, and spills."""
    h, w, labels, bias, _ = make((40, 47 if what == "d" else 48, 90, 4), torch.float32)

    def moved(t, first, more):
        """t inside of rows that are longer, from element `first` of them on."""
        return torch.nn.functional.pad(t, (first, more))[:, first : first + t.shape[1]]

    asked = []
    choose = launchers.linear_logprob_fwd_config

    def config(*args, **kw):
        asked.append(kw["wide"])
        return choose(*args, **kw)

    monkeypatch.setattr(launchers, "linear_logprob_fwd_config", config)
    rest = (-100, 0.0, 1.0, True)
    plain = launchers.linear_logprob_fwd(h, w, labels, bias, *rest)
    if what == "rows of h":
        h = moved(h, 0, 1)
    elif what == "rows of w":
        w = moved(w, 0, 1)
    elif what == "address":
        w = moved(w, 1, 15)
    elif what == "column":
        w = w.t().contiguous().t()
    elif what == "bias":
        bias = torch.cat((bias[:1], bias))[1:]
    got = launchers.linear_logprob_fwd(h, w, labels, bias, *rest)
    assert asked == [what != "d", False]
    for a, b in zip(got, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_only_what_is_needed():
    h, w, labels, bias, g = make((40, 34, 90, 4), torch.float32)
    whole = run(ops.linear_logprob, h, w, labels, bias, g, True, impl="triton")
    h, bias = h.detach(), bias.clone().requires_grad_()
    y = ops.linear_logprob(h, w, labels, bias, impl="triton")
    assert torch.equal(torch.autograd.grad(y, bias, g)[0], whole[3])
