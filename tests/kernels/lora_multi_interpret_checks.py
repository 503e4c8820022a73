"""What test_lora_multi_interpret.py runs under Triton's interpreter: see lora_interpret_checks.py.

TRITON_INTERPRET=1 pytest tests/kernels/lora_multi_interpret_checks.py
"""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 from the start", allow_module_level=True)

from fusedpeft import ops
from fusedpeft.kernels import lora_multi, lora_tables
from fusedpeft.kernels.lora_tables import ARCHS
from fusedpeft.ops.dropout import keep_mask_ref

SHAPES = {  # M, K, [(N, R)]
    "one_row": (1, 33, [(17, 1), (5, 3)]),
    "gate_up": (63, 129, [(65, 16), (65, 16)]),
    "rows16_high_rank": (9, 65, [(33, 40), (24, 12), (17, 0)]),
    "qkv": (130, 150, [(129, 8), (33, 16), (40, 12)]),
    "no_adapter_in_the_middle": (20, 67, [(40, 4), (33, 0), (31, 64)]),
    "no_adapter_first": (20, 67, [(40, 0), (33, 7)]),
    "ranks_past_the_tile": (65, 67, [(66, 70), (35, 40)]),
}
SCALES = (1.5, 0.5, 1.0)
NEEDS = ("dw", "da", "db", "dbias")


def make(shape, dtype, adapter=None):
    """(x, ws, as, bs, biases, dys); the first projection has no bias."""
    m, k, parts = shape
    g = torch.Generator().manual_seed(m + k)
    adapter = adapter or dtype

    def normal(*size, by=1.0, dtype=dtype):
        return (torch.randn(size, generator=g) * by).to(dtype)

    ws = [normal(n, k, by=k**-0.5) for n, _ in parts]
    as_ = [normal(r, k, by=k**-0.5, dtype=adapter) for _, r in parts]
    bs = [normal(n, r, by=max(r, 1) ** -0.5, dtype=adapter) for n, r in parts]
    biases = [normal(n) for n, _ in parts]
    return normal(m, k), ws, as_, bs, [None, *biases[1:]], [normal(m, n) for n, _ in parts]


def specification(t, p, seed, dtype):
    """[(name, tensor)] in plain torch, projection by projection, in `dtype`."""
    x, ws, as_, bs, biases, dys = (
        [None if v is None else v.to(dtype) for v in part] if isinstance(part, list)
        else part.to(dtype) for part in t
    )  # fmt: skip
    keep = keep_mask_ref(*x.shape, p, seed).to(dtype) / (1.0 - p)
    dropped, dx = x * keep, torch.zeros_like(x)
    ss, found = [], []
    for i, (w, a, b, bias, dy) in enumerate(zip(ws, as_, bs, biases, dys, strict=True)):
        s, ds = dropped @ a.T, SCALES[i] * (dy @ b)
        y = x @ w.T + SCALES[i] * (s @ b.T)
        ss.append(s)
        dx = dx + dy @ w + keep * (ds @ a)
        found += [(f"y{i}", y if bias is None else y + bias), (f"dw{i}", dy.T @ x)]
        found += [(f"da{i}", ds.T @ dropped), (f"db{i}", SCALES[i] * (dy.T @ s))]
        found += [(f"dbias{i}", dy.sum(0))]
    return dict(found) | {"s": torch.cat(ss, 1), "dx": dx}


def ours(t, p=0.0, seed=None, needs=None):
    x, ws, as_, bs, biases, dys = t
    n = len(ws)
    ys, s = lora_multi.lora_multi_fwd(x, ws, as_, bs, SCALES[:n], biases, p, seed)
    needs = needs or [[True] * n] * 4
    dx, *lists = lora_multi.lora_multi_bwd(dys, x, ws, as_, bs, s, SCALES[:n], p, seed, True, needs)
    got = {"s": s, "dx": dx} | {f"y{i}": y for i, y in enumerate(ys)}
    for name, grads in zip(NEEDS, lists, strict=True):
        got |= {f"{name}{i}": g for i, g in enumerate(grads)}
    return got


def check(got, t, p=0.0, seed=None, low_dtype=None):
    """max|got - ref64| <= 2 max|low - ref64| + eps, the low precision being the inputs' own."""
    seed = torch.tensor([0]) if seed is None else seed
    low_dtype = low_dtype or t[0].dtype
    truth, low = (specification(t, p, seed, d) for d in (torch.float64, low_dtype))
    assert got.keys() == truth.keys()
    for name, g in got.items():
        ref, lo = truth[name], low[name].double()
        assert g.shape == ref.shape, name
        if ref.numel() == 0:
            continue
        error = (g.double() - ref).abs().max()
        bar = 2 * (lo - ref).abs().max() + 2 * torch.finfo(low_dtype).eps * ref.abs().max()
        assert error <= bar, f"{name}: error {error:.3g}, allowed {bar:.3g}"


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", SHAPES)
def test_against_float64(name, dtype, p):
    t = make(SHAPES[name], dtype)
    seed = torch.tensor([-(2**61) + 12345])
    check(ours(t, p, seed), t, p, seed)


@pytest.mark.parametrize("few_sms", [False, True])
@pytest.mark.parametrize("arch", ARCHS)
def test_every_table(arch, few_sms, monkeypatch):
    """The interpreter takes sm_80's tiles; the others, and the large ones, must be as right."""
    monkeypatch.setattr(lora_multi, "arch_of", lambda device: arch)
    if few_sms:
        monkeypatch.setitem(lora_tables.SMS, arch, 1)
    # Few SMs: rows of whole 16 bytes, as TMA wants them.
    shape = (139, 80, [(264, 16), (144, 24)]) if few_sms else (139, 75, [(263, 16), (140, 24)])
    t = make(shape, torch.float16)
    seed = torch.tensor([5])
    for p in (0.0, 0.25):
        check(ours(t, p, seed), t, p, seed)


@pytest.mark.parametrize("m, launches", [(16, 0), (64, 0), (65, 1)])
def test_few_tokens_need_no_shrink(m, launches, monkeypatch):
    asked = []
    inner = lora_multi.shrink
    monkeypatch.setattr(lora_multi, "shrink", lambda *t: asked.append(1) or inner(*t))
    t = make((m, 67, [(40, 8), (33, 16), (20, 0)]), torch.float32)
    check(ours(t), t)
    assert len(asked) == launches
    check(ours(t, 0.25, torch.tensor([5])), t, 0.25, torch.tensor([5]))
    assert len(asked) == launches + 1  # a mask is the shrink kernel's


def test_fp32_adapters_beside_fp16():
    t = make(SHAPES["qkv"], torch.float16, torch.float32)
    got = ours(t)
    assert got["s"].dtype == got["da1"].dtype == got["db1"].dtype == torch.float32
    assert got["dx"].dtype == torch.float16
    check(got, t)


def test_any_strides():
    t = make(SHAPES["qkv"], torch.float32)
    other = [
        [None if v is None else torch.stack((v, v), -1)[..., 0] for v in part]
        if isinstance(part, list) else part.t().contiguous().t() for part in t
    ]  # fmt: skip
    want = ours(t)
    for name, g in ours(other).items():
        assert torch.equal(g, want[name]), name


@pytest.mark.parametrize("m", [0, 1])
def test_no_rows_give_zeros(m):
    t = make((m, 7, [(5, 3), (4, 0)]), torch.float32)
    got = ours(t)
    assert got["y0"].shape == (m, 5) and got["da0"].shape == (3, 7)
    for g in got.values():
        assert torch.isfinite(g).all()
        assert m == 1 or g.count_nonzero() == 0


def test_two_runs_give_the_same_bits():
    t = make((300, 97, [(70, 12), (64, 8)]), torch.float16)
    seed = torch.tensor([7])
    want = ours(t, 0.1, seed)
    for name, g in ours(t, 0.1, seed).items():
        assert torch.equal(g, want[name]), name


@pytest.mark.parametrize("which", range(4))
def test_only_what_is_needed(which):
    t = make(SHAPES["gate_up"], torch.float32)
    needs = [[i == which, False] for i in range(4)]
    got, want = ours(t, needs=needs), ours(t)
    for i, name in enumerate(NEEDS):
        assert got[f"{name}1"] is None and (got[f"{name}0"] is not None) == (i == which)
    assert torch.equal(got[f"{NEEDS[which]}0"], want[f"{NEEDS[which]}0"])


def test_through_the_op():
    """What autograd gets, with a frozen base and a projection without an adapter."""
    x, ws, as_, bs, biases, dys = make((20, 33, [(40, 4), (24, 0), (17, 7)]), torch.float32)
    leaves = [t.requires_grad_() for t in (x, as_[0], as_[2], bs[0], bs[2], biases[1])]
    as_[1] = bs[1] = None
    seed = torch.tensor([3])
    results = []
    for op, more in ((ops.lora_linear_multi, {"impl": "triton"}), (ops.lora_linear_multi_ref, {})):
        ys = op(x, ws, as_, bs, SCALES, biases, dropout_p=0.25, seed=seed, **more)
        results.append((*ys, *torch.autograd.grad(ys, leaves, dys)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
