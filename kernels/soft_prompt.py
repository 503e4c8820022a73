"""Soft-prompt embedding: gather and prepend in one pass, nothing concatenated.

    y[b, t] = prompt[ids[b], t]                t < P          (the same prompt for all without ids)
    y[b, P + t] = table[input_ids[b, t]]
    dprompt[n, p] = Σ_{b: ids[b] = n} dy[b, p],   in a fixed order: the same bits always

Forward reads and writes each element once, 2·B·(P + T)·d of them; dprompt reads B·P·d.
An id outside its table gives a row of NaN, never a read out of bounds.
(Lester et al. 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning", §2.)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedpeft.kernels.device import on_device
from fusedpeft.kernels.soft_prompt_tables import BWD_CONFIG, soft_prompt_fwd_config

__all__ = ["soft_prompt_bwd", "soft_prompt_fwd"]


@triton.jit
def _soft_prompt_fwd_kernel(
    ids_ptr, table_ptr, prompt_ptr, prompt_ids_ptr, out_ptr,
    T, P, D, vocab, prompts,
    stride_ib, stride_it, stride_tv, stride_td, stride_pn, stride_pp, stride_pd,
    BY_ID: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # of B·(P + T)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    ok = cols < D
    length = P + T
    b, t = row // length, row % length
    cols64 = cols.to(tl.int64)
    is_prompt = t < P
    n = b * 0
    if BY_ID:
        n = tl.load(prompt_ids_ptr + b).to(tl.int64)
    own = ok & is_prompt & (n >= 0) & (n < prompts)
    at = prompt_ptr + n * stride_pn + t * stride_pp + cols64 * stride_pd
    prompt = tl.load(at, mask=own, other=float("nan")).to(out_ptr.dtype.element_ty)

    word = tl.load(ids_ptr + b * stride_ib + (t - P) * stride_it, mask=t >= P, other=-1)
    word = word.to(tl.int64)
    known = ok & (word >= 0) & (word < vocab)
    at = table_ptr + word * stride_tv + cols64 * stride_td
    embedded = tl.load(at, mask=known, other=float("nan"))
    tl.store(out_ptr + row * D + cols, tl.where(is_prompt, prompt, embedded), mask=ok)


@triton.jit
def _soft_prompt_bwd_kernel(
    dy_ptr, prompt_ids_ptr, out_ptr,
    B, P, D, stride_db, stride_dt, stride_dd,
    BY_ID: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # of n·P
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    bs = tl.arange(0, BLOCK_B)
    ok = cols < D
    n, p = row // P, row % P
    dy_ptrs = dy_ptr + p * stride_dt + cols.to(tl.int64)[None, :] * stride_dd
    dy_ptrs += bs.to(tl.int64)[:, None] * stride_db
    acc = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for b0 in range(0, B, BLOCK_B):
        mine = b0 + bs < B
        if BY_ID:
            mine &= tl.load(prompt_ids_ptr + b0 + bs, mask=mine, other=-1).to(tl.int64) == n
        dy = tl.load(dy_ptrs, mask=mine[:, None] & ok[None, :], other=0.0)  # [BLOCK_B, BLOCK_D]
        acc += tl.sum(dy.to(tl.float32), 0)
        dy_ptrs += BLOCK_B * stride_db
    tl.store(out_ptr + row * D + cols, acc.to(out_ptr.dtype.element_ty), mask=ok)


def soft_prompt_fwd(
    input_ids: Tensor, table: Tensor, prompt: Tensor, prompt_ids: Tensor | None
) -> Tensor:
    """[B, P + T, d] in the table's dtype. input_ids [B, T], table [V, d], prompt [n, P, d].

    prompt_ids [B], or None where n = 1 and every row takes it.
    """
    (B, T), (V, d), (n, P, _) = input_ids.shape, table.shape, prompt.shape
    out = torch.empty((B, P + T, d), dtype=table.dtype, device=table.device)
    if out.numel() > 0:
        config, by_id = soft_prompt_fwd_config(d), prompt_ids is not None
        with on_device(table):
            _soft_prompt_fwd_kernel[(B * (P + T), triton.cdiv(d, config["BLOCK_D"]))](
                input_ids, table, prompt, prompt_ids.contiguous() if by_id else input_ids, out,
                T, P, d, V, n,
                *input_ids.stride(), *table.stride(), *prompt.stride(), BY_ID=by_id, **config,
            )  # fmt: skip
    return out


def soft_prompt_bwd(
    dy: Tensor, prompt_ids: Tensor | None, prompts: int, length: int, dtype: torch.dtype
) -> Tensor:
    """dprompt [prompts, length, d] in `dtype`, from dy [B, ≥ length, d]."""
    B, d = dy.shape[0], dy.shape[2]
    out = torch.empty((prompts, length, d), dtype=dtype, device=dy.device)
    if out.numel() > 0:
        config, by_id = BWD_CONFIG, prompt_ids is not None
        with on_device(dy):
            _soft_prompt_bwd_kernel[(prompts * length, triton.cdiv(d, config["BLOCK_D"]))](
                dy, prompt_ids.contiguous() if by_id else dy, out,
                B, length, d, *dy.stride(), BY_ID=by_id, **config,
            )  # fmt: skip
    return out
