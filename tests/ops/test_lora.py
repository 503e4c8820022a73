"""lora_linear on a CPU against float64: values, gradients, strides, rejections, transforms."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedpeft import ops
from fusedpeft.ops.lora import choose_impl
from fusedpeft.ops.native import native

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
needs_native = pytest.mark.skipif(native is None, reason="the extension is not built")


def make(m, k, n, r, dtype, adapter_dtype=None, bias=True, w_zero=False):
    g = torch.Generator().manual_seed(m * 31 + k * 7 + n * 3 + r)
    rnd = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64)  # noqa: E731
    x, w, a, b = rnd(m, k), rnd(n, k) / k**0.5, rnd(r, k) / k**0.5, rnd(n, r)
    w = torch.zeros_like(w) if w_zero else w
    adapter = adapter_dtype or dtype
    return (x.to(dtype), w.to(dtype), a.to(adapter), b.to(adapter)), (
        rnd(n).to(dtype) if bias else None
    )


def grads(fn, tensors, dy):
    leaves = [t.detach().clone().requires_grad_() for t in tensors if t is not None]
    it = iter(leaves)
    y = fn(*[None if t is None else next(it) for t in tensors])
    return y.detach(), torch.autograd.grad(y, leaves, dy.to(y.dtype))


def compare(check, m, k, n, r, dtype, *, adapter_dtype=None, bias=True, w_zero=False, p=0.0):
    (x, w, a, b), c = make(m, k, n, r, dtype, adapter_dtype, bias, w_zero)
    seed = torch.tensor([42])
    tensors = (x, w, a, b, c)
    up = tuple(None if t is None else t.double() for t in tensors)
    dy = torch.randn(m, n, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(
        dtype
    )

    def run(op):
        return lambda x, w, a, b, c: op(x, w, a, b, 0.5, c, dropout_p=p, seed=seed)

    got, low = (
        grads(run(ops.lora_linear), tensors, dy),
        grads(run(ops.lora_linear_ref), tensors, dy),
    )
    ref = grads(run(ops.lora_linear_ref), up, dy)
    check("y", got[0], low[0], ref[0])
    for i, name in enumerate(["dx", "dw", "da", "db", "dbias"][: len(got[1])]):
        assert got[1][i].dtype == low[1][i].dtype, name
        if not (w_zero and name == "dw"):
            check(name, got[1][i], low[1][i], ref[1][i])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "m, k, n, r",
    [(1, 64, 64, 8), (63, 129, 77, 12), (1000, 96, 33, 64), (5, 1, 1, 1), (17, 40, 200, 1)],
)
def test_against_float64(check_accuracy, m, k, n, r, dtype):
    compare(check_accuracy, m, k, n, r, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_adapter_alone(check_accuracy, dtype):
    """W = 0: nothing hides the adapter's errors."""
    compare(check_accuracy, 63, 129, 77, 12, dtype, bias=False, w_zero=True)


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp32_adapters_beside_a_16_bit_base(check_accuracy, dtype, p):
    compare(check_accuracy, 63, 128, 77, 12, dtype, adapter_dtype=torch.float32, p=p)
    compare(check_accuracy, 9, 64, 32, 8, dtype, adapter_dtype=torch.float32, w_zero=True, p=p)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout(check_accuracy, dtype):
    compare(check_accuracy, 63, 129, 77, 12, dtype, p=0.25)


@needs_native
@pytest.mark.parametrize("adapter", ["same", "fp32"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "k, n, r", [(2048, 512, 16), (129, 77, 12), (64, 5, 1), (7, 3, 64), (14336, 40, 16)]
)
@pytest.mark.parametrize("m", [1, 2, 3, 4, 7, 8, 16])
def test_native_decode(check_accuracy, m, k, n, r, dtype, adapter):
    adapter_dtype = torch.float32 if adapter == "fp32" else None
    for w_zero in (False, True):
        (x, w, a, b), c = make(m, k, n, r, dtype, adapter_dtype, True, w_zero)
        got = ops.lora_linear(x, w, a, b, 0.5, c, impl="native")
        low = ops.lora_linear_ref(x, w, a, b, 0.5, c)
        ref = ops.lora_linear_ref(*(t.double() for t in (x, w, a, b)), 0.5, c.double())
        check_accuracy("y", got, low, ref)


@settings(max_examples=40, deadline=None)
@given(
    lead=st.lists(st.integers(0, 4), min_size=0, max_size=3),
    k=st.integers(1, 20),
    n=st.integers(1, 20),
    r=st.integers(1, 9),
    data=st.data(),
)
def test_any_leading_dims_and_strides(lead, k, n, r, data):
    pad = data.draw(st.integers(0, 3))
    x = torch.randn(*lead, k + pad)[..., pad:]
    w = torch.randn(k, n).t() if data.draw(st.booleans()) else torch.randn(n, k)
    a, b = torch.randn(r, k), torch.randn(n, r)
    got = ops.lora_linear(x, w, a, b, 2.0)
    assert got.shape == (*lead, n)
    torch.testing.assert_close(got, ops.lora_linear_ref(x, w, a, b, 2.0), atol=1e-4, rtol=1e-4)


def test_gradcheck_and_opcheck():
    tensors = [t.double().requires_grad_() for t in make(5, 13, 7, 3, torch.float64)[0]]
    bias = torch.randn(7, dtype=torch.float64, requires_grad=True)
    for p in (0.0, 0.4):
        fn = lambda *t, p=p: ops.lora_linear(*t[:4], 0.7, t[4], dropout_p=p, seed=3)  # noqa: E731
        assert torch.autograd.gradcheck(fn, (*tensors, bias))
    args = (*tensors, bias, torch.tensor([3]), 0.7, 0.2, "")
    torch.library.opcheck(torch.ops.fusedpeft.lora_linear, args)
    frozen = (tensors[0].detach(), tensors[1].detach(), *tensors[2:], None, None, 0.7, 0.0, "")
    torch.library.opcheck(torch.ops.fusedpeft.lora_linear, frozen)
    plain = tuple(t.detach().float() for t in tensors)
    torch.library.opcheck(torch.ops.fusedpeft.lora_linear_infer, (*plain, None, None, 0.7, 0.0, ""))


def test_compiled_equals_eager_with_gradients():
    (x, w, a, b), c = make(20, 32, 24, 4, torch.float32)
    dy = torch.randn(20, 24)
    fn = lambda x, w, a, b, c: ops.lora_linear(x, w, a, b, 0.5, c, dropout_p=0.1, seed=9)  # noqa: E731
    eager = grads(fn, (x, w, a, b, c), dy)
    compiled = grads(torch.compile(fn, fullgraph=True), (x, w, a, b, c), dy)
    for e, o in zip((eager[0], *eager[1]), (compiled[0], *compiled[1]), strict=True):
        torch.testing.assert_close(e, o)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(fn, fullgraph=True)(x, w, a, b, c), eager[0])


def test_a_second_backward_gives_the_same_gradients():
    (x, w, a, b), _ = make(9, 16, 8, 4, torch.float32)
    a.requires_grad_(), b.requires_grad_(), x.requires_grad_()
    y = ops.lora_linear(x, w, a, b, 0.5, dropout_p=0.3).square().sum()
    first = torch.autograd.grad(y, (x, a, b), retain_graph=True)
    for f, s in zip(first, torch.autograd.grad(y, (x, a, b)), strict=True):
        assert torch.equal(f, s)


def test_a_frozen_base_costs_no_weight_gradient(monkeypatch):
    from fusedpeft.ops import lora

    asked = []
    inner = lora.aten_bwd
    monkeypatch.setattr(lora, "aten_bwd", lambda *t: asked.append(t[-1]) or inner(*t))
    (x, w, a, b), _ = make(9, 16, 8, 4, torch.float32)
    ops.lora_linear(x, w, a.requires_grad_(), b.requires_grad_(), 0.5).sum().backward()
    assert asked == [[False, False, True, True, False]]


def test_saved_bytes_are_those_of_the_docstring():
    (x, w, a, b), _ = make(50, 64, 32, 8, torch.float32)
    a.requires_grad_(), b.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.lora_linear(x, w, a, b, 0.5, dropout_p=0.2)
    own = [t for t in saved if all(t.data_ptr() != o.data_ptr() for o in (w, a, b))]
    floats = sum(t.numel() for t in own if t.is_floating_point())
    assert floats == 50 * 64 + 50 * 8  # x and S; no mask


def test_dropout_is_recomputed_alike_under_checkpointing():
    (x, w, a, b), _ = make(9, 16, 8, 4, torch.float32)
    a.requires_grad_(), b.requires_grad_()
    fn = lambda x: ops.lora_linear(x, w, a, b, 0.5, dropout_p=0.5)  # noqa: E731
    torch.manual_seed(0)
    want = torch.autograd.grad(fn(x).square().sum(), (a, b))
    torch.manual_seed(0)
    y = torch.utils.checkpoint.checkpoint(fn, x, use_reentrant=False)
    for f, s in zip(want, torch.autograd.grad(y.square().sum(), (a, b)), strict=True):
        assert torch.equal(f, s)


def test_autocast_runs_in_its_dtype_and_returns_fp32_gradients():
    (x, w, a, b), c = make(20, 32, 24, 4, torch.float32)
    a.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ops.lora_linear(x, w, a, b, 0.5, c)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert a.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES)
def test_dora_never_forms_the_product(check_accuracy, dtype):
    (x, w, a, b), c = make(9, 40, 24, 4, dtype)
    m = torch.rand(24, dtype=dtype) + 0.5
    got = ops.lora_linear(x, w, a, b, 0.5, c, magnitude=m)
    low = ops.lora_linear_ref(x, w, a, b, 0.5, c, magnitude=m)
    up = [t.double() for t in (x, w, a, b)]
    ref = ops.lora_linear_ref(*up, 0.5, c.double(), magnitude=m.double())
    check_accuracy("y", got, low, ref)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (2, 3, 0), (2, 0, 0)])
def test_no_features_at_all(shape):
    x, w, a = torch.empty(shape), torch.empty(4, 0), torch.empty(2, 0).requires_grad_()
    b, bias = torch.randn(4, 2), torch.randn(4)
    for grad, p in ((False, 0.0), (True, 0.0), (True, 0.3)):
        with torch.set_grad_enabled(grad):
            y = ops.lora_linear(x, w, a, b, 2.0, bias, dropout_p=p)
            (z,) = ops.lora_linear_multi(x, [w], [a], [b], [2.0], [bias], dropout_p=p)
        assert torch.equal(y, torch.nn.functional.linear(x, w, bias)) and torch.equal(z, y)


def test_empty_input():
    (_, w, a, b), c = make(1, 16, 8, 4, torch.float32)
    x = torch.empty(0, 16, requires_grad=True)
    a.requires_grad_()
    y = ops.lora_linear(x, w, a, b, 0.5, c, dropout_p=0.1)
    y.sum().backward()
    assert y.shape == (0, 8) and x.grad.shape == (0, 16) and torch.equal(a.grad, torch.zeros(4, 16))
    assert ops.lora_linear(torch.empty(2, 0, 16), w, a.detach(), b, 0.5).shape == (2, 0, 8)


X, W, A, B = torch.randn(3, 8), torch.randn(6, 8), torch.randn(2, 8), torch.randn(6, 2)


@pytest.mark.parametrize(
    "args, kwargs, error, message",
    [
        ((torch.randn(3, 7), W, A, B, 1.0), {}, ValueError, r"x: expected last dim K = 8.*(3, 7)"),
        ((X, W, torch.randn(2, 9), B, 1.0), {}, ValueError, r"a: expected \[R, 8\], got \(2, 9\)"),
        ((X, W, A, torch.randn(6, 3), 1.0), {}, ValueError, r"b: .*\(6, 2\), got \(6, 3\)"),
        ((X, W, A[:0], B[:, :0], 1.0), {}, ValueError, r"rank R >= 1, got 0"),
        ((X, W[0], A, B, 1.0), {}, ValueError, r"w: expected \[N, K\], got shape \(8,\)"),
        ((X.bfloat16(), W, A, B, 1.0), {}, TypeError, r"w: expected dtype torch.bfloat16"),
        ((X, W, A, B.double(), 1.0), {}, TypeError, r"b: expected dtype torch.float32"),
        ((X.long(), W, A, B, 1.0), {}, TypeError, r"x: expected a floating dtype, got torch.int64"),
        ((X, None, A, B, 1.0), {}, TypeError, r"w: expected a Tensor .*, got NoneType"),
        ((X, W.to("meta"), A, B, 1.0), {}, ValueError, r"w: expected device cpu .*got meta"),
        ((X, W, A, B, 1.0, torch.randn(5)), {}, ValueError, r"bias: expected \[6\].*got \[5\]"),
        ((X, W, A, B, 1.0), {"dropout_p": 1.0}, ValueError, r"0 <= p < 1, got 1.0"),
        ((X, W, A, B, 1.0), {"impl": "cublas"}, ValueError, r"impl: expected one of .*'cublas'"),
        ((X, W, A, B, 1.0), {"impl": "cuda"}, ValueError, r"expected CUDA tensors, got cpu"),
        ((X, W, A, B, 1.0), {"impl": "cuda", "dropout_p": 0.1}, ValueError, r"no dropout"),
        ((torch.randn(65, 8), W, A, B, 1.0), {"impl": "cuda"}, ValueError, r"<= 64 rows, got 65"),
        ((X.double(), W.double(), A.double(), B.double(), 1.0), {"impl": "triton"}, TypeError,
         "got torch.float64; use .aten."),
        ((torch.randn(17, 8), W, A, B, 1.0), {"impl": "native"}, ValueError, r"<= 16 rows, got 17"),
        ((X.double(), W.double(), A.double(), B.double(), 1.0), {"impl": "native"}, ValueError,
         r"expected CPU tensors of fp32, bf16 or fp16"),
        ((X, W, A, B, 1.0), {"dropout_p": 0.1, "impl": "native"}, ValueError, r"no dropout"),
        ((X, W, A, B, 1.0), {"magnitude": torch.ones(5)}, ValueError, r"magnitude: expected \[6\]"),
        ((X, W, A, B, 1.0), {"magnitude": [1.0]}, TypeError, r"magnitude: .* or None, got list"),
        ((X, W, A, B, 1.0, 0.5), {}, TypeError, r"bias: .* or None, got float"),
        ((X, W, A, B, None), {}, TypeError, r"scale: expected a number, got None"),
        ((X, W, A, B, float("nan")), {}, ValueError, r"scale: expected a finite number, got nan"),
        ((X, W, A, B, torch.ones(1, requires_grad=True)), {}, TypeError, "that requires a gradien"),
        ((X, W, A, B, 1.0), {"dropout_p": "a"}, TypeError, r"dropout_p: .* number, got 'a'"),
        ((X, W, A, B, 1.0), {"dropout_p": 0.1, "seed": 1.5}, TypeError, r"seed: .*, got 1.5"),
        ((X, W, A, B, 1.0), {"impl": "triton"}, ValueError, r"expected CUDA tensors, got cpu"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("autocast", [False, True])
def test_bad_input(args, kwargs, error, message, autocast):
    autocast = autocast and "dtype torch" not in message  # which it would cast
    with torch.autocast("cpu", enabled=autocast), pytest.raises(error, match=message):
        ops.lora_linear(*args, **kwargs)


def test_the_choice_of_implementation():
    assert choose_impl("cpu", 16, False)[0] == "native"
    assert choose_impl("cpu", 17, False)[0] == "aten"
    assert choose_impl("cpu", 1, True)[0] == "aten"
    assert choose_impl("cpu", 1, False, native_ok=False)[0] == "aten"
    assert choose_impl("cuda", 16, False)[0] == "cuda"
    assert choose_impl("cuda", 17, False)[0] == "by shape"
    assert choose_impl("cuda", 1, True)[0] == "by shape"
    assert choose_impl("cuda", 1, False, native_ok=False)[0] == "by shape"
    assert choose_impl("meta", 1, False)[0] == "aten"
    assert choose_impl("cuda", 1, False, dtype=torch.float64)[0] == "aten"


def test_shapes_without_memory():
    """A model on the meta device, whose size is asked for: autocast knows no such device."""
    x, w, a, b = (t.to("meta") for t in (X, W, A, B))
    y = ops.lora_linear(x.requires_grad_(), w, a, b, 1.0)
    assert y.shape == (*x.shape[:-1], w.shape[0]) and y.is_meta
    assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape
