"""Bases in 4 and 8 bits: the layouts themselves, and lora_linear over them against float64."""

import types

import pytest
import torch

from fusedpeft import ops
from fusedpeft.ops import quantised
from fusedpeft.ops.quantised import NF4_CODE, QuantisedWeight

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = {
    "nf4": lambda w: ops.NF4Weight.quantise(w),
    "nf4_double": lambda w: ops.NF4Weight.quantise(w, 128, double=True),
    "fp8_rows": lambda w: ops.FP8Weight.quantise(w),
    "fp8": lambda w: ops.FP8Weight.quantise(w, per_row=False),
}


def normal(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def test_nf4_by_hand():
    """The high nibble first, codes times the absmax of each 64 along the flattened weight."""
    w = torch.zeros(3, 64)
    w[0, :4] = torch.tensor([2.0, -2.0, 2 * NF4_CODE[9], 0.0])
    w[1, 5] = -8.0
    q = ops.NF4Weight.quantise(w)
    assert q.packed[:2].tolist() == [0xF0, 0x97] and q.absmax.tolist() == [2.0, 8.0, 0.0]
    assert torch.equal(q.dequantise(), w)


def test_nf4_takes_the_nearest_code():
    w, code = normal(7, 66), torch.tensor(NF4_CODE)
    q = ops.NF4Weight.quantise(w)
    flat = torch.nn.functional.pad(w.reshape(-1), (0, -w.numel() % 64)).view(-1, 64)
    absmax = flat.abs().amax(1, keepdim=True)
    nearest = (flat[..., None] / absmax[..., None] - code).abs().argmin(-1)
    want = (code[nearest] * absmax).view(-1)[: w.numel()].view_as(w)
    assert torch.equal(q.dequantise(), want)


def test_double_quantisation_is_within_half_a_step_of_absmax():
    w = normal(64, 1024)
    plain, double = ops.NF4Weight.quantise(w), ops.NF4Weight.quantise(w, double=True)
    assert torch.equal(plain.packed, double.packed) and double.absmax.dtype == torch.uint8
    assert double.absmax2.numel() == 64 * 1024 // 64 // 256
    error = (double.block_scales(0, 1024) - plain.absmax).abs().view(-1, 256).amax(1)
    assert (error <= 1.001 * double.absmax2 / 255).all() and error.max() > 0


def test_fp8_scales():
    w = normal(5, 33)
    rows, one = ops.FP8Weight.quantise(w), ops.FP8Weight.quantise(w, per_row=False)
    torch.testing.assert_close(rows.scale, w.abs().amax(1) / 448)
    torch.testing.assert_close(one.scale, w.abs().amax().reshape(1) / 448)
    for q in (rows, one):  # three bits after the point
        assert ((q.dequantise() - w).abs() <= 2**-4 * w.abs() + 2**-9 * q.scale.max()).all()


def test_every_code_of_fp8_is_torchs():
    codes = torch.arange(256, dtype=torch.uint8).view(16, 16).view(torch.float8_e4m3fn)
    got = ops.FP8Weight(codes, torch.ones(1)).dequantise()
    torch.testing.assert_close(got, codes.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
def test_any_rows_are_those_of_the_whole(kind, monkeypatch):
    q = KINDS[kind](normal(13, 70))
    whole = q.dequantise()
    for first, last in ((0, 1), (3, 9), (12, 13), (5, 5), (0, 13)):
        assert torch.equal(q.rows(first, last, torch.float32), whole[first:last])
    monkeypatch.setattr(quantised, "MAX_CHUNK_BYTES", 4 * 70 * 4)
    chunks = list(q.chunks(torch.float32))
    assert [at.stop - at.start for at, _ in chunks] == [4, 4, 4, 1]
    assert torch.equal(torch.cat([w for _, w in chunks]), whole)
    again = QuantisedWeight.from_parts(q.parts(), q.layout)
    assert type(again) is type(q) and torch.equal(again.dequantise(), whole)
    assert q.to("meta").device.type == "meta"


@pytest.mark.parametrize("double", [False, True])
def test_from_bitsandbytes(double):
    """What Params4bit holds: bytes in a column, the state beside them."""
    q = ops.NF4Weight.quantise(normal(12, 128), double=double)
    param = q.packed.reshape(-1, 1).clone()
    state = types.SimpleNamespace(
        quant_type="nf4", shape=torch.Size(q.shape), blocksize=64, absmax=q.absmax, nested=double
    )
    if double:
        state.offset = q.offset.reshape(())
        state.state2 = types.SimpleNamespace(blocksize=256, code=q.book, absmax=q.absmax2)
    param.quant_state = state
    got = ops.NF4Weight.from_bitsandbytes(param)
    assert torch.equal(got.dequantise(), q.dequantise())
    assert got.packed.data_ptr() == param.data_ptr()
    state.quant_type = "fp4"
    with pytest.raises(ValueError, match="expected quant_type 'nf4', got 'fp4'"):
        ops.NF4Weight.from_bitsandbytes(param)
    with pytest.raises(TypeError, match="expected a quantised Params4bit, got Tensor"):
        ops.NF4Weight.from_bitsandbytes(torch.zeros(3))


def run(op, q, tensors, dy, p):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    x, a, b, bias = leaves
    y = op(x, q, a, b, 0.5, bias, dropout_p=p, seed=torch.tensor([3]))
    return y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))


@pytest.mark.parametrize("adapter", ["same", "fp32"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_against_float64(check_accuracy, kind, dtype, adapter, monkeypatch):
    monkeypatch.setattr(quantised, "MAX_CHUNK_BYTES", 40 * 130 * 4)  # four chunks of 129 rows
    q = KINDS[kind](normal(129, 130) / 130**0.5)
    other = torch.float32 if adapter == "fp32" else dtype
    for m, p in ((1, 0.0), (63, 0.0), (63, 0.25)):
        tensors = [normal(m, 130).to(dtype), (normal(12, 130) / 130**0.5).to(other)]
        tensors += [normal(129, 12).to(other), normal(129).to(dtype)]
        dy = normal(m, 129, seed=1).to(dtype)
        got = run(ops.lora_linear, q, tensors, dy, p)
        low = run(ops.lora_linear_ref, q, tensors, dy, p)
        ref = run(ops.lora_linear_ref, q, [t.double() for t in tensors], dy.double(), p)
        for name, g, lo, r in zip(("y", "dx", "da", "db", "dbias"), got, low, ref, strict=True):
            assert g.dtype == lo.dtype and g.is_contiguous()
            check_accuracy(name, g, lo, r)


@pytest.mark.parametrize("kind", KINDS)
def test_w_is_never_whole_in_memory(kind, monkeypatch):
    """Of 4 MiB in fp32 at most 64 KiB at a time, forward and backward."""
    from fusedpeft.bench.harness import peak_bytes

    monkeypatch.setattr(quantised, "MAX_CHUNK_BYTES", 64 << 10)
    q = KINDS[kind](normal(1024, 1024))
    x, a, b = normal(4, 1024).requires_grad_(), normal(4, 1024), normal(1024, 4)

    def step():
        y = ops.lora_linear(x, q, a, b, 0.5)
        return torch.autograd.grad(y, x, torch.ones_like(y))

    assert peak_bytes(step, torch.device("cpu")) < 1 << 20


@pytest.mark.parametrize("kind", ["nf4_double", "fp8_rows"])
def test_gradcheck_opcheck_and_compile(kind):
    q = KINDS[kind](normal(7, 14))
    x, a, b, bias = (
        t.double().requires_grad_() for t in (normal(5, 14), normal(3, 14), normal(7, 3), normal(7))
    )

    def op(x, a, b, bias):
        return ops.lora_linear(x, q, a, b, 0.7, bias, dropout_p=0.4, seed=3)

    assert torch.autograd.gradcheck(op, (x, a, b, bias))
    args = (x, q.parts(), q.layout, a, b, bias, torch.tensor([3]), 0.7, 0.4, "")
    torch.library.opcheck(torch.ops.fusedpeft.lora_linear_quantised, args)
    y = torch.compile(op, fullgraph=True)(x, a, b, bias)
    want = op(x, a, b, bias)
    torch.testing.assert_close(y, want)
    grads = [torch.autograd.grad(t.square().sum(), (x, a, b, bias)) for t in (y, want)]
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_dora(check_accuracy, kind, monkeypatch):
    monkeypatch.setattr(quantised, "MAX_CHUNK_BYTES", 10 * 40 * 4)
    q, m = KINDS[kind](normal(24, 40)), torch.rand(24) + 0.5
    x, a, b, bias = normal(9, 40), normal(4, 40), normal(24, 4), normal(24)
    got = ops.lora_linear(x, q, a, b, 0.5, bias, magnitude=m)
    low = ops.lora_linear_ref(x, q, a, b, 0.5, bias, magnitude=m)
    up = [t.double() for t in (a, b)]
    ref = ops.lora_linear_ref(x.double(), q, *up, 0.5, bias.double(), magnitude=m.double())
    check_accuracy("y", got, low, ref)


def test_leading_dims_no_rows_and_autocast():
    q, a, b = ops.NF4Weight.quantise(normal(6, 8)), normal(2, 8), normal(6, 2).requires_grad_()
    x = normal(2, 3, 8)
    torch.testing.assert_close(
        ops.lora_linear(x, q, a, b, 1.0), ops.lora_linear_ref(x, q, a, b, 1.0)
    )
    y = ops.lora_linear(torch.empty(2, 0, 8), q, a, b, 1.0)
    (db,) = torch.autograd.grad(y.sum(), b)
    assert y.shape == (2, 0, 6) and torch.equal(db, torch.zeros(6, 2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ops.lora_linear(x, q, a, b, 1.0).dtype == torch.bfloat16


W, X, A, B = normal(6, 64), normal(3, 64), normal(2, 64), normal(6, 2)
NF4, U8 = ops.NF4Weight.quantise(W), torch.uint8


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: ops.NF4Weight(NF4.packed[:-1], NF4.absmax, (6, 64)), ValueError,
         r"packed: expected 192 elements .*\(6, 64\).*got 191"),
        (lambda: ops.NF4Weight(NF4.packed, NF4.absmax, (6, 64), 48), ValueError,
         r"block_size: expected a power of two from 64 to 4096, got 48"),
        (lambda: ops.NF4Weight(NF4.packed, NF4.absmax, (6, 64), 8192), ValueError, r"got 8192"),
        (lambda: ops.NF4Weight(NF4.packed, NF4.absmax, (6, 64), 128), ValueError,
         r"absmax: expected 3 elements \(blocks of 128 in 384\), got 6"),
        (lambda: ops.NF4Weight(NF4.packed.int(), NF4.absmax, (6, 64)), TypeError,
         r"packed: expected torch.uint8, got torch.int32"),
        (lambda: ops.NF4Weight(NF4.packed, NF4.absmax.to(U8), (6, 64)), TypeError,
         r"absmax: expected torch.float32, got torch.uint8"),
        (lambda: ops.NF4Weight(NF4.packed, NF4.absmax.to(U8), (6, 64), absmax2=torch.ones(1)),
         ValueError, "book: expected a tensor beside absmax2, got None"),
        (lambda: ops.NF4Weight(NF4.packed, NF4.absmax.to("meta"), (6, 64)), ValueError,
         "one device, got .*cpu.*meta"),
        (lambda: ops.NF4Weight(NF4.packed, NF4.absmax, (384,)), ValueError, r"shape \(N, K\)"),
        (lambda: ops.NF4Weight.quantise(normal(2, 65)), ValueError, "even K .*got 65"),
        (lambda: ops.FP8Weight(W, torch.ones(1)), TypeError, "data: expected torch.float8_e4m3fn"),
        (lambda: ops.FP8Weight(W.to(torch.float8_e4m3fn), torch.ones(5)), ValueError,
         r"scale: expected 6 elements \(one, or one a row\), got 5"),
        (lambda: ops.FP8Weight.quantise(W.long()), ValueError,
         r"floating \[N, K\], got torch.int64"),
        (lambda: ops.lora_linear(X[:, :5], NF4, A, B, 1.0), ValueError,
         "x: expected last dim K = 64"),
        (lambda: ops.lora_linear(X, NF4, A, B[:5], 1.0), ValueError,
         r"b: .*\(6, 2\), got \(5, 2\)"),
        (lambda: ops.lora_linear(X, NF4.to("meta"), A, B, 1.0), ValueError,
         "w: expected device cpu"),
        (lambda: ops.lora_linear(X, NF4, A, B, 1.0, impl="cuda"), ValueError, "got 'cuda'"),
        (lambda: ops.lora_linear(X.expand(17, 3, 64)[:, 0], NF4, A, B, 1.0, impl="native"),
         ValueError, r"impl='native': expected <= 16 rows .*got \(17, 64\)"),
        (lambda: ops.lora_linear([1.0], NF4, A, B, 1.0), TypeError, r"x: expected a Tensor"),
        (lambda: ops.lora_linear_multi(X, [NF4], [A], [B], [1.0]), TypeError,
         r"projection 0: w: expected a Tensor \[N, K\], got NF4Weight"),
    ],
)  # fmt: skip
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_the_choice_of_implementation():
    from fusedpeft.ops.lora_quantised import choose_impl

    assert choose_impl("cpu", tokens=17)[0] == choose_impl("meta")[0] == "aten"
    assert choose_impl("cuda")[0] == "triton"


@pytest.mark.parametrize("block", [0, -64, 64.0, 96])
def test_blocks_that_cannot_be(block):
    with pytest.raises(ValueError, match=f"block_size: expected a power of two .* got {block}"):
        ops.NF4Weight.quantise(torch.randn(4, 8), block)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0, 0)])
@pytest.mark.parametrize("per_row", [True, False])
def test_fp8_of_nothing(shape, per_row):
    weight = ops.FP8Weight.quantise(torch.empty(shape), per_row)
    assert weight.dequantise().shape == shape
