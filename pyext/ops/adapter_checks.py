"""What `bottleneck_adapter` refuses, before anything is computed."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedpeft.ops.adapter_aten import ACTIVATIONS

NORMS = ("layer_norm", "rms_norm")
_POSITIONS = ("before", "after")
_IMPLS = ("aten", "triton")


def check(x, down_w, down_b, up_w, up_b, residual, norm_w, norm_b, activation, norm, position,
           dropout_p, impl) -> None:  # fmt: skip
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
        if tuple(t.shape) != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(t.shape)}")
        if t.dtype != dtype:
            like = "x" if t is residual else "down_w"
            raise TypeError(f"{name}: expected dtype {dtype} (as {like}), got {t.dtype}")
        if t.device != x.device:
            raise ValueError(f"{name}: expected device {x.device} (as x), got {t.device}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {tuple(ACTIVATIONS)}, got {activation!r}")
    if norm is not None and norm not in NORMS:
        raise ValueError(f"norm: expected one of {NORMS} or None, got {norm!r}")
    if position not in _POSITIONS:
        raise ValueError(f"norm_position: expected one of {_POSITIONS}, got {position!r}")
    if norm is None and not (norm_w is None and norm_b is None):
        raise ValueError("norm_weight, norm_bias: expected None without a norm, got tensors")
    if norm == "rms_norm" and norm_b is not None:
        raise ValueError("norm_bias: expected None with rms_norm, got a tensor")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: expected 0 <= p < 1, got {dropout_p}")
    if impl is not None and impl not in _IMPLS:
        raise ValueError(f"impl: expected one of {_IMPLS} or None, got {impl!r}")
    if impl == "triton" and x.dtype == torch.float64:
        raise TypeError("impl='triton': expected fp32, bf16 or fp16, got torch.float64; use 'aten'")
