"""bottleneck_adapter on a CPU against float64: values, gradients, norms, rejections, transforms."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedpeft import ops
from fusedpeft.ops import adapter_native
from fusedpeft.ops.adapter import ACTIVATIONS, choose_impl
from fusedpeft.ops.native import native

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ("x", "down_w", "down_b", "up_w", "up_b", "residual", "norm_weight", "norm_bias")
NORMS = [None, "layer_norm", "rms_norm"]


def make(m, d, e, dtype, *, adapter=None, bias=True, norm=None, residual="other", offset=0.5):
    """x with a mean, so that a norm has something to subtract; None for what is not there."""
    g = torch.Generator().manual_seed(m * 31 + d * 7 + e)
    rnd = lambda *s: torch.randn(*s, generator=g)  # noqa: E731
    ad = adapter or dtype
    t = dict(x=(rnd(m, d) + offset).to(dtype), down_w=(rnd(e, d) / d**0.5).to(ad))
    t["down_b"] = rnd(e).to(ad) if bias else None
    t["up_w"] = (rnd(d, e) / e**0.5).to(ad)
    t["up_b"] = rnd(d).to(ad) if bias else None
    t["residual"] = {"other": rnd(m, d).to(dtype), "x": t["x"], None: None}[residual]
    t["norm_weight"] = (rnd(d) + 1).to(ad) if norm else None
    t["norm_bias"] = rnd(d).to(ad) if norm == "layer_norm" else None
    return t


def call(fn, t, **kw):
    rest = {k: t[k] for k in NAMES[5:]}
    return fn(t["x"], t["down_w"], t["down_b"], t["up_w"], t["up_b"], **rest, **kw)


def grads(fn, t, dy, dtype=None, **kw):
    """(y, {name: gradient}); a residual that is x stays x."""
    leaves = {k: v.detach().to(dtype or v.dtype, copy=True).requires_grad_()
              for k, v in t.items() if v is not None}  # fmt: skip
    if t["residual"] is t["x"]:
        leaves["residual"] = leaves["x"]
    names = list(dict.fromkeys(k for k in leaves if k == "x" or leaves[k] is not leaves["x"]))
    y = call(fn, {k: leaves.get(k) for k in NAMES}, **kw)
    found = torch.autograd.grad(y, [leaves[k] for k in names], dy.to(y.dtype))
    return y.detach(), dict(zip(names, found, strict=True))


def compare(check, t, **kw):
    dy = torch.randn(t["x"].shape, generator=torch.Generator().manual_seed(1)).to(t["x"].dtype)
    kw["seed"] = torch.tensor([42])
    low = grads(ops.bottleneck_adapter_ref, t, dy, **kw)
    ref = grads(ops.bottleneck_adapter_ref, t, dy, torch.float64, **kw)
    for impl in ("aten",) if native is None or kw.get("dropout_p") else ("aten", "native"):
        got = grads(ops.bottleneck_adapter, t, dy, impl=impl, **kw)
        check(f"{impl}: y", got[0], low[0], ref[0])
        assert got[1].keys() == low[1].keys()
        for name, g in got[1].items():
            assert g.dtype == t[name].dtype and g.shape == t[name].shape, name
            check(f"{impl}: d {name}", g, low[1][name], ref[1][name])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", ["other", "x", None])
@pytest.mark.parametrize(
    "m, d, e",
    [(1, 64, 8), (63, 129, 12), (1000, 96, 64), (5, 1, 1), (9, 70, 512), (200, 160, 40)],
)
def test_against_float64(check_accuracy, m, d, e, residual, dtype):
    compare(check_accuracy, make(m, d, e, dtype, residual=residual), scale=0.5, activation="gelu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(check_accuracy, activation, dtype):
    compare(check_accuracy, make(63, 129, 12, dtype), activation=activation)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("position", ["before", "after"])
@pytest.mark.parametrize("residual", ["other", "x", None])
@pytest.mark.parametrize("norm", NORMS[1:])
def test_norms(check_accuracy, norm, residual, position, dtype):
    t = make(40, 129, 12, dtype, norm=norm, residual=residual)
    compare(check_accuracy, t, norm=norm, norm_position=position, activation="silu", scale=2.0)


@pytest.mark.skipif(native is None, reason="the extension is not built")
@pytest.mark.parametrize("adapter", [None, torch.float32])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", ["other", "x", None])
@pytest.mark.parametrize("norm", NORMS)
def test_few_rows_without_gradients(check_accuracy, monkeypatch, norm, residual, dtype, adapter):
    """The C++ kernel for them, up to the number of rows from which on others answer."""
    calls, one, spec = [], native.adapter_decode_one, ops.bottleneck_adapter_ref
    counted = SimpleNamespace(
        adapter_decode_one=lambda *a: (calls.append(1), one(*a)), adapter_train=native.adapter_train
    )
    monkeypatch.setattr(adapter_native, "native", counted)
    for m, d, e in ((1, 64, 8), (5, 129, 12), (32, 96, 1), (33, 96, 40)):
        t = make(m, d, e, dtype, adapter=adapter, bias=m > 1, norm=norm, residual=residual)
        wide = {k: None if v is None else v.double() for k, v in t.items()}
        got, low, ref = (
            call(fn, given, norm=norm, activation="gelu", scale=0.5)
            for fn, given in ((ops.bottleneck_adapter, t), (spec, t), (spec, wide))
        )
        check_accuracy(f"y of {m}", got, low, ref)
    assert len(calls) == 3
    t["x"] = t["x"][:7].t().contiguous().t()  # with strides of its own
    t["residual"] = None
    got, want = call(ops.bottleneck_adapter, t, norm=norm), call(spec, t, norm=norm)
    torch.testing.assert_close(got, want, atol=0.05, rtol=0.05)  # not another row's
    assert len(calls) == 3


@pytest.mark.parametrize("norm", NORMS[1:])
def test_a_norm_of_rows_far_from_zero(check_accuracy, norm):
    t = make(40, 256, 16, torch.float32, norm=norm, offset=30.0)
    t["down_w"] -= t["down_w"].mean(1, keepdim=True)  # else rms_norm's P is one huge number
    got = call(ops.bottleneck_adapter, t, norm=norm)
    t64 = {k: None if v is None else v.double() for k, v in t.items()}
    ref = call(ops.bottleneck_adapter_ref, t64, norm=norm)
    assert (got - ref).abs().max() <= 1e-4 * ref.abs().max()


@pytest.mark.parametrize("norm", NORMS)
def test_rows_far_from_zero_in_bf16(check_accuracy, norm):
    t = make(100, 160, 24, torch.bfloat16, norm=norm, residual="x", offset=30.0)
    compare(check_accuracy, t, norm=norm, activation="gelu")


@pytest.mark.skipif(native is None, reason="the extension is not built")
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("norm", NORMS)
def test_a_row_that_is_not_finite_stays_alone(norm, value):
    t = make(70, 160, 20, torch.bfloat16, norm=norm, residual="x")
    dy = torch.randn_like(t["x"])
    want, want_of = grads(ops.bottleneck_adapter, t, dy, norm=norm, impl="native")
    t["x"][37, 5] = value
    got, of = grads(ops.bottleneck_adapter, t, dy, norm=norm, impl="native")
    others = torch.arange(70) != 37
    assert torch.equal(got[others], want[others])
    assert torch.equal(of["x"][others], want_of["x"][others])


def test_a_norm_without_weights(check_accuracy):
    t = make(63, 129, 12, torch.float32)
    compare(check_accuracy, t, norm="layer_norm")
    compare(check_accuracy, t, norm="rms_norm", norm_position="after")


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp32_adapters_beside_16_bits(check_accuracy, dtype, norm, p):
    t = make(63, 128, 12, dtype, adapter=torch.float32, norm=norm, residual="x")
    compare(check_accuracy, t, norm=norm, dropout_p=p)


@pytest.mark.parametrize("residual", ["other", "x", None])
@pytest.mark.parametrize("bias", [True, False])
def test_dropout_and_biases(check_accuracy, bias, residual):
    for p in (0.0, 0.25):
        t = make(63, 129, 12, torch.float32, bias=bias, residual=residual)
        compare(check_accuracy, t, dropout_p=p, scale=1.5)


@settings(max_examples=40, deadline=None)
@given(
    lead=st.lists(st.integers(0, 4), min_size=0, max_size=3),
    d=st.integers(1, 20),
    e=st.integers(1, 9),
    norm=st.sampled_from(NORMS),
    transposed=st.booleans(),
)
def test_any_leading_dims_and_strides(lead, d, e, norm, transposed):
    x, residual = torch.randn(*lead, d + 3)[..., 3:], torch.randn(*lead, 2 * d)[..., ::2]
    down = torch.randn(d, e).t() if transposed else torch.randn(e, d)
    up = torch.randn(e, d).t() if transposed else torch.randn(d, e)
    args = (x, down, torch.randn(e), up, torch.randn(2 * d)[::2])
    got = ops.bottleneck_adapter(*args, residual=residual, norm=norm)
    want = ops.bottleneck_adapter_ref(*args, residual=residual, norm=norm)
    assert got.shape == (*lead, d)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("residual", ["other", "x"])
def test_gradcheck_and_opcheck(norm, residual):
    t = make(5, 13, 3, torch.float64, norm=norm, residual=residual)
    names = [k for k in NAMES if t[k] is not None and (k != "residual" or residual == "other")]
    leaves = [t[k].requires_grad_() for k in names]

    def fn(*values):
        new = t | dict(zip(names, values, strict=True))
        new |= {"residual": new["x"]} if residual == "x" else {}
        return call(
            ops.bottleneck_adapter, new, norm=norm, activation="tanh", dropout_p=0.3, seed=3
        )

    assert torch.autograd.gradcheck(fn, leaves)
    tensors = [t[k] if k != "residual" or residual == "other" else None for k in NAMES]
    args = (*tensors, torch.tensor([3]), "tanh", norm or "", 1e-5, 0.7, 0.3, residual == "x", "")
    torch.library.opcheck(torch.ops.fusedpeft.bottleneck_adapter, args)


@pytest.mark.parametrize("residual", ["other", "x"])
def test_compiled_equals_eager_with_gradients(residual):
    t = make(20, 32, 4, torch.float32, norm="layer_norm", residual=residual)
    dy = torch.randn(20, 32)
    kw = dict(norm="layer_norm", dropout_p=0.1, seed=9)
    eager = grads(ops.bottleneck_adapter, t, dy, **kw)
    compiled = torch.compile(ops.bottleneck_adapter, fullgraph=True, backend="aot_eager")
    other = grads(compiled, t, dy, **kw)
    torch.testing.assert_close(eager[0], other[0])
    torch.testing.assert_close(eager[1], other[1])


@pytest.mark.parametrize("name", NAMES)
def test_only_what_is_needed(name):
    """One leaf at a time: its gradient is that of all at once; nothing else gets one."""
    t = make(9, 16, 4, torch.float32, norm="layer_norm")
    dy = torch.randn(9, 16)
    want = grads(ops.bottleneck_adapter, t, dy, norm="layer_norm")[1][name]
    leaf = t[name].clone().requires_grad_()
    y = call(ops.bottleneck_adapter, t | {name: leaf}, norm="layer_norm")
    for _ in range(2):  # a second backward gives the same
        (got,) = torch.autograd.grad(y, leaf, dy, retain_graph=True)
        torch.testing.assert_close(got, want)


def test_inputs_are_left_alone():
    t = make(9, 16, 4, torch.bfloat16, residual="x", norm="rms_norm")
    before = {k: v.clone() for k, v in t.items() if v is not None}
    dy = torch.randn(9, 16).bfloat16()
    kept = dy.clone()
    call(ops.bottleneck_adapter, t, norm="rms_norm")
    leaf = t["x"].requires_grad_()
    call(ops.bottleneck_adapter, t, norm="rms_norm").backward(dy)
    assert torch.equal(dy, kept) and leaf.grad is not None
    assert all(torch.equal(t[k], v) for k, v in before.items())


@pytest.mark.parametrize("norm, extra", [(None, 0), ("layer_norm", 50 * 2)])
def test_saved_bytes_are_those_of_the_docstring(norm, extra):
    t = make(50, 64, 8, torch.float32, norm=norm, residual="x")
    t["down_w"].requires_grad_(), t["up_w"].requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda v: saved.append(v) or v, lambda v: v):
        call(ops.bottleneck_adapter, t, norm=norm, dropout_p=0.2)
    own = {v.data_ptr() for v in t.values() if v is not None and v is not t["x"]}
    numbers = [v for v in saved if v.is_floating_point() and v.data_ptr() not in own]
    assert sum(v.numel() for v in numbers) == 50 * 64 + 50 * 8 + extra


def test_dropout_is_recomputed_alike_under_checkpointing():
    t = make(9, 16, 4, torch.float32)
    weights = [t["down_w"].requires_grad_(), t["up_w"].requires_grad_()]
    fn = lambda x: call(ops.bottleneck_adapter, t | {"x": x}, dropout_p=0.5)  # noqa: E731
    torch.manual_seed(0)
    want = torch.autograd.grad(fn(t["x"]).square().sum(), weights)
    torch.manual_seed(0)
    y = torch.utils.checkpoint.checkpoint(fn, t["x"], use_reentrant=False)
    for f, s in zip(want, torch.autograd.grad(y.square().sum(), weights), strict=True):
        assert torch.equal(f, s)


def test_autocast_runs_in_its_dtype_and_returns_fp32_gradients():
    t = make(20, 32, 4, torch.float32, residual="x", norm="layer_norm")
    t["down_w"].requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = call(ops.bottleneck_adapter, t, norm="layer_norm")
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert t["down_w"].grad.dtype == torch.float32


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("norm", NORMS)
def test_empty_input(norm, p):
    for _ in range(20):  # what a kernel writes beside its memory is seen late
        t = make(0, 128, 64, torch.float32, norm=norm, residual="x")
        y, g = grads(ops.bottleneck_adapter, t, torch.zeros(0, 128), norm=norm, dropout_p=p)
        assert y.shape == g["x"].shape == (0, 128)
        assert all(v.count_nonzero() == 0 and v.isfinite().all() for v in g.values())


def test_what_each_device_takes():
    assert choose_impl("cuda", torch.bfloat16)[0] == "triton"
    assert choose_impl("cuda", torch.bfloat16, wide=False)[0] == "aten"
    for device, dtype in (("cuda", torch.float64), ("cpu", torch.float64), ("xpu", torch.half)):
        assert choose_impl(device, dtype)[0] == "aten"
    wide, fp32, bf16 = dict(capability="avx512", products=True), torch.float32, torch.bfloat16
    assert choose_impl("cpu", fp32, **wide)[0] == "native"
    assert choose_impl("cpu", fp32, dropout=True, **wide)[0] == "aten"
    assert choose_impl("cpu", fp32, capability="avx2")[0] == "aten"
    assert choose_impl("cpu", bf16, **wide)[0] == "aten"
    assert choose_impl("cpu", bf16, "rms_norm", **wide)[0] == "native"
    tiles = dict(capability="amx", products=True)
    assert choose_impl("cpu", bf16, "layer_norm", **tiles)[0] == "native"
    assert choose_impl("cpu", bf16, dropout=True, **tiles)[0] == "aten"
    assert choose_impl("cpu", torch.float16, **tiles)[0] == "aten"
    assert choose_impl("cpu", bf16, capability="avx2", products=False)[0] == "native"
    for capability in ("", "portable"):
        assert choose_impl("cpu", bf16, capability=capability, products=False)[0] == "aten"


@pytest.mark.skipif(native is None, reason="the extension is not built")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("sizes", [(203, 21), (256, 32)])
def test_bits_do_not_depend_on_threads(sizes, norm, dtype):
    t = make(300, *sizes, dtype, norm=norm, residual="x")
    dy, threads, found = torch.randn_like(t["x"]), torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            y, of = grads(
                ops.bottleneck_adapter, t, dy, norm=norm, activation="gelu", impl="native"
            )
            found.append([y, *of.values()])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.skipif(native is None, reason="the extension is not built")
@pytest.mark.parametrize("activation", sorted(adapter_native.ACTIVATION_CODES))
def test_activations_over_all_of_their_range(activation):
    """One number a row through the C++ kernel: from where the tails are 0 to where they are 1."""
    x = torch.cat((torch.linspace(-20, 20, 4001), torch.tensor([1e-8, -1e-8, 1e4, -1e4])))[:, None]
    one, none = torch.ones(1, 1), torch.zeros(1)
    x.requires_grad_()
    y = ops.bottleneck_adapter(x, one, none, one, none, activation=activation, impl="native")
    (dx,) = torch.autograd.grad(y.sum(), x)
    wide = x.detach().double().requires_grad_()
    want = ACTIVATIONS[activation][0](wide)
    (slope,) = torch.autograd.grad(want.sum(), wide)
    torch.testing.assert_close(y.double(), want, rtol=1e-6, atol=3e-7)
    torch.testing.assert_close(dx.double(), slope, rtol=1e-6, atol=1e-6)


X, D, C, U, E = WIDTH_8 = [torch.randn(s) for s in ((3, 8), (2, 8), (2,), (8, 2), (8,))]


@pytest.mark.parametrize(
    "args, kwargs, error, message",
    [
        ((X[:, :7], D, C, U, E), {}, ValueError, r"x: expected last dim d = 8 .*got \(3, 7\)"),
        ((X, D[:0], None, U[:, :0], E), {}, ValueError, r"bottleneck E >= 1, got 0"),
        ((X, D[0], C, U, E), {}, ValueError, r"\[\*, d\] and \[E, d\], got \(3, 8\), \(8,\)"),
        ((X, D, C[:1], U, E), {}, ValueError, r"down_b: expected shape \(2,\), got \(1,\)"),
        ((X, D, C, U.t(), E), {}, ValueError, r"up_w: expected shape \(8, 2\), got \(2, 8\)"),
        ((X, D, C, U, X), {}, ValueError, r"up_b: expected shape \(8,\), got \(3, 8\)"),
        ((X, D, C, U, E), {"residual": X[:2]}, ValueError, r"residual: expected shape \(3, 8\)"),
        ((X, D, C, U, E), {"residual": X.half()}, TypeError, r"residual: .*float32 \(as x\)"),
        ((X, D.half(), C, U, E), {}, TypeError, r"down_w: expected dtype torch.float32 .*float16"),
        ((X, D, C, U.double(), E), {}, TypeError, r"up_w: .*float32 \(as down_w\)"),
        ((X.long(), D, C, U, E), {}, TypeError, r"x: expected a floating dtype, got torch.int64"),
        ((X, None, C, U, E), {}, TypeError, r"down_w: expected a Tensor, got NoneType"),
        ((X, D, C, U.to("meta"), E), {}, ValueError, r"up_w: expected device cpu .*got meta"),
        ((X, D, C, U, E), {"activation": "mish"}, ValueError, r"activation: .*got 'mish'"),
        ((X, D, C, U, E), {"norm": "batch"}, ValueError, r"norm: expected one of .*got 'batch'"),
        ((X, D, C, U, E), {"norm_position": "in"}, ValueError, r"norm_position: .*got 'in'"),
        ((X, D, C, U, E), {"norm_weight": E}, ValueError, r"expected None without a norm"),
        ((X, D, C, U, E), {"norm": "rms_norm", "norm_bias": E}, ValueError, r"None with rms_norm"),
        ((X, D, C, U, E), {"norm": "layer_norm", "norm_weight": C}, ValueError, r"weight: .*8"),
        ((X, D, C, U, E), {"dropout_p": 1.0}, ValueError, r"0 <= p < 1, got 1.0"),
        ((X, D, C, U, E), {"impl": "cuda"}, ValueError, r"impl: expected one of .*got 'cuda'"),
        ([t.double() for t in WIDTH_8], {"impl": "triton"}, TypeError, r"fp16, got torch.float64"),
        ([t.double() for t in WIDTH_8], {"impl": "native"}, TypeError, r"fp16, got torch.float64"),
        (WIDTH_8, {"impl": "native", "dropout_p": 0.1}, ValueError, r"no dropout, got dropout"),
    ],
)  # fmt: skip
def test_bad_input(args, kwargs, error, message):
    with pytest.raises(error, match=message):
        ops.bottleneck_adapter(*args, **kwargs)


def test_shapes_without_memory():
    x, *rest = (t.to("meta") for t in (X, D, C, U, E))
    assert ops.bottleneck_adapter(x.requires_grad_(), *rest).shape == x.shape
