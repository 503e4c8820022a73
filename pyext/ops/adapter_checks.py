"""What the ops of bottleneck adapters refuse, before anything is computed."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedpeft.ops.adapter_aten import ACTIVATIONS
from fusedpeft.ops.arguments import check_number, check_probability, check_triton
from fusedpeft.ops.native import DTYPE_CODES, native
from fusedpeft.ops.slots import RANK_STEP, AdapterSlots

NORMS = ("layer_norm", "rms_norm")
POSITIONS = ("before", "after")
_IMPLS = ("native", "aten", "triton")


def check(x, down_w, down_b, up_w, up_b, residual, norm_w, norm_b, activation, norm, position,
           scale, eps, dropout_p, impl) -> None:  # fmt: skip
    for name, t in (("x", x), ("down_w", down_w), ("up_w", up_w)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(t).__name__}")
    if x.ndim < 1 or down_w.ndim != 2:
        raise ValueError(
            f"x, down_w: expected [*, d] and [E, d], got {tuple(x.shape)}, {tuple(down_w.shape)}"
        )
    e, d = down_w.shape
    if e < 1:
        raise ValueError("down_w: expected a bottleneck E >= 1, got 0")
    if x.shape[-1] != d:
        raise ValueError(
            f"x: expected last dim d = {d} (down_w is {(e, d)}), got {tuple(x.shape)}"
        )  # fmt: skip
    wanted = down_w.dtype
    if not x.is_floating_point():
        raise TypeError(f"x: expected a floating dtype, got {x.dtype}")
    if wanted not in (x.dtype, torch.float32) or x.dtype == torch.float64 != wanted:
        raise TypeError(f"down_w: expected dtype {x.dtype} (as x) or torch.float32, got {wanted}")
    for name, t, shape, dtype in (
        ("down_w", down_w, (e, d), wanted),
        ("down_b", down_b, (e,), wanted),
        ("up_w", up_w, (d, e), wanted),
        ("up_b", up_b, (d,), wanted),
        ("norm_weight", norm_w, (d,), wanted),
        ("norm_bias", norm_b, (d,), wanted),
        ("residual", residual, tuple(x.shape), x.dtype),
    ):
        if t is None:
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: expected a Tensor or None, got {type(t).__name__}")
        if tuple(t.shape) != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(t.shape)}")
        if t.dtype != dtype:
            like = "x" if t is residual else "down_w"
            raise TypeError(f"{name}: expected dtype {dtype} (as {like}), got {t.dtype}")
        if t.device != x.device:
            raise ValueError(f"{name}: expected device {x.device} (as x), got {t.device}")
    _check_names(activation, norm, position, norm_w, norm_b)
    check_number("scale", scale)
    check_number("norm_eps", eps)
    check_probability("dropout_p", dropout_p)
    if impl is not None and impl not in _IMPLS:
        raise ValueError(f"impl: expected one of {_IMPLS} or None, got {impl!r}")
    if impl == "native" and (native is None or not x.is_cpu or dropout_p > 0.0):
        why = "dropout" if dropout_p > 0.0 else f"{x.device}"
        raise ValueError(
            "impl='native': expected fusedpeft._C, CPU tensors and no dropout, got "
            + ("no fusedpeft._C" if native is None else why)
        )
    if impl == "native" and x.dtype == torch.float64:
        raise TypeError("impl='native': expected fp32, bf16 or fp16, got torch.float64; use 'aten'")
    if impl == "triton":
        check_triton(x)
        if d % 16:
            raise ValueError(
                f"impl='triton': expected d a multiple of 16, got {d}; use 'aten' or None"
            )


def _check_names(activation, norm, position, norm_w, norm_b) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {tuple(ACTIVATIONS)}, got {activation!r}")
    if norm is not None and norm not in NORMS:
        raise ValueError(f"norm: expected one of {NORMS} or None, got {norm!r}")
    if position not in POSITIONS:
        raise ValueError(f"norm_position: expected one of {POSITIONS}, got {position!r}")
    if norm is None and not (norm_w is None and norm_b is None):
        raise ValueError("norm_weight, norm_bias: expected None without a norm, got tensors")
    if norm == "rms_norm" and norm_b is not None:
        raise ValueError("norm_bias: expected None with rms_norm, got a tensor")


def check_multi(x, pool, slots, residual, norm_w, norm_b, activation, norm, position, impls,
                impl) -> None:  # fmt: skip
    """What `multi_bottleneck_adapter` refuses, but for `slots` (slots.py)."""
    for name, t, kind in (("x", x, Tensor), ("pool", pool, AdapterSlots)):
        if not isinstance(t, kind):
            raise TypeError(f"{name}: expected {kind.__name__}, got {type(t).__name__}")
    if x.dtype not in DTYPE_CODES:
        raise TypeError(f"x: expected fp32, bf16 or fp16, got {x.dtype}")
    if x.ndim < 1 or pool.down.ndim != 3:
        got = f"{tuple(x.shape)}, {tuple(pool.down.shape)}"
        raise ValueError(f"x, pool.down: expected [*, d] and [slots, max_size, d], got {got}")
    (slots, most, d), own, wanted = pool.down.shape, pool.norm_weight is not None, pool.down.dtype
    if x.shape[-1] != d:
        raise ValueError(
            f"x: expected last dim d = {d} (pool.down is {(slots, most, d)}), got {tuple(x.shape)}"
        )
    if most % RANK_STEP:
        raise ValueError(f"pool.down: expected max_size a multiple of {RANK_STEP}, got {most}")
    if wanted not in (x.dtype, torch.float32):
        raise TypeError(f"pool: expected dtype {x.dtype} (as x) or torch.float32, got {wanted}")
    for name, t, shape, dtype in (
        ("pool.down", pool.down, (slots, most, d), wanted),
        ("pool.down_bias", pool.down_bias, (slots, most), wanted),
        ("pool.up", pool.up, (slots, d * most), wanted),
        ("pool.up_bias", pool.up_bias, (slots, d), wanted),
        ("pool.size", pool.size, (slots,), torch.int32),
        ("pool.scale", pool.scale, (slots,), torch.float32),
        ("pool.norm_weight", pool.norm_weight, (slots, d), wanted),
        ("pool.norm_bias", pool.norm_bias, (slots, d), wanted),
        ("norm_weight", norm_w, (d,), wanted),
        ("norm_bias", norm_b, (d,), wanted),
        ("residual", residual, x.shape, x.dtype),
    ):
        if t is None:
            continue
        if t.shape != shape:
            raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(t.shape)}")
        if t.dtype != dtype:
            raise TypeError(f"{name}: expected dtype {dtype}, got {t.dtype}")
        if t.device != x.device:
            raise ValueError(f"{name}: expected device {x.device} (as x), got {t.device}")
        if name.startswith("pool.") and not (t[:1] if t.ndim > 1 else t).is_contiguous():
            raise ValueError(f"{name}: expected a slot's numbers in one piece, got {t.stride()}")
    if pool.norm_bias is not None and not own:
        raise ValueError("pool.norm_weight: expected one beside pool.norm_bias, got None")
    if norm is None and own:
        raise ValueError("norm: expected one, as the slots have norm weights, got None")
    _check_names(activation, norm, position, norm_w, pool.norm_bias if norm_b is None else norm_b)
    if impl is not None and impl not in impls:
        raise ValueError(f"impl: expected one of {impls} or None, got {impl!r}")
