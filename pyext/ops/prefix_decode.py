"""Attention of a few query tokens over prefixes that requests share and over their own keys.

    out_b = softmax([scale · q_b prefix_kᵀ | scale · q_b k_bᵀ]) [prefix_v ; v_b]
    q [B, H, T, D], T ≤ 8   k, v [B, HKV, S, D], or in blocks   prefixes in `PrefixSlots` (slots.py)

Keys are split into chunks, a prefix is read once for all the requests that name its slot, and the
chunks of a query are merged by their largest scores in a fixed order. Bytes: each prefix that is
named, once, and 2·HKV·D for every key. Inference only. (Dao et al. 2023,
"Flash-Decoding"; Juravsky et al. 2024, "Hydragen".)
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusedpeft.ops.arguments import is_plain, refuse_transforms
from fusedpeft.ops.prefix_attention import _row_ref
from fusedpeft.ops.prefix_attention_aten import acc_dtype
from fusedpeft.ops.prefix_decode_checks import check
from fusedpeft.ops.prefix_decode_impls import choose_impl, forward, in_blocks
from fusedpeft.ops.slots import PrefixSlots


def prefix_decode_attention_ref(
    q, k, v, prefix, slots, *, lengths=None, block_table=None, scale=None, window=None,
    return_lse=False,
):  # fmt: skip
    """The specification, in plain torch and q's dtype: request by request, all concatenated."""
    rows = [(q[:0].flatten(0, 1), q[:0, :, :, 0].flatten(0, 1).float())]
    for b, slot in enumerate(slots.tolist()):
        own = (t[b] if block_table is None else in_blocks(t, block_table[b : b + 1])[0]
               for t in (k, v))  # fmt: skip
        own = (t[:, : None if lengths is None else int(lengths[b])] for t in own)
        prefixes = (t[slot, :, : int(prefix.length[slot]) if slot >= 0 else 0] for t in prefix[:2])
        rows.append(_row_ref(q[b], *own, *prefixes, True, scale, None, window))
    out, lse = (torch.cat(t).view(q.shape[: 2 + t[0].ndim - 1]) for t in zip(*rows, strict=True))
    return (out.view(q.shape), lse) if return_lse else out.view(q.shape)


# --- custom op ----------------------------------------------------------------------------------

_lib = torch.library.Library("fusedpeft", "FRAGMENT")
_lib.define(
    "prefix_decode_attention(Tensor q, Tensor k, Tensor v, Tensor pk, Tensor pv, Tensor plen, "
    "Tensor slots, Tensor? lengths, Tensor? block_table, float scale, int window, str impl) "
    "-> (Tensor, Tensor)"
)
_lib.impl("prefix_decode_attention", forward, "CompositeExplicitAutograd")


@torch.library.register_fake("fusedpeft::prefix_decode_attention")
def _(q, *_rest):
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=acc_dtype(q))


NO_GRAD = (
    "prefix_decode_attention: expected no gradients (inference only), got an input that requires "
    "them; train with ops.prefix_attention, or call it under torch.no_grad()"
)


def _no_gradients(ctx, *grads):
    raise RuntimeError(NO_GRAD)


torch.library.register_autograd("fusedpeft::prefix_decode_attention", _no_gradients)


# --- public -------------------------------------------------------------------------------------


def prefix_decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix: PrefixSlots,
    slots: Tensor,
    *,
    lengths: Tensor | None = None,
    block_table: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    return_lse: bool = False,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """out [B, H, T, D] in q's dtype, and with return_lse the logsumexp [B, H, T] in fp32.

    q [B, H, T, D], T ≤ 8, D ≤ 256; k, v [B, HKV, S, D], HKV divides H; one dtype with the prefixes
    (fp32, bf16, fp16; fp64 on ATen). slots [B] int32: the prefix that a request sees, whole and
    unmasked, or -1 for none. lengths [B] int32: how many keys request b has, None for all S; what
    lies beyond them is not read. Query i of T stands at position lengths[b] − T + i and sees the
    keys up to there, with `window` only the last so many. scale: D^−½ where None. A query that sees
    nothing gets 0 and a logsumexp of −inf.

    block_table [B, blocks] int32: k and v are then [num_blocks, HKV, block_size, D], key j of
    request b being token j % block_size of block block_table[b, j // block_size], and S is
    blocks · block_size. Only blocks that hold keys to be seen are looked up. Strides are free but
    the last, which is copied where it is not 1: [num_blocks, block_size, HKV, D] goes in as a
    transpose.

    A slot that is out of range or free, a length beyond S and a block that is not there raise on a
    CPU, before anything is computed; on a GPU that request is NaN, unless FUSEDPEFT_DEBUG=1 asks
    for the check. No gradients: RuntimeError. impl: None chooses by device (`fusedpeft doctor`
    shows it); "native" (C++), "cuda", "aten" (any device, with a prefix per request in memory)
    force one. Raises TypeError or ValueError with the expected and the given value.
    """
    refuse_transforms("prefix_decode_attention")
    check(q, k, v, prefix, slots, lengths, block_table, scale, window, impl)
    given = (q, k, v, prefix.k, prefix.v)
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        raise RuntimeError(NO_GRAD)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    impl = impl or choose_impl(q.device.type, q.dtype)[0]
    reach = min(window or 0, 1 << 30)  # of 32 bits in the kernels
    args = (*given, prefix.length, slots, lengths, block_table, scale, reach, impl)
    out, lse = (forward if is_plain(given) else torch.ops.fusedpeft.prefix_decode_attention)(*args)
    return (out, lse) if return_lse else out
