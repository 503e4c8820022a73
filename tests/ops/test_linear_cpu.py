"""A frozen linear alone for few rows: against float64, and everything that is left to F.linear."""

import pytest
import torch
import torch.nn.functional as F

from fusedpeft.layers.linear import Linear
from fusedpeft.ops import linear_cpu
from fusedpeft.ops.linear_cpu import few_rows
from fusedpeft.ops.native import native

pytestmark = pytest.mark.skipif(native is None, reason="fusedpeft._C is not built")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def of_any_size(monkeypatch):
    monkeypatch.setattr(linear_cpu, "_LEAST", 0)


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (33, 31), (130, 64), (300, 1088), (2048, 96)])
def test_against_float64(check_accuracy, dtype, shape):
    n, k = shape
    w = (normal(n, k + 3, seed=1) / k**0.5).to(dtype)[:, :k]  # rows lie apart
    for lead, bias in (((1,), None), ((2, 2), normal(n, dtype=dtype)), ((), None), ((1, 16), None)):
        x = normal(*lead, k, dtype=dtype)
        got = few_rows(x, w, bias)
        assert got.shape == (*lead, n) and got.dtype == dtype
        wide = (x.double(), w.double(), None if bias is None else bias.double())
        check_accuracy("y", got, F.linear(x, w, bias), F.linear(*wide))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_lie_apart(dtype):
    """The last tokens of prompts: ATen would copy W for each of them, in 16 bits."""
    x, w = normal(8, 5, 96, dtype=dtype)[:, -1:], normal(513, 96, dtype=dtype, seed=1)
    assert not x.is_contiguous() and torch.equal(few_rows(x, w, None), few_rows(x.clone(), w, None))
    apart = normal(4, 192, dtype=dtype)[:, ::2]
    assert torch.equal(few_rows(apart, w, None), few_rows(apart.clone(), w, None))


def test_many_rows_that_lie_apart_are_laid_together(monkeypatch):
    seen, layer, x = [], Linear(32, 8), normal(40, 3, 32)[:, -1:]
    given = F.linear
    want = given(x.clone(), layer.weight, layer.bias)
    monkeypatch.setattr(
        F, "linear", lambda x, *w: (seen.append(x.is_contiguous()), given(x, *w))[1]
    )
    assert torch.equal(layer(x), want) and seen == [True]


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_depend_on_neither_threads_nor_neighbours(dtype):
    x, w = normal(16, 96, dtype=dtype), normal(513, 96, dtype=dtype, seed=1)
    every, threads = few_rows(x, w, None), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = torch.cat([few_rows(row, w, None) for row in x.split(1)])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(every, alone)


def test_what_f_linear_is_left_with(monkeypatch):
    x, w, bias = normal(4, 32), normal(8, 32, seed=1), normal(8, seed=2)
    assert few_rows(x, w, bias) is not None
    learns = w.clone().requires_grad_()
    left = {
        "more than 16 rows": (normal(17, 32), w, bias),
        "no rows": (x[:0], w, bias),
        "another K": (normal(4, 31), w, bias),
        "another dtype": (x.double(), w, bias),
        "fp64": (x.double(), w.double(), bias.double()),
        "a bias of another": (x, w, bias.double()),
        "a transposed W": (x, normal(32, 8).t(), bias),
        "another device": (x.to("meta"), w.to("meta"), bias.to("meta")),
        "a gradient": (x, learns, bias),
    }
    for what, args in left.items():
        assert few_rows(*args) is None, what
    with torch.no_grad():
        assert few_rows(x, learns, bias) is not None
    with torch.autocast("cpu"):
        assert few_rows(x, w, bias) is None
    monkeypatch.setattr(linear_cpu, "_LEAST", 8 * 32 + 1)
    assert few_rows(x, w, bias) is None and few_rows(x.half(), w.half(), None) is not None
    monkeypatch.setattr(linear_cpu, "native", None)
    assert few_rows(x.half(), w.half(), None) is None


def test_the_kernel_refuses_more_rows_than_it_takes():
    x, w = normal(65, 8), normal(4, 8)
    with pytest.raises(ValueError, match="m: expected <= 64, got 65"):
        y = x.new_empty(65, 4)
        native.linear(x.data_ptr(), w.data_ptr(), 0, y.data_ptr(), 65, 8, 4, 8, 8, 0)
