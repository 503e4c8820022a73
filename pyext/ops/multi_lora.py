"""Many LoRA adapters in one batch: the frozen linear and each row's own update as one op.

    y_m = W x_m + bias + scale_s · B_s (A_s x_m),  s = slots[m]       x [*, K]  W [N, K]  y [*, N]

The adapters lie in `LoRASlots` (slots.py): ranks differ from slot to slot, and where linears are
stacked each part of N has a rank, an A, a B and a scale of its own. Bytes beside the base's: A and
B of each slot that is named, once. For decode: no gradients.
"""

from __future__ import annotations

import importlib

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedpeft.ops.arguments import (
    autocast,
    autocasts,
    check_triton,
    device_of,
    is_plain,
    refuse_transforms,
)
from fusedpeft.ops.multi_lora_cpu import (
    MAX_NATIVE_TOKENS,
    aten_fwd,
    check_native,
    is_sound,
    native_fwd,
    native_ok,
)
from fusedpeft.ops.multi_lora_cuda import MAX_CUDA_TOKENS, check_cuda, cuda_fwd, cuda_ok, fast_ok
from fusedpeft.ops.native import native
from fusedpeft.ops.slots import RANK_STEP, LoRASlots, check_slots, debugging

IMPLS = ("native", "aten", "cuda", "triton")


def multi_lora_linear_ref(
    x: Tensor, w: Tensor, pool: LoRASlots, slots: Tensor, bias: Tensor | None = None
) -> Tensor:
    """The specification: row by row, part by part. The adapter is computed in its own dtype."""
    rows = x.reshape(-1, x.shape[-1])
    y = F.linear(rows, w).to(torch.promote_types(x.dtype, pool.a.dtype))
    for m, slot in enumerate(slots.tolist()):
        at = 0
        for (a, b, scale), n in zip(pool.get(slot) if slot >= 0 else (), pool.sizes, strict=False):
            y[m, at : at + n] += scale * F.linear(F.linear(rows[m].to(a.dtype), a), b)
            at += n
    y = y if bias is None else y + bias
    return y.to(x.dtype).view(*x.shape[:-1], w.shape[0])


def choose_impl(
    device_type: str, tokens: int, native_ok: bool = True, cuda_kernel: bool = True,
    dtype: torch.dtype = torch.float32,
) -> tuple[str, str]:  # fmt: skip
    """(implementation, why) that `multi_lora_linear` takes by itself. Pure; `doctor` prints it.

    native_ok: the C++ or CUDA kernel takes these tensors; cuda_kernel: fusedpeft._C has one.
    """
    if device_type == "cuda" and dtype == torch.float64:
        return "aten", "the kernels sum in fp32: fp64 takes ATen"
    if device_type == "cuda" and tokens > MAX_CUDA_TOKENS:
        return "triton", f"more than {MAX_CUDA_TOKENS} tokens: grouped by slot"
    if device_type == "cuda" and not cuda_kernel:
        return "triton", "fusedpeft._C was built without the CUDA kernel"
    if device_type == "cuda" and not native_ok:
        return "triton", "strides, or a number of parts, that the CUDA kernel does not take"
    if device_type == "cuda":
        return "cuda", f"at most {MAX_CUDA_TOKENS} tokens: one launch with the base"
    if device_type != "cpu":
        return "aten", f"no kernel of ours for device '{device_type}'"
    if tokens > MAX_NATIVE_TOKENS:
        return "aten", f"more than {MAX_NATIVE_TOKENS} tokens: ATen's GEMM is ahead"
    if not native_ok:
        return "aten", "dtypes or strides that the C++ kernel does not take"
    return "native", f"at most {MAX_NATIVE_TOKENS} tokens: one C++ pass over W"


# --- custom op ----------------------------------------------------------------------------------

_lib = torch.library.Library("fusedpeft", "FRAGMENT")
_lib.define(
    "multi_lora_linear(Tensor x, Tensor w, Tensor a, Tensor b, Tensor rank, Tensor scale, "
    "Tensor slots, Tensor? bias, int[] sizes, str impl) -> Tensor"
)


def _kernel(module: str, name: str):
    """A function of a module that imports triton: looked up when called."""
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        raise NotImplementedError(
            f"multi_lora_linear: expected {module}.{name} for CUDA tensors, got {error}"
        ) from error


def _forward(x: Tensor, w: Tensor, pool: LoRASlots, slots: Tensor, bias, impl: str) -> Tensor:
    """x [M, K]. The values of `slots` are looked at here, where they are there under a compiler."""
    check_slots(slots, x.shape[0], pool.rank)
    if impl == "":
        cuda_kernel = hasattr(native, "multi_lora_cuda")
        ok = cuda_ok(w, pool) if x.is_cuda else native_ok(x, w)
        impl = choose_impl(x.device.type, x.shape[0], ok, cuda_kernel, x.dtype)[0]
    if impl == "native":
        check_native(x, w)
        return native_fwd(x, w, pool, slots, bias)
    if impl == "cuda":
        check_cuda(x, w, pool, x.shape[0])
        return cuda_fwd(x, w, pool, slots, bias)
    if impl == "triton":
        return _kernel("fusedpeft.kernels.multi_lora", "multi_lora_fwd")(x, w, pool, slots, bias)
    return aten_fwd(x, w, pool, slots, bias)


def _op(x, w, a, b, rank, scale, slots, bias, sizes, impl):
    return _forward(x, w, LoRASlots(a, b, rank, scale, tuple(sizes)), slots, bias, impl)


_lib.impl("multi_lora_linear", _op, "CompositeExplicitAutograd")


@torch.library.register_fake("fusedpeft::multi_lora_linear")
def _(x, w, a, b, rank, scale, slots, bias, sizes, impl):
    return x.new_empty(x.shape[0], w.shape[0])


# --- public -------------------------------------------------------------------------------------


def _check(x, w, pool, slots, bias, impl) -> None:
    for name, t, dims in (("x", x, "[*, K]"), ("w", w, "[N, K]")):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: expected a Tensor {dims}, got {type(t).__name__}")
        if not t.is_floating_point():
            raise TypeError(f"{name}: expected a floating dtype, got {t.dtype}")
        if t.device != x.device:
            raise ValueError(f"{name}: expected device {x.device} (as x), got {t.device}")
        if t.ndim != 2 and (t is not x or t.ndim < 1):
            raise ValueError(f"{name}: expected {dims}, got shape {tuple(t.shape)}")
    n, k = w.shape
    if x.shape[-1] != k:
        raise ValueError(
            f"x: expected last dim K = {k} (w is {tuple(w.shape)}), got {tuple(x.shape)}"
        )
    if w.dtype != x.dtype:
        raise TypeError(f"w: expected dtype {x.dtype} (as x), got {w.dtype}; cast one, or autocast")
    if bias is not None:
        if not isinstance(bias, Tensor):
            raise TypeError(f"bias: expected a Tensor [{n}] or None, got {type(bias).__name__}")
        if bias.shape != (n,) or bias.device != x.device:
            raise ValueError(
                f"bias: expected [{n}] on {x.device}, got {list(bias.shape)} on {bias.device}"
            )
        if bias.dtype != x.dtype:
            raise TypeError(f"bias: expected dtype {x.dtype} (as x), got {bias.dtype}")
    _check_pool(pool, x, n, k)
    if not isinstance(slots, Tensor):
        rows = x.shape[:-1].numel()
        raise TypeError(f"slots: expected an int32 Tensor [{rows}], got {type(slots).__name__}")
    if torch.is_grad_enabled() and any(
        t.requires_grad for t in (x, w, pool.a, pool.b, bias) if t is not None
    ):
        raise ValueError(
            "multi_lora_linear: expected inputs without gradients, got one that requires them; "
            "call it under torch.no_grad(), or train with lora_linear"
        )
    if impl is not None and impl not in IMPLS:
        raise ValueError(f"impl: expected one of {IMPLS} or None, got {impl!r}")
    if impl == "cuda" and x.dtype == torch.float64:
        raise TypeError("impl='cuda': expected fp32, bf16 or fp16, got torch.float64")
    if impl == "triton":
        check_triton(x)


def _check_pool(pool: LoRASlots, x: Tensor, n: int, k: int) -> None:
    if not isinstance(pool, LoRASlots):
        raise TypeError(f"pool: expected LoRASlots (see lora_slots), got {type(pool).__name__}")
    if not pool.sizes or sum(pool.sizes) != n:
        raise ValueError(f"pool.sizes: expected a sum of N = {n}, got {pool.sizes}")
    count, parts, most = pool.rank.shape[0], len(pool.sizes), pool.max_rank
    if most < 1 or most % RANK_STEP:
        raise ValueError(f"pool: expected max_rank a multiple of {RANK_STEP}, got {most}")
    shapes = ((count, parts * most, k), (count, n * most), (count, parts), (count, parts))
    dtypes = (pool.a.dtype, pool.a.dtype, torch.int32, torch.float32)
    for name, t, shape, dtype in zip(pool._fields, pool, shapes, dtypes, strict=False):
        if t.shape != shape:
            raise ValueError(f"pool.{name}: expected {shape}, got {tuple(t.shape)}")
        if t.device != x.device:
            raise ValueError(f"pool.{name}: expected device {x.device} (as x), got {t.device}")
        if t.dtype != dtype:
            raise TypeError(f"pool.{name}: expected {dtype}, got {t.dtype}")
        if t.stride()[-1] != 1 or (t.ndim == 2 and name != "b" and not t.is_contiguous()):
            raise ValueError(f"pool.{name}: expected contiguous rows, got strides {t.stride()}")
    if pool.a.dtype not in (x.dtype, torch.float32):
        raise TypeError(f"pool.a: expected {x.dtype} (as x) or fp32, got {pool.a.dtype}")


def multi_lora_linear(
    x: Tensor,
    w: Tensor,
    pool: LoRASlots,
    slots: Tensor,
    bias: Tensor | None = None,
    *,
    impl: str | None = None,
) -> Tensor:
    """y_m = W x_m + bias + scale_s · B_s (A_s x_m) with s = slots[m], for each stacked part of N.

    x [*, K] of M rows and w [N, K] share a dtype (fp32, bf16, fp16; fp64 on ATen); bias [N]. The
    pool is in that dtype or in fp32. slots [M] int32, one for each row: a slot of the pool, or -1
    for the base alone. Returns [*, N] in x's dtype. No gradients.

    On a GPU neither slots nor ranks are read by the host: nothing is waited for, and a CUDA graph
    replays after slots were rewritten. A row that names no adapter's slot (out of range, or
    free) comes back as NaN there, under FUSEDPEFT_DEBUG=1 and on a CPU it is an error.

    impl: None chooses by device and rows (`fusedpeft doctor` shows it); "native" (C++ on a CPU) and
    "cuda", of at most 64 rows, "triton", "aten" force one. Raises TypeError or ValueError with the
    expected and the given value before anything is launched.
    """
    refuse_transforms("multi_lora_linear")
    if autocasts(device := device_of(x)):
        x, w, bias = autocast(device, x, w, bias)
    plain = is_plain((x, w, slots))
    if impl is None and plain and is_sound(x, w, pool, slots, bias):
        if x.is_cpu and slots.shape[0] <= MAX_NATIVE_TOKENS and native_ok(x, w):
            return native_fwd(x, w, pool, slots, bias)
        if x.is_cuda and fast_ok(x, w, pool, slots) and not debugging():
            return cuda_fwd(x, w, pool, slots, bias)
    _check(x, w, pool, slots, bias, impl)
    x2 = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    if plain and is_plain(pool[:4]):
        y = _forward(x2, w, pool, slots, bias, impl or "")
    else:
        args = (x2, w, *pool[:4], slots, bias, pool.sizes, impl or "")
        y = torch.ops.fusedpeft.multi_lora_linear(*args)
    return y if x.ndim == 2 else y.view(*x.shape[:-1], w.shape[0])
