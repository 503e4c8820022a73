"""Who computes multi_bottleneck_adapter, and what the kernels are handed. No GPU."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from fusedpeft import ops
from fusedpeft.ops import adapter_native, multi_adapter
from fusedpeft.ops.multi_adapter import choose_impl
from fusedpeft.ops.native import native
from fusedpeft.ops.slots import Adapter, adapter_slots

X, SLOTS = torch.zeros(4, 8), torch.tensor([0, -1, 1, 0], dtype=torch.int32)
NORM = dict(norm_weight=torch.ones(8), norm_bias=torch.ones(8))
POOL = adapter_slots(
    [Adapter(torch.ones(e, 8), torch.ones(e), torch.ones(8, e), None, **NORM) for e in (8, 5)]
)
PLAIN_POOL = POOL._replace(norm_weight=None, norm_bias=None)


def test_what_each_device_takes():
    assert choose_impl("cpu", cpu_half=True)[0] == "native"
    assert choose_impl("cpu", cpu_half=False)[0] == choose_impl("meta")[0] == "aten"
    assert choose_impl("cuda", 256, 2048, cuda_half=True)[0] == "cuda"
    for sizes in ((257, 8), (1, 2056)):
        impl, why = choose_impl("cuda", *sizes, cuda_half=True)
        assert impl == "aten" and "waiting for the GPU" in why
    assert "without the CUDA kernel" in choose_impl("cuda", cuda_half=False)[1]


@pytest.mark.skipif(not hasattr(native, "adapter_decode_cuda"), reason="needs the CUDA half")
def test_the_cuda_kernel_takes_no_cpu_tensors():
    with pytest.raises(ValueError, match="impl='cuda': expected cuda tensors, got cpu"):
        ops.multi_bottleneck_adapter(X, PLAIN_POOL, SLOTS, impl="cuda")


def test_the_cuda_kernel_that_is_not_there(monkeypatch):
    monkeypatch.setattr(multi_adapter, "native", None)
    for impl in ("cuda", "native"):
        with pytest.raises(ValueError, match="expected fusedpeft._C with its kernel; build it"):
            ops.multi_bottleneck_adapter(X, PLAIN_POOL, SLOTS, impl=impl)


def test_what_the_cuda_kernel_is_handed(monkeypatch):
    """The same as the one on a CPU, and the processors and the stream."""
    calls = {}
    record = lambda name: lambda *args: calls.__setitem__(name, args)  # noqa: E731
    names = ("adapter_decode", "adapter_decode_cuda")
    fake = SimpleNamespace(**{name: record(name) for name in names})
    for module in (multi_adapter, adapter_native):
        monkeypatch.setattr(module, "native", fake)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=77))
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=132)
    )
    y = torch.empty(4, 8)
    monkeypatch.setattr(torch, "empty_like", lambda *_args, **_kw: y)
    args, kw = (torch.randn(4, 8), POOL, SLOTS), dict(residual=torch.randn(4, 8), norm="layer_norm")
    ops.multi_bottleneck_adapter(*args, **kw)
    monkeypatch.setattr(torch.Tensor, "is_cpu", False, raising=False)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    ops.multi_bottleneck_adapter(*args, **kw)
    assert calls["adapter_decode_cuda"] == (*calls["adapter_decode"], 132, 77)
    assert calls["adapter_decode"][-1] == 8  # the width of a slot
    monkeypatch.setenv("FUSEDPEFT_DEBUG", "1")
    with pytest.raises(ValueError, match="slots: expected -1"):
        ops.multi_bottleneck_adapter(*args[:2], args[2] + 2, **kw)
