"""prefix_attention's backward pass on a CPU by blocks of queries: what they see, hold and give."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from fusedpeft import ops
from fusedpeft.bench.harness import peak_bytes
from fusedpeft.ops.prefix_attention_blocks import Blocks

INF = math.inf


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [0, 1, 5, 64, 10_000])
def test_blocks_hide_what_the_rule_hides(window, causal, masked):
    """Every step, and sequences shorter than the one that the table was made for."""
    for (T, S), step in itertools.product([(1, 1), (37, 37), (300, 300), (37, 300)], [1, 16, 192]):
        blocks = Blocks(torch.float64, T, S, causal, 1.0, window, step)
        for t, s in [(n, n) for n in (T, T - 2, 5) if 0 < n <= T] if T == S else [(T, S)]:
            mask = None
            if masked:
                mask = torch.zeros(1, 1, t, s, dtype=torch.float64)
                mask[..., ::3] = -INF
            seen = torch.zeros(t, s, dtype=torch.float64)
            turns = torch.zeros(t)
            for qs, ks, bias, dead, hides in blocks.of(mask, t, s):
                part = torch.ones(qs.stop - qs.start, ks.stop - ks.start, dtype=torch.float64)
                part = part.tril() if hides else part
                part = part if bias is None else part * bias[0, 0].exp()
                assert dead is None or torch.equal(dead[0, 0], ~part.any(1))
                seen[qs, ks], turns[qs] = part, turns[qs] + 1
            ahead = torch.arange(s) - torch.arange(s - t, s)[:, None]
            want = ~((causal & (ahead > 0)) | (ahead.abs() >= (window or INF)))
            if masked:
                want &= mask[0, 0] == 0
            assert (turns == 1).all() and torch.equal(seen, want.double()), (t, s, step)


def gradients(op, tensors, **kw):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out, lse = op(*leaves, **kw, return_lse=True)
    g = torch.Generator().manual_seed(1)
    dout = torch.randn(out.shape, generator=g, dtype=torch.float64)
    loss = (out.double() * dout).sum()
    if kw.get("mask") is None:
        loss = loss + lse.double().square().sum()
    return torch.autograd.grad(loss, leaves)


@pytest.mark.usefixtures("prefix_attention_by")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["causal", "far", "masked", "packed", "row"])
def test_several_blocks_of_wide_groups(form, dtype, two_threads, check_accuracy, monkeypatch):
    """Blocks of 64 (16 bits) and of 192, the last one not whole; keys that nobody sees."""
    g = torch.Generator().manual_seed(0)
    b, h, hkv, t, s, p, d = 2, 16, 2, 270, 303, 21, 64
    kw, lead = {}, ()
    if form == "far":
        kw = dict(window=9)
    elif form == "masked":
        mask = torch.randn(1, 1, t, s, generator=g)
        mask[..., 7, :] = -INF
        kw = dict(mask=mask, window=200, causal=False)
    elif form == "packed":
        b, s = 1, t
        kw = dict(cu_seqlens=torch.tensor([0, 3, 3, 200, t]))
    elif form == "row":
        lead = (b,)
    shapes = [(b, h, t, d), (b, hkv, s, d), (b, hkv, s, d), *[(*lead, hkv, p, d)] * 2]
    tensors = [torch.randn(x, generator=g, dtype=torch.float64).to(dtype) for x in shapes]
    wide = {k: v.double() if k == "mask" else v for k, v in kw.items()}
    ref = gradients(ops.prefix_attention_ref, [x.double() for x in tensors], **wide)
    low = gradients(ops.prefix_attention_ref, tensors, **kw)
    again = gradients(ops.prefix_attention, tensors, **kw)
    empty = torch.empty  # an element that nobody writes shows
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(math.nan))
    got = gradients(ops.prefix_attention, tensors, **kw)
    for name, x, y, lo, r in zip(("q", "k", "v", "pk", "pv"), got, again, low, ref, strict=True):
        check_accuracy(f"d{name}", x, lo, r)
        assert torch.equal(x, y)
    if form == "far":
        assert got[1][:, :, : s - t - 8].count_nonzero() == 0


@pytest.mark.usefixtures("prefix_attention_by")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("heads", [(8, 8), (16, 4)], ids=str)
def test_training_takes_a_quarter_of_the_memory_of_a_concatenation(heads, dtype, two_threads):
    """Beyond the results, at the bench's sizes; 16 bits used to take half for copies in fp32."""
    (H, HKV), B, T, P, D = heads, 8, 512, 128, 64
    shapes = [(B, H, T, D), (B, HKV, T, D), (B, HKV, T, D), (HKV, P, D), (HKV, P, D)]
    leaves = [torch.randn(x).to(dtype).requires_grad_() for x in shapes]
    dout = torch.randn(shapes[0]).to(dtype)

    def concatenated(q, k, v, pk, pv):
        k, v = (torch.cat([x.expand(B, -1, -1, -1), y], 2) for x, y in ((pk, k), (pv, v)))
        seen = torch.ones(T, P + T, dtype=torch.bool).tril(P)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)

    def train(op):
        out = op(*leaves)
        return out.detach(), torch.autograd.grad(out, leaves, dout)

    results = dout.nbytes + sum(t.nbytes for t in leaves)
    ours, floor = (
        peak_bytes(lambda op=op: train(op), torch.device("cpu")) - results
        for op in (ops.prefix_attention, concatenated)
    )
    assert ours <= 0.25 * floor, f"{ours / 2**20:.2f} MiB of {floor / 2**20:.2f}"


@pytest.mark.usefixtures("prefix_attention_by")
def test_a_prefix_alone_costs_no_gradient_of_keys():
    """Without them dq, dk and dv are not made."""
    B, H, T, D, P = 4, 4, 400, 64, 16
    q, k, v = (torch.randn(B, H, T, D) for _ in range(3))
    prefix = [torch.randn(H, P, D, requires_grad=True) for _ in range(2)]
    out = ops.prefix_attention(q, k, v, *prefix)
    dout = torch.randn_like(out)
    back = lambda: torch.autograd.grad(out, prefix, dout, retain_graph=True)  # noqa: E731
    assert peak_bytes(back, torch.device("cpu")) < 3 * q.nbytes
    for got, want in zip(back(), gradients_of_prefix(q, k, v, prefix, dout), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def gradients_of_prefix(q, k, v, prefix, dout):
    leaves = [t.detach().double().requires_grad_() for t in prefix]
    out = ops.prefix_attention_ref(q.double(), k.double(), v.double(), *leaves)
    return [g.float() for g in torch.autograd.grad(out, leaves, dout.double())]
