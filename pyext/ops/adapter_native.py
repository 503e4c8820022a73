"""Bottleneck adapters in C++ on a CPU, for few rows and for many with their gradients, and for few
rows in CUDA C++ on a GPU: what multi_adapter.py and, on a CPU, adapter.py call."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedpeft.ops.adapter_aten import aten_bwd
from fusedpeft.ops.arguments import PLAIN, is_plain
from fusedpeft.ops.native import DTYPE_CODES, native
from fusedpeft.ops.slots import AdapterSlots, check_slots

# As in csrc/cpu/cpu.h.
NORM_CODES = {"": 0, None: 0, "layer_norm": 1, "rms_norm": 2}
ACTIVATION_CODES = {
    "relu": 0, "gelu": 1, "gelu_tanh": 2, "gelu_new": 2, "silu": 3, "swish": 3, "tanh": 4,
    "leaky_relu": 5,
}  # fmt: skip
MAX_CPU_TOKENS = 32  # rows of one adapter; beyond, blocks of rows are ahead
MAX_CUDA_TOKENS, MAX_CUDA_SIZE = 256, 2048  # rows and E; as in csrc/cuda/adapter_decode.h


def is_sound(x, pool, slots, residual, norm_w, norm_b, activation, norm) -> bool:
    """Whether `check_multi` would pass contiguous tensors that the kernels here take, in 6 us on a
    CPU instead of 30.

    False may also mean that it takes the long list to know.
    """
    if type(pool) is not AdapterSlots or type(x) not in PLAIN or type(slots) not in PLAIN:
        return False
    down, down_bias, up, up_bias, size, scale, own_w, own_b = pool
    if down.ndim != 3 or activation not in ACTIVATION_CODES or norm not in NORM_CODES:
        return False
    (count, most, d), dtype, shape, where = down.shape, down.dtype, x.shape, x.get_device()

    def _is(t: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
        return t is None or (
            t.shape == shape and t.dtype == dtype and t.is_contiguous() and t.get_device() == where
        )

    def _slots(t: Tensor | None, shape: tuple[int, ...]) -> bool:  # an AdapterPool's lie apart
        return t is None or (
            t.shape == shape and t.dtype == dtype and t.stride()[1:] == (*shape[2:], 1)
            and t.get_device() == where
        )  # fmt: skip

    if norm is None:
        norms = norm_w is None and norm_b is None and own_w is None and own_b is None
    else:
        norms = _is(norm_w, (d,), dtype) and _is(norm_b, (d,), dtype)
        norms = norms and (own_b is None or own_w is not None)
        norms = norms and _slots(own_w, (count, d)) and _slots(own_b, (count, d))
        norms = norms and (norm == "layer_norm" or (norm_b is None and own_b is None))
    return (
        norms
        and d > 0
        and (x.is_cpu or (x.is_cuda and cuda_takes(x.numel() // d, most)))
        and most % 8 == 0
        and x.dtype in DTYPE_CODES
        and (dtype == x.dtype or dtype == torch.float32)
        and shape[-1:] == (d,)
        and _is(x, shape, x.dtype)
        and (residual is x or residual is None or _is(residual, shape, x.dtype))
        and _is(slots, (x.numel() // d,), torch.int32)
        and _slots(down, (count, most, d))
        and _slots(down_bias, (count, most))
        and _slots(up, (count, d * most))
        and _slots(up_bias, (count, d))
        and _is(size, (count,), torch.int32)
        and _is(scale, (count,), torch.float32)
    )


def one_ok(x, tensors, activation, norm, position, dropout_p, scale, eps) -> bool:
    """Whether `check` would pass and the C++ kernel takes x and down_w, down_b, up_w, up_b,
    residual, norm_w and norm_b, in 6 us instead of 30: each layer of a decoded token asks it.

    False may also mean that it takes the long list to know.
    """
    down_w, down_b, up_w, up_b, residual, norm_w, norm_b = tensors
    given = [t for t in (x, *tensors) if t is not None]
    if not is_plain((down_w, up_w, *given)) or down_w.ndim != 2:
        return False
    (e, d), dtype, own = down_w.shape, x.dtype, down_w.dtype

    def _is(t: Tensor | None, shape: tuple[int, ...]) -> bool:
        return t is None or t.shape == shape and t.dtype == own

    return (
        native is not None
        and x.shape[-1:] == (d,)
        and 0 < x.numel() <= MAX_CPU_TOKENS * d
        and e > 0
        and dtype in DTYPE_CODES
        and (own == dtype or own == torch.float32)
        and all([t.is_cpu and t.is_contiguous() for t in given])
        and _is(up_w, (d, e))
        and _is(down_b, (e,))
        and _is(up_b, (d,))
        and _is(norm_w, (d,))
        and _is(norm_b, (d,))
        and (residual is None or residual.shape == x.shape and residual.dtype == dtype)
        and activation in ACTIVATION_CODES
        and norm in NORM_CODES
        and (norm_w is None or norm is not None)
        and (norm_b is None or norm == "layer_norm")
        and position == "before"
        and dropout_p == 0.0
        and type(scale) is float
        and type(eps) is float
        and scale - scale == eps - eps == 0.0
        and not torch.is_autocast_enabled("cpu")
        and not (torch.is_grad_enabled() and any([t.requires_grad for t in given]))
    )


def one_fwd(x, tensors, activation, norm, scale: float, eps: float) -> Tensor:
    """y, as x, of one adapter for all rows; of what `one_ok` has said yes to."""
    down_w, down_b, up_w, up_b, residual, norm_w, norm_b = tensors
    y, (e, d) = torch.empty_like(x), down_w.shape
    torch.get_num_threads()  # tells OpenMP in this thread what torch.set_num_threads said in any
    native.adapter_decode_one(
        x.data_ptr(), _address(residual), y.data_ptr(), down_w.data_ptr(), _address(down_b),
        up_w.data_ptr(), _address(up_b), _address(norm_w), _address(norm_b),
        x.numel() // d, d, e, d, d, d, e, scale, eps, NORM_CODES[norm],
        ACTIVATION_CODES[activation], DTYPE_CODES[x.dtype], DTYPE_CODES[down_w.dtype],
    )  # fmt: skip
    return y


def train_fwd(
    x, down_w, down_b, up_w, up_b, residual, norm_w, norm_b, seed,
    activation: str, norm: str, eps: float, scale: float, dropout_p: float, add_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As `aten_fwd`, without dropout."""
    (m, d), e = x.shape, down_w.shape[0]
    x = x.contiguous()
    residual = x if add_x else None if residual is None else residual.contiguous()
    weights = [_dense(t) for t in (down_w, down_b, up_w, up_b, norm_w, norm_b)]
    y, p = torch.empty_like(x), down_w.new_empty(m, e)
    stats = x.new_empty((m if norm else 0, 2), dtype=torch.float32)
    if m == 0:
        return y, p, stats
    torch.get_num_threads()  # tells OpenMP in this thread what torch.set_num_threads said in any
    native.adapter_train(
        x.data_ptr(), _address(residual), [*map(_address, weights)], y.data_ptr(), p.data_ptr(),
        stats.data_ptr(), m, d, e, scale, eps, NORM_CODES[norm], ACTIVATION_CODES[activation],
        DTYPE_CODES[x.dtype], DTYPE_CODES[p.dtype], 0, [0] * 7, 0, False,
    )  # fmt: skip
    return y, p, stats


def train_bwd(
    dy, x, down_w, down_b, up_w, norm_w, norm_b, p, stats, seed,
    activation: str, norm: str, scale: float, dropout_p: float, add_x: bool, need: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """As `aten_bwd`, without dropout."""
    if not p.shape[0]:  # no rows, or nothing is needed that P says: the bias' sum
        args = (dy, x, down_w, down_b, up_w, norm_w, norm_b, p, stats, seed, activation, norm)
        return aten_bwd(*args, scale, dropout_p, add_x, need)
    (m, d), e = dy.shape, down_w.shape[0]
    dy, x = dy.contiguous(), x.contiguous()
    weights = [_dense(t) for t in (down_w, down_b, up_w, None, norm_w, norm_b)]
    shapes = ((m, d), (e, d), (e,), (d, e), (d,), (d,), (d,))
    grads = [
        (down_w if i else dy).new_empty(shape if needed else 0)
        for i, (shape, needed) in enumerate(zip(shapes, need, strict=True))
    ]
    rows, columns = -(-m // 32) * 32, -(-e // 16) * 16
    work = dy.new_empty(2 * rows * columns + 16, dtype=torch.float32)
    torch.get_num_threads()
    native.adapter_train(
        (x if x.numel() else dy).data_ptr(), 0, [*map(_address, weights)], 0, p.data_ptr(),
        stats.data_ptr(), m, d, e, scale, 0.0, NORM_CODES[norm], ACTIVATION_CODES[activation],
        DTYPE_CODES[dy.dtype], DTYPE_CODES[p.dtype], dy.data_ptr(),
        [g.data_ptr() if needed else 0 for g, needed in zip(grads, need, strict=True)],
        work.data_ptr(), add_x,
    )  # fmt: skip
    return tuple(grads)


def _dense(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def cuda_takes(tokens: int, max_size: int) -> bool:
    """Whether the CUDA kernel is there and takes so many rows and so wide adapters."""
    fits = tokens <= MAX_CUDA_TOKENS and max_size <= MAX_CUDA_SIZE
    return fits and hasattr(native, "adapter_decode_cuda")


def _row_stride(t: Tensor) -> int:
    return t.stride()[0] if t.ndim == 2 else t.shape[-1]


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def multi_fwd(x, pool: AdapterSlots, slots, residual, norm_w, norm_b, activation, norm, eps):
    """x, residual: [M, d] with unit inner stride, or contiguous [*, d]. Checks slots' values, of
    CUDA tensors as `check_slots` does."""
    down, down_bias, up, up_bias, size, scale, own_w, own_b = pool
    if own_w is None:
        own = (0, 0)
    else:
        norm_w, norm_b, own = (
            own_w,
            own_b,
            (own_w.stride()[0], own_b.stride()[0] if own_b is not None else 0),
        )
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    given = (
        x.data_ptr(), _address(residual), y.data_ptr(), slots.data_ptr(), size.data_ptr(),
        scale.data_ptr(), down.data_ptr(), down_bias.data_ptr(), up.data_ptr(), up_bias.data_ptr(),
        _address(norm_w), _address(norm_b),
        size.shape[0], slots.shape[0], x.shape[-1], _row_stride(x),
        0 if residual is None else _row_stride(residual),
        down.stride()[0], down_bias.stride()[0], up.stride()[0], up_bias.stride()[0], *own,
        eps, NORM_CODES[norm], ACTIVATION_CODES[activation],
        DTYPE_CODES[x.dtype], DTYPE_CODES[down.dtype], down.shape[1],
    )  # fmt: skip
    if x.is_cpu:
        torch.get_num_threads()  # tells OpenMP in this thread what torch.set_num_threads said
        native.adapter_decode(*given)
        return y
    check_slots(slots, slots.shape[0], size)
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    with torch.cuda.device(x.device):
        stream = torch.cuda.current_stream().cuda_stream
        native.adapter_decode_cuda(*given, processors, stream)
    return y
