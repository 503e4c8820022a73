"""The linear and LoRA for a few tokens in CUDA C++, one launch: each row's own adapter
(multi_lora.py), or one for all (lora.py)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fusedpeft.ops.native import DTYPE_CODES, native
from fusedpeft.ops.slots import RANK_STEP, LoRASlots

MAX_CUDA_TOKENS = 64  # rows that the kernel takes; beyond, the Triton one
MAX_PARTS = 16


def cuda_ok(w: Tensor, pool: LoRASlots) -> bool:
    """Of what `multi_lora_linear` has checked, apart from the device and the number of rows."""
    return w.stride()[1] == 1 and len(pool.sizes) <= MAX_PARTS


def fast_ok(x: Tensor, w: Tensor, pool: LoRASlots, slots: Tensor) -> bool:
    """Whether sound CUDA tensors go straight to `cuda_fwd`, as `choose_impl` would have it."""
    return (
        slots.shape[0] <= MAX_CUDA_TOKENS
        and (x.ndim == 2 or x.is_contiguous())
        and hasattr(native, "multi_lora_cuda")
        and cuda_ok(w, pool)
    )


def check_call(x: Tensor, rows: int) -> None:
    """What impl="cuda" asks of any call: the device, the kernel, the number of rows."""
    if rows > MAX_CUDA_TOKENS:
        raise ValueError(f"impl='cuda': expected <= {MAX_CUDA_TOKENS} rows, got {rows}")
    if not x.is_cuda:
        raise ValueError(f"impl='cuda': expected CUDA tensors, got {x.device}")
    if not hasattr(native, "multi_lora_cuda"):
        raise NotImplementedError(
            "impl='cuda': fusedpeft._C was built without its CUDA half; build with FUSEDPEFT_CUDA=1"
        )


def check_cuda(x: Tensor, w: Tensor, pool: LoRASlots, rows: int) -> None:
    check_call(x, rows)
    if not cuda_ok(w, pool):
        raise ValueError(
            f"impl='cuda': expected rows of w with unit stride and at most {MAX_PARTS} parts, "
            f"got strides {w.stride()} and {len(pool.sizes)} parts"
        )


@functools.cache
def _processors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache  # a quarter of what it takes to work it out
def choose_splits(m: int, k: int, n: int, itemsize: int, processors: int) -> int:
    """By how many blocks each tile's K is shared: two blocks for every processor, where that leaves
    512 of K to each. Pure. Tiles are those of csrc/cuda/multi_lora.cu."""
    if itemsize == 4:
        tiles = -(-n // 8) * -(-m // 8)
    else:
        tiles = -(-n // (16 if m <= 16 else 32 if m <= 32 else 64))
    return max(1, min(2 * processors // tiles, k // 512, 8))


def cuda_fwd(
    x: Tensor, w: Tensor, pool: LoRASlots, slots: Tensor | None, bias: Tensor | None = None,
    one_scale: float = 0.0,
) -> Tensor:  # fmt: skip
    """y [*, N], fresh. x [M, K], or contiguous [*, K], M <= 64. No host synchronisation but in a
    stream's or a capture's first call.

    x and w share fp32, bf16 or fp16; 16-bit rows that are whole pieces of 16 bytes take the tensor
    cores. pool in x's dtype or fp32. A row whose slot holds no adapter or does not exist comes back
    NaN. slots None: slot 0 for all rows, of max_rank and one_scale; pool.rank and pool.scale are
    None then. Raises RuntimeError where the launch failed.
    """
    n, k = w.shape
    if x.ndim == 2:
        x = x if x.stride()[1] == 1 else x.contiguous()
        m, sx = x.shape[0], x.stride()[0]
        y = x.new_empty(m, n)
    else:
        m, sx = slots.shape[0], k
        y = x.new_empty(*x.shape[:-1], n)
    if m == 0 or n == 0:
        return y
    device = x.get_device()
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return cuda_fwd(x, w, pool, slots, bias, one_scale)
    a, b, rank, scale, sizes = pool
    most = a.shape[1] // len(sizes)
    processors = _processors(device)
    splits = choose_splits(m, k, n, x.element_size(), processors)
    s_count = m * a.shape[1]
    scratch = x.new_empty(s_count + (splits - 1) * m * n, dtype=torch.float32)
    s = scratch.data_ptr()
    # Named: they must outlive the launch.
    bias = None if bias is None else bias.contiguous()
    of_rows = 0, 0, 0
    if slots is not None:
        slots = slots.contiguous()
        of_rows = slots.data_ptr(), rank.data_ptr(), scale.data_ptr()
    a_slot, a_row, _ = a.stride()
    stream = torch._C._cuda_getCurrentRawStream(device)  # torch.cuda.current_stream takes 1 us
    native.multi_lora_cuda(
        x.data_ptr(), w.data_ptr(), 0 if bias is None else bias.data_ptr(), y.data_ptr(),
        of_rows[0], a.data_ptr(), b.data_ptr(), of_rows[1], of_rows[2], s, s + 4 * s_count, sizes,
        a.shape[0], most, m, k, n, sx, w.stride()[0], a_slot, a_row, b.stride()[0], processors,
        splits, DTYPE_CODES[x.dtype], DTYPE_CODES[a.dtype], one_scale, stream,
    )  # fmt: skip
    return y


# --- one adapter for all rows: lora.py -----------------------------------------------------------


def one_ok(w: Tensor, a: Tensor, b: Tensor) -> bool:
    """Of what `lora_linear` has checked, apart from the device, x and the number of rows."""
    return (
        hasattr(native, "multi_lora_cuda")
        and a.dtype in (w.dtype, torch.float32)
        and a.shape[0] % RANK_STEP == 0
        and w.stride()[1] == a.stride()[1] == 1
        and b.is_contiguous()
    )


def one_fwd(
    x: Tensor, w: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, scale: float
) -> Tensor:
    """y = x Wᵀ + bias + scale · (x Aᵀ) Bᵀ, fresh [M, N]; x [M, K]. As `cuda_fwd`, one slot."""
    pool = LoRASlots(a.unsqueeze(0), b.view(1, -1), None, None, (w.shape[0],))
    return cuda_fwd(x, w, pool, None, bias, scale)
