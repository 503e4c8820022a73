"""prefix_decode_attention on a CPU against float64: sharing, lengths, blocks, window, bad input."""

import math

import pytest
import torch

from fusedpeft import ops
from fusedpeft.ops.native import native
from fusedpeft.ops.prefix_decode_impls import choose_impl
from fusedpeft.ops.slots import PrefixSlots

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IMPLS = ["native", "aten"] if native is not None else ["aten"]
INF = math.inf


def make(b=5, h=4, hkv=2, t=1, s=70, d=64, p=40, n=4, dtype=torch.float32, block=0, spare=2):
    """(q, k, v, prefix, slots), and block_table where `block`. Slot 0 is full, slot 1 has no keys,
    the last is free; what lies beyond a slot's keys is NaN."""
    g = torch.Generator().manual_seed(b + 3 * h + 5 * t + 7 * s + 11 * d)

    def draw(*size):
        return torch.randn(size, generator=g, dtype=torch.float64).to(dtype)

    length = torch.randint(min(1, p), p + 1, (n,), generator=g, dtype=torch.int32)
    length[0], length[min(1, n - 1)], length[n - 1] = p, 0, -1
    pk, pv = draw(n, hkv, p, d), draw(n, hkv, p, d)
    for i, keys in enumerate(length.tolist()):
        pk[i, :, max(keys, 0) :] = pv[i, :, max(keys, 0) :] = math.nan
    slots = torch.randint(-1, n - 1, (b,), generator=g, dtype=torch.int32)
    q, kw = draw(b, h, t, d), {}
    lead = (b, hkv, s, d)
    if block:
        blocks = -(-s // block)
        lead = (b * blocks + spare, hkv, block, d)
        table = torch.randperm(lead[0], generator=g)[: b * blocks]
        kw["block_table"] = table.view(b, blocks).int()
    return (q, draw(*lead), draw(*lead), PrefixSlots(pk, pv, length), slots), kw


def double(args):
    q, k, v, p, slots = args
    prefix = PrefixSlots(p.k.double(), p.v.double(), p.length)
    return q.double(), k.double(), v.double(), prefix, slots


def compare(check, args, impl, **kw):
    got = ops.prefix_decode_attention(*args, **kw, return_lse=True, impl=impl)
    low = ops.prefix_decode_attention_ref(*args, **kw, return_lse=True)
    ref = ops.prefix_decode_attention_ref(*double(args), **kw, return_lse=True)
    for name, g, lo, r in zip(("out", "lse"), got, low, ref, strict=True):
        assert g.dtype == lo.dtype and g.shape == r.shape and g.is_contiguous(), name
        if name == "lse":
            assert torch.equal(g == -INF, r == -INF)
            g, lo, r = (x.masked_fill(x == -INF, 0.0) for x in (g, lo, r))
        if r.numel():
            check(name, g, lo, r)
    return got


def lengths(b, s, seed=0):
    made = torch.randint(0, s + 1, (b,), generator=torch.Generator().manual_seed(seed))
    made[0], made[-1] = s, 0
    return made.int()


SHAPES = [
    dict(b=1, h=1, hkv=1, s=1, d=1, p=1),
    dict(b=3, h=8, hkv=8, s=1000, d=128, p=600),
    dict(h=8, hkv=2, t=3, s=33, d=33),
    dict(b=17, h=8, hkv=1, t=8, s=20, d=80, p=3),
    dict(b=40, h=4, hkv=4, d=32),
    dict(b=2, h=6, hkv=3, t=2, s=530, d=256, p=530),
    dict(b=2, t=5, s=5, d=100, p=0),
]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_against_float64(check_accuracy, sizes, dtype, impl):
    args, _ = make(**sizes, dtype=dtype)
    compare(check_accuracy, args, impl)
    more = lengths(args[0].shape[0], args[1].shape[2])
    compare(check_accuracy, args, impl, lengths=more, scale=0.3)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [1, 5, 16, 64])
def test_keys_in_blocks(check_accuracy, block, dtype, impl):
    for sizes in (dict(h=2), dict(t=3, h=8, d=96), dict(b=7, s=200)):
        args, kw = make(**sizes, dtype=dtype, block=block)
        more = lengths(args[0].shape[0], kw["block_table"].shape[1] * block)
        compare(check_accuracy, args, impl, **kw)
        for i, length in enumerate(more.tolist()):  # entries that nobody may look up
            kw["block_table"][i, -(-length // block) :] = -7
        compare(check_accuracy, args, impl, lengths=more, **kw)
        kw["block_table"][0, : max(0, (int(more[0]) - sizes.get("t", 1) - 8) // block)] = 10**6
        compare(check_accuracy, args, impl, lengths=more, window=9, **kw)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("window", [1, 7, 64, 1000])
def test_a_window_hides_far_keys_and_never_the_prefix(check_accuracy, window, impl):
    for t in (1, 5):
        args, _ = make(t=t, s=700)
        compare(check_accuracy, args, impl, window=window)
        compare(check_accuracy, args, impl, window=window, lengths=lengths(5, 700))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("slots", [[0] * 40, [-1] * 5, [2, 2], [0, 2] * 9, [-1, 2, -1, 0, 1, 2]])
def test_who_shares_a_prefix(check_accuracy, slots, impl):
    for dtype in DTYPES[:2]:
        (*args, _), _ = make(b=len(slots), dtype=dtype, h=8)
        compare(check_accuracy, (*args, torch.tensor(slots, dtype=torch.int32)), impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_request_that_sees_nothing(impl):
    (q, k, v, prefix, _), _ = make(b=3, t=4)
    slots = torch.tensor([-1, 1, 0], dtype=torch.int32)  # none, an empty one, a full one
    out, lse = ops.prefix_decode_attention(
        q, k, v, prefix, slots, lengths=torch.tensor([0, 2, 0]).int(), return_lse=True, impl=impl
    )
    assert not out[0].any() and (lse[0] == -INF).all()
    assert not out[1, :, :2].any() and (lse[1, :, :2] == -INF).all()
    assert out[1, :, 2:].all() and out[2].all() and lse[2].isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_stays_with_its_request(impl):
    args, _ = make(b=4)
    slots = torch.tensor([0, 0, -1, 2], dtype=torch.int32)
    want = ops.prefix_decode_attention(*args[:4], slots, impl=impl)
    args[0][1] = math.nan
    got = ops.prefix_decode_attention(*args[:4], slots, impl=impl)
    assert got[1].isnan().all()
    assert torch.equal(got[[0, 2, 3]], want[[0, 2, 3]])


@pytest.mark.skipif(native is None, reason="the extension is not built")
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_depend_on_neither_threads_nor_neighbours(dtype):
    args, _ = make(b=9, h=8, t=2, s=600, p=530, dtype=dtype)
    slots = torch.tensor([0, 2, 0, -1, 0, 1, 2, 2, 0], dtype=torch.int32)
    whole = ops.prefix_decode_attention(*args[:4], slots)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert torch.equal(ops.prefix_decode_attention(*args[:4], slots), whole)
            for i in range(9):
                one = (t[i : i + 1] for t in args[:3])
                alone = ops.prefix_decode_attention(*one, args[3], slots[i : i + 1])
                assert torch.equal(alone[0], whole[i])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("impl", IMPLS)
def test_any_strides(impl):
    (q, k, v, prefix, slots), kw = make(t=3, block=16)
    kw["lengths"] = lengths(5, 80)
    want = ops.prefix_decode_attention(q, k, v, prefix, slots, **kw, impl=impl)
    wide = torch.full((5, 11), 10**6, dtype=torch.int32)
    wide[:, ::2][:, :5] = kw["block_table"]
    for move in (
        lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        lambda t: torch.stack((t, t), -1)[..., 0],
        lambda t: torch.cat((t, t), 3)[..., : t.shape[3]],
    ):
        other = PrefixSlots(move(prefix.k), move(prefix.v), prefix.length)
        kw["block_table"] = wide[:, :10:2]
        got = ops.prefix_decode_attention(move(q), move(k), move(v), other, slots, **kw, impl=impl)
        assert torch.equal(got, want)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("sizes", [dict(b=0), dict(t=0), dict(h=0, hkv=1)], ids=str)
def test_empty_inputs(sizes, impl):
    args, _ = make(**sizes)
    out, lse = ops.prefix_decode_attention(*args, return_lse=True, impl=impl)
    assert out.shape == args[0].shape and lse.shape == out.shape[:3]


@pytest.mark.parametrize("impl", IMPLS)
def test_a_pool_without_slots_and_keys_of_none(impl):
    (q, k, v, prefix, _), _ = make(n=1, s=0)
    empty = PrefixSlots(*(t[:0] for t in prefix))
    none = torch.full((5,), -1, dtype=torch.int32)
    assert not ops.prefix_decode_attention(q, k, v, empty, none, impl=impl).any()


@pytest.mark.parametrize("impl", IMPLS)
def test_opcheck_and_compiled(impl):
    (q, k, v, prefix, slots), kw = make(t=2, block=16)
    args = (q, k, v, *prefix, slots, None, kw["block_table"], 0.4, 3, impl)
    torch.library.opcheck(torch.ops.fusedpeft.prefix_decode_attention, args)
    fn = lambda *t: ops.prefix_decode_attention(*t[:3], prefix, slots, window=9, impl=impl)  # noqa: E731
    (q, k, v, *_), _ = make(t=2)
    torch.testing.assert_close(torch.compile(fn, fullgraph=True)(q, k, v), fn(q, k, v))


def test_gradients_are_refused():
    (q, k, v, prefix, slots), _ = make()
    learns = prefix._replace(k=prefix.k.clone().requires_grad_())
    with pytest.raises(RuntimeError, match="no gradients.*train with ops.prefix_attention"):
        ops.prefix_decode_attention(q, k, v, learns, slots)
    with torch.no_grad():
        ops.prefix_decode_attention(q, k, v, learns, slots)


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


(Q, K, V, PREFIX, SLOTS), _ = make(b=2, n=3)
TABLE = ints([0, 1], [1, 0])
BAD = [
    (dict(q=Q[0]), ValueError, r"q: expected 4 dims, got \(4, 1, 64\)"),
    (dict(q=Q.expand(2, 4, 9, 64)), ValueError, r"T <= 8, got 9; longer ones take ops.prefix_att"),
    (dict(q=Q[:, :3]), ValueError, r"HKV that divides H = 3, got 2"),
    (dict(q=torch.zeros(2, 4, 1, 257)), ValueError, r"D in 1\.\.256, got 257"),
    (dict(k=K[:1]), ValueError, r"\[2, HKV, S, 64\] .*got \(1, 2, 70, 64\), \(2, 2, 70, 64\)"),
    (dict(k=K.half()), TypeError, r"k: expected dtype torch.float32 \(as q\), got torch.float16"),
    (dict(v=None), TypeError, r"v: expected a Tensor, got NoneType"),
    (dict(v=V.to("meta")), ValueError, r"v: expected device cpu \(as q\), got meta"),
    (dict(prefix=(1, 2)), TypeError, r"prefix: expected PrefixSlots, got tuple"),
    (dict(prefix=PREFIX._replace(k=PREFIX.k[:, :1])), ValueError, r"prefix.k: expected \[slots, 2"),
    (dict(prefix=PREFIX._replace(length=ints(1))), ValueError, r"prefix.length: expected \[3\], g"),
    (dict(slots=SLOTS.long()), TypeError, r"slots: expected int32, got torch.int64"),
    (dict(slots=SLOTS[:1]), ValueError, r"slots: expected \[2\], got \(1,\)"),
    (dict(slots=ints(0, 3)), ValueError, r"slots: expected -1 \(no adapter\) or 0\.\.2, got 3"),
    (dict(slots=ints(-2, 0)), ValueError, r"slots: expected -1 .*, got -2"),
    (dict(slots=ints(0, 2)), ValueError, r"slots: slot 2 holds no adapter; load one into it first"),
    (dict(lengths=ints(3, 71)), ValueError, r"lengths: expected 0\.\.70, got 71"),
    (dict(lengths=ints(-1, 7)), ValueError, r"lengths: expected 0\.\.70, got -1"),
    (dict(lengths=ints(7)), ValueError, r"lengths: expected \[2\], got \(1,\)"),
    (dict(block_table=ints([0, 1])), ValueError, r"block_table: expected \[2, blocks\]"),
    (dict(block_table=TABLE.long()), TypeError, r"block_table: expected int32, got torch.int64"),
    (dict(block_table=TABLE + 1), ValueError, r"block_table: expected blocks 0\.\.1, got 2"),
    (dict(window=0), ValueError, r"window: expected an int >= 1 or None, got 0"),
    (dict(scale=INF), ValueError, r"scale: expected a finite number, got inf"),
    (dict(impl="triton"), ValueError, r"impl: expected one of .*got 'triton'"),
    (dict(impl="cuda"), ValueError, r"impl='cuda': expected cuda tensors, got cpu"),
]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("change, error, message", BAD)
def test_bad_input(change, error, message, impl):
    args = dict(q=Q, k=K, v=V, prefix=PREFIX, slots=ints(0, -1), impl=impl) | change
    with pytest.raises(error, match=message):
        ops.prefix_decode_attention(**args)


def test_the_choice_of_implementation():
    assert choose_impl("cpu", torch.bfloat16, True, False)[0] == "native"
    assert choose_impl("cpu", torch.float64, True, True)[0] == "aten"
    assert choose_impl("cpu", torch.float32, False, False)[0] == "aten"
    assert choose_impl("cuda", torch.float16, True, True)[0] == "cuda"
    assert choose_impl("cuda", torch.float16, True, False)[0] == "aten"
    assert choose_impl("meta", torch.float16, True, True)[0] == "aten"
