"""prefix_attention on a CPU in C++, csrc/cpu/prefix_train.h: prefix and keys in one pass."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fusedpeft.ops.native import DTYPE_CODES, native
from fusedpeft.ops.prefix_attention_blocks import laid_out
from fusedpeft.ops.prefix_attention_checks import check_values

_NOWHERE = [0, 0, 0, 0]


def _unit(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def _as_rows(prefix: Tensor) -> Tensor:
    return _unit(prefix if prefix.ndim == 4 else prefix.unsqueeze(0))


def _place(t: Tensor | None) -> list[int]:
    return _NOWHERE if t is None or t.numel() == 0 else [t.data_ptr(), *t.stride()[:3]]


def _sequences(q: Tensor, pk: Tensor, cu: Tensor | None, ids: Tensor | None):
    """(tokens, the prefix of each row) of what attends to itself: all rows, or packed sequences."""
    count = q.shape[0] if cu is None else len(cu) - 1
    if pk.shape[2] == 0:
        ids = torch.full((count,), -1)
    elif ids is None:
        ids = torch.arange(count) if len(pk) == count else torch.zeros(count, dtype=torch.int64)
    ids = ids.long().contiguous()
    if cu is None:
        return [(slice(None), ids)]
    ends = cu.tolist()
    spans = zip(ends, ends[1:], ids.split(1), strict=False)
    return [(slice(a, b), one) for a, b, one in spans]


def _run(of: list[Tensor | None], lse, dlse, mask, ids, dpkv, causal, scale, window) -> None:
    """of: q, k, v, pk, pv, out and for backward dout, dq, dk, dv; lse, dlse: contiguous."""
    q, k, pk = of[0], of[1], of[3]
    (B, H, T, D), (HKV, S), P = q.shape, k.shape[1:3], pk.shape[2]
    if q.numel() == 0:
        return
    backward, threads, of_mask = len(of) > 6, torch.get_num_threads(), _NOWHERE
    threads = min(threads, HKV if backward else B * HKV)
    work = q.new_empty(threads * native.prefix_train_floats(P, S, D, backward), dtype=torch.float32)
    if mask is not None:
        steps = [s if n > 1 else 0 for n, s in zip(mask.shape[:3], mask.stride(), strict=False)]
        of_mask = [mask.data_ptr(), *steps]
    native.prefix_train(
        [_place(t) for t in of] + [_NOWHERE] * (10 - len(of)), ids.data_ptr(), lse.data_ptr(),
        of_mask, 0 if dlse is None else dlse.data_ptr(), *([t.data_ptr() for t in dpkv] or (0, 0)),
        work.data_ptr(), threads, (B, H, HKV, T, S, P, D), window, causal, scale,
        DTYPE_CODES[q.dtype],
    )  # fmt: skip


def _float_mask(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else _unit(mask.float())


def flash_fwd(q, k, v, pk, pv, mask, cu, ids, causal: bool, scale: float, window: int):
    check_values(None, cu, ids, _as_rows(pk), q.shape[2])  # a compiled call has not
    out, mask = laid_out(q), _float_mask(mask)
    lse = torch.full(q.shape[:3], -math.inf)
    ins, prefix = [_unit(t) for t in (q, k, v)], [_as_rows(t) for t in (pk, pv)]
    for at, of in _sequences(q, prefix[0], cu, ids):
        part = lse[:, :, at].contiguous()
        tensors = [*(t[:, :, at] for t in ins), *prefix, out[:, :, at]]
        _run(tensors, part, None, mask, of, [], causal, scale, window)
        if cu is not None:
            lse[:, :, at] = part
    return out, lse


def flash_bwd(
    dout, dlse, q, k, v, pk, pv, out, lse, mask, cu, ids, causal, scale, window, need: list[bool]
):
    like, mask = pk.shape, _float_mask(mask)
    ins, prefix = [_unit(t) for t in (q, k, v)], [_as_rows(t) for t in (pk, pv)]
    out, dout = _unit(out), _unit(dout.to(q.dtype))
    dqkv = [laid_out(t) for t in (q, k, v)] if any(need[:3]) else [None] * 3
    if q.numel() == 0:  # the keys' are zeros then
        dqkv = [t if t is None else t.zero_() for t in dqkv]
    dpkv = [torch.zeros(t.shape) for t in prefix] if any(need[3:]) else []
    for at, of in _sequences(q, prefix[0], cu, ids):
        tensors = [*(t[:, :, at] for t in ins), *prefix, out[:, :, at], dout[:, :, at]]
        tensors += [t if t is None else t[:, :, at] for t in dqkv]
        parts = [t if t is None else t[:, :, at].contiguous() for t in (lse, dlse)]
        _run(tensors, *parts, mask, of, dpkv, causal, scale, window)
    grads = (*dqkv, *(t.to(q.dtype).view(like) for t in dpkv or prefix))
    return tuple(g if n else q.new_empty(0) for g, n in zip(grads, need, strict=True))
