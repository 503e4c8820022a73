"""Attention over a prefix and the keys, for GPUs; the prefix is read where it lies.

    out = softmax([scale · q prefix_kᵀ | scale · q kᵀ + mask]) [prefix_v ; v]
    q [B, H, T, D]   k, v [B, HKV, S, D], S ≥ T   prefix [HKV, P, D] or [B or n, HKV, P, D]

Forward: a block of queries walks the prefix's tiles, then the keys' that causality and window leave
it, in one pass of online softmax. Backward, in this order:
1. dq: the same walk with p made again from the logsumexp; before it, delta = Σ dout·out − dlse.
2. dk, dv: a block of keys walks the queries that see it, over all heads of its group in order.
3. the prefix's dk, dv: a block of the prefix walks the queries of every row that has it, in order;
   where there are fewer blocks than SMs the queries are shared out over parts, summed in order.
No atomics, no synchronisation: packed sequences are found from cu_seqlens on the device.
(Online softmax: Milakov and Gimelshein 2018. Dao 2023, "FlashAttention-2", §3; Li & Liang 2021.)

FLOPs 4·B·H·T·D·(P + keys seen) forward, 2.5 times that and two products again backward (seven for
two). Bytes: q, k, v, out once, keys again by each block of queries, out of L2. Beyond results and
logsumexp: delta B·H·T fp32, and parts of the prefix's gradients, at most 64·D·8 bytes an SM. Heads
whose D is no multiple of 16, and tensors whose last stride is not 1 or whose rows do not begin at
such, are copied to where it is so.
Mask values below −1e29 hide as −inf does. Tokens that a malformed cu_seqlens leaves out are NaN.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from fusedpeft.kernels.device import arch_of, on_device
from fusedpeft.kernels.prefix_attention_bwd_kernels import (
    _prefix_attention_dkv_kernel,
    _prefix_attention_dprefix_kernel,
    _prefix_attention_dq_kernel,
)
from fusedpeft.kernels.prefix_attention_kernels import _prefix_attention_fwd_kernel
from fusedpeft.kernels.prefix_attention_tables import FAR, prefix_attention_config, prefix_parts
from fusedpeft.kernels.sums import ordered_sum

__all__ = ["prefix_attention_bwd", "prefix_attention_fwd"]

TINY = 1e-30  # of the scale: scores are 0 all the same


def _aligned(t: Tensor) -> Tensor:
    """Unit inner stride, a tile within 32 bits, and a last dim that is a multiple of 16, as are the
    other strides and the address: rows that cannot be loaded 16 bytes at a time spill."""
    if missing := -t.shape[-1] % 16:
        return F.pad(t, (0, missing))
    near = t.stride(-1) == 1 and t.stride(-2) < 2**23
    wide = t.data_ptr() % 16 == 0 and all(n % 16 == 0 for n in t.stride()[:-1])
    return t if near and wide else t.clone(memory_format=torch.contiguous_format)


class _Problem:
    """One call: its tensors, its sizes, and what every kernel takes of them."""

    def __init__(self, q, k, v, pk, pv, mask, cu, ids, causal, scale, window):
        self.D = q.shape[-1]
        self.q, self.k, self.v, self.pk, self.pv = (_aligned(t) for t in (q, k, v, pk, pv))
        self.cu = None if cu is None else cu.contiguous()
        self.ids = None if ids is None else ids.contiguous()
        self.mask, self.scale = mask, scale
        (self.B, self.H, self.T, self.width), (self.HKV, self.S) = self.q.shape, k.shape[1:3]
        self.P, self.packed = pk.shape[-2], 0 if cu is None else cu.shape[0] - 1
        self.batch = self.B if cu is None else self.packed
        self.left, self.right = window or FAR, 1 if causal else window or FAR
        self.arch = arch_of(q.device)

    def config(self, kernel: str) -> dict:
        size, mask = self.q.element_size(), self.mask is not None
        return prefix_attention_config(kernel, self.D, self.arch, elem_bytes=size, mask=mask)

    def fresh(self, shape: torch.Size) -> Tensor:
        """[…, width] in q's dtype; NaN where packed sequences might leave tokens out."""
        out = torch.empty(*shape[:-1], self.width, dtype=self.q.dtype, device=self.q.device)
        return out.fill_(float("nan")) if self.cu is not None else out

    def cut(self, t: Tensor) -> Tensor:
        return t if self.width == self.D else t[..., : self.D].contiguous()

    def blocks(self, length: int, block: int) -> int:
        """Of one row; of all packed sequences together, at most."""
        return length // block + self.packed if self.packed else triton.cdiv(length, block)

    def prefixes(self) -> tuple[Tensor, Tensor, int, list[int]]:
        """pk, pv, how many prefixes there are, their strides (0 over the rows of a shared one)."""
        own = self.pk.ndim == 4
        strides = [(t.stride(0) if own else 0, *t.stride()[-3:-1]) for t in (self.pk, self.pv)]
        return self.pk, self.pv, self.pk.shape[0] if own else 1, [*strides[0], *strides[1]]

    def of_mask(self) -> tuple[Tensor, list[int]]:
        if self.mask is None:
            return self.q, [0, 0, 0, 1]
        lead = [self.mask.stride(i) if self.mask.shape[i] > 1 else 0 for i in (0, 1)]
        return self.mask, [*lead, *self.mask.stride()[2:]]

    def or_q(self, t: Tensor | None) -> Tensor:
        return self.q if t is None else t


def _strides(*tensors: Tensor) -> list[int]:
    return [s for t in tensors for s in t.stride()[:3]]


def prefix_attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor, mask: Tensor | None, cu: Tensor | None,
    ids: Tensor | None, causal: bool, scale: float, window: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out [B, H, T, D], logsumexp [B, H, T] fp32). q, k, v, prefix of fp32, bf16 or fp16, any
    strides; mask [B or 1, H or 1, T, S]; cu int [n + 1] with B = 1; ids int [rows]; window 0: none.
    """
    # The kernel multiplies maxima by the scale, which must not turn them into minima.
    q, scale = (-q, -scale) if scale < 0.0 else (q, scale)
    call = _Problem(q, k, v, pk, pv, mask, cu, ids, causal, scale, window)
    out = call.fresh(q.shape)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if cu is not None:
        lse.fill_(float("nan"))
    config = call.config("fwd")
    blocks = call.blocks(call.T, config["BLOCK_M"])
    if out.numel() > 0 and call.batch > 0:
        pk, pv, table, of_prefix = call.prefixes()
        mask, of_mask = call.of_mask()
        with on_device(q):
            _prefix_attention_fwd_kernel[(blocks * call.H * call.B,)](
                call.q, call.k, call.v, pk, pv, mask, call.or_q(call.cu), call.or_q(call.ids),
                out, lse, scale, call.H // call.HKV, call.HKV, call.T, call.S, call.P, call.width,
                blocks, call.packed, int(ids is not None), table, call.left, call.right,
                *_strides(call.q, call.k, call.v), *of_prefix, *of_mask,
                MASK=call.mask is not None, **config,
            )  # fmt: skip
    return call.cut(out), lse


def prefix_attention_bwd(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor,
    out: Tensor, lse: Tensor, mask: Tensor | None, cu: Tensor | None, ids: Tensor | None,
    causal: bool, scale: float, window: int, need: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """(dq, dk, dv, dpk, dpv) in q's dtype, each empty where not needed."""
    # The kernels divide by the scale: one near 0 is put right at the end.
    scale, factor = (TINY, scale / TINY) if abs(scale) < TINY else (scale, 1.0)
    call = _Problem(q, k, v, pk, pv, mask, cu, ids, causal, scale, window)
    need_q, need_kv, need_prefix = need[0], need[1] or need[2], need[3] or need[4]
    dout, out = _aligned(dout), _aligned(out)
    delta = torch.empty(lse.shape, dtype=torch.float32, device=q.device)
    dq = call.fresh(q.shape) if need_q else q.new_empty(0)
    dk, dv = (call.fresh(t.shape) if need_kv else q.new_empty(0) for t in (k, v))
    dpk = dpv = q.new_empty(0)
    some = dout.numel() > 0 and call.batch > 0
    sizes = (scale, call.H // call.HKV, call.HKV)
    with on_device(q):
        if some:
            _launch_dq(call, dout, dlse, out, lse, delta, dq, sizes)
        if need_kv and some:
            _launch_dkv(call, dout, lse, delta, dk, dv, sizes)
        elif need_kv:  # keys that no query sees
            dk.zero_(), dv.zero_()
        if need_prefix:
            dpk, dpv = _launch_dprefix(call, dout, lse, delta, sizes)
    if factor != 1.0:
        for grad in (dq, dk, dpk):
            grad.mul_(factor)
    grads = (dq, dk, dv, dpk, dpv)
    return tuple(call.cut(g) if n else q.new_empty(0) for g, n in zip(grads, need, strict=True))


def _launch_dq(call: _Problem, dout, dlse, out, lse, delta, dq, sizes) -> None:
    config = call.config("dq")
    blocks = call.blocks(call.T, config["BLOCK_M"])
    pk, pv, table, of_prefix = call.prefixes()
    mask, of_mask = call.of_mask()
    _prefix_attention_dq_kernel[(blocks * call.H * call.B,)](
        call.q, call.k, call.v, pk, pv, mask, call.or_q(call.cu), call.or_q(call.ids),
        out, lse, dout, lse if dlse is None else dlse.contiguous(),
        dq if dq.numel() else out, delta, *sizes, call.T, call.S, call.P, call.width, blocks,
        call.packed, int(call.ids is not None), table, call.left, call.right,
        int(dlse is not None), int(dq.numel() > 0),
        *_strides(call.q, call.k, call.v), *of_prefix, *of_mask, *_strides(dout),
        MASK=call.mask is not None, **config,
    )  # fmt: skip


def _launch_dkv(call: _Problem, dout, lse, delta, dk, dv, sizes) -> None:
    config = call.config("dkv")
    blocks = call.blocks(call.S, config["BLOCK_N"])
    mask, of_mask = call.of_mask()
    _prefix_attention_dkv_kernel[(blocks * call.HKV * call.B,)](
        call.q, call.k, call.v, mask, call.or_q(call.cu), lse, dout, delta, dk, dv,
        *sizes, call.T, call.S, call.width, blocks, call.packed, call.left, call.right,
        *_strides(call.q, call.k, call.v), *of_mask, *_strides(dout),
        MASK=call.mask is not None, **config,
    )  # fmt: skip


def _launch_dprefix(call: _Problem, dout, lse, delta, sizes) -> tuple[Tensor, Tensor]:
    """(dpk, dpv) of the shape of the prefixes, [..., width]."""
    config = call.config("dprefix")
    pk, pv, prefixes, of_prefix = call.prefixes()
    own = pk.ndim == 4 and call.ids is None
    tiles = call.blocks(call.T, config["BLOCK_M"]) * (1 if own else call.B)
    block_n = config["BLOCK_N"]
    parts = prefix_parts(call.P, call.HKV, prefixes, tiles, call.arch, block_n=block_n)
    dtype = call.q.dtype if parts == 1 else torch.float32
    part_k, part_v = (
        torch.empty(parts, *pk.shape, dtype=dtype, device=pk.device) for _ in range(2)
    )
    programs = triton.cdiv(call.P, block_n) * call.HKV * prefixes * parts
    if programs > 0:
        batch = call.batch if call.T > 0 else 0
        _prefix_attention_dprefix_kernel[(programs,)](
            call.q, pk, pv, call.or_q(call.cu), call.or_q(call.ids), lse, dout, delta,
            part_k, part_v, *sizes, call.T, call.P, call.width, call.packed,
            int(call.ids is not None), batch, prefixes, int(own), parts,
            *_strides(call.q), *of_prefix, *_strides(dout), **config,
        )  # fmt: skip
    if parts == 1:
        return part_k[0], part_v[0]
    return ordered_sum(part_k, call.q.dtype, 1.0), ordered_sum(part_v, call.q.dtype, 1.0)
