"""prefix_attention's path for a few queries without gradients: the kernel of prefix_decode."""

import math
from unittest import mock

import pytest
import torch

from fusedpeft import ops
from fusedpeft.ops import prefix_decode_impls
from fusedpeft.ops.native import native

pytestmark = pytest.mark.skipif(native is None, reason="the extension is not built")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(t=1, s=37, b=4, h=4, hkv=2, p=19, d=32, dtype=torch.float32, lead=()):
    g = torch.Generator().manual_seed(t + s)
    shapes = [(b, h, t, d), (b, hkv, s, d), (b, hkv, s, d), *[(*lead, hkv, p, d)] * 2]
    return [torch.randn(x, generator=g, dtype=torch.float64).to(dtype) for x in shapes]


def took_native(fn):
    """fn's result, and whether the C++ kernel made it."""
    with mock.patch.object(
        prefix_decode_impls, "_native", side_effect=prefix_decode_impls._native
    ) as spy:
        return fn(), spy.called


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lead", [(), (4,), (3,)], ids=str)
@pytest.mark.parametrize("t, causal", [(1, True), (1, False), (8, True)])
def test_against_float64(check_accuracy, t, causal, lead, dtype):
    tensors = make(t, lead=lead, dtype=dtype)
    kw = dict(causal=causal, window=20, return_lse=True)
    if lead == (3,):
        kw["prefix_ids"] = torch.tensor([2, -1, 0, 2])
    got, native_ = took_native(lambda: ops.prefix_attention(*tensors, **kw))
    assert native_
    low = ops.prefix_attention_ref(*tensors, **kw)
    ref = ops.prefix_attention_ref(*(x.double() for x in tensors), **kw)
    for name, g, lo, r in zip(("out", "lse"), got, low, ref, strict=True):
        assert g.dtype == lo.dtype
        check_accuracy(name, g, lo, r)


def test_what_takes_the_other_path():
    q, k, v, pk, pv = make(2)
    mask = torch.zeros(1, 1, 2, 37)
    for change, kw in (
        (q, dict(causal=False)),
        (q, dict(mask=mask)),
        (q.clone().requires_grad_(), {}),
        (torch.randn(4, 4, 9, 32), {}),
    ):
        out, native_ = took_native(
            lambda c=change, kw=kw: ops.prefix_attention(c, k, v, pk, pv, **kw)
        )
        assert not native_ and out.shape == change.shape
        with pytest.raises(ValueError, match=r"impl='native': expected T <= 8, causal, no mask"):
            ops.prefix_attention(change, k, v, pk, pv, **kw, impl="native")
    tensors = [t.double() for t in (q, k, v, pk, pv)]
    assert not took_native(lambda: ops.prefix_attention(*tensors))[1]
    with pytest.raises(TypeError, match="impl='native': expected fp32, bf16 or fp16, got .*64"):
        ops.prefix_attention(*tensors, impl="native")
    with pytest.raises(ValueError, match="impl='cuda': expected cuda tensors, got cpu"):
        ops.prefix_attention(q, k, v, pk, pv, impl="cuda")


def test_compiled_and_autocast():
    tensors = make(3)
    fn = lambda *t: ops.prefix_attention(*t, window=9)  # noqa: E731
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(fn, fullgraph=True)(*tensors), fn(*tensors))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert fn(*tensors).dtype == torch.bfloat16
    table = make(1, lead=(3,))
    with pytest.raises(ValueError, match="prefix_ids: expected -1 or an id below 3, got 3"):
        ops.prefix_attention(*table, prefix_ids=torch.tensor([0, 1, 2, 3]))
    q, k, v, pk, pv = make(1)
    none = torch.full((4,), -1)
    got = ops.prefix_attention(q, k, v, pk[None], pv[None], prefix_ids=none, scale=0.5)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.5, enable_gqa=True)
    torch.testing.assert_close(got, want)
    assert math.isfinite(got.sum())
