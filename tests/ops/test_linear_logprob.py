"""linear_logprob and linear_cross_entropy on a CPU against float64."""

import importlib
import math

import pytest
import torch

from fusedpeft import ops

module = importlib.import_module("fusedpeft.ops.linear_logprob")
aten = importlib.import_module("fusedpeft.ops.linear_logprob_aten")

DTYPES = [torch.float32, torch.bfloat16]
OPTIONS = {"plain": {}, "softcap": {"softcap": 2.0}, "both": {"softcap": 1.5, "temperature": 0.7}}


def make(m, d, v, dtype, bias=True, ignored=0):
    g = torch.Generator().manual_seed(m + d + v)
    h, w = torch.randn(m, d, generator=g), torch.randn(v, d, generator=g) / d**0.5
    c = torch.randn(v, generator=g) if bias else None
    labels = torch.randint(0, v, (m,), generator=g)
    labels[:ignored] = -100
    return h.to(dtype), w.to(dtype), labels, None if c is None else c.to(dtype)


def run(op, h, w, labels, bias, head, g, **kw):
    h = h.detach().clone().requires_grad_()
    w, bias = (None if t is None else t.detach().clone().requires_grad_(head) for t in (w, bias))
    y = op(h, w, labels, bias, **kw)
    leaves = [t for t in (h, w, bias) if t is not None and t.requires_grad]
    return y.detach(), torch.autograd.grad(y, leaves, g.to(y.dtype))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("chunk_bytes", [4 * 100, 32 * 2**20])
@pytest.mark.parametrize("head", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m, d, v, ignored", [(1, 16, 10, 0), (63, 33, 101, 7), (130, 64, 17, 130)])
def test_against_float64(
    check_accuracy, monkeypatch, m, d, v, ignored, dtype, head, chunk_bytes, options
):
    monkeypatch.setattr(aten, "LOGITS_BYTES", chunk_bytes)
    monkeypatch.setattr(aten, "TILE_ROWS", 50)
    kw = OPTIONS[options]
    h, w, labels, bias = make(m, d, v, dtype, ignored=ignored)
    g = torch.randn(m, generator=torch.Generator().manual_seed(5))
    up = (h.double(), w.double(), labels, bias.double())
    got = run(ops.linear_logprob, h, w, labels, bias, head, g, **kw)
    low = run(ops.linear_logprob_ref, h, w, labels, bias, head, g, **kw)
    ref = run(ops.linear_logprob_ref, *up, head, g, **kw)
    for name, *t in zip(["logp"], got[:1], low[:1], ref[:1], strict=True):
        check_accuracy(name, *t)
    for name, *t in zip(["dh", "dw", "dbias"], got[1], low[1], ref[1], strict=False):
        assert t[0].dtype == t[1].dtype, name
        check_accuracy(name, *t)
    assert (got[0][:ignored] == 0).all() and (got[1][0][:ignored] == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy_equals_torch(reduction):
    h, w, labels, bias = make(40, 16, 30, torch.float64, ignored=3)
    got = ops.linear_cross_entropy(h, w, labels, bias, reduction=reduction)
    want = torch.nn.functional.cross_entropy(h @ w.t() + bias, labels, reduction=reduction)
    torch.testing.assert_close(got, want)
    ref = ops.linear_cross_entropy_ref(h, w, labels, bias, reduction=reduction)
    torch.testing.assert_close(got, ref)


def test_softcap_and_temperature_are_what_models_do():
    """Gemma's c·tanh(z/c), then the division; cross-entropy takes the same options."""
    h, w, labels, bias = make(20, 16, 30, torch.float64)
    z = 3.0 * torch.tanh((h @ w.t() + bias) / 3.0) / 0.5
    want = torch.nn.functional.cross_entropy(z, labels)
    for op in (ops.linear_cross_entropy, ops.linear_cross_entropy_ref):
        got = op(h, w, labels, bias, softcap=3.0, temperature=0.5)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("masked", [False, True], ids=["rows_picked", "rows_masked"])
def test_ignored_rows_are_skipped_not_multiplied_by_zero(masked, monkeypatch):
    if masked:  # as on a GPU, where picking the rows would synchronise
        monkeypatch.setattr(aten, "_select", lambda h, t, ignored: (None, t != ignored))
    h, w, labels, _ = make(6, 8, 10, torch.float32, bias=False, ignored=2)
    h[:2] = float("nan")
    h.requires_grad_(), w.requires_grad_()
    loss = ops.linear_cross_entropy(h, w, labels)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(w.grad).all() and (h.grad[:2] == 0).all()


@pytest.mark.skipif(aten.native is None, reason="fusedpeft._C is not built")
def test_a_softmax_in_one_pass_is_torch_s(check_accuracy):
    z = 4 * torch.randn(70, 3001, generator=torch.Generator().manual_seed(0))
    z[3], z[4, :3000], z[5, 7], z[6, 7] = -torch.inf, -torch.inf, torch.nan, torch.inf
    z[7], z[8, 5] = 1e30, 3e38
    low = z.softmax(-1), z.logsumexp(-1, keepdim=True)
    low[1][3] = low[1][6] = torch.nan  # as p is there
    for write in (True, False):
        got = z.clone()
        lse = aten._softmax_(got, write)
        for p, want in ((got if write else low[0], low[0]), (lse, low[1])):
            torch.testing.assert_close(p, want, equal_nan=True)
    fine = torch.cat((z[:3], z[9:]))
    got = fine.clone()
    lse, wide = aten._softmax_(got, True), fine.double()
    check_accuracy("p", got, fine.softmax(-1), wide.softmax(-1))
    check_accuracy("lse", lse[:, 0], fine.logsumexp(-1), wide.logsumexp(-1))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(aten._softmax_(fine, True), lse) and torch.equal(fine, got)
    finally:
        torch.set_num_threads(threads)


def test_all_ignored_and_empty_give_zero():
    h, w, labels, _ = make(4, 8, 10, torch.float32, bias=False, ignored=4)
    h.requires_grad_()
    loss = ops.linear_cross_entropy(h, w, labels)
    loss.backward()
    assert loss == 0 and (h.grad == 0).all()
    empty = torch.empty(2, 0, dtype=torch.int64)
    assert ops.linear_logprob(torch.empty(2, 0, 8), w, empty).shape == (2, 0)
    assert ops.linear_cross_entropy(torch.empty(2, 0, 8), w, empty) == 0


def test_the_logits_never_exist_whole():
    """The largest tensor made, forward and backward, stays within one chunk."""
    m, d, v = 256, 16, 5000
    h, w, labels, _ = make(m, d, v, torch.float32, bias=False)

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else (out,):
                if isinstance(t, torch.Tensor):
                    Largest.numel = max(Largest.numel, t.numel())
            return out

    for head in (False, True):
        Largest.numel = 0
        with pytest.MonkeyPatch.context() as patch, Largest():
            patch.setattr(aten, "LOGITS_BYTES", 4 * v * 32)
            run(ops.linear_logprob, h, w, labels, None, head, torch.ones(m))
        assert Largest.numel <= 32 * v < m * v / 4


@pytest.mark.parametrize("options", OPTIONS)
def test_gradcheck(options):
    h, w, labels, bias = make(6, 5, 9, torch.float64, ignored=1)
    h.requires_grad_(), w.requires_grad_(), bias.requires_grad_()
    kw = OPTIONS[options]
    whole = lambda h, w, c: ops.linear_logprob(h, w, labels, c, **kw)  # noqa: E731
    assert torch.autograd.gradcheck(whole, (h, w, bias))
    frozen = (w.detach(), labels, bias.detach())  # the kept u
    assert torch.autograd.gradcheck(lambda h: ops.linear_logprob(h, *frozen, **kw), (h,))
    assert torch.autograd.gradcheck(lambda c: whole(h.detach(), frozen[0], c), (bias,))


def test_opcheck_compile():
    h, w, labels, bias = make(6, 5, 9, torch.float64, ignored=1)
    h.requires_grad_(), w.requires_grad_(), bias.requires_grad_()
    op = torch.ops.fusedpeft.linear_logprob
    torch.library.opcheck(op, (h, w, labels, bias, -100, 0.0, 1.0, False, ""))
    frozen = (h, w.detach(), labels, None)
    torch.library.opcheck(op, (*frozen, -100, 2.0, 0.5, True, "aten"))
    fn = torch.compile(lambda h: ops.linear_cross_entropy(h, w, labels, bias), fullgraph=True)
    torch.testing.assert_close(fn(h), ops.linear_cross_entropy(h, w, labels, bias))


def test_autocast():
    h, w, labels, bias = make(6, 5, 9, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ops.linear_logprob(h, w, labels, bias).dtype == torch.float32


H, W, L = torch.randn(4, 8), torch.randn(10, 8), torch.tensor([0, 9, -100, 3])


@pytest.mark.parametrize(
    "args, error, message",
    [
        ((H, W, torch.tensor([0, 10, 1, 2])), ValueError, r"in \[0, 10\).*got 10 at \[1\]"),
        ((H, W, torch.tensor([0, -1, 1, 2])), ValueError, r"got -1 at \[1\]"),
        ((H, W, L.int()), TypeError, "expected torch.int64, got torch.int32"),
        ((H, W, L[:3]), ValueError, r"labels: expected \(4,\), got \(3,\)"),
        ((H, W[:, :7], L), ValueError, r"h \[\*, d\] and w \[V, d\]"),
        ((H, W.bfloat16(), L), TypeError, "one floating dtype"),
        ((H, W, L, torch.randn(9)), ValueError, r"bias: expected \[10\].*got \[9\]"),
        ((H, W.to("meta"), L), ValueError, "w: expected device cpu"),
        ((H, [1], L), TypeError, "w: expected a Tensor, got list"),
        ((H, W[:0], L), ValueError, r"V >= 1 and d >= 1, got \(0, 8\)"),
        ((H, W, L, torch.randn(10, device="meta")), ValueError, "bias: expected device cpu"),
    ],
)
def test_bad_input(args, error, message):
    with pytest.raises(error, match=message):
        ops.linear_logprob(*args)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"softcap": 0.0}, ValueError, "softcap: expected a finite number > 0, got 0.0"),
        ({"softcap": float("nan")}, ValueError, "softcap: .* got nan"),
        ({"temperature": -1.0}, ValueError, "temperature: expected a finite number > 0, got -1.0"),
        ({"temperature": float("inf")}, ValueError, "temperature: .* got inf"),
        ({"impl": "cuda"}, ValueError, r"impl: expected one of \('aten', 'triton'\).*got 'cuda'"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        ops.linear_logprob(H, W, L, **options)


def test_fp64_has_no_triton():
    with pytest.raises(TypeError, match="got torch.float64; use 'aten'"):
        ops.linear_logprob(H.double(), W.double(), L, impl="triton")
    assert module.choose_impl("cuda", torch.bfloat16)[0] == "triton"
    assert module.choose_impl("cuda", torch.float64)[0] == "aten"
    assert module.choose_impl("cpu", torch.bfloat16)[0] == "aten"


def test_bad_reduction():
    with pytest.raises(ValueError, match="reduction: expected 'mean', 'sum' or 'none', got 'max'"):
        ops.linear_cross_entropy(H, W, L, reduction="max")


def test_shapes_without_memory():
    h, w, labels = (t.to("meta") for t in (H, W, L))
    assert ops.linear_logprob(h.requires_grad_(), w, labels).shape == labels.shape


@pytest.mark.parametrize("learns", [False, True])
def test_a_gradient_beyond_fp16_and_nan_where_a_label_is_ignored(learns):
    """What a scaler multiplies the loss by, and what a loss may leave where it does not look."""
    g = torch.Generator().manual_seed(0)
    h = torch.randn(3, 4, generator=g).half().requires_grad_()
    w = torch.randn(9, 4, generator=g).half().requires_grad_(learns)
    logp = ops.linear_logprob(h, w, torch.tensor([1, -100, 3]))
    dy = torch.tensor([65536.0, math.nan, 25000.0])
    (dh,) = torch.autograd.grad(logp, h, dy)
    up = h.detach().double().requires_grad_()
    ref = ops.linear_logprob_ref(up, w.detach().double(), torch.tensor([1, -100, 3]))
    (want,) = torch.autograd.grad(ref, up, dy.nan_to_num().double())
    finite = want.abs() < 6e4
    assert finite.any() and torch.equal(dh[1], torch.zeros(4).half())
    # u keeps 11 bits of numbers up to 2, and the product, up to 65504, is rounded to 11 once more.
    bound = 2.0**-10 * dy.nan_to_num()[:, None] + 2.0**-11 * want.abs()
    assert ((dh.double() - want).abs() <= bound)[finite].all()
