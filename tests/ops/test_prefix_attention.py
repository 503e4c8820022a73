"""prefix_attention on a CPU against float64: values, gradients, masks, packing, rejections."""

import functools
import importlib
import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from fusedpeft import ops
from fusedpeft.ops.native import native
from fusedpeft.ops.prefix_attention import choose_impl

# the file: the package's attribute of that name is the function
module = importlib.import_module("fusedpeft.ops.prefix_attention")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ("out", "lse", "dq", "dk", "dv", "dprefix_k", "dprefix_v")
INF = math.inf


def make(b=2, h=4, hkv=2, t=37, s=37, p=19, d=32, dtype=torch.float32, prefix="shared", n=3):
    """q, k, v, prefix_k, prefix_v; prefix is shared, row or table (n of them)."""
    g = torch.Generator().manual_seed(b + h * 3 + t * 5 + s * 7 + p * 11 + d)
    lead = {"shared": (), "row": (b,), "table": (n,)}[prefix]
    shapes = [(b, h, t, d), (b, hkv, s, d), (b, hkv, s, d), *[(*lead, hkv, p, d)] * 2]
    return [torch.randn(x, generator=g, dtype=torch.float64).to(dtype) for x in shapes]


def run(op, tensors, weights=(1.0, 0.0), **kw):
    """(out, lse, gradients of weights[0]·Σ dout·out + weights[1]·Σ dlse·lse)."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out, lse = op(*leaves, **kw, return_lse=True)
    g = torch.Generator().manual_seed(1)
    dout = torch.randn(out.shape, generator=g, dtype=torch.float64)
    dlse = torch.randn(lse.shape, generator=g, dtype=torch.float64)
    loss = weights[0] * (out.double() * dout).sum()
    if weights[1]:
        loss = loss + weights[1] * (lse.double() * dlse).masked_fill(lse == -INF, 0.0).sum()
    grads = torch.autograd.grad(loss, leaves)
    return (out.detach(), lse.detach(), *grads)


def sdpa_row(q, k, v, pk, pv, causal, scale, mask, window, of):
    """`_row_ref` by torch's own SDPA over the concatenation: the fp32 bar, as its flash kernel,
    with a polynomial for exp, is a few units off where the plain softmax is not."""
    T, S, P = q.shape[1], k.shape[1], pk.shape[1]
    ahead = torch.arange(S) - torch.arange(S - T, S)[:, None]
    hide = (causal & (ahead > 0)) | (ahead.abs() >= (window or INF))
    bias = (q.new_zeros(1, T, S) if mask is None else mask).masked_fill(hide, -INF)
    kk, vv = (torch.cat(t, 1)[None] for t in ((pk, k), (pv, v)))
    kw = dict(attn_mask=F.pad(bias, (P, 0))[None], scale=scale, enable_gqa=True)
    lse = of(q, k, v, pk, pv, causal, scale, mask, window)[1]
    return F.scaled_dot_product_attention(q[None], kk, vv, **kw)[0], lse


def check(name, got, ref, *lows):
    """max|got − ref64| ≤ 2 · max|low − ref64| + eps, low being torch's own forms of it."""
    assert torch.isfinite(got).all(), f"{name}: not finite"
    worst, *own = ((t.double() - ref).abs().max().item() for t in (got, *lows))
    eps = torch.finfo(got.dtype).eps * ref.abs().max().clamp(min=1e-30).item()
    bound = 2 * max(own) + eps
    assert worst <= bound, f"{name}: |got - ref64| {worst:.3e} > {bound:.3e}"


def compare(tensors, weights=(1.0, 0.0), **kw):
    up = {k: v.double() if k == "mask" else v for k, v in kw.items()}
    got = run(ops.prefix_attention, tensors, weights, **kw)
    lows = [run(ops.prefix_attention_ref, tensors, weights, **kw)]
    if tensors[0].dtype == torch.float32:
        with mock.patch.object(module, "_row_ref", functools.partial(sdpa_row, of=module._row_ref)):
            lows.append(run(ops.prefix_attention_ref, tensors, weights, **kw))
    ref = run(ops.prefix_attention_ref, [t.double() for t in tensors], weights, **up)
    for name, g, r, *lo in zip(NAMES, got, ref, *lows, strict=True):
        assert g.dtype == lo[0].dtype and g.shape == r.shape, name
        if r.numel() == 0:
            continue
        if name == "lse":
            assert torch.equal(g == -INF, r == -INF)
            g, r, *lo = (x.masked_fill(x == -INF, 0.0) for x in (g, r, *lo))
        check(name, g, r, *lo)
    return got


@pytest.mark.usefixtures("prefix_attention_by")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "sizes",
    [
        dict(),
        dict(b=1, h=1, hkv=1, t=1, s=1, p=1, d=1),
        dict(t=1, s=70, p=5, d=64),
        dict(t=150, s=263, p=33, d=40),
        dict(b=3, h=6, hkv=6, t=129, s=129, p=64, d=33),
        dict(b=1, h=8, hkv=1, t=9, s=20, p=200, d=256),
        dict(p=0),
        dict(p=1024, t=5, s=5),
    ],
    ids=str,
)
def test_against_float64(sizes, causal, dtype):
    compare(make(**sizes, dtype=dtype), causal=causal)


@pytest.mark.usefixtures("prefix_attention_by")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [1, 7, 130, 1000])
def test_a_window_hides_far_keys_and_never_the_prefix(window, causal):
    compare(make(t=200, s=263), causal=causal, window=window)


@pytest.mark.usefixtures("prefix_attention_by")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("prefix", ["shared", "row", "table"])
def test_every_form_of_prefix(prefix, dtype):
    kw = {"prefix_ids": torch.tensor([2, -1, 0, 2])} if prefix == "table" else {}
    got = compare(make(b=4, prefix=prefix, dtype=dtype), **kw)
    if prefix == "table":
        assert got[5][1].count_nonzero() == 0  # nobody asked for prefix 1


def test_an_id_of_minus_one_is_plain_attention():
    q, k, v, pk, pv = make(b=1, prefix="table")
    got = ops.prefix_attention(q, k, v, pk, pv, prefix_ids=torch.tensor([-1]))
    want = ops.prefix_attention(q, k, v, pk[0, :, :0], pv[0, :, :0])
    assert torch.equal(got, want)
    plain = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(want, plain)


@pytest.mark.usefixtures("prefix_attention_by")
@pytest.mark.parametrize("p", [0, 19])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lead", [(1, 1), (2, 1), (1, 4), (2, 4)], ids=str)
def test_masks_and_rows_that_see_no_key(lead, causal, p):
    g = torch.Generator().manual_seed(0)
    mask = torch.randn(*lead, 150, 160, generator=g)
    mask[torch.rand(mask.shape, generator=g) < 0.3] = -INF
    mask[..., 5, :] = -INF
    mask[..., 140, :141] = -INF
    tensors = make(t=150, s=160, p=p)
    out, lse, *_ = compare(tensors, mask=mask, causal=causal)
    assert (lse[..., 5] == -INF).all() == (p == 0)
    assert out[..., 5, :].any() == (p > 0)
    compare(tensors, mask=mask, causal=causal, window=20)


@pytest.mark.usefixtures("prefix_attention_by")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("prefix", ["shared", "row", "table"])
def test_packed_sequences(prefix, dtype):
    """Lengths 1, 0, 140, 9: each answers as it would alone."""
    cu = torch.tensor([0, 1, 1, 141, 150], dtype=torch.int32)
    q, k, v, *_ = make(b=1, t=150, s=150, dtype=dtype)
    tensors = [q, k, v, *make(b=4, prefix=prefix, dtype=dtype)[3:]]
    kw = {"prefix_ids": torch.tensor([2, 0, -1, 1])} if prefix == "table" else {}
    for more in ({}, {"causal": False}, {"window": 30}):
        compare(tensors, cu_seqlens=cu, **kw, **more)


@pytest.mark.usefixtures("prefix_attention_by")
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.0, 1.0)])
def test_the_logsumexp_is_differentiable(weights):
    mask = torch.zeros(1, 1, 37, 37)
    mask[..., 3, :] = -INF
    for p in (0, 19):
        compare(make(p=p), weights, mask=mask)


def test_gradcheck_and_opcheck():
    tensors = [t.requires_grad_() for t in make(1, 4, 2, 4, 6, 3, 5, torch.float64)]
    for kw in ({}, {"causal": False}, {"window": 2}):
        fn = lambda *t, kw=kw: ops.prefix_attention(*t, **kw, return_lse=True)  # noqa: E731
        assert torch.autograd.gradcheck(fn, tensors)
    op = torch.ops.fusedpeft.prefix_attention
    torch.library.opcheck(op, (*tensors, None, None, None, True, 0.4, 0, "aten"))
    table = [t.requires_grad_() for t in make(2, 4, 2, 4, 6, 3, 5, prefix="table")]
    mask, ids = torch.zeros(2, 1, 4, 6), torch.tensor([1, -1])
    torch.library.opcheck(op, (*table, mask, None, ids, False, 0.4, 3, "aten"))
    laid = [t.detach().transpose(1, 2).contiguous().transpose(1, 2) for t in table[:3]]
    for impl in ("aten", "flash"):
        given = [t.float().requires_grad_() for t in (*laid, *table[3:])]
        torch.library.opcheck(op, (*given, mask, None, ids, False, 0.4, 3, impl))


def test_compiled_equals_eager_with_gradients():
    tensors = make()
    fn = lambda *t: ops.prefix_attention(*t, window=9)  # noqa: E731
    dout = torch.randn_like(tensors[0])

    def grads(f):
        leaves = [t.detach().clone().requires_grad_() for t in tensors]
        out = f(*leaves)
        return (out, *torch.autograd.grad(out, leaves, dout))

    for e, c in zip(grads(fn), grads(torch.compile(fn, fullgraph=True)), strict=True):
        torch.testing.assert_close(e, c)


@pytest.mark.usefixtures("prefix_attention_by")
@pytest.mark.parametrize("threads", [1, 2])
def test_two_runs_give_the_same_bits(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        first, second = (run(ops.prefix_attention, make(b=5, t=300, s=300)) for _ in range(2))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_bits_do_not_depend_on_the_threads():
    if native is None:
        pytest.skip("fusedpeft._C is not built")
    tensors, before = make(b=3, h=6, hkv=3, t=100, s=130), torch.get_num_threads()
    try:
        got = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            got.append(run(ops.prefix_attention, tensors, impl="flash"))
    finally:
        torch.set_num_threads(before)
    for other in got[1:]:
        assert all(torch.equal(a, b) for a, b in zip(got[0], other, strict=True))


@pytest.mark.usefixtures("prefix_attention_by")
def test_gradients_only_where_they_are_needed():
    tensors = make()
    want = run(ops.prefix_attention, tensors)[2:]
    dout = torch.randn(
        tensors[0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    for i, full in enumerate(want):
        leaves = [t.detach().clone().requires_grad_(i == j) for j, t in enumerate(tensors)]
        ops.prefix_attention(*leaves).backward(dout.float())
        assert [t.grad is not None for t in leaves] == [i == j for j in range(5)]
        torch.testing.assert_close(leaves[i].grad, full)


@pytest.mark.usefixtures("prefix_attention_by")
def test_any_strides():
    tensors = make(t=50, s=60)
    want = run(ops.prefix_attention, tensors)
    for other in (
        [t.transpose(-3, -2).contiguous().transpose(-3, -2) for t in tensors],  # [B, T, H, D]
        [torch.stack((t, t), -1)[..., 0] for t in tensors],
    ):
        assert not other[0].is_contiguous()
        leaves = [t.detach().requires_grad_() for t in other]
        out = ops.prefix_attention(*leaves)
        torch.testing.assert_close(out, want[0])
        grads = torch.autograd.grad(out.square().sum(), leaves[:3])
        by_token = other[0].stride(-1) == 1
        for made, given in zip((out, *grads), (other[0], *other[:3]), strict=True):
            assert made.stride() == (given if by_token else given.contiguous()).stride()


def test_autocast_runs_in_its_dtype_and_returns_fp32_gradients():
    tensors = [t.requires_grad_() for t in make()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ops.prefix_attention(*tensors)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in tensors)


def test_saved_are_the_inputs_out_and_the_logsumexp():
    tensors = [t.requires_grad_() for t in make()]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.prefix_attention(*tensors)
    own = [t for t in saved if all(t.data_ptr() != o.data_ptr() for o in tensors)]
    assert sorted(t.numel() for t in own) == [2 * 4 * 37, 2 * 4 * 37 * 32]


@pytest.mark.usefixtures("prefix_attention_by")
@pytest.mark.parametrize(
    "sizes", [dict(b=0), dict(t=0), dict(t=0, s=0), dict(t=0, s=0, p=0)], ids=str
)
def test_empty_inputs_give_zeros(sizes):
    tensors = make(**sizes)
    out, lse, *grads = run(ops.prefix_attention, tensors)
    assert out.shape == tensors[0].shape and lse.shape == out.shape[:3]
    for g, t in zip(grads, tensors, strict=True):
        assert g.shape == t.shape and g.count_nonzero() == 0


def test_no_memory_for_a_prefix_per_row():
    from fusedpeft.bench.harness import peak_bytes

    q, k, v, pk, pv = make(b=64, h=1, hkv=1, t=1, s=1, p=1024, d=64)
    copied = 64 * (pk.nbytes + pv.nbytes)
    taken = peak_bytes(lambda: ops.prefix_attention(q, k, v, pk, pv), torch.device("cpu"))
    assert taken < copied / 20


Q, K, V, PK, PV = make()
TABLE = make(prefix="table")[3:]


@pytest.mark.parametrize(
    "change, kw, error, message",
    [
        (dict(q=Q[0]), {}, ValueError, r"q: expected 4 dims.*got \(4, 37, 32\)"),
        (dict(k=K[:, :, :, :8]), {}, ValueError, r"k, v: expected \[2, HKV, S, 32\].*37, 8\), "),
        (dict(v=V[:, :, :9]), {}, ValueError, r"got \(2, 2, 37, 32\), \(2, 2, 9, 32\)"),
        (dict(k=K[:, :, :9], v=V[:, :, :9]), {}, ValueError, r"k: expected S >= T = 37, got S = 9"),
        (dict(q=Q[:, :3]), {}, ValueError, r"k: expected HKV that divides H = 3, got 2"),
        (dict(q=torch.zeros(1, 1, 1, 257)), {}, ValueError, r"D in 1\.\.256, got 257"),
        (dict(pk=PK[:1]), {}, ValueError, r"\[2, 2, P, 32\] or \[2, P, 32\], got"),
        (dict(pv=PV[:, :5]), {}, ValueError, r"prefix_v: expected \(2, 19, 32\).*\(2, 5, 32\)"),
        (dict(pk=TABLE[0], pv=TABLE[1]), {}, ValueError, r"prefix_k: .*got \(3, 2, 19, 32\)"),
        (dict(k=K.bfloat16()), {}, TypeError, r"k: expected dtype torch.float32 \(as q\)"),
        (dict(q=Q.long()), {}, TypeError, r"q: expected a floating dtype, got torch.int64"),
        (dict(v=V.to("meta")), {}, ValueError, r"v: expected device cpu \(as q\), got meta"),
        (dict(pk=None), {}, TypeError, r"prefix_k: expected a Tensor, got NoneType"),
        ({}, dict(mask=torch.zeros(37, 37)), ValueError, r"mask: .*\[2 or 1, 4 or 1, 37, 37\]"),
        ({}, dict(mask=torch.ones(1, 1, 37, 37) > 0), TypeError, r"mask: .*got torch.bool"),
        ({}, dict(mask=torch.full((1, 1, 37, 37), math.nan)), ValueError, r"mask: .*got NaN"),
        ({}, dict(mask=torch.full((1, 1, 37, 37), INF)), ValueError, r"mask: .*\+inf"),
        ({}, dict(mask=torch.zeros(1, 1, 37, 37, requires_grad=True)), ValueError, r"no gradient"),
        ({}, dict(window=0), ValueError, r"window: expected an int >= 1 or None, got 0"),
        ({}, dict(scale=INF), ValueError, r"scale: expected a finite number, got inf"),
        ({}, dict(impl="eager"), ValueError, r"impl: expected one of .*got 'eager'"),
        ({}, dict(impl="triton"), ValueError, r"impl='triton': expected CUDA tensors, got cpu"),
        ({}, dict(cu_seqlens=torch.tensor([0, 37])), ValueError, r"expected B = 1 .*got B = 2"),
        (dict(pk=TABLE[0], pv=TABLE[1]), dict(prefix_ids=torch.tensor([0, 3])), ValueError,
         r"prefix_ids: expected -1 or an id below 3, got 3"),
        (dict(pk=TABLE[0], pv=TABLE[1]), dict(prefix_ids=torch.tensor([0, -2])), ValueError,
         r"got -2"),
        (dict(pk=TABLE[0], pv=TABLE[1]), dict(prefix_ids=torch.tensor([0])), ValueError,
         r"prefix_ids: expected \[2\], one a row, got \(1,\)"),
        (dict(pk=TABLE[0], pv=TABLE[1]), dict(prefix_ids=torch.tensor([0.0, 1.0])), TypeError,
         r"prefix_ids: expected int32 or int64"),
        ({}, dict(prefix_ids=torch.tensor([0, 0])), ValueError, r"\[n, 2, P, 32\], got"),
    ],
)  # fmt: skip
def test_bad_input(change, kw, error, message):
    args = dict(q=Q, k=K, v=V, pk=PK, pv=PV) | change
    if args["q"].shape[-1] == 257:
        args["k"] = args["v"] = args["q"]
    with pytest.raises(error, match=message):
        ops.prefix_attention(*args.values(), **kw)


@pytest.mark.parametrize(
    "change, kw, message",
    [
        (dict(k=K[..., :8]), {}, r"k, v: expected \[2, HKV, S, 32\]"),
        (dict(k=K[:, :, :9]), {}, r"k, v: expected"),
        (dict(q=Q[:, :3, :1]), {}, r"k: expected HKV that divides H = 3"),
        (dict(pk=PK[:1], pv=PV[:1]), {}, r"prefix_k: expected"),
        (dict(pv=PV[:, :5]), {}, r"prefix_v: expected \(2, 19, 32\)"),
        (dict(pk=PK.double()), {}, r"prefix_k: expected dtype"),
        (dict(v=V.to("meta")), {}, r"v: expected device cpu"),
        (dict(k=K[:, :, :0], v=V[:, :, :0]), {}, r"k: expected S >= T = 1, got S = 0"),
        ({}, dict(window=0), r"window: expected an int >= 1"),
        ({}, dict(scale=INF), r"scale: expected a finite number"),
        ({}, dict(impl="eager"), r"impl: expected one of"),
    ],
)
def test_the_short_way_of_a_decoded_token_refuses_the_same(change, kw, message):
    args = dict(q=Q[:, :, :1], k=K, v=V, pk=PK, pv=PV) | change
    with torch.no_grad(), pytest.raises((TypeError, ValueError), match=message):
        ops.prefix_attention(*args.values(), **kw)


@pytest.mark.parametrize("cu", [[0, 9], [1, 37], [0, 20, 10, 37]], ids=str)
def test_bad_packing(cu):
    q, k, v, pk, pv = make(b=1)
    with pytest.raises(ValueError, match=r"ascending from 0 to 37, got"):
        ops.prefix_attention(q, k, v, pk, pv, cu_seqlens=torch.tensor(cu))
    with pytest.raises(ValueError, match=r"mask: expected None beside cu_seqlens"):
        mask = torch.zeros(1, 1, 37, 37)
        ops.prefix_attention(q, k, v, pk, pv, cu_seqlens=torch.tensor([0, 37]), mask=mask)
    with pytest.raises(ValueError, match=r"S = T = 37, got S = 60"):
        k, v = make(b=1, s=60)[1:3]
        ops.prefix_attention(q, k, v, pk, pv, cu_seqlens=torch.tensor([0, 37]))


def test_the_choice_of_implementation():
    assert choose_impl("cpu")[0] == choose_impl("cpu", "aten")[0] == "flash"
    assert choose_impl("cpu", flash=False)[0] == "aten"
    assert choose_impl("cpu", "native")[0] == "native"
    assert choose_impl("cuda", "cuda")[0] == "cuda" and choose_impl("cuda", "aten")[0] == "triton"
    assert choose_impl("cuda")[0] == "triton" and choose_impl("xpu")[0] == "raises"
    given = [t.to("meta").requires_grad_() for t in (Q, K, V, PK, PV)]
    out, lse = ops.prefix_attention(*given, return_lse=True)  # shapes without memory
    assert out.shape == Q.shape and lse.shape == Q.shape[:3]
    assert torch.autograd.grad(out.sum(), given)[3].shape == PK.shape


@pytest.mark.usefixtures("prefix_attention_by")
@pytest.mark.parametrize("scale", [0.0, -0.5])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("T", [4, 300])
def test_a_scale_that_is_not_positive(T, causal, scale):
    g = torch.Generator().manual_seed(0)
    t = [torch.randn(s, generator=g).requires_grad_() for s in
         ((2, 4, T, 8), (2, 2, T, 8), (2, 2, T, 8), (2, 3, 8), (2, 3, 8))]  # fmt: skip
    dy = torch.randn(2, 4, T, 8, generator=g)
    got, want = (
        (y := op(*t, causal=causal, scale=scale), *torch.autograd.grad(y, t, dy))
        for op in (ops.prefix_attention, ops.prefix_attention_ref)
    )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("prefix_attention_by")
@pytest.mark.parametrize("window", [2**31 - 1, 2**31, 2**70])
@pytest.mark.parametrize("T", [1, 5])
def test_a_window_wider_than_any_number_of_keys_hides_none(T, window):
    q, k = torch.randn(1, 2, T, 8), torch.randn(1, 2, 5, 8)
    for causal in (True, False):
        got = ops.prefix_attention(q, k, k, k[0, :, :2], k[0, :, :2], causal=causal, window=window)
        want = ops.prefix_attention(q, k, k, k[0, :, :2], k[0, :, :2], causal=causal)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("bad", [{"prefix_ids": [0, 77]}, {"cu_seqlens": [0, 4]}])
def test_values_are_checked_in_a_compiled_call_too(bad):
    packed = "cu_seqlens" in bad
    q = torch.randn(1 if packed else 2, 2, 9, 8)
    prefix = torch.randn(2, 3, 8) if packed else torch.randn(3, 2, 3, 8)
    given = {name: torch.tensor(value) for name, value in bad.items()}
    call = torch.compile(ops.prefix_attention, backend="aot_eager")
    with pytest.raises(ValueError, match=f"{next(iter(bad))}: expected"):
        call(q, q, q, prefix, prefix, **given)
