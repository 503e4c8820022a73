"""What test_interpret.py runs in a process of its own, under Triton's interpreter.

    TRITON_INTERPRET=1 pytest tests/kernels/adapter_interpret_checks.py

fp32 and fp16 only: the interpreter's bf16 products are wrong.
"""

import math
import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 from the start", allow_module_level=True)

from fusedpeft import ops
from fusedpeft.kernels import adapter as launchers
from fusedpeft.kernels import adapter_tables as tables
from fusedpeft.kernels.device import ARCHS, SMS
from fusedpeft.ops.adapter import ACTIVATIONS

NAMES = ("x", "down_w", "down_b", "up_w", "up_b", "residual", "norm_weight", "norm_bias")
NORMS = [None, "layer_norm", "rms_norm"]
SHAPES = {  # M, d, E; beyond 64 (fp32) or 256 (fp16) a kernel a product
    "one_row": (1, 16, 8),
    "odd": (63, 144, 12),
    "tail_row": (65, 160, 33),
    "wide": (40, 80, 130),
    "wider": (9, 48, 264),
}


def make(shape, dtype, *, adapter=None, bias=True, norm=None, residual="other", offset=0.5):
    """x with a mean, so that a norm has something to subtract; None for what is not there."""
    m, d, e = shape
    g = torch.Generator().manual_seed(m * 31 + d * 7 + e)
    rnd = lambda *s: torch.randn(*s, generator=g)  # noqa: E731
    ad = adapter or dtype
    t = dict(x=(rnd(m, d) + offset).to(dtype), down_w=(rnd(e, d) / d**0.5).to(ad))
    t["down_b"] = rnd(e).to(ad) if bias else None
    t["up_w"] = (rnd(d, e) / e**0.5).to(ad)
    t["up_b"] = rnd(d).to(ad) if bias else None
    t["residual"] = {"other": rnd(m, d).to(dtype), "x": t["x"], None: None}[residual]
    t["norm_weight"] = (rnd(d) + 1).to(ad) if norm else None
    t["norm_bias"] = rnd(d).to(ad) if norm == "layer_norm" else None
    return t


def grads(fn, t, dtype=None, **kw):
    """{"y": …, name: gradient of it}; a residual that is x stays x."""
    dy = torch.randn(t["x"].shape, generator=torch.Generator().manual_seed(1)).to(t["x"].dtype)
    leaves = {k: v.detach().to(dtype or v.dtype).clone().requires_grad_()
              for k, v in t.items() if v is not None}  # fmt: skip
    if t["residual"] is t["x"]:
        leaves["residual"] = leaves["x"]
    names = [k for k in leaves if k == "x" or leaves[k] is not leaves["x"]]
    v = {k: leaves.get(k) for k in NAMES}
    y = fn(*(v[k] for k in NAMES[:5]), **{k: v[k] for k in NAMES[5:]}, **kw)
    found = torch.autograd.grad(y, [leaves[k] for k in names], dy.to(y.dtype))
    return {"y": y.detach(), **dict(zip(names, found, strict=True))}


def ours(t, **kw):
    return grads(ops.bottleneck_adapter, t, impl="triton", **kw)


def check(t, low_dtype=None, **kw):
    """max|got - ref64| <= 2 max|low - ref64| + eps, the low precision being x's own."""
    kw["seed"] = torch.tensor([42])
    low_dtype = low_dtype or t["x"].dtype
    got = ours(t, **kw)
    low = grads(ops.bottleneck_adapter_ref, t, low_dtype, **kw)
    ref = grads(ops.bottleneck_adapter_ref, t, torch.float64, **kw)
    assert got.keys() == low.keys()
    for name, g in got.items():
        like = t["x" if name == "y" else name]
        assert g.dtype == like.dtype and g.shape == like.shape, name
        error = (g.double() - ref[name]).abs().max()
        bar = 2 * (low[name].double() - ref[name]).abs().max()
        bar += 2 * torch.finfo(low_dtype).eps * ref[name].abs().max()
        assert error <= bar, f"{name}: error {error:.3g}, allowed {bar:.3g}"


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", SHAPES)
def test_against_float64(name, dtype, norm):
    t = make(SHAPES[name], dtype, norm=norm, residual="x" if norm else "other")
    check(t, norm=norm, activation="gelu", scale=0.5)


@pytest.mark.parametrize("norm", NORMS[:2])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, norm):
    for dtype in (torch.float32, torch.float16):
        check(make((20, 48, 12), dtype, norm=norm), activation=activation, norm=norm)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("residual", ["other", "x", None])
@pytest.mark.parametrize("norm", NORMS)
def test_dropout_residuals_and_biases(norm, residual, bias):
    shapes = ((20, 80, 12), torch.float16), ((20, 80, 70), torch.float32)
    for (shape, dtype), dropped in zip(shapes, (bias, not bias), strict=True):
        t = make(shape, dtype, bias=bias, norm=norm, residual=residual)
        check(t, norm=norm, dropout_p=0.25 if dropped else 0.0, scale=1.5, activation="silu")


@pytest.mark.parametrize("norm", NORMS[1:])
def test_a_norm_without_weights_and_after(norm):
    t = make((20, 80, 12), torch.float32)
    check(t, norm=norm)
    check(make((20, 80, 12), torch.float32, norm=norm), norm=norm, norm_position="after")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("norm", NORMS[1:])
def test_a_norm_of_rows_far_from_zero(norm, dtype):
    """μ some 100 σ: sums of squares would lose σ, rounded x̂ would not do."""
    t = make((20, 208, 16), dtype, norm=norm, offset=100.0)
    t["down_w"] -= t["down_w"].mean(1, keepdim=True)  # else rms_norm's P is one huge number
    t["x"][:, 0] += 50.0  # a first element that is no shift
    check(t, norm=norm, activation="gelu")


@pytest.mark.parametrize("few_sms", [False, True])
@pytest.mark.parametrize("arch", ARCHS)
def test_every_table(arch, few_sms, monkeypatch):
    """The interpreter takes sm_80's tiles for few rows; the others must be as right."""
    monkeypatch.setattr(launchers, "arch_of", lambda device: arch)
    if few_sms:
        monkeypatch.setitem(SMS, arch, 1)
    for e in (12, 100, 300) if few_sms else (60, 200):
        t = make((70, 144, e), torch.float16, norm="layer_norm", residual="x")
        check(t, norm="layer_norm", dropout_p=0.25, activation="silu")


def test_rows_in_splits(monkeypatch):
    t = make((700, 32, 12), torch.float16, norm="layer_norm", residual="x")
    assert tables.adapter_bwd_config(700, 32, 12, "sm_80")["dw_splits"] > 1
    check(t, norm="layer_norm", dropout_p=0.1, activation="tanh")


def test_fp32_adapters_beside_fp16():
    for e, norm in ((12, None), (12, "layer_norm"), (300, "rms_norm")):
        t = make((30, 80, e), torch.float16, adapter=torch.float32, norm=norm, residual="x")
        check(t, torch.float16, norm=norm, dropout_p=0.1, activation="silu")


def test_any_strides():
    t = make((40, 80, 12), torch.float32, norm="layer_norm")
    want = ours(t, norm="layer_norm", dropout_p=0.1, seed=3)
    twice = {k: torch.stack((v, v), -1)[..., 0] for k, v in t.items()}
    turned = {k: v.t().contiguous().t() if v.ndim == 2 else v for k, v in t.items()}
    wide = {k: torch.cat((v, v[..., :1]), -1)[..., :-1] for k, v in t.items()}
    late = {k: torch.cat((v.flatten()[:1], v.flatten()))[1:].view(v.shape) for k, v in t.items()}
    for other in (twice, turned, wide, late):
        args = [other[k] for k in NAMES]
        y = ops.bottleneck_adapter(
            *args[:5], residual=args[5], norm="layer_norm", norm_weight=args[6], norm_bias=args[7],
            dropout_p=0.1, seed=3, impl="triton",
        )  # fmt: skip
        assert torch.equal(y, want["y"])
    dy = torch.randn(40, 2 * 80)[:, ::2]
    leaf = t["x"].clone().requires_grad_()
    y = ops.bottleneck_adapter(leaf, *[t[k] for k in NAMES[1:5]], impl="triton")
    (got,) = torch.autograd.grad(y, leaf, dy, retain_graph=True)
    assert torch.equal(got, torch.autograd.grad(y, leaf, dy.contiguous())[0])


def test_two_runs_give_the_same_bits():
    t = make((300, 80, 12), torch.float16, norm="layer_norm", residual="x")
    kw = dict(norm="layer_norm", dropout_p=0.1, seed=7)
    one, two = ours(t, **kw), ours(t, **kw)
    assert all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize("norm", NORMS[:2])
@pytest.mark.parametrize("name", NAMES)
def test_only_what_is_needed(name, norm):
    """One leaf at a time: its gradient is that of all at once."""
    t = make((40, 80, 12), torch.float32, norm=norm)
    if t[name] is None:
        pytest.skip(f"no {name} without a norm")
    kw = dict(norm=norm, dropout_p=0.2, seed=5)
    dy = torch.randn(t["x"].shape, generator=torch.Generator().manual_seed(1))
    leaf = t[name].clone().requires_grad_()
    args = [leaf if k == name else t[k] for k in NAMES]
    rest = dict(zip(NAMES[5:], args[5:], strict=True))
    y = ops.bottleneck_adapter(*args[:5], **rest, **kw, impl="triton")
    (first,) = torch.autograd.grad(y, leaf, dy, retain_graph=True)
    assert torch.equal(first, torch.autograd.grad(y, leaf, dy)[0])
    assert torch.equal(first, ours(t, **kw)[name])


@pytest.mark.parametrize("norm", NORMS)
def test_no_rows_give_zeros(norm):
    t = make((0, 16, 4), torch.float32, norm=norm, residual="x")
    for v in ours(t, norm=norm, dropout_p=0.1, seed=1).values():
        assert v.isfinite().all() and v.count_nonzero() == 0


def test_other_widths_are_refused():
    t = make((20, 70, 12), torch.float32)
    with pytest.raises(ValueError, match="impl='triton': expected d a multiple of 16, got 70"):
        ours(t)


def test_nan_stays_in_its_row_and_is_not_lost():
    t = make((20, 48, 12), torch.float32)
    t["x"][3, 5] = math.nan
    for activation in ACTIVATIONS:
        y = ops.bottleneck_adapter(*[t[k] for k in NAMES[:5]], activation=activation, impl="triton")
        assert y.isnan().all(1).nonzero().flatten().tolist() == [3]
        assert y.isnan().any(1).sum() == 1
