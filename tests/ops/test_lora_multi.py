"""lora_linear_multi on a CPU against float64: values, gradients, rejections, transforms."""

import pytest
import torch

from fusedpeft import ops
from fusedpeft.ops import lora_multi
from fusedpeft.ops.native import native

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SCALES = [0.5, 2.0, 1.25]
# No rank of 1: torch alone takes it as dot products, which MKL sums in lanes, more exactly than any
# GEMM sums (by two, on average of 60 seeds); see test_a_rank_of_one_among_others.
K, NS, RANKS = 129, (77, 24, 40), (12, 2, 64)


def make(m, dtype, adapter_dtype=None, w_zero=False, bare=None):
    """[x, *ws, *as, *bs, *biases] of three projections; the second has no bias. `bare`: that one
    has no adapter."""
    g = torch.Generator().manual_seed(m)
    rnd = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64)  # noqa: E731
    adapter = adapter_dtype or dtype
    x = rnd(m, K).to(dtype)
    ws = [(rnd(n, K) / K**0.5 * (not w_zero)).to(dtype) for n in NS]
    as_ = [(rnd(r, K) / K**0.5).to(adapter) for r in RANKS]
    bs = [rnd(n, r).to(adapter) for n, r in zip(NS, RANKS, strict=True)]
    biases = [rnd(n).to(dtype) for n in NS]
    biases[1] = None
    if bare is not None:
        as_[bare] = bs[bare] = None
    return [x, *ws, *as_, *bs, *biases]


def call(op, flat, **kwargs):
    x, parts = flat[0], [flat[1 + 3 * i : 4 + 3 * i] for i in range(4)]
    return op(x, *parts[:3], SCALES, parts[3], **kwargs)


def outputs_and_grads(op, flat, dys, **kwargs):
    """Everything the op gives, None where there is no such parameter."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in flat]
    ys = call(op, leaves, **kwargs)
    dys = [dy.to(y.dtype) for dy, y in zip(dys, ys, strict=True)]
    grads = torch.autograd.grad(ys, [t for t in leaves if t is not None], dys)
    return [*(y.detach() for y in ys), *grads]


def compare(check, m, dtype, p=0.0, **kwargs):
    flat = make(m, dtype, **kwargs)
    g = torch.Generator().manual_seed(1)
    dys = [torch.randn(m, n, generator=g, dtype=torch.float64).to(dtype) for n in NS]
    kwargs = dict(dropout_p=p, seed=torch.tensor([42]))
    got = outputs_and_grads(ops.lora_linear_multi, flat, dys, **kwargs)
    low = outputs_and_grads(ops.lora_linear_multi_ref, flat, dys, **kwargs)
    up = [None if t is None else t.double() for t in flat]
    ref = outputs_and_grads(ops.lora_linear_multi_ref, up, dys, **kwargs)
    assert len(got) == 3 + sum(t is not None for t in flat)
    for i, (g, lo, r) in enumerate(zip(got, low, ref, strict=True)):
        assert g.dtype == lo.dtype and g.shape == lo.shape and g.is_contiguous()
        check(f"output {i}", g, lo, r)


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 63, 300])
def test_against_float64(check_accuracy, m, dtype, p):
    compare(check_accuracy, m, dtype, p)


def test_a_rank_of_one_among_others():
    x, *flat = make(63, torch.float32)
    ws, as_, bs, biases = (flat[3 * i : 3 * i + 3] for i in range(4))
    as_[1], bs[1] = as_[1][:1], bs[1][:, :1]
    ys = ops.lora_linear_multi(x, ws, as_, bs, SCALES, biases)
    for y, *one in zip(ys, ws, as_, bs, SCALES, biases, strict=True):
        torch.testing.assert_close(y, ops.lora_linear_ref(x, *one), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_adapters_alone(check_accuracy, dtype):
    compare(check_accuracy, 63, dtype, w_zero=True)


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_fp32_adapters_beside_a_16_bit_base(check_accuracy, dtype, p):
    compare(check_accuracy, 63, dtype, p, adapter_dtype=torch.float32)


@pytest.mark.parametrize("bare", range(3))
def test_a_projection_without_an_adapter(check_accuracy, bare):
    compare(check_accuracy, 63, torch.float32, 0.25, bare=bare)


def test_the_mask_is_that_of_lora_linear():
    x, w0, w1, w2, a0, a1, a2, b0, b1, b2, c0, c1, c2 = make(9, torch.float32)
    ys = call(
        ops.lora_linear_multi, [x, w0, w1, w2, a0, a1, a2, b0, b1, b2, c0, c1, c2],
        dropout_p=0.5, seed=7,
    )  # fmt: skip
    one = ops.lora_linear(x, w2, a2, b2, SCALES[2], c2, dropout_p=0.5, seed=7)
    torch.testing.assert_close(ys[2], one)


@pytest.mark.skipif(native is None, reason="the extension is not built")
@pytest.mark.parametrize("impl", ["native", None])
@pytest.mark.parametrize("bare", [None, 1])
def test_decode(check_accuracy, bare, impl, monkeypatch):
    flat = make(4, torch.bfloat16, bare=bare)
    asked = []
    inner = lora_multi.DECODE["native"]
    monkeypatch.setitem(lora_multi.DECODE, "native", lambda *t: asked.append(1) or inner(*t))
    got = call(ops.lora_linear_multi, flat, impl=impl)
    assert len(asked) == (3 if bare is None else 2)
    compiled = torch.compile(ops.lora_linear_multi, fullgraph=True)
    for g, c in zip(got, call(compiled, flat, impl=impl), strict=True):
        assert torch.equal(g, c)
    low = call(ops.lora_linear_multi_ref, flat)
    up = [None if t is None else t.double() for t in flat]
    for g, lo, r in zip(got, low, call(ops.lora_linear_multi_ref, up), strict=True):
        check_accuracy("y", g, lo, r)


def test_dora_on_one_projection(check_accuracy):
    flat, m = make(9, torch.float32), torch.rand(NS[0]) + 0.5
    got = call(ops.lora_linear_multi, flat, magnitudes=[m, None, None])
    low = call(ops.lora_linear_multi_ref, flat, magnitudes=[m, None, None])
    up = [None if t is None else t.double() for t in flat]
    ref = call(ops.lora_linear_multi_ref, up, magnitudes=[m.double(), None, None])
    for g, lo, r in zip(got, low, ref, strict=True):
        check_accuracy("y", g, lo, r)


def test_leading_dims_strides_and_no_rows():
    flat = make(12, torch.float32)
    wide = torch.stack((flat[0], flat[0]), -1)[..., 0]
    want = call(ops.lora_linear_multi_ref, flat)
    got = call(ops.lora_linear_multi, [wide.view(3, 4, K), *flat[1:]])
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w.view(3, 4, -1), atol=1e-4, rtol=1e-4)
    leaves = [None if t is None else t.requires_grad_() for t in flat]
    leaves[0] = torch.empty(2, 0, K, requires_grad=True)
    ys = call(ops.lora_linear_multi, leaves, dropout_p=0.1)
    assert [y.shape for y in ys] == [(2, 0, n) for n in NS]
    sum(y.sum() for y in ys).backward()
    assert leaves[4].grad.shape == (RANKS[0], K) and leaves[4].grad.count_nonzero() == 0


def test_gradcheck_opcheck_and_compile():
    flat = [None if t is None else t.double().requires_grad_() for t in make(3, torch.float64)]
    there = [t for t in flat if t is not None]

    def op(*there):
        it = iter(there)
        full = [None if t is None else next(it) for t in flat]
        return call(ops.lora_linear_multi, full, dropout_p=0.4, seed=3)

    assert torch.autograd.gradcheck(op, there, fast_mode=True)
    empty = torch.empty(0, dtype=torch.float64)
    parts = [[empty if t is None else t for t in flat[1 + 3 * i : 4 + 3 * i]] for i in range(4)]
    args = (flat[0], *parts, torch.tensor([3]), SCALES, 0.4, "")
    torch.library.opcheck(torch.ops.fusedpeft.lora_linear_multi, args)
    compiled = torch.compile(op, fullgraph=True)
    dys = [torch.ones(3, n, dtype=torch.float64) for n in NS]
    results = [(fn(*there), there) for fn in (op, compiled)]
    grads = [torch.autograd.grad(ys, leaves, dys) for ys, leaves in results]
    for eager, other in zip(*grads, strict=True):
        torch.testing.assert_close(eager, other)


def test_one_node_that_saves_x_once_and_computes_what_is_needed(monkeypatch):
    flat = make(50, torch.float32)
    for t in flat[4:10]:
        t.requires_grad_()
    saved, asked = [], []
    inner = lora_multi.aten_multi_bwd
    monkeypatch.setattr(lora_multi, "aten_multi_bwd", lambda *t: asked.append(t[-2:]) or inner(*t))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ys = call(ops.lora_linear_multi, flat, dropout_p=0.2)
    theirs = {t.data_ptr() for t in flat[1:] if t is not None}
    floats = [t for t in saved if t.is_floating_point() and t.data_ptr() not in theirs]
    assert sum(t.numel() for t in floats) == 50 * (K + sum(RANKS))  # x and S; no mask
    assert len({y.grad_fn for y in ys}) == 1
    sum(y.sum() for y in ys).backward()
    no, yes = [False] * 3, [True] * 3
    assert asked == [(False, [no, yes, yes, no])]


def test_an_output_that_nobody_uses():
    flat = make(5, torch.float32)
    for t in flat[4:10]:
        t.requires_grad_()
    call(ops.lora_linear_multi, flat)[1].sum().backward()
    assert flat[4].grad.count_nonzero() == 0 and flat[5].grad.count_nonzero() > 0


def test_autocast():
    flat = make(20, torch.float32)
    flat[4].requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ys = call(ops.lora_linear_multi, flat)
    assert {y.dtype for y in ys} == {torch.bfloat16}
    ys[0].sum().backward()
    assert flat[4].grad.dtype == torch.float32


X, W, A, B = torch.randn(3, 8), torch.randn(6, 8), torch.randn(2, 8), torch.randn(6, 2)


@pytest.mark.parametrize(
    "args, kwargs, error, message",
    [
        ((X, W, [A], [B], [1.0]), {}, TypeError, "ws: expected a list or tuple, got Tensor"),
        ((X, [W, W], [A], [B], [1.0]), {}, ValueError, r"as_: expected 2 entries.*got 1"),
        ((X, [W], [A], [B], []), {}, ValueError, r"scales: expected 1 entries.*got 0"),
        ((X, [W], [None], [None], [1.0]), {}, ValueError, "at least one adapter, got none"),
        ((X, [W, W], [A, None], [B, B], [1.0, 1.0]), {}, ValueError,
         "projection 1: a, b: expected both or neither"),
        ((X, [W, W[:, :5]], [A, A], [B, B], [1.0, 1.0]), {}, ValueError,
         r"projection 1: x: expected last dim K = 5"),
        ((X, [W, W], [A, A], [B, B[:5]], [1.0, 1.0]), {}, ValueError,
         r"projection 1: b: .*\(6, 2\), got \(5, 2\)"),
        ((X, [W, W], [A, A.double()], [B, B.double()], [1.0, 1.0]), {}, TypeError,
         r"projection 1: a: expected dtype torch.float32 \(as the others\)"),
        ((X, [W], [A], [B], [1.0], [torch.ones(5)]), {}, ValueError,
         r"projection 0: bias: .*\[6\]"),
        ((X, [W], [A], [B], [1.0]), {"dropout_p": 1.0}, ValueError, r"0 <= p < 1, got 1.0"),
        ((X, [W], [A], [B], [1.0]), {"impl": "cublas"}, ValueError, r"impl: .*got 'cublas'"),
        ((torch.randn(17, 8), [W], [A], [B], [1.0]), {"impl": "native"}, ValueError, "<= 16 rows"),
    ],
)  # fmt: skip
def test_bad_input(args, kwargs, error, message):
    with pytest.raises(error, match=message):
        ops.lora_linear_multi(*args, **kwargs)
