"""Bottleneck adapters by token: each row's own norm, down, activation, up and residual as one op.

    y_m = residual_m + scale_s · (act(norm(x_m) D_sᵀ + c_s) U_sᵀ + e_s),   s = slots[m]

x, y [*, d] of M rows, slots [M]; the adapters lie in `AdapterSlots` (slots.py). Bytes: D and U of
each slot that is named, once, and 3 M d. Inference only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusedpeft.ops.adapter import _norm, bottleneck_adapter_ref
from fusedpeft.ops.adapter_aten import aten_fwd
from fusedpeft.ops.adapter_checks import check_multi
from fusedpeft.ops.adapter_native import (
    MAX_CUDA_SIZE,
    MAX_CUDA_TOKENS,
    cuda_takes,
    is_sound,
    multi_fwd,
)
from fusedpeft.ops.arguments import is_plain, refuse_transforms
from fusedpeft.ops.native import native
from fusedpeft.ops.slots import Adapter, AdapterSlots, check_slots


def multi_bottleneck_adapter_ref(
    x: Tensor, pool: AdapterSlots, slots: Tensor, *, residual: Tensor | None = None,
    norm: str | None = None, norm_weight: Tensor | None = None, norm_bias: Tensor | None = None,
    **rest,
) -> Tensor:  # fmt: skip
    """The specification: `bottleneck_adapter_ref` of each row, its adapter all zeros for none."""
    d, ys, given = x.shape[-1], [x.new_empty(0, x.shape[-1])], (norm_weight, norm_bias)
    base = [None] * slots.numel() if residual is None else residual.reshape(-1, 1, d)
    none = Adapter(pool.down.new_zeros(1, d), None, pool.down.new_zeros(d, 1), None)
    for row, r, slot in zip(x.reshape(-1, 1, d), base, slots.tolist(), strict=True):
        a = pool.get(slot) or none._replace(norm_weight=norm_weight, norm_bias=norm_bias)
        w, b = given if pool.norm_weight is None else (a.norm_weight, a.norm_bias)
        n = None if pool.norm_weight is not None and w is None else norm
        kw = dict(scale=a.scale, residual=r, norm=n, norm_weight=w, norm_bias=b, **rest)
        ys.append(bottleneck_adapter_ref(row, *a[:4], **kw))
    return torch.cat(ys).view(x.shape)


IMPLS = ("native", "cuda", "aten")


def choose_impl(
    device_type: str, tokens: int = 1, max_size: int = 8,
    cpu_half: bool | None = None, cuda_half: bool | None = None,
) -> tuple[str, str]:  # fmt: skip
    """(implementation, why) that `multi_bottleneck_adapter` takes by itself; `doctor` prints it.

    Pure but for cpu_half and cuda_half of fusedpeft._C, by default as they are built.
    """
    cpu_half = native is not None if cpu_half is None else cpu_half
    cuda_half = hasattr(native, "adapter_decode_cuda") if cuda_half is None else cuda_half
    if device_type == "cpu" and cpu_half:
        return "native", "one parallel region in C++, rows that share a slot share its reads"
    slow = "rows that name one slot together, slot by slot"
    if device_type != "cuda":
        return "aten", slow
    slow += ", waiting for the GPU"
    if not cuda_half:
        return "aten", f"fusedpeft._C was built without the CUDA kernel: {slow}"
    if tokens > MAX_CUDA_TOKENS or max_size > MAX_CUDA_SIZE:
        most = f"more than {MAX_CUDA_TOKENS} tokens or a slot wider than {MAX_CUDA_SIZE}"
        return "aten", f"{most}: {slow}"
    return "cuda", "one launch, which finds on the GPU who shares a slot"


def _aten(x, pool: AdapterSlots, slots, residual, norms, activation, norm, eps, add_x) -> Tensor:
    """Any M. Reads the slots and the sizes, for which a GPU is waited for."""
    count, d = pool.size.shape[0], x.shape[1]
    named, where = slots.unique(return_inverse=True)
    y = x.new_empty(x.shape)
    base = x if add_x else residual
    for i, slot in enumerate(named.tolist()):
        rows = slice(None) if named.numel() == 1 else (where == i).nonzero()[:, 0]
        if not -1 <= slot < count or (slot >= 0 and int(pool.size[slot]) < 0):
            y[rows] = float("nan")  # on a GPU; a CPU has refused it
            continue
        a = pool.get(slot)
        if a is None:
            y[rows] = 0 if base is None else base[rows]
            continue
        nw, nb = norms if pool.norm_weight is None else (a.norm_weight, a.norm_bias)
        own = None if add_x or residual is None else residual[rows]
        args = (a.down_w, a.down_b, a.up_w, a.up_b, own, nw, nb, None)
        y[rows] = aten_fwd(x[rows], *args, activation, norm, eps, a.scale, 0.0, add_x)[0]
    return y.view(-1, d)


# --- custom op ----------------------------------------------------------------------------------

_lib = torch.library.Library("fusedpeft", "FRAGMENT")
_lib.define(
    "multi_bottleneck_adapter(Tensor x, Tensor[] pool, Tensor slots, Tensor? residual, "
    "Tensor? norm_w, Tensor? norm_b, str activation, str norm, float eps, bool add_x, str impl) "
    "-> Tensor"
)


def _forward(x, pool, slots, residual, norm_w, norm_b, activation, norm, eps, add_x, impl):
    """x, residual [M, d]; pool: the tensors of `AdapterSlots` that are there."""
    pool = AdapterSlots(*pool)
    most = pool.down.shape[1]
    impl = impl or choose_impl(x.device.type, x.shape[0], most)[0]
    check_slots(slots, x.shape[0], pool.size, read=impl == "aten")  # else multi_fwd reads them
    if impl == "aten":
        return _aten(x, pool, slots, residual, (norm_w, norm_b), activation, norm, eps, add_x)
    _check_impl(impl, x, most)
    x, residual = _unit(x), _unit(x if add_x else residual)
    norms = (None if t is None else t.contiguous() for t in (norm_w, norm_b))
    return multi_fwd(x, pool, slots.contiguous(), residual, *norms, activation, norm, eps)


def _check_impl(impl: str, x: Tensor, max_size: int) -> None:
    device, name = {
        "native": ("cpu", "adapter_decode"), "cuda": ("cuda", "adapter_decode_cuda")
    }[impl]  # fmt: skip
    if not hasattr(native, name):
        how = "pip install -e . with FUSEDPEFT_CUDA=1" if impl == "cuda" else "pip install -e ."
        raise ValueError(f"impl={impl!r}: expected fusedpeft._C with its kernel; build it: {how}")
    if x.device.type != device:
        raise ValueError(f"impl={impl!r}: expected {device} tensors, got {x.device}")
    if impl == "cuda" and not cuda_takes(x.shape[0], max_size):
        most = f"<= {MAX_CUDA_TOKENS} rows and max_size <= {MAX_CUDA_SIZE}"
        got = f"{x.shape[0]} and {max_size}"
        raise ValueError(f"impl='cuda': expected {most}, got {got}; use 'aten'")


def _unit(t: Tensor | None) -> Tensor | None:
    return t if t is None or t.stride(1) == 1 else t.contiguous()


_lib.impl("multi_bottleneck_adapter", _forward, "CompositeExplicitAutograd")


@torch.library.register_fake("fusedpeft::multi_bottleneck_adapter")
def _(x, pool, slots, *_rest):
    return x.new_empty(x.shape)


def _no_gradients(ctx, dy):
    raise RuntimeError(_NO_GRAD)


_NO_GRAD = (
    "multi_bottleneck_adapter: expected no gradients (inference only), got an input that requires "
    "them; train with bottleneck_adapter, or call it under torch.no_grad()"
)
torch.library.register_autograd("fusedpeft::multi_bottleneck_adapter", _no_gradients)


# --- public -------------------------------------------------------------------------------------


def multi_bottleneck_adapter(
    x: Tensor,
    pool: AdapterSlots,
    slots: Tensor,
    *,
    activation: str = "relu",
    residual: Tensor | None = None,
    norm: str | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    norm_position: str = "before",
    impl: str | None = None,
) -> Tensor:
    """y_m = residual_m + scale_s · (act(norm(x_m) D_sᵀ + c_s) U_sᵀ + e_s) with s = slots[m].

    x [*, d] of M rows in fp32, bf16 or fp16; slots [M] int32, one for each row: a slot of the pool,
    or -1. The pool is in x's dtype, or fp32 beside a 16-bit x. residual, activation, norm and
    norm_position as in `ops.bottleneck_adapter`; sizes and scales differ from slot to slot.

    norm_weight, norm_bias [d] are the model's own norm; where the pool has norm weights, an
    adapter's win over them. A row without an adapter (-1, or a slot of size 0) is its residual, or
    0; a norm "after" normalises it as well, unless the only weights are the adapters'.

    A slot that is out of range or free raises on a CPU, before anything is computed; on a GPU its
    rows are NaN, unless FUSEDPEFT_DEBUG=1 asks for the check. No gradients: RuntimeError.
    impl: None chooses by device (`fusedpeft doctor` shows it); "native" (C++), "cuda" (up to 256
    rows and E 2048) and "aten", which on a GPU waits for the values of `slots`, force one. What
    "cuda" does can be captured; slots and sizes must not change while it runs. Raises TypeError or
    ValueError with the expected and the given value before anything is computed.
    """
    refuse_transforms("multi_bottleneck_adapter")
    before = norm is not None and norm_position == "before"
    grads = torch.is_grad_enabled()
    if not grads and impl is None and norm_position == "before" and native is not None:
        given = (x, pool, slots, residual, norm_weight, norm_bias, activation, norm)
        if is_plain((x, slots)) and is_sound(*given):
            return multi_fwd(*given, norm_eps)
    check_multi(
        x, pool, slots, residual, norm_weight, norm_bias,
        activation, norm, norm_position, IMPLS, impl,
    )  # fmt: skip
    given = [t for t in (x, *pool, residual, norm_weight, norm_bias) if t is not None]
    if grads and any(t.requires_grad for t in given):
        raise RuntimeError(_NO_GRAD)
    add_x = residual is x
    x2 = x.reshape(-1, x.shape[-1])
    args = (
        x2, [t for t in (pool if before else pool[:6]) if t is not None], slots,
        None if add_x or residual is None else residual.reshape(x2.shape),
        norm_weight if before else None, norm_bias if before else None,
        activation, norm if before else "", float(norm_eps), add_x, impl or "",
    )  # fmt: skip
    plain = is_plain(given)
    y = (_forward if plain else torch.ops.fusedpeft.multi_bottleneck_adapter)(*args)
    if norm is not None and not before:
        y = _norm_after(y, pool, slots, norm, norm_weight, norm_bias, norm_eps)
    return y.view(x.shape)


def _norm_after(y, pool: AdapterSlots, slots, norm, weight, bias, eps) -> Tensor:
    dtype = pool.down.dtype if weight is not None or pool.norm_weight is not None else y.dtype
    model = _norm(y.to(dtype), norm, weight, bias, eps).to(y.dtype)
    if pool.norm_weight is None:
        return model
    at = slots.long().clamp(0, pool.size.shape[0] - 1)
    n = _norm(y.to(dtype), norm, None, None, eps) * pool.norm_weight[at]
    n = n if pool.norm_bias is None else n + pool.norm_bias[at]
    mine = (slots >= 0) & (pool.size[at] > 0)
    return torch.where(mine[:, None], n.to(y.dtype), y if weight is None else model)
