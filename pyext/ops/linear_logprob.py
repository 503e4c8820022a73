"""Log-probability of a label through the output head, without the [M, V] logits in memory.

    log p_t = z_t[label_t] − logsumexp_v z_t[v],   z = cap(h Wᵀ + bias) / temperature
    cap(a) = c · tanh(a / c), or a                      h [M, d]  W [V, d]

Its gradient in a = h Wᵀ + bias is (δ_{v, label} − p_v) · s_v with the slope
s_v = (1 − tanh²(a_v / c)) / temperature. A frozen head needs no second pass over the vocabulary:
forward keeps u_t = s_label W[label_t] − Σ_v p_v s_v W[v] (M·d elements), and backward is
dh_t = g_t · u_t. A trainable head keeps the logsumexp (M elements) and makes the logits again, a
tile at a time. This is the gradient of softmax cross-entropy, reordered; working by chunks is the
idea of "Cut Your Losses in Large-Vocabulary Language Models" (Wijmans et al. 2024).
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

LOGITS_BYTES = 32 * 2**20  # one chunk of fp32 logits: fits the last-level caches of today's CPUs
TILE_ROWS = 2048  # of backward: enough for a product, and the rest of the chunk is vocabulary
_IMPLS = ("aten", "triton")


def linear_logprob_ref(
    h, w, labels, bias=None, *, ignore_index: int = -100, softcap=None, temperature=1.0
) -> Tensor:
    """The specification, in plain torch."""
    z = _logits(h, w, bias)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    logp = (z / temperature).log_softmax(-1)
    keep = labels != ignore_index
    picked = logp.gather(-1, labels.where(keep, 0).unsqueeze(-1)).squeeze(-1)
    return picked.where(keep, 0.0).to(h.dtype)


def linear_cross_entropy_ref(
    h, w, labels, bias=None, *, ignore_index: int = -100, reduction: str = "mean", **options
) -> Tensor:
    """The specification, in plain torch."""
    logp = linear_logprob_ref(h, w, labels, bias, ignore_index=ignore_index, **options)
    return _reduce(logp, labels, ignore_index, reduction)


def choose_impl(device_type: str, dtype: torch.dtype) -> tuple[str, str]:
    """(implementation, why) that `linear_logprob` takes by itself. Pure; `doctor` prints it."""
    if device_type == "cuda" and dtype != torch.float64:
        return "triton", "CUDA tensors take the Triton kernels"
    if device_type == "cuda":
        return "aten", "the Triton kernels sum in fp32: fp64 takes chunks of ATen"
    return "aten", "chunks of ATen products: the whole logits are never in memory"


# --- ATen ---------------------------------------------------------------------------------------


def _logits(h: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    z = F.linear(h, w, bias)
    return z if z.dtype == torch.float64 else z.float()


def _cap_(z: Tensor, softcap: float, temperature: float) -> Tensor:
    """cap(z) / temperature in place; softcap 0 is none."""
    if softcap > 0.0:
        return z.div_(softcap).tanh_().mul_(softcap / temperature)
    return z if temperature == 1.0 else z.div_(temperature)


def _slope(z: Tensor, softcap: float, temperature: float) -> Tensor:
    """1 − tanh²(a / c), from z = c · tanh(a / c) / temperature."""
    return z.mul(temperature / softcap).square_().neg_().add_(1.0)


def _select(h: Tensor, labels: Tensor, ignore_index: int):
    """Rows that count. On a CPU the others are never computed; a GPU would have to synchronise."""
    keep = labels != ignore_index
    if h.device.type == "cpu":
        return keep.nonzero().squeeze(1), keep
    return None, keep


def _aten_fwd(h, w, labels, bias, ignore_index: int, softcap, temperature, need_u: bool):
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
    for i in range(0, h.shape[0], step):
        c = slice(i, i + step)
        at = rows[c] if rows is not None else c
        z = _cap_(_logits(h[c], w, bias), softcap, temperature)
        z_label = z.gather(-1, label[c].unsqueeze(-1))
        slope = _slope(z, softcap, temperature) if need_u and softcap > 0.0 else None
        top = z.amax(-1, keepdim=True)
        e = z.sub_(top).exp_()  # in place, as all that follows: a chunk is all there is
        total = e.sum(-1, keepdim=True)
        lse_c = top + total.log()
        lse[at] = lse_c.squeeze(-1)
        logp[at] = (z_label - lse_c).squeeze(-1).masked_fill(bad[c], float("nan"))
        if need_u:
            e = e if slope is None else e.mul_(slope)
            mean = (e.div_(total).to(w.dtype) @ w).to(acc)
            own = w[label[c]].to(acc)
            own = own if slope is None else own * _slope(z_label, softcap, temperature)
            u[at] = ((own - mean) / temperature).to(u.dtype)
    if rows is None:
        logp, lse = logp.where(keep, 0.0), lse.where(keep, 0.0)
        u = u.where(keep.unsqueeze(-1), 0.0) if need_u else u
    return logp.to(h.dtype), lse, u


def _tiles(m: int, v: int) -> Iterator[tuple[slice, list[slice]]]:
    """Columns of the vocabulary, and for each all the rows: a tile is one chunk of logits."""
    rows = max(1, min(m, TILE_ROWS))
    columns = max(1, LOGITS_BYTES // (4 * rows))
    for n in range(0, v, columns):
        yield slice(n, n + columns), [slice(i, i + rows) for i in range(0, m, rows)]


def _aten_bwd(g, h, w, labels, bias, lse, ignore_index, softcap, temperature, need: list[bool]):
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
    for cols, chunks in _tiles(h.shape[0], w.shape[0]):
        w_c, bias_c = w[cols], None if bias is None else bias[cols]
        dw_c = torch.zeros_like(w_c, dtype=acc) if need_w else None
        dbias_c = w_c.new_zeros(w_c.shape[0], dtype=acc)
        for c in chunks:
            z = _cap_(_logits(h[c], w_c, bias_c), softcap, temperature)
            slope = _slope(z, softcap, temperature) if softcap > 0.0 else None
            dz = z.sub_(lse[c].unsqueeze(-1)).exp_().mul_(-g[c].unsqueeze(-1))
            at = labels[c] - cols.start
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


# --- custom ops ---------------------------------------------------------------------------------

_lib = torch.library.Library("fusedpeft", "FRAGMENT")
_lib.define(
    "linear_logprob(Tensor h, Tensor w, Tensor labels, Tensor? bias, int ignore_index, "
    "float softcap, float temperature, bool need_u, str impl) -> (Tensor, Tensor, Tensor)"
)
_lib.define(
    "linear_logprob_backward(Tensor g, Tensor h, Tensor w, Tensor labels, Tensor? bias, "
    "Tensor lse, int ignore_index, float softcap, float temperature, bool[] need, str impl) "
    "-> (Tensor, Tensor, Tensor)"
)


def _use_triton(h: Tensor, impl: str) -> bool:
    return (impl or choose_impl(h.device.type, h.dtype)[0]) == "triton"


def _forward(h, w, labels, bias, ignore_index, softcap, temperature, need_u, impl):
    args = (h, w, labels, bias, ignore_index, softcap, temperature, need_u)
    if _use_triton(h, impl):
        from fusedpeft.kernels.linear_logprob import linear_logprob_fwd

        return linear_logprob_fwd(*args)
    return _aten_fwd(*args)


def _backward(g, h, w, labels, bias, lse, ignore_index, softcap, temperature, need, impl):
    args = (g, h, w, labels, bias, lse, ignore_index, softcap, temperature, need)
    if _use_triton(h, impl):
        from fusedpeft.kernels.linear_logprob import linear_logprob_bwd

        return linear_logprob_bwd(*args)
    return _aten_bwd(*args)


_lib.impl("linear_logprob", _forward, "CompositeExplicitAutograd")
_lib.impl("linear_logprob_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("fusedpeft::linear_logprob")
def _(h, w, labels, bias, ignore_index, softcap, temperature, need_u, impl):
    acc = torch.float64 if h.dtype == torch.float64 else torch.float32
    lse = h.new_empty(h.shape[0], dtype=acc)
    return h.new_empty(h.shape[0]), lse, h.new_empty(h.shape if need_u else 0)


@torch.library.register_fake("fusedpeft::linear_logprob_backward")
def _(g, h, w, labels, bias, lse, ignore_index, softcap, temperature, need, impl):
    dh, dw = h.new_empty(h.shape if need[0] else 0), w.new_empty(w.shape if need[1] else 0)
    return dh, dw, w.new_empty(w.shape[0] if need[2] else 0)


def _setup_context(ctx, inputs, output) -> None:
    h, w, labels, bias, *ctx.options, ctx.need_u, ctx.impl = inputs
    _, lse, u = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(lse, u)
    if ctx.need_u:  # frozen head
        ctx.save_for_backward(u)
    else:
        ctx.save_for_backward(h, w, labels, bias, lse)


def _autograd_backward(ctx, g, _lse, _u):
    if g is None:
        return (None,) * 9
    if ctx.need_u:
        (u,) = ctx.saved_tensors
        return (g.unsqueeze(-1) * u, *(None,) * 8)
    h, w, labels, bias, lse = ctx.saved_tensors
    need = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    dh, dw, dbias = torch.ops.fusedpeft.linear_logprob_backward(
        g, h, w, labels, bias, lse, *ctx.options, need, ctx.impl
    )
    grads = [t if n else None for t, n in zip((dh, dw, dbias), need, strict=True)]
    return (grads[0], grads[1], None, grads[2], *(None,) * 5)


torch.library.register_autograd(
    "fusedpeft::linear_logprob", _autograd_backward, setup_context=_setup_context
)


# --- public -------------------------------------------------------------------------------------


def _check(h, w, labels, bias, ignore_index: int, softcap, temperature, impl) -> None:
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
    if w.numel() == 0:
        raise ValueError(f"w: expected V >= 1 and d >= 1, got {tuple(w.shape)}")
    if labels.shape != h.shape[:-1]:
        raise ValueError(f"labels: expected {tuple(h.shape[:-1])}, got {tuple(labels.shape)}")
    if bias is not None and (bias.shape != w.shape[:1] or bias.dtype != h.dtype):
        raise ValueError(
            f"bias: expected [{w.shape[0]}] of {h.dtype}, got {list(bias.shape)} of {bias.dtype}"
        )
    if bias is not None and bias.device != h.device:
        raise ValueError(f"bias: expected device {h.device} (as h), got {bias.device}")
    for name, value in (("softcap", softcap), ("temperature", temperature)):
        if not (name == "softcap" and value is None) and not 0.0 < value < float("inf"):
            raise ValueError(f"{name}: expected a finite number > 0, got {value}")
    if impl is not None and impl not in _IMPLS:
        raise ValueError(f"impl: expected one of {_IMPLS} or None, got {impl!r}")
    if impl == "triton" and h.dtype == torch.float64:
        raise TypeError("impl='triton': expected fp32, bf16 or fp16, got torch.float64; use 'aten'")
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
    h: Tensor,
    w: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    temperature: float = 1.0,
    impl: str | None = None,
) -> Tensor:
    """log p(label) by token, [*] in h's dtype; exactly 0 where the label is `ignore_index`.

    h [*, d] and w [V, d] share a dtype, labels [*] int64, bias [V]. softcap c puts the logits
    through c·tanh(z/c) (Gemma's final_logit_softcapping), temperature divides what comes out.
    Ignored rows are skipped, so NaN in them reaches nothing, and get zero gradient. No shift
    inside: align labels first.

    impl: None chooses by device (`fusedpeft doctor` shows it); "aten" and "triton" force one. Peak
    extra memory on ATen is one chunk of fp32 logits (32 MiB, or one row where V is larger; two of
    them with a softcap), in Triton see `kernels/linear_logprob.py`; never [M, V].

    Saved for backward: u (M·d elements of h's dtype) where the head is frozen; else h and the
    logsumexp (M fp32). On a CPU a label outside [0, V) raises ValueError; on a GPU its row is NaN
    unless FUSEDPEFT_DEBUG=1 asks for the check. Under torch.compile the row is NaN as well.
    """
    if isinstance(h, Tensor) and torch.is_autocast_enabled(h.device.type):
        dtype = torch.get_autocast_dtype(h.device.type)
        h, w, bias = h.to(dtype), w.to(dtype), None if bias is None else bias.to(dtype)
    _check(h, w, labels, bias, ignore_index, softcap, temperature, impl)
    grad = torch.is_grad_enabled()
    head_learns = grad and (w.requires_grad or (bias is not None and bias.requires_grad))
    need_u = grad and h.requires_grad and not head_learns
    logp, _, _ = torch.ops.fusedpeft.linear_logprob(
        h.reshape(-1, h.shape[-1]), w, labels.reshape(-1), bias,
        ignore_index, float(softcap or 0.0), float(temperature), need_u, impl or "",
    )  # fmt: skip
    return logp.view(labels.shape)


def linear_cross_entropy(
    h: Tensor,
    w: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    softcap: float | None = None,
    temperature: float = 1.0,
    impl: str | None = None,
) -> Tensor:
    """Cross-entropy of the labels through the head: −`linear_logprob`, reduced.

    reduction "mean" divides by the number of labels that are not ignored (0, not NaN, where all
    are), "sum", or "none" ([*]). Shapes, options, memory and errors as in `linear_logprob`.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction: expected 'mean', 'sum' or 'none', got {reduction!r}")
    options = dict(softcap=softcap, temperature=temperature, impl=impl)
    logp = linear_logprob(h, w, labels, bias, ignore_index=ignore_index, **options)
    return _reduce(logp, labels, ignore_index, reduction)


def _reduce(logp: Tensor, labels: Tensor, ignore_index: int, reduction: str) -> Tensor:
    if reduction == "none":
        return -logp
    total = -logp.sum(dtype=torch.promote_types(logp.dtype, torch.float32))
    if reduction == "mean":
        total = total / (labels != ignore_index).sum().clamp(min=1)
    return total
