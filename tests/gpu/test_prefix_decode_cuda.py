"""csrc/cuda/prefix_decode.cu on a GPU through its op, against float64. pytest -m gpu tests/gpu"""

import math

import pytest
import torch

from fusedpeft import ops
from fusedpeft.ops.native import native
from fusedpeft.ops.slots import PrefixSlots

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(
        not hasattr(native, "prefix_decode_cuda"),
        reason="needs the CUDA half of fusedpeft._C: build with FUSEDPEFT_CUDA=1",
    ),
    pytest.mark.usefixtures("exact_matmul"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INF = math.inf


def make(b=5, h=8, hkv=2, t=1, s=300, d=64, p=200, dtype=torch.float32, block=0):
    """(q, k, v, prefix, slots), and block_table where `block`. Slot 0 is full, slot 1 has no keys,
    slot 3 is free; what lies beyond a slot's keys is NaN."""
    g = torch.Generator("cuda").manual_seed(b + 3 * h + 5 * t + 7 * s + 11 * d)

    def draw(*size):
        return torch.randn(size, generator=g, device="cuda").to(dtype)

    length = torch.tensor([p, 0, p // 2, -1], dtype=torch.int32, device="cuda")
    pk, pv = draw(4, hkv, p, d), draw(4, hkv, p, d)
    for i, keys in enumerate(length.tolist()):
        pk[i, :, max(keys, 0) :] = pv[i, :, max(keys, 0) :] = math.nan
    slots = torch.randint(-1, 3, (b,), generator=g, dtype=torch.int32, device="cuda")
    q, kw, lead = draw(b, h, t, d), {}, (b, hkv, s, d)
    if block:
        blocks = -(-s // block)
        lead = (b * blocks + 2, hkv, block, d)
        table = torch.randperm(lead[0], generator=g, device="cuda")[: b * blocks]
        kw["block_table"] = table.view(b, blocks).int()
    return (q, draw(*lead), draw(*lead), PrefixSlots(pk, pv, length), slots), kw


def double(args):
    q, k, v, p, slots = args
    return q.double(), k.double(), v.double(), PrefixSlots(p.k.double(), p.v.double(), p[2]), slots


def compare(check, args, **kw):
    got = ops.prefix_decode_attention(*args, **kw, return_lse=True)
    low = ops.prefix_decode_attention_ref(*args, **kw, return_lse=True)
    ref = ops.prefix_decode_attention_ref(*double(args), **kw, return_lse=True)
    for name, g, lo, r in zip(("out", "lse"), got, low, ref, strict=True):
        assert g.dtype == lo.dtype and g.is_contiguous(), name
        if name == "lse":
            assert torch.equal(g == -INF, r == -INF)
            g, lo, r = (x.masked_fill(x == -INF, 0.0) for x in (g, lo, r))
        check(name, g, lo, r)
    return got


def lengths(b, s):
    made = torch.randint(0, s + 1, (b,), generator=torch.Generator().manual_seed(b))
    made[0], made[-1] = s, 0
    return made.int().cuda()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "sizes",
    [
        dict(b=1, h=1, hkv=1, s=1, d=1, p=1),
        dict(b=33, h=32, hkv=8, d=128, p=512, s=700),
        dict(t=8, d=40),
        dict(b=20, h=8, hkv=1, t=3, d=96),
        dict(b=3, h=4, hkv=4, d=256, s=2000),
        dict(d=33, t=2),
    ],
    ids=str,
)
def test_against_float64(check_accuracy, sizes, dtype):
    args, _ = make(**sizes, dtype=dtype)
    compare(check_accuracy, args)
    more = lengths(args[0].shape[0], args[1].shape[2])
    compare(check_accuracy, args, lengths=more, scale=0.3)
    compare(check_accuracy, args, lengths=more, window=100)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [7, 16, 64])
def test_keys_in_blocks(check_accuracy, block, dtype):
    args, kw = make(t=2, d=128, dtype=dtype, block=block)
    more = lengths(5, kw["block_table"].shape[1] * block)
    for i, length in enumerate(more.tolist()):
        kw["block_table"][i, -(-length // block) :] = -7
    compare(check_accuracy, args, lengths=more, **kw)
    q, k, v, *rest = args  # as vLLM lays it out
    k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    compare(check_accuracy, (q, k, v, *rest), lengths=more, window=50, **kw)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_there_is_nan_and_touches_no_one_else(dtype):
    (q, k, v, prefix, _), kw = make(b=7, dtype=dtype, block=16)
    good = torch.tensor([0, 0, -1, 2, 2, 1, 0], dtype=torch.int32, device="cuda")
    full = torch.full_like(good, 300)
    want = ops.prefix_decode_attention(q, k, v, prefix, good, lengths=full, **kw)
    slots, length, table = good.clone(), full.clone(), kw["block_table"].clone()
    slots[1], slots[3], slots[4] = 3, 4, -2
    length[5], table[6, 2] = 400, k.shape[0]
    got, lse = ops.prefix_decode_attention(
        q, k, v, prefix, slots, lengths=length, block_table=table, return_lse=True
    )
    lost = torch.tensor([1, 3, 4, 5, 6])
    assert got[lost].isnan().all() and lse[lost].isnan().all()
    assert torch.equal(got[[0, 2]], want[[0, 2]])


def test_runs_are_bit_equal_and_who_sees_nothing_gets_zeros():
    args, _ = make(b=40, h=32, hkv=8, d=128, dtype=torch.bfloat16)
    first = ops.prefix_decode_attention(*args)
    assert torch.equal(first, ops.prefix_decode_attention(*args))
    none = torch.full_like(args[4], -1)
    out, lse = ops.prefix_decode_attention(
        *args[:4], none, lengths=torch.zeros_like(none), return_lse=True
    )
    assert not out.any() and (lse == -INF).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_graph_replays_with_other_slots_lengths_and_prefixes(check_accuracy, dtype):
    args, kw = make(b=12, h=8, hkv=2, d=128, t=2, dtype=dtype, block=16)
    q, k, v, prefix, slots = args
    length = torch.full_like(slots, 300)
    ops.prefix_decode_attention(*args, lengths=length, **kw)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.prefix_decode_attention(*args, lengths=length, **kw)
    for seed in range(3):
        g = torch.Generator().manual_seed(seed)
        slots.copy_(torch.randint(-1, 3, (12,), generator=g))
        length.copy_(torch.randint(0, 301, (12,), generator=g))
        prefix.length[2] = 50 * seed
        prefix.k[2, :, : 50 * seed].normal_()
        prefix.v[2, :, : 50 * seed].normal_()
        graph.replay()
        kw64 = dict(lengths=length, **kw)
        low = ops.prefix_decode_attention_ref(*args, **kw64)
        check_accuracy("out", out, low, ops.prefix_decode_attention_ref(*double(args), **kw64))


@pytest.mark.parametrize("dtype", DTYPES)
def test_prefix_attention_takes_this_path(check_accuracy, dtype):
    (q, k, v, prefix, _), _ = make(t=4, dtype=dtype)
    tensors = (q, k, v, prefix.k[0], prefix.v[0])
    got = ops.prefix_attention(*tensors)
    assert torch.equal(got, ops.prefix_attention(*tensors, impl="cuda"))
    low = ops.prefix_attention_ref(*tensors)
    check_accuracy("out", got, low, ops.prefix_attention_ref(*(x.double() for x in tensors)))


def test_debugging_reads_the_values(monkeypatch):
    args, _ = make()
    monkeypatch.setenv("FUSEDPEFT_DEBUG", "1")
    with pytest.raises(ValueError, match="slots: slot 3 holds no adapter"):
        ops.prefix_decode_attention(*args[:4], torch.full_like(args[4], 3))
    with pytest.raises(ValueError, match=r"lengths: expected 0\.\.300, got 301"):
        ops.prefix_decode_attention(*args, lengths=torch.full_like(args[4], 301))
