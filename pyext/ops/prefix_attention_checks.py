"""What prefix_attention refuses, with the expected and the given value."""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor

from fusedpeft.ops.arguments import check_number, check_triton
from fusedpeft.ops.native import DTYPE_CODES, native

MAX_HEAD_DIM = 256
IMPLS = ("flash", "aten", "triton", "native", "cuda")
DECODE = ("native", "cuda")  # the kernels of prefix_decode_attention
MAX_DECODE_QUERIES = 8


def check(q, k, v, pk, pv, mask, window, cu, ids, scale, causal, impl) -> None:
    named = (("q", q), ("k", k), ("v", v), ("prefix_k", pk), ("prefix_v", pv))
    extra = (("mask", mask), ("cu_seqlens", cu), ("prefix_ids", ids))
    for name, t in (*named, *((n, t) for n, t in extra if t is not None)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(t).__name__}")
        if t.device != q.device:
            raise ValueError(f"{name}: expected device {q.device} (as q), got {t.device}")
    if not q.is_floating_point():
        raise TypeError(f"q: expected a floating dtype, got {q.dtype}")
    for name, t in named[1:]:
        if t.dtype != q.dtype:
            raise TypeError(f"{name}: expected dtype {q.dtype} (as q), got {t.dtype}")
    for name, t in named[:3]:
        if t.ndim != 4:
            raise ValueError(f"{name}: expected 4 dims [B, heads, length, D], got {tuple(t.shape)}")
    (B, H, T, D), (_, HKV, S, _) = q.shape, k.shape
    if not 1 <= D <= MAX_HEAD_DIM:
        raise ValueError(f"q: expected head dim D in 1..{MAX_HEAD_DIM}, got {D}")
    if HKV < 1 or H % HKV:
        raise ValueError(f"k: expected HKV that divides H = {H}, got {HKV}")
    if k.shape != (B, HKV, S, D) or v.shape != k.shape:
        want = f"[{B}, HKV, S, {D}] (q is {tuple(q.shape)})"
        raise ValueError(f"k, v: expected {want}, got {tuple(k.shape)}, {tuple(v.shape)}")
    if S < T or (cu is not None and S != T):
        why = f"S {'=' if cu is not None else '>='} T = {T}"
        raise ValueError(f"k: expected {why}, got S = {S}")
    if cu is not None and (B != 1 or cu.ndim != 1 or len(cu) < 1):
        got = f"B = {B}, cu_seqlens {tuple(cu.shape)}"
        raise ValueError(f"cu_seqlens: expected B = 1 (packed) and [n + 1], got {got}")
    _check_prefix(pk, pv, ids, B if cu is None else len(cu) - 1, HKV, D)
    if mask is not None:
        if cu is not None:
            raise ValueError("mask: expected None beside cu_seqlens, got a Tensor")
        if not mask.is_floating_point() or mask.dtype.itemsize == 1:
            raise TypeError(f"mask: expected floating (added; -inf hides a key), got {mask.dtype}")
        allowed = ((1, B), (1, H), (T,), (S,))
        if mask.ndim != 4 or any(m not in a for m, a in zip(mask.shape, allowed, strict=True)):
            raise ValueError(
                f"mask: expected [{B} or 1, {H} or 1, {T}, {S}], got {tuple(mask.shape)}"
            )
        if mask.requires_grad:
            raise ValueError("mask: expected no gradient, got requires_grad=True")
    for name, t in extra[1:]:
        if t is not None and t.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name}: expected int32 or int64, got {t.dtype}")
    if window is not None and (not isinstance(window, int) or window < 1):
        raise ValueError(f"window: expected an int >= 1 or None, got {window!r}")
    if scale is not None:
        check_number("scale", scale)
    if impl in DECODE:
        check_kernel(impl, q)
        if not decodes(q, k, v, pk, pv, causal, mask, cu):
            want = f"T <= {MAX_DECODE_QUERIES}, causal, no mask, no cu_seqlens, no gradients"
            raise ValueError(f"impl={impl!r}: expected {want}, got T = {T} or one of these")
    else:
        _check_impl(impl, q)
    read = q.device.type == "cpu" or os.environ.get("FUSEDPEFT_DEBUG") == "1"
    if read and not torch.compiler.is_compiling():
        check_values(mask, cu, ids, pk, T)


def decodes(q, k, v, pk, pv, causal: bool, mask, cu) -> bool:
    """Whether the kernels of prefix_decode_attention answer the call; `check` has not been yet."""
    tensors = (q, k, v, pk, pv)
    return (
        all(isinstance(t, Tensor) for t in tensors)
        and q.ndim == 4
        and q.shape[2] <= MAX_DECODE_QUERIES
        and (causal or q.shape[2] == 1)
        and mask is None
        and cu is None
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
    )


def flash_ok(q: Tensor, k: Tensor) -> bool:
    """Whether the C++ kernel for many queries takes what `check` has passed, with work for every
    thread: each has heads of k of its own."""
    return (
        native is not None
        and q.is_cpu
        and q.dtype in DTYPE_CODES
        and k.shape[1] >= torch.get_num_threads()
    )


def plainly_decodes(q, k, v, pk, pv, causal: bool, window, scale) -> bool:
    """Whether `check` would pass and the C++ kernel answers, for one prefix and without mask,
    cu_seqlens and prefix_ids: in 4 us instead of 30, as every layer of a decoded token asks it.

    False may also mean that it takes the long list to know.
    """
    try:
        (B, H, T, D), (_, HKV, S, _), (_, P, _) = q.shape, k.shape, pk.shape
    except ValueError:
        return False
    shape, of_prefix, dtype = (B, HKV, S, D), (HKV, P, D), q.dtype
    return (
        (T == 1 or causal and T <= MAX_DECODE_QUERIES)
        and T <= S
        and 1 <= D <= MAX_HEAD_DIM
        and HKV > 0
        and H % HKV == 0
        and k.shape == shape == v.shape
        and pk.shape == of_prefix == pv.shape
        and dtype in DTYPE_CODES
        and k.dtype == v.dtype == pk.dtype == pv.dtype == dtype
        and q.is_cpu and k.is_cpu and v.is_cpu and pk.is_cpu and pv.is_cpu
        and (window is None or type(window) is int and window >= 1)
        and (scale is None or type(scale) is float and math.isfinite(scale))
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and native is not None
    )  # fmt: skip


def check_kernel(impl: str, q: Tensor) -> None:
    """Of "native" and "cuda": that fusedpeft._C has it, and that it takes q."""
    device = "cpu" if impl == "native" else "cuda"
    if q.device.type != device:
        raise ValueError(f"impl={impl!r}: expected {device} tensors, got {q.device.type}")
    if q.dtype not in DTYPE_CODES:
        raise TypeError(f"impl={impl!r}: expected fp32, bf16 or fp16, got {q.dtype}")
    if not hasattr(native, "prefix_decode" if impl == "native" else "prefix_decode_cuda"):
        how = "pip install -e ." if impl == "native" else "FUSEDPEFT_CUDA=1 pip install -e ."
        raise ValueError(f"impl={impl!r}: expected fusedpeft._C with its kernel; build it: {how}")


def _check_impl(impl: str, q: Tensor) -> None:
    device = q.device.type
    if impl == device == "meta":
        return
    if impl == "raises":
        raise NotImplementedError(f"prefix_attention: expected CPU or CUDA tensors, got {device}")
    if impl not in IMPLS:
        raise ValueError(f"impl: expected one of {IMPLS} or None, got {impl!r}")
    if impl in ("aten", "flash") and device != "cpu":
        raise ValueError(f"impl={impl!r}: expected CPU tensors, got {device}; use 'triton'")
    if impl == "flash" and q.dtype not in DTYPE_CODES:
        raise TypeError(f"impl='flash': expected fp32, bf16 or fp16, got {q.dtype}; use 'aten'")
    if impl == "flash" and native is None:
        raise ValueError("impl='flash': expected fusedpeft._C; build it: pip install -e .")
    if impl == "triton":
        check_triton(q)


def _check_prefix(pk: Tensor, pv: Tensor, ids: Tensor | None, B: int, HKV: int, D: int) -> None:
    lead = "n" if ids is not None else B
    want = f"[{lead}, {HKV}, P, {D}]" + ("" if ids is not None else f" or [{HKV}, P, {D}]")
    for name, t in (("prefix_k", pk), ("prefix_v", pv)):
        dims = (4,) if ids is not None else (3, 4)
        ok = t.ndim in dims and t.shape[-3] == HKV and t.shape[-1] == D
        if not ok or (t.ndim == 4 and ids is None and t.shape[0] != B):
            raise ValueError(f"{name}: expected {want}, got {tuple(t.shape)}")
    if pv.shape != pk.shape:
        raise ValueError(
            f"prefix_v: expected {tuple(pk.shape)} (as prefix_k), got {tuple(pv.shape)}"
        )
    if ids is not None and ids.shape != (B,):
        raise ValueError(f"prefix_ids: expected [{B}], one a row, got {tuple(ids.shape)}")


def check_values(mask, cu, ids, pk: Tensor, T: int) -> None:
    if mask is not None and not (mask < math.inf).all():
        raise ValueError("mask: expected finite values or -inf, got NaN or +inf")
    if cu is not None:
        ends = cu.tolist()
        if (
            ends[0] != 0
            or ends[-1] != T
            or any(a > b for a, b in zip(ends, ends[1:], strict=False))
        ):
            raise ValueError(f"cu_seqlens: expected ascending from 0 to {T}, got {ends}")
    if ids is not None:
        bad = [i for i in ids.tolist() if not -1 <= i < pk.shape[0]]
        if bad:
            raise ValueError(f"prefix_ids: expected -1 or an id below {pk.shape[0]}, got {bad[0]}")
