"""Log-probability of a label through the output head, without the [M, V] logits in memory.

    log p_t = z_t[label_t] − logsumexp_v z_t[v],      z = h Wᵀ + bias      h [M, d]  W [V, d]

A frozen head needs no second pass over the vocabulary: forward keeps
u_t = W[label_t] − Σ_v p_t[v] W[v]  (M·d elements), and backward is dh_t = g_t · u_t. A trainable
head keeps the logsumexp (M elements) and makes the logits again, a chunk at a time. This is the
gradient of softmax cross-entropy, reordered; working by chunks is the idea of "Cut Your Losses in
Large-Vocabulary Language Models" (Wijmans et al. 2024).
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

LOGITS_BYTES = 32 * 2**20  # one chunk of fp32 logits: fits the last-level caches of today's CPUs


def linear_logprob_ref(h, w, labels, bias=None, *, ignore_index: int = -100) -> Tensor:
    """The specification, in plain torch."""
    logp = _logits(h, w, bias).log_softmax(-1)
    keep = labels != ignore_index
    picked = logp.gather(-1, labels.where(keep, 0).unsqueeze(-1)).squeeze(-1)
    return picked.where(keep, 0.0).to(h.dtype)


def linear_cross_entropy_ref(
    h, w, labels, bias=None, *, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    """The specification, in plain torch."""
    return _reduce(
        linear_logprob_ref(h, w, labels, bias, ignore_index=ignore_index),
        labels,
        ignore_index,
        reduction,
    )


def _chunks(h: Tensor, w: Tensor) -> Iterator[slice]:
    rows = max(1, LOGITS_BYTES // (4 * w.shape[0]))
    return (slice(i, i + rows) for i in range(0, h.shape[0], rows))


def _logits(h: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    z = F.linear(h, w, bias)
    return z if z.dtype == torch.float64 else z.float()


def _select(h: Tensor, labels: Tensor, ignore_index: int):
    """Rows that count. On a CPU the others are never computed; a GPU would have to synchronise."""
    keep = labels != ignore_index
    if h.device.type == "cpu":
        return keep.nonzero().squeeze(1), keep
    return None, keep


def _forward(h, w, labels, bias, ignore_index: int, need_u: bool):
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
    label = labels.clamp(0, max(v - 1, 0))
    for c in _chunks(h, w):
        z = _logits(h[c], w, bias)
        at = rows[c] if rows is not None else c
        lse_c = z.logsumexp(-1)
        logp_c = z.gather(-1, label[c].unsqueeze(-1)).squeeze(-1) - lse_c
        lse[at] = lse_c
        logp[at] = logp_c.masked_fill(bad[c], float("nan"))
        if need_u:
            p = z.sub_(lse_c.unsqueeze(-1)).exp_().to(w.dtype)
            u[at] = w[label[c]] - p @ w
    if rows is None:
        logp, lse = logp.where(keep, 0.0), lse.where(keep, 0.0)
        u = u.where(keep.unsqueeze(-1), 0.0) if need_u else u
    return logp.to(h.dtype), lse, u


def _backward(g, h, w, labels, bias, lse, ignore_index: int, need: list[bool]):
    """(dh, dw, dbias) by making the logits again; each empty where not needed."""
    need_h, need_w, need_bias = need
    dh = h.new_zeros(h.shape if need_h else 0)
    dw = lse.new_zeros(w.shape if need_w else 0)
    dbias = lse.new_zeros(w.shape[0] if need_bias else 0)
    rows, keep = _select(h, labels, ignore_index)
    g = g.to(lse.dtype).where(keep, 0.0)
    if rows is not None:
        g, h, labels, lse = g[rows], h[rows], labels[rows], lse[rows]
    label = labels.clamp(0, max(w.shape[0] - 1, 0)).unsqueeze(-1)
    for c in _chunks(h, w):
        at = rows[c] if rows is not None else c
        dz = _logits(h[c], w, bias).sub_(lse[c].unsqueeze(-1)).exp_().mul_(-g[c].unsqueeze(-1))
        dz.scatter_add_(1, label[c], g[c].unsqueeze(-1))
        if need_bias:
            dbias += dz.sum(0)
        dz = dz.to(w.dtype)
        if need_h:
            dh[at] = dz @ w
        if need_w:
            dw += dz.t() @ h[c]
    return dh, dw.to(w.dtype), dbias.to(w.dtype)


_lib = torch.library.Library("fusedpeft", "FRAGMENT")
_lib.define(
    "linear_logprob(Tensor h, Tensor w, Tensor labels, Tensor? bias, int ignore_index, "
    "bool need_u) -> (Tensor, Tensor, Tensor)"
)
_lib.define(
    "linear_logprob_backward(Tensor g, Tensor h, Tensor w, Tensor labels, Tensor? bias, "
    "Tensor lse, int ignore_index, bool[] need) -> (Tensor, Tensor, Tensor)"
)
_lib.impl("linear_logprob", _forward, "CompositeExplicitAutograd")
_lib.impl("linear_logprob_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("fusedpeft::linear_logprob")
def _(h, w, labels, bias, ignore_index, need_u):
    acc = torch.float64 if h.dtype == torch.float64 else torch.float32
    lse = h.new_empty(h.shape[0], dtype=acc)
    return h.new_empty(h.shape[0]), lse, h.new_empty(h.shape if need_u else 0)


@torch.library.register_fake("fusedpeft::linear_logprob_backward")
def _(g, h, w, labels, bias, lse, ignore_index, need):
    dh, dw = h.new_empty(h.shape if need[0] else 0), w.new_empty(w.shape if need[1] else 0)
    return dh, dw, w.new_empty(w.shape[0] if need[2] else 0)


def _setup_context(ctx, inputs, output) -> None:
    h, w, labels, bias, ctx.ignore_index, ctx.need_u = inputs
    _, lse, u = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(lse, u)
    if ctx.need_u:  # frozen head
        ctx.save_for_backward(u)
    else:
        ctx.save_for_backward(h, w, labels, bias, lse)


def _autograd_backward(ctx, g, _lse, _u):
    if g is None:
        return (None,) * 6
    if ctx.need_u:
        (u,) = ctx.saved_tensors
        return (g.unsqueeze(-1) * u, None, None, None, None, None)
    h, w, labels, bias, lse = ctx.saved_tensors
    need = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    dh, dw, dbias = torch.ops.fusedpeft.linear_logprob_backward(
        g, h, w, labels, bias, lse, ctx.ignore_index, need
    )
    grads = [t if n else None for t, n in zip((dh, dw, dbias), need, strict=True)]
    return (grads[0], grads[1], None, grads[2], None, None)


torch.library.register_autograd(
    "fusedpeft::linear_logprob", _autograd_backward, setup_context=_setup_context
)


def _check(h, w, labels, bias, ignore_index: int) -> None:
    for name, t in (("h", h), ("w", w), ("labels", labels)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(t).__name__}")
        if t.device != h.device:
            raise ValueError(f"{name}: expected device {h.device} (as h), got {t.device}")
    if not h.is_floating_point() or w.dtype != h.dtype:
        raise TypeError(f"h, w: expected one floating dtype, got {h.dtype} and {w.dtype}")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels: expected torch.int64, got {labels.dtype}")
    if w.ndim != 2 or h.ndim < 1 or h.shape[-1] != w.shape[1]:
        raise ValueError(f"expected h [*, d] and w [V, d], got {tuple(h.shape)}, {tuple(w.shape)}")
    if labels.shape != h.shape[:-1]:
        raise ValueError(f"labels: expected {tuple(h.shape[:-1])}, got {tuple(labels.shape)}")
    if bias is not None and (bias.shape != w.shape[:1] or bias.dtype != h.dtype):
        raise ValueError(
            f"bias: expected [{w.shape[0]}] of {h.dtype}, got {list(bias.shape)} of {bias.dtype}"
        )
    # Reading values on a GPU would stall it: only on request there (DESIGN: FUSEDPEFT_DEBUG=1).
    read = h.device.type == "cpu" or os.environ.get("FUSEDPEFT_DEBUG") == "1"
    if read and not torch.compiler.is_compiling() and labels.numel():
        bad = ((labels < 0) | (labels >= w.shape[0])) & (labels != ignore_index)
        if bad.any():
            at = bad.nonzero()[0].tolist()
            raise ValueError(
                f"labels: expected values in [0, {w.shape[0]}) or ignore_index {ignore_index}, "
                f"got {int(labels[tuple(at)])} at {at}"
            )


def linear_logprob(
    h: Tensor, w: Tensor, labels: Tensor, bias: Tensor | None = None, *, ignore_index: int = -100
) -> Tensor:
    """log p(label) by token, [*] in h's dtype; exactly 0 where the label is `ignore_index`.

    h [*, d] and w [V, d] share a dtype, labels [*] int64, bias [V]. Peak extra memory is one chunk
    of fp32 logits (32 MiB, or one row where V is larger), never [M, V]. Ignored rows are skipped,
    so NaN in them reaches nothing, and get zero gradient. No shift inside: align labels first.

    Saved for backward: u (M·d elements of h's dtype) where the head is frozen; else h and the
    logsumexp (M fp32). On a CPU a label outside [0, V) raises ValueError; on a GPU its row is NaN
    unless FUSEDPEFT_DEBUG=1 asks for the check. Under torch.compile the row is NaN as well.
    """
    if isinstance(h, Tensor) and torch.is_autocast_enabled(h.device.type):
        dtype = torch.get_autocast_dtype(h.device.type)
        h, w, bias = h.to(dtype), w.to(dtype), None if bias is None else bias.to(dtype)
    _check(h, w, labels, bias, ignore_index)
    grad = torch.is_grad_enabled()
    head_learns = grad and (w.requires_grad or (bias is not None and bias.requires_grad))
    need_u = grad and h.requires_grad and not head_learns
    logp, _, _ = torch.ops.fusedpeft.linear_logprob(
        h.reshape(-1, h.shape[-1]), w, labels.reshape(-1), bias, ignore_index, need_u
    )
    return logp.view(labels.shape)


def linear_cross_entropy(
    h: Tensor,
    w: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy of the labels through the head: −`linear_logprob`, reduced.

    reduction "mean" divides by the number of labels that are not ignored (0, not NaN, where all
    are), "sum", or "none" ([*]). Shapes, memory and errors as in `linear_logprob`.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction: expected 'mean', 'sum' or 'none', got {reduction!r}")
    logp = linear_logprob(h, w, labels, bias, ignore_index=ignore_index)
    return _reduce(logp, labels, ignore_index, reduction)


def _reduce(logp: Tensor, labels: Tensor, ignore_index: int, reduction: str) -> Tensor:
    if reduction == "none":
        return -logp
    total = -logp.sum(dtype=torch.promote_types(logp.dtype, torch.float32))
    if reduction == "mean":
        total = total / (labels != ignore_index).sum().clamp(min=1)
    return total
