"""What Python hands to the CUDA kernel of the linear with LoRA, on a CPU: in the kernel's place its
C++ twin reads the same addresses, sizes and strides."""

import types

import pytest
import torch

from fusedpeft import ops
from fusedpeft.ops import multi_lora_cuda
from fusedpeft.ops.native import native
from fusedpeft.ops.slots import lora_slots

pytestmark = pytest.mark.skipif(native is None, reason="fusedpeft._C is not built")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def calls(monkeypatch):
    """The calls that were made, (splits, stream) each."""
    made = []

    def kernel(
        x, w, bias, y, slots, a, b, rank, scale, s, sums, sizes, count, most, m, k, n, sx, sw,
        a_slot, a_row, b_slot, processors, splits, dtype, adapter_dtype, one_scale, stream,
    ):  # fmt: skip
        assert processors == 132 and s and sums - s == 4 * m * most * len(sizes)
        made.append((splits, stream))
        if not slots:
            assert (rank, scale, count, len(sizes)) == (0, 0, 1, 1)
            one = [torch.zeros(m, dtype=torch.int32), torch.tensor([[most]], dtype=torch.int32)]
            one.append(torch.tensor([[one_scale]]))
            slots, rank, scale = (t.data_ptr() for t in one)
        native.multi_lora(
            x, w, bias, y, slots, a, b, rank, scale, sizes, count, most, m, k, n, sx, sw, n,
            a_slot, a_row, b_slot, dtype, adapter_dtype,
        )  # fmt: skip

    monkeypatch.setattr(multi_lora_cuda, "native", types.SimpleNamespace(multi_lora_cuda=kernel))
    monkeypatch.setattr(multi_lora_cuda, "_processors", lambda device: 132)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)  # what a CPU tensor says it is on
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 7, raising=False)
    return made


def draw(*size, dtype=torch.float32):
    return (torch.randn(size, generator=torch.Generator().manual_seed(sum(size))) * 0.3).to(dtype)


@pytest.mark.parametrize("adapter_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strided", [False, True])
def test_one_adapter_for_all_rows(calls, check_accuracy, dtype, adapter_dtype, strided):
    m, n, k, r = 5, 24, 1040, 16
    more = 8 if strided else 0
    x, w, bias = (
        draw(m, k + more, dtype=dtype),
        draw(n, k + more, dtype=dtype),
        draw(n, dtype=dtype),
    )
    a, b = draw(r, k + more, dtype=adapter_dtype or dtype), draw(n, r, dtype=adapter_dtype or dtype)
    x, w, a = x[:, :k], w[:, more:], a[:, more:]
    assert multi_lora_cuda.one_ok(w, a, b)
    for c in (bias, None):
        got = multi_lora_cuda.one_fwd(x, w, a, b, c, 0.5)
        args = (x, w, a, b, 0.5, c)
        ref = ops.lora_linear_ref(*(t.double() if torch.is_tensor(t) else t for t in args))
        check_accuracy("y", got, ops.lora_linear_ref(*args), ref)
    assert calls == [(2, 7)] * 2
    assert multi_lora_cuda.one_fwd(x[:0], w, a, b, bias, 0.5).shape == (0, n) and len(calls) == 2


def test_what_one_adapter_must_be(calls):
    w, a, b = draw(24, 32), draw(16, 32), draw(24, 16)
    assert not multi_lora_cuda.one_ok(w, a[:12], b[:, :12].contiguous())
    assert not multi_lora_cuda.one_ok(w, a, b.t().contiguous().t())
    assert not multi_lora_cuda.one_ok(w.t().contiguous().t(), a, b)
    assert not multi_lora_cuda.one_ok(w, a.double(), b.double())


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_adapter_a_row(calls, check_accuracy, dtype):
    k, sizes = 64, (24, 9)
    adapters = [
        [(draw(r, k), draw(n, r), 0.5 + r) for n, r in zip(sizes, ranks, strict=True)]
        for ranks in ((8, 3), (0, 16), (5, 5))
    ]
    pool = lora_slots(adapters, dtype=dtype)
    slots = torch.tensor([2, -1, 0, 1, 2, 0], dtype=torch.int32)
    x, w, bias = draw(6, k, dtype=dtype), draw(33, k, dtype=dtype), draw(33, dtype=dtype)
    up = pool._replace(a=pool.a.double(), b=pool.b.double())
    ref = ops.multi_lora_linear_ref(x.double(), w.double(), up, slots, bias.double())
    low = ops.multi_lora_linear_ref(x, w, pool, slots, bias)
    check_accuracy("y", multi_lora_cuda.cuda_fwd(x, w, pool, slots, bias), low, ref)
    folded = multi_lora_cuda.cuda_fwd(x.view(2, 3, k), w, pool, slots, bias)
    assert folded.shape == (2, 3, 33)
    check_accuracy("y", folded.view(6, 33), low, ref)
