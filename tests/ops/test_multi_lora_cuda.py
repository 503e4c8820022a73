"""What stands between multi_lora_linear and its CUDA kernel, with the CPU kernel in its place."""

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
        *rest, processors, splits, dt, adt, _stream = rest
        sizes, count, most, m, k, n, sx, sw, *strides = rest
        assert (processors, splits, sums - s) == (132, 1, 4 * m * len(sizes) * most)
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


def test_k_is_split_where_rows_are_few():
    splits = multi_lora_cuda.choose_splits
    assert [splits(m, 4096, 4096, 2, 132) for m in (1, 16, 17, 32, 33, 64)] == [1, 1, 2, 2, 4, 4]
    assert [splits(m, 4096, 14336, 2, 132) for m in (1, 32, 64)] == [1, 1, 1]
    assert splits(1, 4096, 1024, 2, 132) == 4 and splits(64, 4096, 1024, 2, 132) == 8
    assert splits(1, 8, 1, 2, 132) == 1 and splits(64, 4096, 4096, 4, 132) == 1
