"""What test_interpret.py runs in a process of its own, under Triton's interpreter.

    TRITON_INTERPRET=1 pytest tests/kernels/lora_interpret_checks.py

The interpreter is chosen when triton is imported, for the whole process, so these checks cannot
share one with tests that compile. fp32 and fp16 only: its bf16 products are wrong.
"""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 from the start", allow_module_level=True)

import triton
import triton.language as tl

from fusedpeft.kernels import lora, lora_bwd, lora_gemm, lora_tables
from fusedpeft.kernels.dropout import keep_mask, signed_threshold
from fusedpeft.kernels.lora_tables import ARCHS
from fusedpeft.ops.dropout import dropout_ref, keep_mask_ref

SHAPES = {  # M, N, K, R
    "one_row": (1, 17, 33, 1),
    "rows16": (16, 40, 72, 12),
    "rows16_high_rank": (9, 33, 65, 40),
    "odd": (63, 65, 129, 8),
    "tail_row": (130, 129, 150, 12),
    "high_rank": (130, 67, 161, 64),
    "rank_past_the_tile": (65, 66, 67, 70),
}
SCALE = 1.5
NAMES = ("y", "s", "dx", "dw", "da", "db", "dbias")


def make(shape, dtype, adapter_dtype=None):
    """Inputs and dy; W of unit-variance outputs, so that base and update weigh alike."""
    m, n, k, r = shape
    g = torch.Generator().manual_seed(m + n + k + r)

    def normal(*size, dtype=dtype):
        return torch.randn(size, generator=g).to(dtype)

    adapter = adapter_dtype or dtype
    return dict(
        x=normal(m, k),
        w=(normal(n, k, dtype=torch.float32) / k**0.5).to(dtype),
        a=(normal(r, k, dtype=torch.float32) / k**0.5).to(adapter),
        b=(normal(n, r, dtype=torch.float32) / r**0.5).to(adapter),
        bias=normal(n),
        dy=normal(m, n),
    )


def specification(t, p, seed, dtype):
    """(y, S, gradients) in plain torch: float64 is the truth, the inputs' own dtype the bar."""
    x, w, a, b, bias, dy = (t[k].to(dtype) for k in ("x", "w", "a", "b", "bias", "dy"))
    if p > 0.0:
        keep = keep_mask_ref(*x.shape, p, seed).to(dtype) / (1.0 - p)
        dropped = dropout_ref(t["x"], p, seed).to(dtype)
    else:
        keep, dropped = torch.ones((), dtype=dtype), x
    s = dropped @ a.T
    ds = SCALE * (dy @ b)
    y = x @ w.T + bias + SCALE * (s @ b.T)
    dx = dy @ w + keep * (ds @ a)
    return y, s, dx, dy.T @ x, ds.T @ dropped, SCALE * (dy.T @ s), dy.sum(0)


def ours(t, p=0.0, seed=None):
    y, s = lora.lora_fwd(t["x"], t["w"], t["a"], t["b"], SCALE, t["bias"], p, seed)
    args = (t["dy"], t["x"], t["w"], t["a"], t["b"], s, SCALE, p, seed)
    return (y, s, *lora.lora_bwd(*args, True, True, True, True, True))


def check(got, t, p=0.0, seed=None, low_dtype=None):
    """max|got - ref64| <= 2 max|low - ref64| + eps, the low precision being the inputs' own."""
    truth = specification(t, p, seed, torch.float64)
    low_dtype = low_dtype or t["x"].dtype
    low = specification(t, p, seed, low_dtype)
    for name, g, ref, lo in zip(NAMES, got, truth, low, strict=True):
        error = (g.double() - ref).abs().max()
        bar = 2 * (lo.double() - ref).abs().max()
        bar += 2 * torch.finfo(low_dtype).eps * ref.abs().max()
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
    """The interpreter takes sm_80's tiles; the others must be as right, and so must the large ones,
    which a small problem takes on a chip of one SM (with `held` updates and S in the K loop)."""
    monkeypatch.setattr(lora, "arch_of", lambda device: arch)
    monkeypatch.setattr(lora_bwd, "arch_of", lambda device: arch)
    if few_sms:
        monkeypatch.setitem(lora_tables.SMS, arch, 1)
    for shape in ((139, 263, 75, 16), (139, 263, 75, 40)):
        t = make(shape, torch.float16)
        seed = torch.tensor([5])
        for p in (0.0, 0.25):
            check(ours(t, p, seed), t, p, seed)


@pytest.fixture
def one_sm_hopper(monkeypatch):
    """A Hopper of one SM, which takes the TMA kernel where it may; returns the launches of it."""
    monkeypatch.setattr(lora, "arch_of", lambda device: "sm_90")
    monkeypatch.setattr(lora_bwd, "arch_of", lambda device: "sm_90")
    monkeypatch.setitem(lora_tables.SMS, "sm_90", 1)
    launches, launch = [], lora_gemm._lora_gemm_tma
    monkeypatch.setattr(lora_gemm, "_lora_gemm_tma", lambda *t: launches.append(t) or launch(*t))
    return launches


@pytest.mark.parametrize(
    "r, adapter_dtype, sms",
    [(1, torch.float16, 1), (16, torch.float32, 3), (40, torch.float32, 1), (64, torch.float16, 3)],
)
def test_tma(one_sm_hopper, monkeypatch, r, adapter_dtype, sms):
    """Ragged ends, several tiles a block, ranks below and above what is held; forward and dx."""
    monkeypatch.setattr(lora_gemm, "_blocks", lambda x: sms)
    t = make((139, 1040, 200, r), torch.float16, adapter_dtype)
    if sms == 3:
        t["w"].zero_()  # nothing hides the update's errors
    check(ours(t), t)
    assert len(one_sm_hopper) == 2


def test_tma_adds_no_update_of_rank_0(one_sm_hopper):
    t = make((130, 264, 72, 8), torch.float16)
    w, out = t["w"], torch.empty((130, 264), dtype=torch.float16)
    config = lora_tables.gemm_config(130, 264, 0, "sm_90", 2)
    tma = lora_tables.tma_config(130, 264, 0, "sm_90", 2)
    none = (t["a"][:0].t(), t["b"][:, :0].t(), t["x"].new_empty(130, 0))
    lora_gemm.lora_gemm(t["x"], w.t(), *none, out, 1.0, config, tma=tma)
    assert len(one_sm_hopper) == 1
    ref = t["x"].double() @ w.double().T
    assert (out.double() - ref).abs().max() <= 2**-10 * ref.abs().max()


def test_what_tma_cannot_address_is_copied_to_where_it_can(one_sm_hopper):
    t = make((139, 1040, 200, 16), torch.float16)
    odd = make((139, 1041, 200, 16), torch.float16)  # y's rows would begin at odd addresses
    wide = {**t, "x": torch.stack((t["x"], t["x"]), -1)[..., 0]}
    late = {**t, "w": torch.cat((t["w"].flatten()[:1], t["w"].flatten()))[1:].view(1040, 200)}
    for case in (odd, wide, late):
        one_sm_hopper.clear()
        check(ours(case), case)
        assert len(one_sm_hopper) == 2
    # The GEMM by itself goes by pointers there.
    one_sm_hopper.clear()
    config, tma = (
        f(139, 1040, 16, "sm_90", 2) for f in (lora_tables.gemm_config, lora_tables.tma_config)
    )
    s, out = t["x"] @ t["a"].T, torch.empty((139, 1040), dtype=torch.float16)
    args = (wide["x"], t["w"].t(), t["a"].t(), t["b"].t(), s, out, SCALE, config)
    lora_gemm.lora_gemm(*args, tma=tma, bias=t["bias"])
    assert torch.equal(out, ours(t)[0]) and len(one_sm_hopper) == 2  # by ours
    seed = torch.tensor([3])
    one_sm_hopper.clear()
    check(ours(t, 0.25, seed), t, 0.25, seed)
    assert len(one_sm_hopper) == 1  # dx has a mask, y has none


def test_frozen_base_of_zeros_shows_the_adapter():
    t = make((63, 65, 129, 8), torch.float32)
    t["w"].zero_()
    t["bias"].zero_()
    check(ours(t), t)


def test_fp32_adapters_beside_fp16():
    t = make((63, 65, 129, 8), torch.float16, torch.float32)
    got = ours(t)
    assert [g.dtype for g in got[:2]] == [torch.float16, torch.float32]
    assert got[4].dtype == got[5].dtype == torch.float32
    check(got, t)


def test_any_strides():
    t = make((63, 66, 130, 8), torch.float32)
    strided = {k: torch.stack((v, v), -1)[..., 0] for k, v in t.items()}
    transposed = {k: v.t().contiguous().t() for k, v in t.items()}
    late = {k: torch.cat((v.flatten()[:1], v.flatten()))[1:].view(v.shape) for k, v in t.items()}
    for other in (strided, transposed, late):
        assert not other["x"].is_contiguous() or other is late
        for name, g, ref in zip(NAMES, ours(other), ours(t), strict=True):
            assert torch.equal(g, ref), name


@pytest.mark.parametrize("m", [0, 1])
def test_no_rows_give_zeros(m):
    t = make((m, 5, 7, 3), torch.float32)
    got = ours(t)
    assert got[0].shape == (m, 5)
    for g in got:
        assert torch.isfinite(g).all()
    if m == 0:
        assert all(g.count_nonzero() == 0 for g in got)


def test_two_runs_give_the_same_bits():
    t = make((300, 70, 97, 12), torch.float16)
    seed = torch.tensor([7])
    for a, b in zip(ours(t, 0.1, seed), ours(t, 0.1, seed), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("flag", range(5))
def test_only_what_is_needed(flag):
    t = make((63, 65, 129, 8), torch.float32)
    need = [i == flag for i in range(5)]
    empty = t["x"].new_zeros(0)
    _, s = lora.lora_fwd(t["x"], t["w"], t["a"], t["b"], SCALE, t["bias"])
    x = t["x"] if flag in (1, 2) else empty  # the op saves neither x nor S for nobody
    s = s if flag == 3 else empty
    got = lora.lora_bwd(t["dy"], x, t["w"], t["a"], t["b"], s, SCALE, 0.0, None, *need)
    assert [g is not None for g in got] == need
    assert torch.equal(got[flag], ours(t)[2 + flag])


@triton.jit
def _mask_kernel(seed_ptr, out_ptr, threshold, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    keep = keep_mask(seed_ptr, at, at, threshold)
    tl.store(out_ptr + at[:, None] * BLOCK + at[None, :], keep.to(tl.int8))


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.75, 0.999])
@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 0x1234_5678_9ABC_DEF0])
def test_mask_bits_are_the_specification(p, seed):
    seed = torch.tensor([seed])
    out = torch.zeros((64, 64), dtype=torch.int8)
    _mask_kernel[(1,)](seed, out, signed_threshold(p), BLOCK=64)
    assert torch.equal(out.bool(), keep_mask_ref(64, 64, p, seed))
