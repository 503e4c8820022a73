"""Linear log-prob in chunks of ATen products: forward with u, backward with the logits again.

Equations in `linear_logprob.py`. Extra memory is one chunk of fp32 logits, whatever M and V are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedpeft.ops.native import native

LOGITS_BYTES = 32 * 2**20  # one chunk of fp32 logits: fits the last-level caches of today's CPUs
TILE_ROWS = 2048  # of backward: enough for a product, and the rest of the chunk is vocabulary


def _logits(buffer: Tensor, h: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """h Wᵀ + bias in the buffer's memory and dtype. A fresh chunk costs more than its first use:
    the allocator gives so much memory back to the system, which hands it out zeroed, by pages."""
    z = buffer[: h.shape[0] * w.shape[0]].view(h.shape[0], w.shape[0])
    if h.dtype != z.dtype:
        return z.copy_(F.linear(h, w, bias))
    return torch.mm(h, w.t(), out=z) if bias is None else torch.addmm(bias, h, w.t(), out=z)


def _cap_(z: Tensor, softcap: float, temperature: float) -> Tensor:
    """cap(z) / temperature in place; softcap 0 is none."""
    if softcap > 0.0:
        return z.div_(softcap).tanh_().mul_(softcap / temperature)
    return z if temperature == 1.0 else z.div_(temperature)


def _slope(z: Tensor, softcap: float, temperature: float) -> Tensor:
    """1 − tanh²(a / c), from z = c · tanh(a / c) / temperature."""
    return z.mul(temperature / softcap).square_().neg_().add_(1.0)


def _softmax_(z: Tensor, write: bool) -> Tensor:
    """logsumexp of z's rows, [rows, 1]; with `write` z becomes its softmax. On a CPU in C++: one
    pass through memory, as a row stays in the cache (csrc/cpu/elementwise.h)."""
    if native is not None and z.is_cpu and z.dtype == torch.float32 and z.numel():
        lse = z.new_empty(len(z), 1)
        torch.get_num_threads()  # tells OpenMP in this thread what torch.set_num_threads said
        native.softmax(z.data_ptr(), lse.data_ptr(), *z.shape, write)
        return lse
    top = z.amax(-1, keepdim=True)
    e = z.sub_(top).exp_()  # in place: a chunk is all there is
    total = e.sum(-1, keepdim=True)
    if write:
        e.div_(total)
    return top + total.log()


def _select(h: Tensor, labels: Tensor, ignore_index: int):
    """Rows that count. On a CPU the others are never computed; a GPU would have to synchronise."""
    keep = labels != ignore_index
    if h.device.type == "cpu":
        return keep.nonzero().squeeze(1), keep
    return None, keep


def logprob_fwd(h, w, labels, bias, ignore_index: int, softcap, temperature, need_u: bool):
    """(log p [M], logsumexp [M], u [M, d] or empty); zeros where the label is ignored."""
    m, v = h.shape[0], w.shape[0]
    acc = torch.float64 if h.dtype == torch.float64 else torch.float32
    logp, lse = h.new_zeros(m, dtype=acc), h.new_zeros(m, dtype=acc)
    u = h.new_zeros(h.shape if need_u else 0)
    rows, keep = _select(h, labels, ignore_index)
    if rows is not None:
        h, labels = h[rows], labels[rows]
    # Out of range on a GPU: NaN for that row, never a read out of bounds (no host sync to raise).
    bad = (labels < 0) | (labels >= v)
    label = labels.clamp(0, v - 1)
    step = max(1, LOGITS_BYTES // (4 * v))
    buffer = h.new_empty(min(step, h.shape[0]) * v, dtype=acc)
    for i in range(0, h.shape[0], step):
        c = slice(i, i + step)
        at = rows[c] if rows is not None else c
        z = _cap_(_logits(buffer, h[c], w, bias), softcap, temperature)
        z_label = z.gather(-1, label[c].unsqueeze(-1))
        slope = _slope(z, softcap, temperature) if need_u and softcap > 0.0 else None
        lse_c = _softmax_(z, need_u)
        lse[at] = lse_c.squeeze(-1)
        logp[at] = (z_label - lse_c).squeeze(-1).masked_fill(bad[c], float("nan"))
        if need_u:
            p = z if slope is None else z.mul_(slope)
            mean = (p.to(w.dtype) @ w).to(acc)
            own = w[label[c]].to(acc)
            own = own if slope is None else own * _slope(z_label, softcap, temperature)
            u[at] = ((own - mean) / temperature).to(u.dtype)
    if rows is None:
        logp, lse = logp.where(keep, 0.0), lse.where(keep, 0.0)
        u = u.where(keep.unsqueeze(-1), 0.0) if need_u else u
    return logp, lse, u


def _tile(m: int, v: int) -> tuple[int, int]:
    """(rows, columns of the vocabulary) of one chunk of logits, for backward."""
    rows = max(1, min(m, TILE_ROWS))
    return rows, min(v, max(1, LOGITS_BYTES // (4 * rows)))


def logprob_bwd(g, h, w, labels, bias, lse, ignore_index, softcap, temperature, need: list[bool]):
    """(dh, dw, dbias) by making the logits again; each empty where not needed."""
    need_h, need_w, need_bias = need
    shape, acc = h.shape, lse.dtype
    rows, keep = _select(h, labels, ignore_index)
    g = g.to(acc)
    if rows is not None:
        g, h, labels, lse = g[rows], h[rows], labels[rows], lse[rows]
    else:  # p = 0 and h = 0 there, so that NaN in an ignored row reaches nothing
        g, lse = g.where(keep, 0.0), lse.where(keep, float("inf"))
        h = h.where(keep.unsqueeze(-1), 0.0)
    dh = h.new_zeros(h.shape if need_h else 0, dtype=acc)
    dw, dbias = (
        w.new_empty(s if n else 0) for s, n in ((w.shape, need_w), (w.shape[0], need_bias))
    )
    tall, wide = _tile(h.shape[0], w.shape[0])
    buffer = h.new_empty(tall * wide, dtype=acc)
    for v0 in range(0, w.shape[0], wide):
        cols = slice(v0, v0 + wide)
        w_c, bias_c = w[cols], None if bias is None else bias[cols]
        dw_c = torch.zeros_like(w_c, dtype=acc) if need_w else None
        dbias_c = w_c.new_zeros(w_c.shape[0], dtype=acc)
        for row in range(0, h.shape[0], tall):
            c = slice(row, row + tall)
            z = _cap_(_logits(buffer, h[c], w_c, bias_c), softcap, temperature)
            slope = _slope(z, softcap, temperature) if softcap > 0.0 else None
            dz = z.sub_(lse[c].unsqueeze(-1)).exp_().mul_(-g[c].unsqueeze(-1))
            at = labels[c] - v0
            inside = (at >= 0) & (at < w_c.shape[0])
            dz.scatter_add_(
                1, at.where(inside, 0).unsqueeze(-1), g[c].where(inside, 0.0).unsqueeze(-1)
            )
            dz = dz if slope is None else dz.mul_(slope)
            dz = dz if temperature == 1.0 else dz.div_(temperature)
            if need_bias:
                dbias_c += dz.sum(0)
            dz = dz.to(w.dtype)
            if need_h:
                _add_product(dh[c], dz, w_c)
            if need_w:
                _add_product(dw_c, dz.t(), h[c])
        if need_w:
            dw[cols] = dw_c
        if need_bias:
            dbias[cols] = dbias_c
    if need_h:
        full = dh.new_zeros(shape, dtype=w.dtype)
        full[slice(None) if rows is None else rows] = dh.to(w.dtype)
        dh = full
    return dh.to(w.dtype), dw, dbias


def _add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    if a.dtype == out.dtype:
        out.addmm_(a, b)
    else:
        out += a @ b
