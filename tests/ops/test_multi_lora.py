"""multi_lora_linear on a CPU against float64, slots and pools of every kind, rejections."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedpeft import ops
from fusedpeft.ops.lora import lora_linear_ref
from fusedpeft.ops.multi_lora import choose_impl
from fusedpeft.ops.multi_lora_cpu import MAX_NATIVE_TOKENS, prepared
from fusedpeft.ops.native import native
from fusedpeft.ops.slots import empty_lora_slots, lora_slots

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
needs_native = pytest.mark.skipif(native is None, reason="the extension is not built")
IMPLS = ["aten", pytest.param("native", marks=needs_native)]
RANKS = ((8,), (1,), (64,), (12,), (0,))  # of each slot, of each part


def make(m, k, sizes, ranks=RANKS, dtype=torch.float32, adapter=None, w_zero=False, seed=0):
    """x, w, pool, slots, bias; the slots are every one of the pool and -1 in turn."""
    g = torch.Generator().manual_seed(seed + m * 31 + k * 7 + sum(sizes))
    rnd = lambda *s: torch.randn(*s, generator=g)  # noqa: E731
    w = (rnd(sum(sizes), k) * (0 if w_zero else max(k, 1) ** -0.5)).to(dtype)
    adapters = [
        [(rnd(r, k) / max(k, 1) ** 0.5, rnd(n, r), 0.5 + i) for i, (r, n) in enumerate(pairs)]
        for pairs in (zip(rank, sizes, strict=True) for rank in ranks)
    ]
    pool = lora_slots([*adapters, None], dtype=adapter or dtype)
    slots = (torch.arange(m, dtype=torch.int32) * 7) % (len(ranks) + 1) - 1
    return rnd(m, k).to(dtype), w, pool, slots, rnd(sum(sizes)).to(dtype)


def double(x, w, pool, slots, bias):
    pool = pool._replace(a=pool.a.double(), b=pool.b.double())
    return x.double(), w.double(), pool, slots, None if bias is None else bias.double()


def compare(check_accuracy, args, impl):
    got = ops.multi_lora_linear(*args, impl=impl)
    low, ref = ops.multi_lora_linear_ref(*args), ops.multi_lora_linear_ref(*double(*args))
    assert got.dtype == low.dtype and got.shape == low.shape
    check_accuracy("y", got, low, ref)


def test_the_specification_is_that_of_lora_linear():
    x, w, pool, slots, bias = double(*make(7, 33, (5, 4), ((8, 3), (1, 12), (0, 2))))
    got = ops.multi_lora_linear_ref(x, w, pool, slots, bias)
    for m, slot in enumerate(slots.tolist()):
        for at, n, part in ((0, 5, 0), (5, 4, 1)):
            rows = slice(at, at + n)
            want = x[m] @ w[rows].T + bias[rows]
            if slot >= 0:
                a, b, scale = pool.get(slot)[part]
                want = lora_linear_ref(x[m], w[rows], a, b, scale, bias[rows])
            torch.testing.assert_close(got[m, rows], want)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("adapter", ["same", "fp32"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k, n", [(2048, 65), (129, 77), (7, 3), (1, 1)])
@pytest.mark.parametrize("m", [1, 2, 3, 8, 17, 64])
def test_against_float64(check_accuracy, m, k, n, dtype, adapter, impl):
    kind = torch.float32 if adapter == "fp32" else dtype
    for w_zero in (False, True):  # W = 0: nothing hides the adapters' errors
        compare(check_accuracy, make(m, k, (n,), dtype=dtype, adapter=kind, w_zero=w_zero), impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_stacked_parts_with_ranks_of_their_own(check_accuracy, dtype, impl):
    ranks = ((8, 1, 64), (12, 0, 3), (0, 16, 0), (5, 5, 5))
    for sizes in ((40, 9, 9), (1, 70, 2)):
        for w_zero in (False, True):
            args = make(11, 96, sizes, ranks, dtype, w_zero=w_zero)
            compare(check_accuracy, args, impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_all_rows_of_one_slot_and_of_none(check_accuracy, impl):
    x, w, pool, slots, bias = make(9, 40, (24,))
    for slot in (-1, 2, 4):
        compare(check_accuracy, (x, w, pool, torch.full_like(slots, slot), bias), impl)
    compare(check_accuracy, (x, w, pool, slots, None), impl)


@settings(max_examples=40, deadline=None)
@given(
    lead=st.lists(st.integers(0, 4), min_size=0, max_size=3),
    k=st.integers(1, 20),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    data=st.data(),
)
def test_any_leading_dims_and_strides(lead, k, sizes, data):
    m = torch.Size(lead).numel()
    ranks = data.draw(
        st.lists(st.tuples(*[st.integers(0, 9)] * len(sizes)), min_size=1, max_size=4)
    )
    _, w, pool, slots, bias = make(m, k, tuple(sizes), ranks)
    x = torch.randn(*lead, k + 3)[..., 3:]
    w = w.t().contiguous().t() if data.draw(st.booleans()) else w
    got = ops.multi_lora_linear(x, w, pool, slots, bias)
    assert got.shape == (*lead, sum(sizes))
    want = ops.multi_lora_linear_ref(x, w, pool, slots, bias)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_opcheck_compile_and_autocast():
    x, w, pool, slots, bias = make(6, 32, (8, 4), ((4, 2), (3, 8)))
    args = (x, w, *pool[:4], slots, bias, pool.sizes, "")
    torch.library.opcheck(torch.ops.fusedpeft.multi_lora_linear, args)
    want = ops.multi_lora_linear(x, w, pool, slots, bias)
    call = lambda x: ops.multi_lora_linear(x, w, pool, slots, bias)  # noqa: E731
    torch.testing.assert_close(torch.compile(call, fullgraph=True)(x), want)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = call(x)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), want, atol=0.1, rtol=0.05)


def test_a_slot_is_replaced_and_evicted_without_a_trace():
    x, w, pool, _, bias = make(2, 40, (24,))
    slots = torch.tensor([2, -1], dtype=torch.int32)
    base = torch.nn.functional.linear(x, w, bias)
    a, b = torch.randn(3, 40), torch.randn(24, 3)
    pool.put(2, [(a, b, 2.0)])  # of rank 64 before
    got = ops.multi_lora_linear(x, w, pool, slots, bias)
    torch.testing.assert_close(got[0], base[0] + 2.0 * (x[0] @ a.T) @ b.T, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got[1], base[1])
    pool.put(2, None)
    assert not pool.a[2].any() and not pool.b[2].any() and not pool.scale[2].any()
    with pytest.raises(ValueError, match="slot 2 holds no adapter"):
        ops.multi_lora_linear(x, w, pool, slots, bias)
    torch.testing.assert_close(ops.multi_lora_linear(x[1:], w, pool, slots[1:], bias), base[1:])


@needs_native
@pytest.mark.parametrize("k", [700, 704])  # 704: whole tiles, for chips that multiply those
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_depend_on_neither_neighbours_nor_threads(dtype, k):
    x, w, pool, slots, bias = make(37, k, (90, 31), ((8, 3), (12, 0), (17, 24)), dtype)
    want = ops.multi_lora_linear(x, w, pool, slots, bias, impl="native")
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            for rows in (
                [5],
                [30, 2],
                [*range(36, -1, -1)],
                [7, 7, 7, 7, 7],
                [0, 9, 18, 27, 36, 1],
            ):
                got = ops.multi_lora_linear(x[rows], w, pool, slots[rows], bias, impl="native")
                assert torch.equal(got, want[rows]), (count, rows)
    finally:
        torch.set_num_threads(threads)


@needs_native
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("where", ["x", "a", "b"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_with_its_token(dtype, where, bad):
    x, w, pool, slots, bias = make(20, 96, (40, 31), ((8, 3), (12, 5), (17, 40)), dtype)
    want = ops.multi_lora_linear(x, w, pool, slots, bias, impl="native")
    mine = slots == 1
    if where == "x":
        x[mine, 50] = bad
    else:
        getattr(pool.get(1)[0], where)[0, 1] = bad  # a view
    got = ops.multi_lora_linear(x, w, pool, slots, bias, impl="native")
    assert mine.any() and not got[mine].isfinite().all(1).any()
    assert torch.equal(got[~mine], want[~mine])


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_prepared_call_is_the_op(dtype):
    x, w, pool, slots, bias = make(6, 96, (40, 31), ((8, 3), (12, 5), (17, 40)), dtype)
    call = prepared(w, pool, bias)
    for rows, named in ((x, slots), (x.view(3, 2, 96), slots), (x[2], slots[2:3])):
        assert torch.equal(call(rows, named), ops.multi_lora_linear(rows, w, pool, named, bias))
    with pytest.raises(ValueError, match="slots: expected -1"):
        call(x, slots + 100)
    many = x.new_zeros(MAX_NATIVE_TOKENS + 1, 96)
    for rows in (x[:, ::2].repeat(1, 2)[:, ::2], x.double(), x.t().contiguous().t(), many):
        assert call(rows, slots.new_zeros(len(rows))) is None  # multi_lora_linear is to answer
    wide = pool._replace(a=pool.a.double(), b=pool.b.double())
    assert prepared(w.double(), wide, None)(x.double(), slots) is None


def test_gradients_are_refused():
    x, w, pool, slots, bias = make(3, 16, (8,), ((4,),))
    with pytest.raises(ValueError, match="without gradients.*no_grad"):
        ops.multi_lora_linear(x, w.requires_grad_(), pool, slots, bias)
    with torch.no_grad():
        assert not ops.multi_lora_linear(x, w, pool, slots, bias).requires_grad


X, W, POOL, SLOTS, BIAS = make(3, 8, (6,), ((2,), (4,)))


def pool(**changes):
    return POOL._replace(**changes)


@pytest.mark.parametrize("impl", [None, *IMPLS])
@pytest.mark.parametrize(
    "args, error, message",
    [
        ((None, W, POOL, SLOTS), TypeError, r"x: expected a Tensor .*, got NoneType"),
        ((X.long(), W, POOL, SLOTS), TypeError, r"x: expected a floating dtype, got torch.int64"),
        ((X[:, :7], W, POOL, SLOTS), ValueError, r"x: expected last dim K = 8.*\(3, 7\)"),
        ((X, W[0], POOL, SLOTS), ValueError, r"w: expected \[N, K\], got shape \(8,\)"),
        ((X, W.half(), POOL, SLOTS), TypeError, r"w: expected dtype torch.float32"),
        ((X, W.to("meta"), POOL, SLOTS), ValueError, r"w: expected device cpu .*got meta"),
        ((X, W, POOL, SLOTS, BIAS[:5]), ValueError, r"bias: expected \[6\].*got \[5\]"),
        ((X, W, POOL, SLOTS, BIAS.half()), TypeError, r"bias: expected dtype torch.float32"),
        ((X, W, (1, 2), SLOTS), TypeError, r"pool: expected LoRASlots.*got tuple"),
        ((X, W[:5], POOL, SLOTS), ValueError, r"pool.sizes: expected a sum of N = 5, got \(6,\)"),
        ((X, W, pool(a=POOL.a[..., :7]), SLOTS), ValueError, r"pool.a: expected \(3, 8, 8\), got"),
        ((X, W, pool(a=POOL.a[:, :7]), SLOTS), ValueError, r"max_rank a multiple of 8, got 7"),
        ((X, W, pool(b=POOL.b[:, :7]), SLOTS), ValueError, r"pool.b: expected \(3, 48\), got"),
        ((X, W, pool(b=POOL.b.half()), SLOTS), TypeError, r"pool.b: expected torch.float32"),
        ((X, W, pool(a=POOL.a.half(), b=POOL.b.half()), SLOTS), TypeError, r"pool.a: .*as x\) or"),
        ((X, W, pool(rank=POOL.rank.long()), SLOTS), TypeError, r"pool.rank: expected torch.int32"),
        ((X, W, pool(scale=POOL.scale.to("meta")), SLOTS), ValueError, r"pool.scale: .*got meta"),
        ((X, W, pool(a=POOL.a.mT.contiguous().mT), SLOTS), ValueError, r"pool.a: .*contiguous"),
        ((X, W, POOL, None), TypeError, r"slots: expected an int32 Tensor \[3\], got NoneType"),
        ((X, W, POOL, SLOTS.long()), TypeError, r"slots: expected int32, got torch.int64"),
        ((X, W, POOL, SLOTS[:2]), ValueError, r"slots: expected \[3\].*got \(2,\)"),
        ((X, W, POOL, SLOTS.to("meta")), ValueError, r"slots: expected device cpu .*got meta"),
        ((X, W, POOL, SLOTS + 2), ValueError, r"slots: expected -1 .* or 0..2, got 3"),
        ((X, W, POOL, SLOTS - 1), ValueError, r"slots: expected -1 .* or 0..2, got -2"),
        ((X, W, POOL, SLOTS + 1), ValueError, r"slots: slot 2 holds no adapter; load one"),
    ],
)  # fmt: skip
def test_bad_input(args, error, message, impl):
    with pytest.raises(error, match=message):
        ops.multi_lora_linear(*args, impl=impl)


def test_an_implementation_that_is_not():
    with pytest.raises(ValueError, match=r"impl: expected one of .*got 'numpy'"):
        ops.multi_lora_linear(X, W, POOL, SLOTS, impl="numpy")
    wide = double(X, W, POOL, SLOTS, BIAS)
    with pytest.raises(TypeError, match="impl='cuda': expected fp32, bf16 or fp16"):
        ops.multi_lora_linear(*wide, impl="cuda")
    assert ops.multi_lora_linear(*wide).dtype == torch.float64
    with pytest.raises(ValueError, match="impl='cuda': expected CUDA tensors, got cpu"):
        ops.multi_lora_linear(X, W, POOL, SLOTS, impl="cuda")


def test_an_empty_batch():
    none = torch.empty(0, dtype=torch.int32)
    assert ops.multi_lora_linear(X[:0], W, POOL, none, BIAS).shape == (0, 6)
    assert ops.multi_lora_linear(torch.empty(2, 0, 8), W, POOL, none).shape == (2, 0, 6)
    free = empty_lora_slots(8, (6,), 0, 8)
    base = ops.multi_lora_linear(X, W, free, torch.full_like(SLOTS, -1), BIAS)
    torch.testing.assert_close(base, torch.nn.functional.linear(X, W, BIAS))


def test_the_choice_of_implementation():
    assert choose_impl("cpu", 65)[0] == "aten"
    assert choose_impl("cpu", 64)[0] == "native"
    assert choose_impl("cpu", 64, native_ok=False)[0] == "aten"
    assert choose_impl("cuda", 64)[0] == "cuda"
    assert choose_impl("cuda", 64, cuda_kernel=False)[0] == "triton"
    assert choose_impl("cuda", 64, native_ok=False)[0] == "triton"
    assert choose_impl("cuda", 65)[0] == "triton"
    assert choose_impl("cuda", 1, dtype=torch.float64)[0] == "aten"
    assert choose_impl("meta", 1)[0] == "aten"
