"""bottleneck_adapter on a GPU, `impl="triton"` against float64. pytest -m gpu tests/gpu"""

import pytest
import torch

from fusedpeft import ops
from fusedpeft.ops.adapter import ACTIVATIONS, choose_impl

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

NAMES = ("x", "down_w", "down_b", "up_w", "up_b", "residual", "norm_weight", "norm_bias")
NORMS = [None, "layer_norm", "rms_norm"]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = {  # M, d, E; beyond 64 (fp32) or 256 a kernel a product
    "one_row": (1, 256, 8),
    "odd": (63, 144, 12),
    "many_rows": (8192 + 5, 768, 48),
    "llama_8b": (1000, 4096, 64),
    "e_128": (5000, 1024, 128),
    "e_256": (5000, 1024, 256),
    "e_512": (700, 1024, 512),
}


def make(shape, dtype, *, adapter=None, bias=True, norm=None, residual="other", offset=0.5):
    """x with a mean, so that a norm has something to subtract; None for what is not there."""
    m, d, e = shape
    g = torch.Generator("cuda").manual_seed(m * 31 + d * 7 + e)
    rnd = lambda *s: torch.randn(*s, generator=g, device="cuda")  # noqa: E731
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
    g = torch.Generator("cuda").manual_seed(1)
    dy = torch.randn(t["x"].shape, generator=g, device="cuda").to(t["x"].dtype)
    leaves = {k: v.detach().to(dtype or v.dtype).clone().requires_grad_()
              for k, v in t.items() if v is not None}  # fmt: skip
    if t["residual"] is t["x"]:
        leaves["residual"] = leaves["x"]
    names = [k for k in leaves if k == "x" or leaves[k] is not leaves["x"]]
    v = {k: leaves.get(k) for k in NAMES}
    y = fn(*(v[k] for k in NAMES[:5]), **{k: v[k] for k in NAMES[5:]}, **kw)
    found = torch.autograd.grad(y, [leaves[k] for k in names], dy.to(y.dtype))
    return {"y": y.detach(), **dict(zip(names, found, strict=True))}


def compare(check, t, **kw):
    """The low precision is x's own, also beside fp32 adapters, which are cast to it."""
    kw["seed"] = torch.tensor([42], device="cuda")
    got = grads(ops.bottleneck_adapter, t, impl="triton", **kw)
    low = grads(ops.bottleneck_adapter_ref, t, t["x"].dtype, **kw)
    ref = grads(ops.bottleneck_adapter_ref, t, torch.float64, **kw)
    assert got.keys() == low.keys()
    for name, g in got.items():
        assert g.dtype == t["x" if name == "y" else name].dtype, name
        check(name, g, low[name], ref[name])
    return got


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_against_float64(check_accuracy, name, dtype, norm):
    t = make(SHAPES[name], dtype, norm=norm, residual="x" if norm else "other")
    compare(check_accuracy, t, norm=norm, activation="gelu", scale=0.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(check_accuracy, activation, dtype):
    compare(check_accuracy, make((200, 512, 32), dtype), activation=activation)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("residual", ["other", "x", None])
@pytest.mark.parametrize("norm", NORMS)
def test_dropout_residuals_and_biases(check_accuracy, norm, residual, bias):
    for e in (24, 300):
        t = make((500, 768, e), torch.bfloat16, bias=bias, norm=norm, residual=residual)
        compare(check_accuracy, t, norm=norm, dropout_p=0.25, scale=1.5, activation="silu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", NORMS[1:])
def test_a_norm_of_rows_far_from_zero(check_accuracy, norm, dtype):
    t = make((300, 4096, 64), dtype, norm=norm, offset=100.0)
    t["down_w"] -= t["down_w"].mean(1, keepdim=True)  # else rms_norm's P is one huge number
    t["x"][:, 0] += 50.0  # a first element that is no shift
    compare(check_accuracy, t, norm=norm, activation="gelu")


def test_fp32_adapters_beside_bf16(check_accuracy):
    for norm in NORMS:
        t = make((300, 1024, 64), torch.bfloat16, adapter=torch.float32, norm=norm, residual="x")
        compare(check_accuracy, t, norm=norm, activation="gelu", dropout_p=0.1)


def test_cuda_takes_triton_and_runs_are_bit_equal():
    assert choose_impl("cuda", torch.bfloat16)[0] == "triton"
    t = make((6000, 1024, 64), torch.bfloat16, norm="layer_norm", residual="x")
    kw = dict(norm="layer_norm", dropout_p=0.1, seed=7)
    one = grads(ops.bottleneck_adapter, t, impl="triton", **kw)
    two = grads(ops.bottleneck_adapter, t, **kw)
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_no_synchronisation():
    t = make((700, 512, 24), torch.bfloat16, norm="layer_norm", residual="x")
    kw = dict(norm="layer_norm", dropout_p=0.1, seed=torch.tensor([3], device="cuda"))
    grads(ops.bottleneck_adapter, t, **kw)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        grads(ops.bottleneck_adapter, t, **kw)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_saved_and_peak_memory():
    m, d, e = 8192, 4096, 64
    t = make((m, d, e), torch.bfloat16, residual="x")
    weights = [t[k].requires_grad_() for k in NAMES[1:5]]
    before = torch.cuda.memory_allocated()
    y = ops.bottleneck_adapter(t["x"], *weights, residual=t["x"])
    assert torch.cuda.memory_allocated() - before <= (m * d + m * e) * 2 + 2**20  # y and P
    del y


def test_offsets_beyond_two_to_the_31():
    """x of more than 2^31 elements; its last row."""
    m, d = 530_000, 4096
    x = torch.zeros(m, d, device="cuda", dtype=torch.bfloat16)
    x[-1] = 1.0
    down = torch.full((8, d), 1.0 / d, device="cuda", dtype=torch.bfloat16)
    up = torch.full((d, 8), 0.125, device="cuda", dtype=torch.bfloat16)
    y = ops.bottleneck_adapter(x, down, None, up, None, residual=x)
    assert torch.allclose(y[-1].float(), torch.full((d,), 2.0, device="cuda"), atol=0.02)
    assert y[:-1].count_nonzero() == 0


def test_torch_compile_fullgraph():
    t = make((256, 512, 24), torch.bfloat16, norm="layer_norm", residual="x")
    kw = dict(norm="layer_norm", activation="gelu")
    compiled = torch.compile(ops.bottleneck_adapter, fullgraph=True)
    one, two = grads(ops.bottleneck_adapter, t, **kw), grads(compiled, t, **kw)
    for k in one:
        torch.testing.assert_close(one[k], two[k])
