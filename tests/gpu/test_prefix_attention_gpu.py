"""prefix_attention on a GPU, `impl="triton"` against float64. pytest -m gpu tests/gpu"""

import math

import pytest
import torch
import torch.nn.functional as F

from fusedpeft import ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

INF = math.inf
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
NAMES = ("out", "lse", "dq", "dk", "dv", "dprefix_k", "dprefix_v")
SHAPES = {  # b, h, hkv, t, s, p, d
    "one_query": (3, 8, 2, 1, 300, 20, 64),
    "odd": (2, 6, 3, 137, 290, 19, 80),
    "unaligned_head": (1, 4, 2, 100, 100, 33, 72),
    "llama": (2, 8, 2, 700, 700, 128, 128),
    "wide": (1, 4, 1, 200, 260, 50, 256),
    "no_prefix": (2, 4, 4, 257, 257, 0, 64),
    "long_prefix": (2, 4, 2, 64, 64, 1024, 96),
}


def make(shape, dtype, lead=()):
    b, h, hkv, t, s, p, d = shape
    g = torch.Generator("cuda").manual_seed(sum(shape))
    sizes = [(b, h, t, d), (b, hkv, s, d), (b, hkv, s, d), *[(*lead, hkv, p, d)] * 2]
    return [torch.randn(x, generator=g, device="cuda").to(dtype) for x in sizes]


def run(op, tensors, dlse=0.0, **kw):
    """(out, lse, gradients of Σ dout·out + dlse · Σ random·lse)."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out, lse = op(*leaves, **kw, return_lse=True)
    g = torch.Generator("cuda").manual_seed(1)
    up, down = (torch.randn(t.shape, generator=g, device="cuda") for t in (out, lse))
    loss = (out * up.to(out.dtype)).sum()
    if dlse:
        loss = loss + dlse * (lse * down).masked_fill(lse == -INF, 0.0).sum()
    return (out.detach(), lse.detach(), *torch.autograd.grad(loss, leaves))


def check(check_accuracy, tensors, dlse=0.0, **kw):
    got = run(ops.prefix_attention, tensors, dlse, impl="triton", **kw)
    low = run(ops.prefix_attention_ref, tensors, dlse, **kw)
    wide = {k: v.double() if k == "mask" else v for k, v in kw.items()}
    ref = run(ops.prefix_attention_ref, [t.double() for t in tensors], dlse, **wide)
    for name, *three in zip(NAMES, got, low, ref, strict=True):
        assert three[0].dtype == three[1].dtype and three[0].shape == three[1].shape, name
        if name == "lse":
            assert torch.equal(three[0] == -INF, three[2] == -INF)
            three = [t.masked_fill(t == -INF, 0.0) for t in three]
        if three[0].numel() and three[0].dtype != torch.float32:
            check_accuracy(name, *three)
        elif three[0].numel():  # scores are rounded once more than torch's: times log2 e, for exp2
            error, own = ((t.double() - three[2]).abs().max() for t in three[:2])
            bar = 2 * own + 4 * torch.finfo(torch.float32).eps * three[2].abs().max()
            assert error <= bar, f"{name}: error {error:.3g}, allowed {bar:.3g}"
    return got


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_against_float64(check_accuracy, name, dtype, causal):
    check(check_accuracy, make(SHAPES[name], dtype), dlse=1.0, causal=causal)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [1, 70, 300])
def test_a_window(check_accuracy, window, dtype):
    for causal in (True, False):
        check(check_accuracy, make(SHAPES["llama"], dtype), window=window, causal=causal)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [64, 128, 256])
def test_masks_and_rows_that_see_no_key(check_accuracy, d, dtype):
    g = torch.Generator("cuda").manual_seed(0)
    mask = torch.randn(2, 1, 150, 160, generator=g, device="cuda").to(dtype)
    mask[torch.rand(mask.shape, generator=g, device="cuda") < 0.3] = -INF
    mask[..., 5, :] = -INF
    for p in (0, 19):
        tensors = make((2, 4, 2, 150, 160, p, d), dtype)
        lse = check(check_accuracy, tensors, dlse=1.0, mask=mask)[1]
        assert (lse[..., 5] == -INF).all() == (p == 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lead", ["row", "table"])
def test_every_form_of_prefix(check_accuracy, lead, dtype):
    size = (4,) if lead == "row" else (3,)
    ids = torch.tensor([2, -1, 0, 2], device="cuda")
    kw = {"prefix_ids": ids} if lead == "table" else {}
    check(check_accuracy, make((4, 8, 2, 150, 150, 40, 64), dtype, size), **kw)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lead", [(), (5,)], ids=["shared", "table"])
def test_packed_sequences(check_accuracy, lead, dtype):
    cu = torch.tensor([0, 1, 1, 441, 505, 514], dtype=torch.int32, device="cuda")
    kw = {"prefix_ids": torch.tensor([2, 0, -1, 1, 2], device="cuda")} if lead else {}
    tensors = make((1, 8, 2, 514, 514, 40, 64), dtype, lead)
    check(check_accuracy, tensors, dlse=1.0, cu_seqlens=cu, **kw)
    check(check_accuracy, tensors, cu_seqlens=cu, causal=False, window=100, **kw)


def test_runs_are_bit_equal_and_a_second_backward_too():
    tensors = make(SHAPES["llama"], torch.bfloat16)
    first, second = (run(ops.prefix_attention, tensors) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    leaves = [t.requires_grad_() for t in tensors]
    out = ops.prefix_attention(*leaves)
    once = torch.autograd.grad(out, leaves, torch.ones_like(out), retain_graph=True)
    twice = torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


def test_no_synchronisation():
    tensors = [t.requires_grad_() for t in make((1, 8, 2, 514, 514, 40, 64), torch.bfloat16, (3,))]
    cu = torch.tensor([0, 100, 441, 514], device="cuda")
    ids = torch.tensor([2, -1, 0], device="cuda")

    def step():
        out = ops.prefix_attention(*tensors, cu_seqlens=cu, prefix_ids=ids)
        torch.autograd.grad(out.sum(), tensors)

    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_cuda_graph_replays():
    tensors = make(SHAPES["llama"], torch.bfloat16)
    want = ops.prefix_attention(*tensors)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.prefix_attention(*tensors)
    out.zero_()
    graph.replay()
    assert torch.equal(out, want)


def test_nobody_reads_ids_and_lengths(monkeypatch):
    monkeypatch.delenv("FUSEDPEFT_DEBUG", raising=False)
    tensors = make((3, 4, 2, 100, 100, 20, 64), torch.bfloat16, (2,))
    out = ops.prefix_attention(*tensors, prefix_ids=torch.tensor([1, 7, 0], device="cuda"))
    assert out[1].isnan().all() and torch.isfinite(out[[0, 2]]).all()
    q, k, v, pk, pv = make((1, 4, 2, 300, 300, 20, 64), torch.bfloat16)
    cu = torch.tensor([0, 200, 250], device="cuda")
    out = ops.prefix_attention(q, k, v, pk, pv, cu_seqlens=cu)
    assert out[:, :, 250:].isnan().all() and torch.isfinite(out[:, :, :250]).all()


def test_extra_memory_is_a_fraction_of_what_concatenation_copies():
    tensors = [t.requires_grad_() for t in make((4, 32, 8, 2048, 2048, 128, 128), torch.bfloat16)]
    results = 2 * tensors[0].nbytes + sum(t.nbytes for t in tensors[1:])  # out and gradients
    lse = tensors[0].nbytes // 64
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = ops.prefix_attention(*tensors)
    grads = torch.autograd.grad(out, tensors, out.detach())
    extra = torch.cuda.max_memory_allocated() - before - results - lse
    keys = [t.nbytes + 4 * p.nbytes for t, p in zip(tensors[1:3], tensors[3:], strict=True)]
    copies = 2 * sum(keys)  # concatenation's own: keys and values, and the gradients of both
    assert grads[0].shape == out.shape and extra <= 0.15 * copies


def test_offsets_beyond_two_to_the_31():
    """q and out of 2^31 elements and more: the last rows answer as they would alone."""
    n, h, d = 2**19 + 200, 32, 128
    q = torch.zeros(1, h, n, d, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.zeros(1, 1, n, d, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    tail = make((1, h, 1, 200, 200, 16, d), torch.bfloat16)
    for whole, end in zip((q, k, v), tail, strict=False):
        whole[:, :, -200:] = end
    cu = torch.tensor([*range(0, 2**19 + 1, 2048), n], device="cuda")
    out = ops.prefix_attention(q, k, v, *tail[3:], cu_seqlens=cu)
    torch.testing.assert_close(out[:, :, -200:], ops.prefix_attention(*tail))


def test_torch_compile_fullgraph():
    tensors = make((2, 8, 2, 200, 200, 20, 64), torch.bfloat16)
    fn = torch.compile(lambda *t: ops.prefix_attention(*t, window=50), fullgraph=True)
    dout = torch.randn_like(tensors[0])

    def grads(f):
        leaves = [t.detach().clone().requires_grad_() for t in tensors]
        out = f(*leaves)
        return (out, *torch.autograd.grad(out, leaves, dout))

    for a, b in zip(grads(fn), grads(lambda *t: ops.prefix_attention(*t, window=50)), strict=True):
        torch.testing.assert_close(a, b)


def test_without_a_prefix_it_is_plain_attention():
    q, k, v, pk, pv = make((2, 8, 2, 300, 300, 0, 64), torch.bfloat16)
    want = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(ops.prefix_attention(q, k, v, pk, pv), want, rtol=2e-2, atol=2e-2)


def test_fp64_has_no_kernel():
    tensors = [t.double() for t in make((1, 2, 1, 9, 9, 3, 32), torch.float32)]
    with pytest.raises(TypeError, match="impl='triton': expected fp32, bf16 or fp16"):
        ops.prefix_attention(*tensors)
