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

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedpeft.ops import twice
from fusedpeft.ops.arguments import (
    autocast,
    autocasts,
    check_number,
    check_triton,
    device_of,
    refuse_transforms,
)
from fusedpeft.ops.linear_logprob_aten import logprob_bwd, logprob_fwd

_IMPLS = ("aten", "triton")


def linear_logprob_ref(
    h, w, labels, bias=None, *, ignore_index: int = -100, softcap=None, temperature=1.0
) -> Tensor:
    """The specification, in plain torch."""
    z = F.linear(h, w, bias)
    z = z if z.dtype == torch.float64 else z.float()
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    logp = (z / temperature).log_softmax(-1)
    keep = labels != ignore_index
    picked = logp.gather(-1, labels.where(keep, 0).unsqueeze(-1)).squeeze(-1)
    return picked.where(keep, 0.0)


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
    return logprob_fwd(*args)


def _backward(g, h, w, labels, bias, lse, ignore_index, softcap, temperature, need, impl):
    args = (g, h, w, labels, bias, lse, ignore_index, softcap, temperature, need)
    if _use_triton(h, impl):
        from fusedpeft.kernels.linear_logprob import linear_logprob_bwd

        return linear_logprob_bwd(*args)
    return logprob_bwd(*args)


_lib.impl("linear_logprob", _forward, "CompositeExplicitAutograd")
_lib.impl("linear_logprob_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("fusedpeft::linear_logprob")
def _(h, w, labels, bias, ignore_index, softcap, temperature, need_u, impl):
    acc = torch.float64 if h.dtype == torch.float64 else torch.float32
    lse = h.new_empty(h.shape[0], dtype=acc)
    return torch.empty_like(lse), lse, h.new_empty(h.shape if need_u else 0)


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
        ctx.save_for_backward(u, labels)
    else:
        ctx.save_for_backward(h, w, labels, bias, lse)


def _autograd_backward(ctx, g, _lse, _u):
    if g is None:
        return (None,) * 9
    if ctx.need_u:
        if twice.asked():
            raise RuntimeError(
                "linear_logprob: expected a head that is trained for second gradients, which need "
                "h: with a frozen one u alone is kept; use linear_logprob_ref"
            )
        u, labels = ctx.saved_tensors
        # In g's fp32, which 16 bits may not hold; and what is ignored has no gradient, NaN or not.
        g = g.masked_fill(labels == ctx.options[0], 0.0).unsqueeze(-1)
        return (torch.mul(u, g, out=torch.empty_like(u)), *(None,) * 8)
    h, w, labels, bias, lse = ctx.saved_tensors
    need = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    if twice.asked():
        grads = _second(g, h, w, labels, bias, *ctx.options, need)
        return (*grads[:2], None, grads[2], *(None,) * 5)
    dh, dw, dbias = torch.ops.fusedpeft.linear_logprob_backward(
        g, h, w, labels, bias, lse, *ctx.options, need, ctx.impl
    )
    grads = [t if n else None for t, n in zip((dh, dw, dbias), need, strict=True)]
    return (grads[0], grads[1], None, grads[2], *(None,) * 5)


def _second(g, h, w, labels, bias, ignore_index, softcap, temperature, need):
    options = dict(ignore_index=ignore_index, softcap=softcap or None, temperature=temperature)

    def reference(h, w, bias):
        return linear_logprob_ref(h, w, labels, bias, **options)

    return twice.gradients(reference, (h, w, bias), need, g)


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
    if bias is not None and not isinstance(bias, Tensor):
        raise TypeError(f"bias: expected a Tensor or None, got {type(bias).__name__}")
    if bias is not None and (bias.shape != w.shape[:1] or bias.dtype != h.dtype):
        raise ValueError(
            f"bias: expected [{w.shape[0]}] of {h.dtype}, got {list(bias.shape)} of {bias.dtype}"
        )
    if bias is not None and bias.device != h.device:
        raise ValueError(f"bias: expected device {h.device} (as h), got {bias.device}")
    for name, value in (("softcap", softcap), ("temperature", temperature)):
        if name == "softcap" and value is None:
            continue
        check_number(name, value)
        if not value > 0.0:
            raise ValueError(f"{name}: expected a finite number > 0, got {value}")
    if not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index: expected an int, got {ignore_index!r}")
    if impl is not None and impl not in _IMPLS:
        raise ValueError(f"impl: expected one of {_IMPLS} or None, got {impl!r}")
    if impl == "triton":
        check_triton(h)
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
    """log p(label) by token, [*] in fp32 (fp64 for fp64); exactly 0 where the label is
    `ignore_index`. fp32 beside 16-bit h and w, because log-probabilities are there to be summed.

    h [*, d] and w [V, d] share a dtype, labels [*] int64, bias [V]. softcap c puts the logits
    through c·tanh(z/c) (Gemma's final_logit_softcapping), temperature divides what comes out.
    Ignored rows are skipped, so NaN in them reaches nothing, and get zero gradient. No shift
    inside: align labels first.

    impl: None chooses by device (`fusedpeft doctor` shows it); "aten" and "triton" force one. Peak
    extra memory on ATen is one chunk of fp32 logits (32 MiB, or one row where V is larger; two of
    them with a softcap), in Triton see `kernels/linear_logprob.py`; never [M, V].

    Saved for backward: u (M·d elements of h's dtype) and the labels where the head is frozen; else
    h and the logsumexp (M fp32). On a CPU a label outside [0, V) raises ValueError; on a GPU its
    row is NaN unless FUSEDPEFT_DEBUG=1 asks for the check. Under torch.compile it is NaN as well.
    """
    refuse_transforms("linear_logprob")
    if autocasts(device := device_of(h)):
        h, w, bias = autocast(device, h, w, bias)
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
    total = -logp.sum()
    if reduction == "mean":
        total = total / (labels != ignore_index).sum().clamp(min=1)
    return total
