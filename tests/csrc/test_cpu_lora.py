"""lora_linear's ATen path in 16 bits, widened to fp32 and not, whatever the chip would choose."""

from __future__ import annotations

import pytest
import torch

from fusedpeft import ops
from fusedpeft.ops import lora_cpu


def gradients(op, tensors, dy, p):
    leaves = [t.clone().requires_grad_() for t in tensors]
    x, w, a, b, bias = leaves
    y = op(x, w, a, b, 0.5, bias, dropout_p=p, seed=torch.tensor([3]))
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


def draw(m: int, dtype: torch.dtype, adapter: torch.dtype):
    g = torch.Generator().manual_seed(m)
    sizes = ((m, 129), (77, 129), (12, 129), (77, 12), (77,), (m, 77))
    x, w, a, b, bias, dy = (torch.randn(*s, generator=g) for s in sizes)
    w, a = w / 129**0.5, a / 129**0.5
    return [x.to(dtype), w.to(dtype), a.to(adapter), b.to(adapter), bias.to(dtype)], dy.to(dtype)


@pytest.mark.parametrize("slow", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("adapter", ["same", "fp32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_against_float64(check_accuracy, monkeypatch, dtype, adapter, p, slow):
    monkeypatch.setattr(lora_cpu, "_SLOW_16_BIT", slow)
    for m in (3, 63):
        tensors, dy = draw(m, dtype, torch.float32 if adapter == "fp32" else dtype)
        got = gradients(ops.lora_linear, tensors, dy, p)
        low = gradients(ops.lora_linear_ref, tensors, dy, p)
        ref = gradients(ops.lora_linear_ref, [t.double() for t in tensors], dy, p)
        for name, g, lo, r in zip(
            ("y", "dx", "dw", "da", "db", "dbias"), got, low, ref, strict=True
        ):
            assert g.dtype == lo.dtype and g.is_contiguous(), name
            check_accuracy(name, g, lo, r)


def test_which_products_are_widened(monkeypatch):
    monkeypatch.setattr(lora_cpu, "_SLOW_16_BIT", True)
    assert lora_cpu.widens(torch.empty(4, 2, dtype=torch.bfloat16))
    assert lora_cpu.widens(torch.empty(4, 2, dtype=torch.float16))
    assert not lora_cpu.widens(torch.empty(3, 2, dtype=torch.bfloat16))
    assert not lora_cpu.widens(torch.empty(4, 2))
    assert not lora_cpu.widens(torch.empty(4, 2, dtype=torch.bfloat16, device="meta"))
    monkeypatch.setattr(lora_cpu, "_SLOW_16_BIT", False)
    assert not lora_cpu.widens(torch.empty(4, 2, dtype=torch.bfloat16))


def test_a_widened_product_stays_so_under_autocast(monkeypatch):
    """Else autocast would narrow the operands again, and the sums would differ."""
    monkeypatch.setattr(lora_cpu, "_SLOW_16_BIT", True)
    (x, w, a, b, bias), dy = draw(63, torch.bfloat16, torch.bfloat16)
    want = gradients(ops.lora_linear, (x, w, a, b, bias), dy, 0.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = gradients(ops.lora_linear, (x, w, a, b, bias), dy, 0.0)
    for g, expected in zip(got, want, strict=True):
        assert torch.equal(g, expected)
