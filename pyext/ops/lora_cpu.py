"""LoRA linear on a CPU: ATen for training and many tokens, C++ for decode. See lora.py."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedpeft.ops.dropout import dropout
from fusedpeft.ops.native import DTYPE_CODES, native

MAX_DECODE_TOKENS = 16  # rows that the C++ kernel takes; beyond, the GEMM of ATen is ahead

# Below AVX-512 ATen has no fast product of bf16 or fp16 on x86: fp32, conversions and all, is ten
# times faster, from a few tokens on.
_SLOW_16_BIT = torch.backends.cpu.get_cpu_capability() == "AVX2"
_WIDEN_TOKENS = 4


def widens(x: Tensor) -> bool:
    return _SLOW_16_BIT and x.is_cpu and x.element_size() == 2 and x.shape[0] >= _WIDEN_TOKENS


def wide(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if t is None else t.float() for t in tensors)


def aten_fwd(
    x, w, a, b, bias, seed, scale: float, dropout_p: float, linear=F.linear
) -> tuple[Tensor, Tensor]:
    """linear, and mm below: the products with W, which may be no tensor."""
    if widens(x):
        with torch.autocast("cpu", enabled=False):
            y, s = aten_fwd(*wide(x, w, a, b, bias), seed, scale, dropout_p)
        return y.to(x.dtype), s.to(a.dtype)
    y = linear(x, w, bias)
    s = F.linear(dropout(x, dropout_p, seed).to(a.dtype), a)
    if a.dtype == y.dtype:
        y.addmm_(s, b.t(), alpha=scale)  # accumulates in place: no [M, N] temporary
    else:
        y += torch.mm(s, b.t()).mul_(scale)
    return y, s


def aten_bwd(
    dy, x, w, a, b, s, seed, scale: float, dropout_p: float, need: list[bool], mm=torch.mm
):
    if widens(dy):
        like = (dy, w, a, b, dy)
        with torch.autocast("cpu", enabled=False):
            grads = aten_bwd(*wide(dy, x, w, a, b, s), seed, scale, dropout_p, need)
        return tuple(g.to(t.dtype) for g, t in zip(grads, like, strict=True))
    need_x, need_w, need_a, need_b, need_bias = need
    dx = dw = da = db = dbias = dy.new_empty(0)
    dya = dy.to(a.dtype)
    if need_x or need_a:
        ds = torch.mm(dya, b).mul_(scale)
    if need_x:
        dx = mm(dy, w)
        if dropout_p == 0.0 and a.dtype == dx.dtype:
            dx.addmm_(ds, a)
        else:
            dx += dropout(torch.mm(ds, a), dropout_p, seed)
    if need_w:
        dw = torch.mm(dy.t(), x)
    if need_a:
        da = torch.mm(ds.t(), dropout(x, dropout_p, seed).to(a.dtype))
    if need_b:  # as its transpose, rows of which are long
        db = torch.mm(s.t(), dya).mul_(scale).t().contiguous()
    if need_bias:
        dbias = dy.sum(0)
    return dx, dw, da, db, dbias


# --- ATen, several projections of one x: see lora_multi.py ---------------------------------------


def _same(t: Tensor | None) -> Tensor | None:
    return t


def _float(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.float()


def aten_multi_fwd(x, *rest) -> tuple[list[Tensor], Tensor]:
    """([y_i [M, N_i]], S [M, ΣR]); see `_multi_fwd` for the arguments."""
    if not widens(x):
        return _multi_fwd(_same, x, *rest)
    with torch.autocast("cpu", enabled=False):  # W by W: one fp32 copy at a time
        return _multi_fwd(_float, x, *rest)


def aten_multi_bwd(dys, *rest) -> tuple:
    """(dx, [dW_i], [dA_i], [dB_i], [dbias_i]), empty where not needed; see `_multi_bwd`."""
    if not widens(dys[0]):
        return _multi_bwd(_same, dys, *rest)
    with torch.autocast("cpu", enabled=False):
        return _multi_bwd(_float, dys, *rest)


def _multi_fwd(up, x, ws, as_, bs, biases, seed, scales, p: float):
    x_up, a = up(x), up(torch.cat(as_))
    s = F.linear(dropout(x_up, p, seed).to(a.dtype), a)
    ys = []
    parts = s.split([r.shape[0] for r in as_], 1)
    for w, b, bias, part, scale in zip(ws, bs, biases, parts, scales, strict=True):
        y = F.linear(x_up, up(w), up(bias))
        if a.dtype == y.dtype:
            y.addmm_(part, up(b).t(), alpha=scale)
        else:
            y += torch.mm(part, b.t()).mul_(scale)
        ys.append(y.to(x.dtype))
    return ys, s.to(as_[0].dtype)


def _multi_bwd(up, dys, x, ws, as_, bs, s, seed, scales, p: float, need_x: bool, need):
    need_w, need_a, need_b, need_bias = need
    dtype, like = as_[0].dtype, dys[0]
    none = like.new_empty(0)
    dys = [up(dy) for dy in dys]
    a, ranks = up(torch.cat(as_)), [a.shape[0] for a in as_]
    side = [dy.to(a.dtype) for dy in dys]
    dx, das = none, [none] * len(ws)
    if need_x or any(need_a):
        rows = zip(side, bs, scales, strict=True)
        ds = torch.cat([torch.mm(dy, up(b)).mul_(scale) for dy, b, scale in rows], 1)
    if need_x:
        dx = torch.mm(dys[0], up(ws[0]))
        for dy, w in zip(dys[1:], ws[1:], strict=True):
            dx.addmm_(dy, up(w))
        if p == 0.0 and a.dtype == dx.dtype:
            dx.addmm_(ds, a)
        else:
            dx += dropout(torch.mm(ds, a), p, seed)
    x = up(x)
    if any(need_a):
        da = torch.mm(ds.t(), dropout(x, p, seed).to(a.dtype)).to(dtype)
        das = [g.clone() if n else none for g, n in zip(da.split(ranks), need_a, strict=True)]
    parts = up(s).split(ranks, 1) if any(need_b) else [none] * len(ws)
    dws = [
        torch.mm(dy.t(), x).to(like.dtype) if n else none for dy, n in zip(dys, need_w, strict=True)
    ]
    dbs = [  # as the transpose, rows of which are long
        torch.mm(part.t(), dy).mul_(scale).t().to(dtype).contiguous() if n else none
        for part, dy, scale, n in zip(parts, side, scales, need_b, strict=True)
    ]
    dbiases = [
        dy.sum(0).to(like.dtype) if n else none for dy, n in zip(dys, need_bias, strict=True)
    ]
    return dx.to(like.dtype), dws, das, dbs, dbiases


# --- C++ decode ---------------------------------------------------------------------------------


def native_ok(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> bool:
    return (
        native is not None
        and x.dtype in DTYPE_CODES
        and (a.dtype == x.dtype or a.dtype == torch.float32)
        and (x.is_contiguous() or (x.ndim == 2 and x.stride()[1] == 1))
        and w.stride()[1] == a.stride()[1] == b.stride()[1] == 1
    )


def native_fwd(x: Tensor, w: Tensor, a: Tensor, b: Tensor, bias, scale: float) -> Tensor:
    """x [M, K], or contiguous [*, K] with K > 0: flattening costs as much as the call."""
    n, r = b.shape
    if x.ndim == 2:
        (m, k), sx = x.shape, x.stride()[0]
        y = x.new_empty(m, n)
    else:
        k = sx = w.shape[1]
        m, y = x.numel() // k, x.new_empty(*x.shape[:-1], n)
    bias = None if bias is None else bias.contiguous()  # named: it must outlive the call
    torch.get_num_threads()  # tells OpenMP in this thread what torch.set_num_threads said in any
    native.lora_decode(
        x.data_ptr(), w.data_ptr(), a.data_ptr(), b.data_ptr(),
        0 if bias is None else bias.data_ptr(), y.data_ptr(),
        m, k, n, r, sx, w.stride()[0], a.stride()[0], b.stride()[0], n,
        scale, DTYPE_CODES[x.dtype], DTYPE_CODES[a.dtype],
    )  # fmt: skip
    return y
