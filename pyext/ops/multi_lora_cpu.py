"""Many LoRA adapters in one batch: ATen for any rows, C++ for decode. See multi_lora.py."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedpeft.ops.arguments import PLAIN, is_plain
from fusedpeft.ops.lora_cpu import wide, widens
from fusedpeft.ops.native import DTYPE_CODES, native
from fusedpeft.ops.slots import LoRASlots, check_slots

MAX_NATIVE_TOKENS = 64  # rows that the C++ kernel takes; beyond, the GEMM of ATen is ahead


def aten_fwd(x: Tensor, w: Tensor, pool: LoRASlots, slots: Tensor, bias: Tensor | None) -> Tensor:
    """Rows that share a slot together. Reads the slots, for which a GPU is waited for."""
    if widens(x):
        x_up, w_up, bias_up = wide(x, w, bias)
        with torch.autocast("cpu", enabled=False):
            return aten_fwd(x_up, w_up, pool, slots, bias_up).to(x.dtype)
    if not slots.is_cpu:
        slots, rank = slots.cpu(), pool.rank.cpu()
        check_slots(slots, x.shape[0], rank)
    y = F.linear(x, w, bias)
    dtype = torch.promote_types(x.dtype, pool.a.dtype)
    named, where = slots.unique(return_inverse=True)
    for i, slot in enumerate(named.tolist()):
        if slot < 0:
            continue
        rows = slice(None) if named.numel() == 1 else (where == i).nonzero()[:, 0].to(x.device)
        own, at = x[rows].to(dtype), 0
        for (a, b, scale), n in zip(pool.get(slot), pool.sizes, strict=True):
            update = F.linear(F.linear(own, a.to(dtype)), b.to(dtype)).mul_(scale)
            y[rows, at : at + n] += update.to(y.dtype)
            at += n
    return y


# --- C++ decode ---------------------------------------------------------------------------------


def native_ok(x: Tensor, w: Tensor) -> bool:
    """Of what `multi_lora_linear` has checked."""
    return (
        native is not None
        and x.dtype in DTYPE_CODES
        and (x.is_contiguous() or (x.ndim == 2 and x.stride()[1] == 1))
        and w.stride()[1] == 1
    )


def check_native(x: Tensor, w: Tensor) -> None:
    if x.shape[0] > MAX_NATIVE_TOKENS:
        raise ValueError(f"impl='native': expected <= {MAX_NATIVE_TOKENS} rows, got {x.shape[0]}")
    if not (x.is_cpu and native_ok(x, w)):
        raise ValueError(
            "impl='native': expected CPU tensors of fp32, bf16 or fp16 with unit inner strides, "
            f"got {x.dtype} on {x.device}"
        )


def is_sound(x: Tensor, w: Tensor, pool: LoRASlots, slots: Tensor, bias: Tensor | None) -> bool:
    """Whether plain tensors on a CPU or a GPU would pass the checks, but for the values of `slots`,
    which the kernels read: in 3 us instead of 10, as each linear of a decoded token asks it.

    False may also mean that it takes the long list to know.
    """
    if type(pool) is not LoRASlots or not (type(x) in PLAIN and type(w) in PLAIN):
        return False
    a, b, rank, scale, sizes = pool
    parts = len(sizes)
    try:
        (n, k), (count, rows, ak), (bs, bn) = w.shape, a.shape, b.shape
    except ValueError:
        return False
    return (
        parts > 0
        and k > 0
        and x.ndim > 0
        and x.shape[-1] == k == ak
        and sum(sizes) == n
        and rows > 0
        and rows % (8 * parts) == 0
        and bs == count
        and bn * parts == n * rows
        and rank.shape == (count, parts) == scale.shape
        and type(slots) is Tensor
        and slots.ndim == 1
        and slots.shape[0] * k == x.numel()
        and x.dtype in DTYPE_CODES
        and x.dtype == w.dtype
        and not (torch.is_grad_enabled() and _learns(x, w, a, b, bias))
        and a.dtype == b.dtype
        and (a.dtype == x.dtype or a.dtype == torch.float32)
        and rank.dtype == slots.dtype == torch.int32
        and scale.dtype == torch.float32
        and (
            (x.is_cpu and w.is_cpu and a.is_cpu and b.is_cpu)
            and (rank.is_cpu and scale.is_cpu and slots.is_cpu)
            or _on_one_gpu(x, w, a, b, rank, scale, slots)
        )
        and a.stride()[2] == 1
        and b.stride()[1] == 1
        and rank.is_contiguous()
        and scale.is_contiguous()
        and (
            bias is None
            or (type(bias) in PLAIN and bias.shape == (n,) and bias.dtype == x.dtype)
            and (x.is_cpu and bias.is_cpu or _on_one_gpu(x, bias))
        )
    )


def _on_one_gpu(x: Tensor, *others: Tensor) -> bool:
    index = x.get_device()  # -1 for whatever is not on a GPU
    return x.is_cuda and all([t.get_device() == index for t in others])


def _learns(*tensors: Tensor | None) -> bool:
    return any(t is not None and t.requires_grad for t in tensors)


def native_fwd(x: Tensor, w: Tensor, pool: LoRASlots, slots: Tensor, bias) -> Tensor:
    """x [M, K], or contiguous [*, K]. Raises ValueError for a slot that is not there or free."""
    # Named: they must outlive the call.
    bias = None if bias is None else bias.contiguous()
    slots = slots.contiguous()
    return _run(x, slots, *_fixed(w, pool, bias))


def _fixed(w: Tensor, pool: LoRASlots, bias: Tensor | None) -> tuple:
    """What the C++ kernel is told of them; addresses, so that they must outlive it."""
    a, b, rank, scale, sizes = pool
    weights = (w.data_ptr(), 0 if bias is None else bias.data_ptr())
    adapters = (
        a.data_ptr(), b.data_ptr(), rank.data_ptr(), scale.data_ptr(), sizes, a.shape[0],
        a.shape[1] // len(sizes),
    )  # fmt: skip
    strides = (w.stride()[0], w.shape[0], *a.stride()[:2], b.stride()[0])
    return w.shape, weights, adapters, strides, DTYPE_CODES[a.dtype]


def _run(x: Tensor, slots: Tensor, shape, weights, adapters, strides, adapter_code) -> Tensor:
    (n, k), m = shape, slots.shape[0]
    y = x.new_empty(m, n) if x.ndim == 2 else x.new_empty(*x.shape[:-1], n)
    torch.get_num_threads()  # tells OpenMP in this thread what torch.set_num_threads said in any
    native.multi_lora(
        x.data_ptr(), *weights, y.data_ptr(), slots.data_ptr(), *adapters, m, k, n,
        x.stride()[0] if x.ndim == 2 else k, *strides, DTYPE_CODES[x.dtype], adapter_code,
    )  # fmt: skip
    return y


def prepared(
    w: Tensor, pool: LoRASlots, bias: Tensor | None
) -> Callable[[Tensor, Tensor], Tensor | None]:
    """`native_fwd` of a w, a pool and a bias that stay where they are: what can be known of them is
    asked now and not with each token.

    The call takes x and slots and returns y, or None where it takes `multi_lora_linear` to answer.
    It does not record gradients. Raises ValueError for a slot that is not there or free.
    """
    k, dtype = w.shape[1], w.dtype
    bias = None if bias is None else bias.detach().contiguous()
    x, slots = w.new_empty(1, k), torch.zeros(1, dtype=torch.int32)
    with torch.no_grad():
        if not (is_sound(x, w, pool, slots, bias) and w.is_cpu and native_ok(x, w)):
            return lambda x, slots: None
    fixed = _fixed(w, pool, bias)

    def call(x: Tensor, slots: Tensor, _held=(w, bias, pool)) -> Tensor | None:
        m = slots.shape[0]
        sound = (
            is_plain((x,))
            and m <= MAX_NATIVE_TOKENS
            and x.dtype == dtype
            and x.is_cpu
            and x.is_contiguous()
            and x.shape[-1] == k
            and x.numel() == m * k
        )
        return _run(x, slots, *fixed) if sound else None

    return call
