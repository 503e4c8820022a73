"""RMSNorm, gated FFNs and rotary positions in C++: against float64, and what they leave."""

import pytest
import torch

from fusedpeft.ops import elementwise_cpu
from fusedpeft.ops.elementwise_cpu import (
    GATES,
    gated,
    gated_mlp,
    gated_ref,
    rms_norm,
    rms_norm_ref,
    rotary,
    rotary_ref,
)
from fusedpeft.ops.native import native

pytestmark = pytest.mark.skipif(native is None, reason="fusedpeft._C is not built")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (3, 31), (2, 5, 256), (7, 300), (40, 1088), (600, 64)]


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def results(function, inputs, dy, dtype=None):
    """y and the gradients of inputs."""
    inputs = [t.to(dtype or t.dtype).detach().requires_grad_() for t in inputs]
    y = function(*inputs)
    return [y, *torch.autograd.grad(y, inputs, dy.to(y.dtype))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm_against_float64(check_accuracy, shape, offset, dtype):
    x, dy = 3 * normal(*shape), normal(*shape, seed=1).to(dtype)
    x[0] *= 1e-3  # beside eps
    x, w = x.to(dtype), normal(shape[-1], seed=2).to(dtype)

    def by(norm, weight):
        return lambda x: norm(x, weight, 1e-5, offset)

    got = results(by(rms_norm, w), [x], dy)
    low = results(by(rms_norm_ref, w), [x], dy)
    wide = results(by(rms_norm_ref, w.double()), [x], dy, torch.float64)
    assert type(got[0].grad_fn).__name__ == "_RmsNormBackward"
    for name, *three in zip(("y", "dx"), got, low, wide, strict=True):
        check_accuracy(name, *three)
    with torch.no_grad():
        assert torch.equal(rms_norm(x, w, 1e-5, offset), got[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", GATES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gated_against_float64(check_accuracy, shape, activation, dtype):
    inputs = [(3 * normal(*shape)).to(dtype), normal(*shape, seed=1).to(dtype)]
    dy = normal(*shape, seed=2).to(dtype)
    got = results(lambda *t: gated(*t, activation), inputs, dy)
    low = results(lambda *t: gated_ref(*t, activation), inputs, dy)
    wide = results(lambda *t: gated_ref(*t, activation), inputs, dy, torch.float64)
    for name, *three in zip(("y", "dgate", "dup"), got, low, wide, strict=True):
        check_accuracy(name, *three)
    with torch.no_grad():
        assert torch.equal(gated(*inputs, activation), got[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(8, 1, 300), (2, 3, 7), (5, 256), (1, 1, 9)])
def test_gated_of_two_parts_of_rows(shape, dtype):
    """As a product of gate and up together leaves them."""
    both = normal(*shape[:-1], 2 * shape[-1] + 3).to(dtype)
    gate, up, _ = both.split((shape[-1], shape[-1], 3), -1)
    got = gated(gate, up, "silu")
    assert got.is_contiguous()
    assert torch.equal(got, gated(gate.contiguous(), up.contiguous(), "silu"))
    with torch.enable_grad():  # its gradients are of whole tensors
        assert gated(gate.requires_grad_(), up, "silu") is None or gate.is_contiguous()
    lying = normal(*shape[:-2], shape[-1], shape[-2]).to(dtype).transpose(-1, -2)
    assert gated(lying, lying, "silu") is None or lying.is_contiguous()


def mlp_ref(x, wg, wu, wd, activation):
    return gated_ref(x @ wg.t(), x @ wu.t(), activation) @ wd.t()


def frozen(*weights):
    return [(w, None) for w in weights]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (6, 31, 40, 17), (130, 64, 300, 64)])
def test_gated_mlp_against_float64(check_accuracy, sizes, dtype):
    rows, d, wide, out = sizes
    shapes = (wide, d), (wide, d), (out, wide)
    ws = [(normal(*s, seed=i) / s[1] ** 0.5).to(dtype) for i, s in enumerate(shapes)]
    x, dy = normal(2, rows, d, seed=3).to(dtype), normal(2, rows, out, seed=4).to(dtype)
    double = [w.double() for w in ws]
    got = results(lambda x: gated_mlp(x, *frozen(*ws), "silu"), [x], dy)
    low = results(lambda x: mlp_ref(x, *ws, "silu"), [x], dy)
    wide = results(lambda x: mlp_ref(x, *double, "silu"), [x], dy, torch.float64)
    for name, *three in zip(("y", "dx"), got, low, wide, strict=True):
        check_accuracy(name, *three)


def test_gated_mlp_twice_and_what_it_leaves():
    x, weights = normal(3, 8).requires_grad_(), [normal(8, 8, seed=i) / 8**0.5 for i in range(3)]

    def penalty(mlp):
        (dx,) = torch.autograd.grad(mlp(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), x)[0]

    got = penalty(lambda x: gated_mlp(x, *frozen(*weights), "gelu"))
    want = penalty(lambda x: mlp_ref(x, *weights, "gelu"))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    kept = gated_mlp(x, *frozen(*weights), "silu").sum()  # gate's gradient lies where dh's did
    first = torch.autograd.grad(kept, x, retain_graph=True)
    assert torch.equal(first[0], torch.autograd.grad(kept, x)[0])
    wg, wu, wd = frozen(*weights)
    learns = (weights[1].clone().requires_grad_(), None)
    assert gated_mlp(x, wg, learns, wd, "silu") is None
    assert gated_mlp(x, wg, wu, (wd[0], normal(8)), "silu") is None
    assert gated_mlp(x.detach(), wg, wu, wd, "silu") is None
    with torch.no_grad():
        assert gated_mlp(x, wg, wu, wd, "silu") is None


ROTARY = [  # B, H, HKV, T, D, rows of cos
    (1, 1, 1, 1, 2, 1),
    (2, 4, 2, 7, 6, 2),
    (2, 3, 1, 33, 64, 1),
    (1, 2, 2, 3, 640, 1),
    (4, 8, 4, 90, 64, 4),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("by_token", [True, False])
@pytest.mark.parametrize("sizes", ROTARY)
def test_rotary_against_float64(check_accuracy, sizes, by_token, dtype):
    batch, heads, groups, tokens, dim, rows = sizes

    def laid(count, seed):
        t = normal(batch, tokens, count, dim, dtype=dtype, seed=seed).transpose(1, 2)
        return t if by_token else t.contiguous()

    cos, sin = (normal(rows, tokens, dim, dtype=dtype, seed=s) for s in (2, 3))
    pair = laid(heads, 0), laid(groups, 1)
    inputs = [t.requires_grad_() for t in pair]
    ys = rotary(*inputs, cos, sin)
    for i, (x, y) in enumerate(zip(inputs, ys, strict=True)):
        assert y.stride() == x.stride() and type(y.grad_fn).__name__ == "_RotaryBackward"
        dy = torch.randn_like(x)
        (dx,) = torch.autograd.grad(y, x, dy, retain_graph=True)
        low = results(lambda x: rotary_ref(x, cos, sin), [x], dy)
        wide = (cos.double(), sin.double())
        exact = results(lambda x, wide=wide: rotary_ref(x, *wide), [x], dy, torch.float64)
        for name, *three in zip((f"y{i}", f"dx{i}"), (y, dx), low, exact, strict=True):
            check_accuracy(name, *three)
    with torch.no_grad():
        assert all(map(torch.equal, rotary(*inputs, cos, sin), ys))


def test_rotary_one_gradient_twice_and_what_it_leaves():
    q, k = normal(2, 2, 5, 8), normal(2, 1, 5, 8, seed=1)
    cos, sin = normal(1, 5, 8, seed=2), normal(1, 5, 8, seed=3)
    one = q.clone().requires_grad_()

    def penalty(turned):
        (dq,) = torch.autograd.grad(turned(one).pow(3).sum(), one, create_graph=True)
        return torch.autograd.grad(dq.square().sum(), one)[0]

    got = penalty(lambda q: rotary(q, k, cos, sin)[0])
    torch.testing.assert_close(got, penalty(lambda q: rotary_ref(q, cos, sin)))
    assert not rotary(q, k, cos, sin)[0].requires_grad
    assert [t.requires_grad for t in rotary(one, k, cos, sin)] == [True, False]
    wide = normal(2, 2, 5, 16)
    left = {
        "odd D": tuple(t[..., :7] for t in (q, k, cos, sin)),
        "another D of k": (q, k[..., :6], cos, sin),
        "numbers that lie apart": (wide[..., ::2], k, cos, sin),
        "other tokens": (q, k, cos[:, :4], sin[:, :4]),
        "other rows": (q, k, cos.expand(3, -1, -1), sin.expand(3, -1, -1)),
        "cos of two dimensions": (q, k, cos[0], sin[0]),
        "another dtype": (q, k, cos.double(), sin.double()),
        "fp64": tuple(t.double() for t in (q, k, cos, sin)),
        "no tokens": tuple(t[..., :0, :] for t in (q, k, cos, sin)),
        "another device": tuple(t.to("meta") for t in (q, k, cos, sin)),
        "cos that learns": (q, k, cos.clone().requires_grad_(), sin),
    }
    for what, args in left.items():
        assert rotary(*args) is None, what
    with torch.autocast("cpu"):
        assert rotary(q, k, cos, sin) is None
    part = wide[..., 4:12]  # of a model that turns a part of each head
    torch.testing.assert_close(rotary(part, k, cos, sin)[0], rotary_ref(part, cos, sin))


def test_one_gradient_alone():
    gate, up = normal(4, 8), normal(4, 8, seed=1)
    for learns in (gate, up):
        pair = [t.clone().requires_grad_() if t is learns else t for t in (gate, up)]
        (one,) = [t for t in pair if t.requires_grad]
        (got,) = torch.autograd.grad(gated(*pair, "silu").sum(), one)
        (want,) = torch.autograd.grad(gated_ref(*pair, "silu").sum(), one)
        torch.testing.assert_close(got, want)


def test_gradients_of_gradients():
    x, w, up = normal(3, 8).requires_grad_(), normal(8, seed=1), normal(3, 8, seed=2)

    def penalty(norm, gate):
        y = gate(norm(x, w, 1e-5), up, "silu")
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), x)[0]

    torch.testing.assert_close(penalty(rms_norm, gated), penalty(rms_norm_ref, gated_ref))


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_threads(dtype):
    x, w, threads = normal(301, 256, dtype=dtype), normal(256, dtype=dtype), torch.get_num_threads()
    q, angles = x.view(7, 43, 4, 64).transpose(1, 2), x[:43, :64].unsqueeze(0)

    def run():
        turned = rotary(q, q, angles.cos(), angles.sin())
        return rms_norm(x, w, 1e-5), gated(x, x.flip(0), "silu"), *turned

    every = run()
    try:
        torch.set_num_threads(1)
        alone = run()
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, every, alone))


def test_nan_and_inf_come_through():
    x = normal(3, 32)
    x[0, 3], x[1, 4] = torch.nan, torch.inf
    w, up = torch.ones(32), torch.ones(3, 32)
    for got, want in (
        (rms_norm(x, w, 1e-5), rms_norm_ref(x, w, 1e-5)),
        (gated(x, up, "silu"), gated_ref(x, up, "silu")),
    ):
        torch.testing.assert_close(got, want, equal_nan=True)


def test_what_eager_torch_is_left_with(monkeypatch):
    x, w = normal(4, 32), normal(32, seed=1)
    assert rms_norm(x, w, 1e-5) is not None and gated(x, x, "silu") is not None
    learns = w.clone().requires_grad_()
    left = {
        "no rows": (x[:0], w),
        "columns that lie apart": (normal(4, 64)[:, ::2], w),
        "another d": (normal(4, 31), w),
        "another dtype": (x.half(), w),
        "fp64": (x.double(), w.double()),
        "another device": (x.to("meta"), w.to("meta")),
        "a weight that learns": (x, learns),
    }
    for what, args in left.items():
        assert rms_norm(*args, 1e-5) is None, what
    with torch.no_grad():
        assert rms_norm(x, learns, 1e-5) is not None
    for other in (x[:3], x.half(), x.t().contiguous().t(), x.to("meta")):
        assert gated(x, other, "silu") is None
    with torch.autocast("cpu"):
        assert rms_norm(x, w, 1e-5) is None and gated(x, x, "silu") is None
    monkeypatch.setattr(elementwise_cpu, "native", None)
    assert rms_norm(x, w, 1e-5) is None and gated(x, x, "silu") is None


def test_the_kernels_refuse_what_they_do_not_take():
    x = normal(2, 8)
    at = x.data_ptr()
    with pytest.raises(ValueError, match="d: expected >= 1, got 0"):
        native.rms_norm(at, at, 0, at, 2, 0, 1e-5, 0.0, 0)
    with pytest.raises(ValueError, match="activation: expected 1, 2 or 3, got 0"):
        native.gated(at, 16, at, 16, 0, at, 0, 1, 16, 0, 0)
    strides = (8, 8, 8)
    with pytest.raises(ValueError, match="d: expected >= 2, even, got 3"):
        native.rotary(at, strides, at, strides, at, strides, at, strides, 1, 1, 1, 3, False, 0)
    with pytest.raises(ValueError, match="x, cos, sin, out: expected addresses, got null"):
        native.rotary(0, strides, at, strides, at, strides, at, strides, 1, 1, 1, 4, False, 0)
    with pytest.raises(ValueError, match="cols: expected >= 1, got 0"):
        native.softmax(at, at, 1, 0, True)
    with pytest.raises(ValueError, match="dup: expected an address beside dy"):
        native.gated(at, 16, at, 16, at, at, 0, 1, 16, 3, 0)
