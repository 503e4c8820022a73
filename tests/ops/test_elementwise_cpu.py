"""RMSNorm and gates in C++: against float64, and everything that is left to eager torch."""

import pytest
import torch

from fusedpeft.ops import elementwise_cpu
from fusedpeft.ops.elementwise_cpu import GATES, gated, gated_ref, rms_norm, rms_norm_ref
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
    every = rms_norm(x, w, 1e-5), gated(x, x.flip(0), "silu")
    try:
        torch.set_num_threads(1)
        alone = rms_norm(x, w, 1e-5), gated(x, x.flip(0), "silu")
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
        native.gated(at, at, 0, at, 0, 16, 0, 0)
    with pytest.raises(ValueError, match="dup: expected an address beside dy"):
        native.gated(at, at, at, at, 0, 16, 3, 0)
