"""What multi_lora_linear and lora_linear give their CUDA kernel, with the CPU's in its place."""

from types import SimpleNamespace

import pytest
import torch

from fusedpeft import ops
from fusedpeft.ops import multi_lora_cuda
from fusedpeft.ops.native import native
from fusedpeft.ops.slots import lora_slots


@pytest.fixture
def on_the_cpu(monkeypatch):
    def multi_lora_cuda_(*given):
        x, w, bias, y, slots, a, b, rank, scale, s, sums, *rest = given
        *rest, processors, splits, dt, adt, one_scale, stream = rest
        sizes, count, most, m, k, n, sx, sw, *strides = rest
        assert (processors, stream, sums - s) == (132, 7, 4 * m * len(sizes) * most)
        assert splits == multi_lora_cuda.choose_splits(m, k, n, 2 if dt else 4, 132)
        if not slots:  # one adapter for all, as the kernel takes null
            assert (rank, scale, count, len(sizes)) == (0, 0, 1, 1)
            one = [torch.zeros(m, dtype=torch.int32), torch.tensor([[most]], dtype=torch.int32)]
            one.append(torch.tensor([[one_scale]]))
            slots, rank, scale = (t.data_ptr() for t in one)
        native.multi_lora(
            x, w, bias, y, slots, a, b, rank, scale, sizes, count, most, m, k, n, sx, sw, n,
            *strides, dt, adt,
        )  # fmt: skip

    fake = SimpleNamespace(multi_lora_cuda=multi_lora_cuda_)
    monkeypatch.setattr(multi_lora_cuda, "native", fake)
    monkeypatch.setattr(multi_lora_cuda, "_processors", lambda device: 132)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 7, raising=False)


@pytest.mark.skipif(native is None, reason="the extension is not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_the_kernel_is_given(on_the_cpu, dtype):
    g = torch.Generator().manual_seed(0)
    rnd = lambda *s: torch.randn(*s, generator=g).to(dtype)  # noqa: E731
    pool = lora_slots([[(rnd(3, 20), rnd(9, 3), 2.0), (rnd(8, 20), rnd(4, 8), 0.5)], None])
    slots = torch.tensor([0, -1, 0, 0], dtype=torch.int32)
    w, bias = rnd(13, 24)[:, 4:], rnd(26)[::2]
    for x in (rnd(4, 20), rnd(4, 23)[:, 3:], rnd(20, 4).t(), rnd(2, 2, 20)):
        got = multi_lora_cuda.cuda_fwd(x, w, pool, slots, bias)
        want = ops.multi_lora_linear(x.contiguous(), w, pool, slots, bias)
        assert got.shape == want.shape and torch.equal(got, want)
    assert multi_lora_cuda.cuda_fwd(x[:0], w, pool, slots[:0]).shape == (0, 2, 13)


@pytest.mark.skipif(native is None, reason="the extension is not built")
@pytest.mark.parametrize("adapter_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_adapter_for_all_rows(on_the_cpu, check_accuracy, dtype, adapter_dtype):
    g = torch.Generator().manual_seed(0)
    rnd = lambda *s: (0.3 * torch.randn(*s, generator=g)).to(dtype)  # noqa: E731
    like = adapter_dtype or dtype
    x, w, a = rnd(5, 1048)[:, :1040], rnd(24, 1048)[:, 8:], rnd(16, 1048).to(like)[:, 8:]
    b, bias = rnd(24, 16).to(like), rnd(48)[::2]
    assert multi_lora_cuda.one_ok(w, a, b)
    for given in (x, x.t().contiguous().t()):
        for c in (bias, None):
            got = multi_lora_cuda.one_fwd(given, w, a, b, c, 0.5)
            args = (x, w, a, b, 0.5, c)
            ref = ops.lora_linear_ref(*(t.double() if torch.is_tensor(t) else t for t in args))
            check_accuracy("y", got, ops.lora_linear_ref(*args), ref)
    assert multi_lora_cuda.one_fwd(x[:0], w, a, b, bias, 0.5).shape == (0, 24)


def test_what_one_adapter_must_be(on_the_cpu):
    w, a, b = torch.randn(24, 32), torch.randn(16, 32), torch.randn(24, 16)
    assert not multi_lora_cuda.one_ok(w, a[:12], b[:, :12].contiguous())
    assert not multi_lora_cuda.one_ok(w, a, b.t().contiguous().t())
    assert not multi_lora_cuda.one_ok(w.t().contiguous().t(), a, b)
    assert not multi_lora_cuda.one_ok(w, a.double(), b.double())


def test_k_is_split_where_rows_are_few():
    splits = multi_lora_cuda.choose_splits
    assert [splits(m, 4096, 4096, 2, 132) for m in (1, 16, 17, 32, 33, 64)] == [1, 1, 2, 2, 4, 4]
    assert [splits(m, 4096, 14336, 2, 132) for m in (1, 32, 64)] == [1, 1, 1]
    assert splits(1, 4096, 1024, 2, 132) == 4 and splits(64, 4096, 1024, 2, 132) == 8
    assert splits(1, 8, 1, 2, 132) == 1 and splits(64, 4096, 4096, 4, 132) == 1
