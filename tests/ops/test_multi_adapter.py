"""multi_bottleneck_adapter on a CPU against float64: slots, norms, sizes, bad input, transforms."""

import pytest
import torch

from fusedpeft import ops
from fusedpeft.ops.adapter import ACTIVATIONS
from fusedpeft.ops.multi_adapter import IMPLS
from fusedpeft.ops.slots import Adapter, AdapterSlots, adapter_slots

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NORMS = [None, "layer_norm", "rms_norm"]
CPU_IMPLS = [i for i in IMPLS if i != "cuda"]


def adapters(d, sizes, dtype, *, own=None, seed=0):
    """Slot 1 has no biases; sizes of None are free slots."""
    g = torch.Generator().manual_seed(seed)

    def one(i, e):
        rnd = lambda *s, std=1.0: (torch.randn(*s, generator=g) * std).to(dtype)  # noqa: E731
        down, up = rnd(e, d, std=d**-0.5), rnd(d, e, std=max(e, 1) ** -0.5)
        norm = (rnd(d) + 1 if own else None, rnd(d) if own == "layer_norm" else None)
        c, f = (None, None) if i == 1 else (rnd(e), rnd(d))
        return Adapter(down, c, up, f, 0.5 + i, *norm)

    return adapter_slots([None if e is None else one(i, e) for i, e in enumerate(sizes)])


def inputs(m, d, dtype, adapter=None, norm=None):
    g = torch.Generator().manual_seed(m + d)
    x, residual = ((torch.randn(m, d, generator=g) + 0.5).to(dtype) for _ in range(2))
    weight = (torch.randn(d, generator=g) + 1).to(adapter or dtype) if norm else None
    bias = torch.randn(d, generator=g).to(adapter or dtype) if norm == "layer_norm" else None
    return x, dict(residual=residual, norm=norm, norm_weight=weight, norm_bias=bias)


def double(value):
    if isinstance(value, AdapterSlots):
        return AdapterSlots(*(double(t) for t in value))._replace(size=value.size)
    return value.double() if isinstance(value, torch.Tensor) else value


def compare(check, x, pool, slots, impl=None, **kw):
    got = ops.multi_bottleneck_adapter(x, pool, slots, impl=impl, **kw)
    low = ops.multi_bottleneck_adapter_ref(x, pool, slots, **kw)
    kw64 = {k: double(v) for k, v in kw.items()}
    ref = ops.multi_bottleneck_adapter_ref(double(x), double(pool), slots, **kw64)
    assert got.dtype == x.dtype and got.is_contiguous()
    check("y", got, low, ref)


def draw_slots(m, count, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-1, count, (m,), generator=g, dtype=torch.int32)


@pytest.mark.parametrize("impl", CPU_IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m, d", [(1, 64), (2, 129), (7, 96), (16, 257), (33, 9), (64, 40), (3, 1)])
def test_against_float64(check_accuracy, m, d, dtype, impl):
    pool = adapters(d, (8, 5, 0, 64, 17, 1), dtype)
    x, kw = inputs(m, d, dtype)
    for residual in (kw["residual"], x, None):
        for seed in range(2):
            kw["residual"] = residual
            slots = draw_slots(m, 6, seed)
            compare(check_accuracy, x, pool, slots, impl, activation="gelu", **kw)


@pytest.mark.parametrize("impl", CPU_IMPLS)
@pytest.mark.parametrize("slots", [[3] * 40, [-1] * 5, [2, 2], [0, 3] * 9, [-1, 3, -1, 0, 2, 3]])
def test_who_shares_a_slot(check_accuracy, slots, impl):
    pool = adapters(70, (8, 5, 0, 33), torch.float32)
    x, kw = inputs(len(slots), 70, torch.float32)
    compare(check_accuracy, x, pool, torch.tensor(slots, dtype=torch.int32), impl, **kw)


@pytest.mark.parametrize("impl", CPU_IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(check_accuracy, activation, dtype, impl):
    pool = adapters(65, (8, 24), dtype)
    x, kw = inputs(9, 65, dtype)
    compare(check_accuracy, x * 3, pool, draw_slots(9, 2), impl, activation=activation, **kw)


@pytest.mark.parametrize("impl", CPU_IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("position", ["before", "after"])
@pytest.mark.parametrize("weights", ["model", "slots", "both", "none"])
@pytest.mark.parametrize("norm", NORMS[1:])
def test_norms(check_accuracy, norm, weights, position, dtype, impl):
    own = norm if weights in ("slots", "both") else None
    pool = adapters(129, (8, 5, 0, 12), dtype, own=own)
    x, kw = inputs(11, 129, dtype, norm=norm)
    if weights in ("slots", "none"):
        kw |= dict(norm_weight=None, norm_bias=None)
    slots = torch.tensor([0, 1, 2, 3, -1, 0, 1, 2, 3, -1, 3], dtype=torch.int32)
    for residual in (kw["residual"], x, None):
        kw["residual"] = residual
        compare(check_accuracy, x, pool, slots, impl, norm_position=position, **kw)


@pytest.mark.parametrize("impl", CPU_IMPLS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_fp32_adapters_beside_16_bits(check_accuracy, dtype, norm, impl):
    pool = adapters(96, (8, 24, 64), torch.float32)
    x, kw = inputs(13, 96, dtype, adapter=torch.float32, norm=norm)
    compare(check_accuracy, x, pool, draw_slots(13, 3), impl, **kw)


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_a_norm_of_rows_far_from_zero(impl):
    pool = adapters(256, (16,), torch.float32)
    x, kw = inputs(5, 256, torch.float32, norm="layer_norm")
    slots = torch.zeros(5, dtype=torch.int32)
    got = ops.multi_bottleneck_adapter(x + 300, pool, slots, impl=impl, **kw)
    kw = {k: double(v) for k, v in kw.items()}
    ref = ops.multi_bottleneck_adapter_ref((x + 300).double(), double(pool), slots, **kw)
    assert (got - ref).abs().max() <= 1e-4 * ref.abs().max()


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_one_adapter_is_bottleneck_adapter(impl):
    pool = adapters(128, (24, 8), torch.float32, own="layer_norm")
    x, _ = inputs(6, 128, torch.float32)
    got = ops.multi_bottleneck_adapter(
        x.view(2, 3, 128),
        pool,
        torch.full((6,), 1, dtype=torch.int32),
        norm="layer_norm",
        impl=impl,
    )
    a = pool.get(1)
    norm = dict(norm="layer_norm", norm_weight=a.norm_weight, norm_bias=a.norm_bias)
    want = ops.bottleneck_adapter(x.view(2, 3, 128), *a[:4], scale=a.scale, **norm)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_strides_and_empty_batches(check_accuracy, impl):
    pool = adapters(20, (8, 5), torch.float32)
    torch.manual_seed(0)
    wide = torch.randn(6, 47)
    kw = dict(residual=torch.randn(20, 6).t())
    for x in (wide[:, 3:23], wide[:, 1:41:2], wide[:1, :20].expand(6, 20)):
        compare(check_accuracy, x, pool, draw_slots(6, 2), impl, **kw)
    arena = torch.randn(2, 500)  # a pool whose slots lie apart
    apart = pool._replace(down=arena[:, :160].view(2, 8, 20), up=arena[:, 200:360])
    compare(check_accuracy, wide[:, :20], apart, draw_slots(6, 1), impl, **kw)
    for lead in ((0,), (2, 0, 3)):
        none = torch.empty(0, dtype=torch.int32)
        y = ops.multi_bottleneck_adapter(torch.empty(*lead, 20), pool, none, impl=impl)
        assert y.shape == (*lead, 20)


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_rows_do_not_depend_on_their_batch(impl):
    pool = adapters(96, (8, 33, 64), torch.float32)
    x, kw = inputs(12, 96, torch.float32)
    slots = draw_slots(12, 3)
    call = lambda i: ops.multi_bottleneck_adapter(  # noqa: E731
        x[i], pool, slots[i], impl=impl, residual=kw["residual"][i]
    )
    whole = call(slice(None))
    for i in range(12):
        torch.testing.assert_close(call(slice(i, i + 1)), whole[i : i + 1], rtol=1e-5, atol=1e-5)
    assert torch.equal(call(slice(None)), whole)


def test_a_slot_that_is_put_anew(check_accuracy):
    pool, other = adapters(32, (8, 16), torch.float32), adapters(32, (5, 3), torch.float32, seed=1)
    at = [t.data_ptr() for t in pool if t is not None]
    pool.put(1, other.get(0))
    pool.put(0, None)
    assert at == [t.data_ptr() for t in pool if t is not None]
    assert all(t[0].count_nonzero() == 0 for t in (pool.down, pool.up, pool.up_bias))
    x, kw = inputs(3, 32, torch.float32)
    compare(check_accuracy, x, pool, torch.tensor([1, -1, 1], dtype=torch.int32), **kw)
    with pytest.raises(ValueError, match="slot 0 holds no adapter"):
        ops.multi_bottleneck_adapter(x, pool, torch.tensor([1, 0, 1], dtype=torch.int32))


def test_opcheck_and_compile():
    pool = adapters(24, (8, 5), torch.float32, own="layer_norm")
    x, kw = inputs(4, 24, torch.float32, norm="layer_norm")
    slots = torch.tensor([0, -1, 1, 0], dtype=torch.int32)
    args = (list(pool), slots, kw["residual"], None, None, "gelu", "layer_norm", 1e-5, False, "")
    torch.library.opcheck(torch.ops.fusedpeft.multi_bottleneck_adapter, (x, *args))
    compiled = torch.compile(ops.multi_bottleneck_adapter, fullgraph=True, backend="aot_eager")
    for kw["norm_position"] in ("before", "after"):
        want = ops.multi_bottleneck_adapter(x, pool, slots, **kw)
        torch.testing.assert_close(compiled(x, pool, slots, **kw), want)


X, SLOTS = torch.randn(3, 8), torch.tensor([0, -1, 1], dtype=torch.int32)
POOL = adapters(8, (8, 3, None), torch.float32)
OWN = adapters(8, (8, 3, None), torch.float32, own="layer_norm")
WIDE = POOL._replace(down=torch.zeros(3, 12, 8))
W = torch.ones(8)


@pytest.mark.parametrize(
    "args, kwargs, error, message",
    [
        ((X, POOL, SLOTS.long()), {}, TypeError, "slots: expected int32, got torch.int64"),
        ((X, POOL, SLOTS[:2]), {}, ValueError, r"slots: expected \[3\], one .*got \(2,\)"),
        ((X, POOL, SLOTS + 1), {}, ValueError, r"slots: slot 2 holds no adapter"),
        ((X, POOL, SLOTS + 2), {}, ValueError, r"slots: expected -1 .*or 0\.\.2, got 3"),
        ((X, POOL, SLOTS - 1), {}, ValueError, r"slots: expected -1 .*or 0\.\.2, got -2"),
        ((X, POOL, [0, 1, 0]), {}, TypeError, r"slots: expected an int32 Tensor \[3\], got list"),
        ((X, tuple(POOL), SLOTS), {}, TypeError, r"pool: expected AdapterSlots, got tuple"),
        ((X[:, :7], POOL, SLOTS), {}, ValueError, r"x: expected last dim d = 8 .*got \(3, 7\)"),
        ((X.double(), POOL, SLOTS), {}, TypeError, r"x: expected fp32, bf16 or fp16, got .*64"),
        ((X, WIDE, SLOTS), {}, ValueError, r"max_size a multiple of 8, got 12"),
        ((X, POOL._replace(scale=W), SLOTS), {}, ValueError, r"pool.scale: .*\(3,\), got \(8,\)"),
        ((X, POOL._replace(size=POOL.scale), SLOTS), {}, TypeError, r"pool.size: .*int32, got"),
        ((X.half(), adapters(8, (2,), torch.bfloat16), SLOTS), {}, TypeError, r"pool: .*float16"),
        ((X, POOL._replace(up_bias=torch.zeros(8, 3).t()), SLOTS), {}, ValueError, "in one piece"),
        ((X, POOL._replace(norm_bias=W), SLOTS), {}, ValueError, r"pool.norm_bias: .*\(3, 8\)"),
        ((X, OWN._replace(norm_weight=None), SLOTS), {"norm": "layer_norm"}, ValueError, "beside"),
        ((X, POOL, SLOTS), {"residual": X[:2]}, ValueError, r"residual: expected shape \(3, 8\)"),
        ((X, POOL, SLOTS), {"residual": X.half()}, TypeError, r"residual: expected dtype .*32"),
        ((X, POOL, SLOTS), {"activation": "mish"}, ValueError, r"activation: .*got 'mish'"),
        ((X, POOL, SLOTS), {"norm": "batch"}, ValueError, r"norm: expected one of .*got 'batch'"),
        ((X, POOL, SLOTS), {"norm_position": "in"}, ValueError, r"norm_position: .*got 'in'"),
        ((X, POOL, SLOTS), {"norm_weight": W}, ValueError, r"expected None without a norm"),
        ((X, OWN, SLOTS), {}, ValueError, r"norm: expected one, as the slots have .*got None"),
        ((X, OWN, SLOTS), {"norm": "rms_norm"}, ValueError, "None with rms_norm"),
        ((X, POOL, SLOTS), {"impl": "triton"}, ValueError, r"impl: expected one of .*'triton'"),
        ((X.requires_grad_(), POOL, SLOTS), {}, RuntimeError, "expected no gradients"),
    ],
)  # fmt: skip
def test_bad_input(args, kwargs, error, message):
    x, *rest = args
    with torch.set_grad_enabled(error is RuntimeError), pytest.raises(error, match=message):
        ops.multi_bottleneck_adapter(x, *rest, **kwargs)


A = Adapter(torch.zeros(3, 8), None, torch.zeros(8, 3), None)


@pytest.mark.parametrize(
    "slot, adapter, message",
    [
        (3, A, r"slot: expected 0\.\.2, got 3"),
        (0, A._replace(up_w=torch.zeros(3, 8)), r"up_w: expected shape \(8, 3\), got \(3, 8\)"),
        (0, A._replace(norm_weight=W), r"norm_weight: expected None, as the slots have none"),
        (0, Adapter(torch.zeros(9, 8), None, torch.zeros(8, 9), None), r"E <= 8, got 9"),
    ],
)
def test_what_does_not_fit_a_slot(slot, adapter, message):
    before = [t.clone() for t in POOL if t is not None]
    with pytest.raises(ValueError, match=message):
        POOL.put(slot, adapter)
    kept = [t for t in POOL if t is not None]
    assert all(torch.equal(a, b) for a, b in zip(before, kept, strict=True))


def test_what_slots_are_made_of():
    assert adapter_slots([A], slots=4, max_size=20).down.shape == (4, 24, 8)
    with pytest.raises(ValueError, match="expected at least one"):
        adapter_slots([None])
    with pytest.raises(ValueError, match="slots: expected >= 2, .*got 1"):
        adapter_slots([A, A], slots=1)
