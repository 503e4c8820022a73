"""W in 4 and 8 bits in C++ on a CPU: its numbers to the bit, and decode against float64."""

import pytest
import torch

from fusedpeft import ops
from fusedpeft.ops import quantised_cpu
from fusedpeft.ops.lora_quantised import choose_impl
from fusedpeft.ops.native import native

pytestmark = pytest.mark.skipif(native is None, reason="fusedpeft._C is not built")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = {
    "nf4": lambda w: ops.NF4Weight.quantise(w),
    "nf4_double": lambda w: ops.NF4Weight.quantise(w, 128, double=True),
    "nf4_wide": lambda w: ops.NF4Weight.quantise(w, 4096, double=True),
    "fp8_rows": lambda w: ops.FP8Weight.quantise(w),
    "fp8": lambda w: ops.FP8Weight.quantise(w, per_row=False),
}
# Whole blocks, blocks that cross rows, a last one that is a part, several pieces, more than a
# thread's share, and next to nothing.
SHAPES = [(40, 512), (13, 70), (3, 1090), (300, 1024), (1, 2), (0, 6), (4, 0)]


def normal(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def same(got, want):
    """The same bits, but for those of a NaN."""
    assert got.dtype == want.dtype and got.shape == want.shape
    nan = want.isnan()
    assert torch.equal(got.isnan(), nan)
    ints = {2: torch.int16, 4: torch.int32, 8: torch.int64}[got.element_size()]
    assert torch.equal(got.view(ints)[~nan], want.view(ints)[~nan])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_the_specifications_to_the_bit(kind, shape):
    q, n = KINDS[kind](normal(*shape)), shape[0]
    for dtype in (*DTYPES, torch.float64):
        for first, last in ((0, n), (n // 3, n // 2), (n // 2, n)):
            same(q.rows(first, last, dtype), q.aten_rows(first, last, dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_slabs_are_parts_of_the_whole(kind):
    q = KINDS[kind](normal(37, 390))
    for dtype in (*DTYPES, torch.float64):
        whole = q.aten_rows(0, 37, dtype)
        for columns in (False, True):
            for most in (1, 37 * 130 * 4, 1 << 20):
                slabs = [(at, w.clone()) for at, w in quantised_cpu.slabs(q, dtype, most, columns)]
                same(torch.cat([w for _, w in slabs], int(columns)), whole)
                for at, w in slabs:
                    same(w, whole[:, at] if columns else whole[at])


def test_every_code_and_factors_at_the_edges():
    """Codes of NaN, subnormal codes, factors that overflow, underflow or are no numbers."""
    inf, nan = float("inf"), float("nan")
    factors = [1.0, 3e38, 1e-40, 2.0**-149, 0.0, -0.0, inf, -inf, nan, 1 / 3]
    codes = torch.arange(256, dtype=torch.uint8)
    data = torch.stack([codes.roll(i) for i in range(len(factors))])
    fp8 = ops.FP8Weight(data.view(torch.float8_e4m3fn), torch.tensor(factors))
    packed = torch.cat([codes] * len(factors))
    absmax = torch.tensor(factors).repeat_interleave(8)  # 256 codes of a row of 512 share one
    nf4 = ops.NF4Weight(packed, absmax, (len(factors), 512))
    for q in (fp8, nf4):
        for dtype in DTYPES:
            same(q.rows(0, len(factors), dtype), q.aten_rows(0, len(factors), dtype))


def test_tensors_that_are_no_rows_of_memory():
    q = ops.NF4Weight.quantise(normal(8, 128), double=True)
    apart = [torch.stack([t, t], -1)[..., 0] for t in q.parts()]
    got = ops.quantised.QuantisedWeight.from_parts(apart, q.layout)
    assert not got.packed.is_contiguous()
    same(got.dequantise(), q.dequantise())
    x, a, b = normal(2, 128), normal(3, 128), normal(8, 3)
    same(ops.lora_linear(x, got, a, b, 0.5), ops.lora_linear(x, q, a, b, 0.5))


def make(q, m, r, dtype, adapter):
    n, k = q.shape
    tensors = [normal(m, k).to(dtype), (normal(r, k, seed=1) / k**0.5).to(adapter)]
    return *tensors, normal(n, r, seed=2).to(adapter), normal(n, seed=3).to(dtype)


@pytest.mark.parametrize("adapter", ["same", "fp32"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_decode_against_float64(check_accuracy, kind, dtype, adapter):
    for n, k in ((129, 130), (50, 1090), (64, 2304)):
        q = KINDS[kind](normal(n, k) / k**0.5)
        for m, r in ((1, 12), (4, 1), (7, 64), (16, 8)):
            other = torch.float32 if adapter == "fp32" else dtype
            x, a, b, bias = make(q, m, r, dtype, other)
            got = ops.lora_linear(x, q, a, b, 0.5, bias, impl="native")
            low = ops.lora_linear_ref(x, q, a, b, 0.5, bias)
            ref = ops.lora_linear_ref(x.double(), q, a.double(), b.double(), 0.5, bias.double())
            assert got.dtype == dtype
            check_accuracy("y", got, low, ref)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_bits_depend_on_neither_threads_nor_neighbours(kind, dtype):
    q = KINDS[kind](normal(501, 700))
    x, a, b, bias = make(q, 16, 12, dtype, dtype)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = torch.cat([ops.lora_linear(row, q, a, b, 0.5, bias) for row in x.split(1)])
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            for m in (3, 7, 16):
                same(ops.lora_linear(x[:m], q, a, b, 0.5, bias), alone[:m])
            same(q.rows(7, 501, dtype), q.aten_rows(7, 501, dtype))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["nf4", "fp8_rows"])
def test_numbers_that_are_not_finite_stay_where_they_are(kind, dtype):
    q = KINDS[kind](normal(40, 576))
    x, a, b, bias = make(q, 5, 4, dtype, dtype)
    want = ops.lora_linear(x, q, a, b, 0.5, bias)
    x[2, 570] = float("inf")
    if kind == "nf4":
        q.absmax[9 * 11] = float("nan")
    else:
        q.data.view(torch.uint8)[11, 3] = 0x7F
    got = ops.lora_linear(x, q, a, b, 0.5, bias)
    assert not got[2].isfinite().any() and got[:, 11].isnan().all()
    rows, columns = torch.arange(5) != 2, torch.arange(40) != 11
    same(got[rows][:, columns], want[rows][:, columns])


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_beside_the_native_forward(check_accuracy, dtype):
    q = KINDS["nf4_double"](normal(66, 130) / 130**0.5)

    def run(op, up, **how):
        leaves = [t.to(up).requires_grad_() for t in make(q, 5, 4, dtype, dtype)]
        x, a, b, bias = leaves
        y = op(x, q, a, b, 0.5, bias, **how)
        return y.detach(), *torch.autograd.grad(y, leaves, normal(5, 66).to(dtype).to(up))

    got = run(ops.lora_linear, dtype, impl="native")
    low, ref = run(ops.lora_linear_ref, dtype), run(ops.lora_linear_ref, torch.float64)
    for name, g, lo, r in zip(("y", "dx", "da", "db", "dbias"), got, low, ref, strict=True):
        check_accuracy(name, g, lo, r)


def test_leading_dims_strides_and_compile():
    q = KINDS["nf4"](normal(24, 64))
    x, a, b, bias = make(q, 6, 4, torch.float32, torch.float32)
    want = ops.lora_linear(x, q, a, b, 0.5, bias, impl="native")
    same(ops.lora_linear(x.view(2, 3, 64), q, a, b, 0.5, bias).view(6, 24), want)
    same(ops.lora_linear(torch.cat([x, x], 1)[:, :64], q, a, b, 0.5, bias), want)
    same(ops.lora_linear(x, q, a, b, 0.5, torch.stack([bias, bias], 1)[:, 0]), want)
    turned = x.t().contiguous().t()  # no unit stride: not the kernel's
    torch.testing.assert_close(ops.lora_linear(turned, q, a, b, 0.5, bias), want)
    with pytest.raises(ValueError, match="impl='native': expected <= 16 rows .* unit inner"):
        ops.lora_linear(turned, q, a, b, 0.5, bias, impl="native")
    compiled = torch.compile(lambda x: ops.lora_linear(x, q, a, b, 0.5, bias), fullgraph=True)
    same(compiled(x), want)


@pytest.mark.parametrize("kind", KINDS)
def test_without_the_extension_all_is_plain_torch(kind, monkeypatch, check_accuracy):
    q = KINDS[kind](normal(40, 130) / 130**0.5)
    x, a, b, bias = make(q, 5, 4, torch.bfloat16, torch.bfloat16)
    x.requires_grad_()
    monkeypatch.setattr(quantised_cpu, "native", None)

    def run(op, up):
        y = op(x.to(up), q, a.to(up), b.to(up), 0.5, bias.to(up))
        return y.detach(), torch.autograd.grad(y.sum(), x)[0]

    low, ref = run(ops.lora_linear_ref, x.dtype), run(ops.lora_linear_ref, torch.float64)
    for name, g, lo, r in zip(("y", "dx"), run(ops.lora_linear, x.dtype), low, ref, strict=True):
        check_accuracy(name, g, lo, r.to(torch.float64))
    with pytest.raises(ValueError, match="impl='native'"):
        ops.lora_linear(x, q, a, b, 0.5, impl="native")


def test_the_choice_of_implementation():
    assert choose_impl("cpu", tokens=16)[0] == "native"
    assert choose_impl("cpu", tokens=17)[0] == "aten"
    assert choose_impl("cpu", tokens=1, native_ok=False)[0] == "aten"
