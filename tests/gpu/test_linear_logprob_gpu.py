"""linear_logprob on a GPU, `impl="triton"` against float64. pytest -m gpu tests/gpu"""

import pytest
import torch

from fusedpeft import ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SHAPES = {  # M, d, V, ignored rows
    "one_row": (1, 256, 1000, 0),
    "odd": (63, 65, 1029, 5),
    "rows_in_chunks": (3000, 512, 5003, 700),
    "llama_1b": (1024, 2048, 32000, 100),
    "all_ignored": (600, 64, 700, 600),
}
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
OPTIONS = {"plain": {}, "both": {"softcap": 5.0, "temperature": 0.7}}


def make(shape, dtype):
    """Ignored rows hold NaN: nothing of them may reach anything."""
    m, d, v, ignored = shape
    g = torch.Generator("cuda").manual_seed(m + d + v)
    h = torch.randn(m, d, generator=g, device="cuda")
    w = torch.randn(v, d, generator=g, device="cuda") * (2.0 / d**0.5)
    bias, up = (torch.randn(n, generator=g, device="cuda").to(dtype) for n in (v, m))
    labels = torch.randint(0, v, (m,), generator=g, device="cuda")
    at = torch.randperm(m, generator=g, device="cuda")[:ignored]
    labels[at], h[at] = -100, float("nan")
    return h.to(dtype), w.to(dtype), labels, bias, up


def run(op, h, w, labels, bias, g, head, **kw):
    h = h.detach().clone().requires_grad_()
    w, bias = (None if t is None else t.detach().clone().requires_grad_(head) for t in (w, bias))
    y = op(h, w, labels, bias, **kw)
    leaves = [t for t in (h, w, bias) if t is not None and t.requires_grad]
    return (y.detach(), *torch.autograd.grad(y, leaves, g.to(y.dtype)))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("head", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_against_float64(check_accuracy, name, dtype, head, options):
    h, w, labels, bias, g = make(SHAPES[name], dtype)
    kw = OPTIONS[options]
    got = run(ops.linear_logprob, h, w, labels, bias, g, head, impl="triton", **kw)
    clean = h.where((labels != -100)[:, None], 0.0)
    low = run(ops.linear_logprob_ref, clean, w, labels, bias, g, head, **kw)
    wide = (clean.double(), w.double(), labels, bias.double(), g.double())
    ref = run(ops.linear_logprob_ref, *wide, head, **kw)
    for label, *t in zip(("logp", "dh", "dw", "dbias"), got, low, ref, strict=False):
        check_accuracy(label, *t)
    assert all((t[labels == -100] == 0).all() for t in got[:2])


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("name", ["rows_in_chunks", "llama_1b", "all_ignored"])
def test_a_frozen_head_without_bias(check_accuracy, name, dtype):
    """What Hopper takes by TMA."""
    h, w, labels, _, g = make(SHAPES[name], dtype)
    clean = h.where((labels != -100)[:, None], 0.0)
    got = run(ops.linear_logprob, h, w, labels, None, g, False, impl="triton")
    low = run(ops.linear_logprob_ref, clean, w, labels, None, g, False)
    ref = run(ops.linear_logprob_ref, clean.double(), w.double(), labels, None, g.double(), False)
    for label, *t in zip(("logp", "dh"), got, low, ref, strict=False):
        check_accuracy(label, *t)
    again = run(ops.linear_logprob, h, w, labels, None, g, False, impl="triton")
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


def test_runs_are_bit_equal_and_a_second_backward_too():
    h, w, labels, bias, g = make((2000, 512, 9000, 300), torch.bfloat16)
    for head in (False, True):
        one = run(ops.linear_logprob, h, w, labels, bias, g, head)
        for a, b in zip(one, run(ops.linear_logprob, h, w, labels, bias, g, head), strict=True):
            assert torch.equal(a, b)
    h.requires_grad_()
    y = ops.linear_logprob(h, w, labels, bias)
    first = torch.autograd.grad(y, h, g, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(y, h, g)[0])


def test_no_synchronisation():
    h, w, labels, bias, g = make((700, 256, 3000, 50), torch.bfloat16)
    for head in (False, True):
        run(ops.linear_logprob, h, w, labels, bias, g, head)  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            run(ops.linear_logprob, h, w, labels, bias, g, head)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_extra_memory_is_a_twentieth_of_the_logits():
    m, d, v = 4096, 4096, 128256
    h = torch.randn(m, d, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    w = torch.randn(v, d, device="cuda", dtype=torch.bfloat16) / d**0.5
    labels = torch.randint(0, v, (m,), device="cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    ops.linear_logprob(h, w, labels)
    assert torch.cuda.max_memory_allocated() - before <= 0.05 * m * v * 2


def test_references_that_jump():
    """Logits grow along the vocabulary by more than exp can hold from a fixed reference."""
    h, w, labels, bias, g = make((300, 128, 20000, 0), torch.bfloat16)
    bias = torch.linspace(-400.0, 400.0, 20000, device="cuda", dtype=torch.bfloat16)
    got = run(ops.linear_logprob, h, w, labels, bias, g, False, impl="triton")
    assert all(torch.isfinite(t).all() for t in got)


def test_offsets_beyond_two_to_the_31():
    """The head of 2^31 elements and more; labels at its end."""
    v, d = 530_000, 4096
    w = torch.zeros(v, d, device="cuda", dtype=torch.bfloat16)
    w[-1] = 0.125
    h = torch.ones(4, d, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    labels = torch.full((4,), v - 1, device="cuda")
    logp = ops.linear_logprob(h, w, labels)
    assert (logp.float().abs() < 1e-3).all()  # 512 against zeros


def test_a_label_out_of_range_is_nan(monkeypatch):
    monkeypatch.delenv("FUSEDPEFT_DEBUG", raising=False)
    h, w, labels, bias, _ = make((70, 64, 300, 0), torch.bfloat16)
    labels[3], labels[60] = 300, -7
    logp = ops.linear_logprob(h, w, labels, bias)
    assert logp.isnan().nonzero().flatten().tolist() == [3, 60]


def test_torch_compile_fullgraph():
    h, w, labels, bias, _ = make((256, 128, 3000, 10), torch.bfloat16)
    h = h.nan_to_num().requires_grad_()
    fn = torch.compile(lambda h: ops.linear_cross_entropy(h, w, labels, bias), fullgraph=True)
    torch.testing.assert_close(fn(h), ops.linear_cross_entropy(h, w, labels, bias))
