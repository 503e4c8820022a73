"""What test_lora_quantised_interpret.py runs under Triton's interpreter: see
lora_interpret_checks.py.

    TRITON_INTERPRET=1 pytest tests/kernels/lora_quantised_interpret_checks.py
"""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 from the start", allow_module_level=True)

from fusedpeft import ops
from fusedpeft.kernels import lora_quantised, lora_quantised_tables, lora_tables
from fusedpeft.kernels.lora_tables import ARCHS

SHAPES = {  # M, N, K, R
    "one_row": (1, 17, 34, 1),
    "rows16": (16, 40, 72, 12),
    "odd": (63, 65, 130, 8),
    "whole_tiles": (64, 128, 192, 16),
    "high_rank": (66, 67, 66, 70),
}
KINDS = {
    "nf4": lambda w: ops.NF4Weight.quantise(w),
    "nf4_double": lambda w: ops.NF4Weight.quantise(w, double=True),
    "nf4_blocks_of_256": lambda w: ops.NF4Weight.quantise(w, 256),
    "fp8_rows": lambda w: ops.FP8Weight.quantise(w),
    "fp8": lambda w: ops.FP8Weight.quantise(w, per_row=False),
}
NAMES = ("y", "dx", "da", "db", "dbias")


def make(shape, kind, dtype, adapter=None):
    """(weight, [x, a, b, bias], dy)."""
    m, n, k, r = shape
    g = torch.Generator().manual_seed(m + n + k + r)
    rnd = lambda *s: torch.randn(*s, generator=g)  # noqa: E731
    adapter, weight = adapter or dtype, KINDS[kind](rnd(n, k) / k**0.5)
    tensors = [rnd(m, k).to(dtype), (rnd(r, k) / k**0.5).to(adapter)]
    tensors += [(rnd(n, r) / r**0.5).to(adapter), rnd(n).to(dtype)]
    return weight, tensors, rnd(m, n).to(dtype)


def run(op, weight, tensors, dy, p, **kwargs):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    x, a, b, bias = leaves
    y = op(x, weight, a, b, 1.5, bias, dropout_p=p, seed=torch.tensor([-(2**61) + 5]), **kwargs)
    return y.detach(), *torch.autograd.grad(y, leaves, dy)


def check(weight, tensors, dy, p=0.0):
    """max|got - ref64| <= 2 max|low - ref64| + eps, the low precision being the inputs' own."""
    got = run(ops.lora_linear, weight, tensors, dy, p, impl="triton")
    low = run(ops.lora_linear_ref, weight, tensors, dy, p)
    truth = run(ops.lora_linear_ref, weight, [t.double() for t in tensors], dy.double(), p)
    for name, g, ref, lo in zip(NAMES, got, truth, low, strict=True):
        assert g.dtype == lo.dtype and g.shape == lo.shape
        error = (g.double() - ref).abs().max()
        bar = 2 * (lo.double() - ref).abs().max()
        bar += 2 * torch.finfo(dy.dtype).eps * ref.abs().max()
        assert error <= bar, f"{name}: error {error:.3g}, allowed {bar:.3g}"
    return got


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SHAPES)
def test_against_float64(name, kind, dtype):
    check(*make(SHAPES[name], kind, dtype))
    check(*make(SHAPES[name], kind, dtype), p=0.25)


@pytest.mark.parametrize("few_sms", [False, True])
@pytest.mark.parametrize("arch", ARCHS)
def test_every_table(arch, few_sms, monkeypatch):
    """The interpreter takes sm_80's tiles; the others, and the large ones, must be as right."""
    monkeypatch.setattr(lora_quantised, "arch_of", lambda device: arch)
    if few_sms:
        monkeypatch.setitem(lora_quantised_tables.SMS, arch, 1)
    for kind in ("nf4_double", "fp8_rows"):
        check(*make((139, 140, 146, 16), kind, torch.float16), p=0.25)


SLABBED = {  # M, N, K, R: three slabs of 256 in one direction, the last of them ragged
    "y": (17, 515, 34, 12),
    "dx": (17, 35, 514, 16),
}
SLABS = {"y": (3, 34), "dx": (35, 2)}  # that last one


@pytest.fixture
def slabs(monkeypatch):
    """Slabs for any number of tokens; what each launch of their kernel wrote."""
    monkeypatch.setattr(lora_quantised_tables, "SLAB_TOKENS", 1)
    monkeypatch.setattr(lora_quantised_tables, "SLAB_BYTES", 1 << 10)
    seen, whole = [], lora_quantised._Base.dequantise

    def dequantise(base, out, *where):
        seen.append(tuple(out.shape))
        whole(base, out, *where)

    monkeypatch.setattr(lora_quantised._Base, "dequantise", dequantise)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SLABBED)
def test_slabs_against_float64(name, kind, dtype, slabs):
    m, n, k, r = SLABBED[name]
    check(*make((m, n, k, r), kind, dtype))
    assert len(slabs) == 4 and slabs[2 if name == "y" else 3] == SLABS[name], slabs
    check(*make((m, n, k, r), kind, dtype, torch.float32), p=0.25)


@pytest.mark.parametrize("arch", ARCHS)
def test_slabs_of_every_table(arch, slabs, monkeypatch):
    """Among them Hopper's kernel by TMA, which takes slabs where all is aligned."""
    monkeypatch.setattr(lora_quantised, "arch_of", lambda device: arch)
    for tables in (lora_tables, lora_quantised_tables):
        monkeypatch.setitem(tables.SMS, arch, 1)
    for shape in ((139, 320, 144, 16), (139, 144, 320, 24)):
        check(*make(shape, "nf4_double", torch.float16))
        check(*make(shape, "fp8_rows", torch.float16), p=0.25)
    assert (256, 144) in slabs and (144, 256) in slabs


@pytest.mark.parametrize("name", SLABBED)
def test_slabs_give_what_tiles_give(name, slabs, monkeypatch):
    """In fp32 within rounding, with the same mask: the slab's first column counts."""
    case = make(SLABBED[name], "nf4", torch.float32)
    many = run(ops.lora_linear, *case, 0.5, impl="triton")
    monkeypatch.setattr(lora_quantised_tables, "SLAB_TOKENS", 1000)
    few = run(ops.lora_linear, *case, 0.5, impl="triton")
    for one, two in zip(many, few, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


def test_fp32_adapters_beside_fp16():
    got = check(*make(SHAPES["odd"], "nf4", torch.float16, torch.float32))
    assert got[2].dtype == got[3].dtype == torch.float32


def test_every_code_of_fp8():
    """The identity reads W back, in both directions: subnormals, zeros, the largest, NaN."""
    codes = torch.arange(256, dtype=torch.uint8).view(16, 16)
    nan = (codes & 0x7F) == 0x7F
    eye, nothing = torch.eye(16).requires_grad_(), torch.zeros(16, 16)
    for clean in (True, False):
        data = codes.masked_fill(nan, 0) if clean else codes
        weight = ops.FP8Weight(data.view(torch.float8_e4m3fn), torch.ones(1))
        want = weight.dequantise()
        y = ops.lora_linear(eye, weight, nothing, nothing, 1.0, impl="triton")
        (dx,) = torch.autograd.grad(y, eye, torch.eye(16))
        if clean:
            assert torch.equal(y.T, want) and torch.equal(dx, want)
        else:  # 0 · NaN is NaN: it spreads along the sums
            assert torch.equal(y.isnan().any(0), nan.any(1))
            assert torch.equal(dx.isnan().any(0), nan.any(0))


def test_any_strides_and_no_rows():
    weight, (x, a, b, bias), dy = make(SHAPES["odd"], "nf4", torch.float32)
    want = run(ops.lora_linear, weight, (x, a, b, bias), dy, 0.0, impl="triton")
    other = [torch.stack((t, t), -1)[..., 0] for t in (x, a, b, bias)]
    got = ops.lora_linear(other[0], weight, *other[1:3], 1.5, other[3], impl="triton")
    assert torch.equal(got, want[0])
    none = run(ops.lora_linear, weight, (x[:0], a, b, bias), dy[:0], 0.1, impl="triton")
    assert none[0].shape == (0, 65) and all(g.count_nonzero() == 0 for g in none)


def test_two_runs_give_the_same_bits():
    case = make(SHAPES["high_rank"], "nf4_double", torch.float16)
    runs = [run(ops.lora_linear, *case, 0.1, impl="triton") for _ in range(2)]
    for one, two in zip(*runs, strict=True):
        assert torch.equal(one, two)
