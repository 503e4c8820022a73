"""Soft-prompt embedding: trained vectors in front of the embedded tokens, as one op.

    y[b] = [prompt ; table[input_ids[b]]]      input_ids [B, T]  table [V, d]  prompt [P, d]

or prompt[prompt_ids[b]] of a table of prompts [n, P, d]. (Lester et al. 2021, "The Power of Scale
for Parameter-Efficient Prompt Tuning", §2.)
"""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedpeft.ops.arguments import is_plain, refuse_transforms


def soft_prompt_embedding_ref(
    input_ids: Tensor, table: Tensor, prompt: Tensor, prompt_ids: Tensor | None = None
) -> Tensor:
    """The specification, in plain torch."""
    rows = input_ids.shape[0]
    own = prompt.expand(rows, -1, -1) if prompt_ids is None else prompt[prompt_ids]
    return torch.cat((own.to(table.dtype), F.embedding(input_ids, table)), 1)


def choose_impl(device_type: str, dtype: torch.dtype) -> tuple[str, str]:
    """(implementation, why) that `soft_prompt_embedding` takes. Pure; `doctor` prints it."""
    if device_type == "cuda" and dtype != torch.float64:
        return "triton", "CUDA tensors take the Triton kernels"
    if device_type == "cuda":
        return "aten", "the Triton kernel sums in fp32: fp64 takes ATen"
    return "aten", "one gather straight to the rows' places, the prompt over what it left"


# --- ATen ---------------------------------------------------------------------------------------


def _unknown(ids: Tensor, size: int) -> Tensor:
    return (ids < 0) | (ids >= size)


def _aten_fwd(input_ids, table, prompt, prompt_ids) -> Tensor:
    n, P, _ = prompt.shape
    known = input_ids.clamp(0, table.shape[0] - 1) if input_ids.is_cuda else input_ids
    y = F.embedding(F.pad(known, (P, 0)), table)  # row 0 where the prompt comes: in the cache
    if prompt_ids is None:
        y[:, :P] = prompt
    else:
        y[:, :P] = prompt[prompt_ids.clamp(0, n - 1) if y.is_cuda else prompt_ids]
    if y.is_cuda:  # NaN for an id out of range, never a read out of bounds (no sync to raise)
        y[:, P:].masked_fill_(_unknown(input_ids, table.shape[0])[..., None], float("nan"))
        if prompt_ids is not None:
            y[:, :P].masked_fill_(_unknown(prompt_ids, n)[:, None, None], float("nan"))
    return y


def _aten_dprompt(dy, prompt_ids, prompts: int, length: int, dtype: torch.dtype) -> Tensor:
    acc = torch.promote_types(dy.dtype, torch.float32)
    own = dy[:, :length]
    if prompt_ids is None:
        # A sum of 16-bit numbers is kept in fp32 anyway, where it also stays in 16 bits at the end.
        return own.sum(0, keepdim=True, dtype=dtype if dtype == dy.dtype else acc).to(dtype)
    total = dy.new_zeros((prompts, length, dy.shape[2]), dtype=acc)
    for n, row in zip(prompt_ids.tolist(), own, strict=True):  # a fixed order
        total[n] += row
    return total.to(dtype)


# --- custom ops ---------------------------------------------------------------------------------

_lib = torch.library.Library("fusedpeft", "FRAGMENT")
_lib.define(
    "soft_prompt_embedding(Tensor input_ids, Tensor table, Tensor prompt, Tensor? prompt_ids) "
    "-> Tensor"
)
_lib.define(
    "soft_prompt_embedding_backward(Tensor dy, Tensor input_ids, Tensor? prompt_ids, SymInt vocab, "
    "SymInt prompts, SymInt length, ScalarType table_dtype, ScalarType prompt_dtype, bool[] need) "
    "-> (Tensor, Tensor)"
)


def _forward(input_ids, table, prompt, prompt_ids) -> Tensor:
    if choose_impl(table.device.type, table.dtype)[0] == "triton":
        from fusedpeft.kernels.soft_prompt import soft_prompt_fwd

        return soft_prompt_fwd(input_ids, table, prompt, prompt_ids)
    return _aten_fwd(input_ids, table, prompt, prompt_ids)


def _backward(
    dy, input_ids, prompt_ids, vocab, prompts, length, table_dtype, prompt_dtype, need
) -> tuple[Tensor, Tensor]:  # fmt: skip
    need_table, need_prompt = need
    dtable, dprompt = dy.new_empty(0, dtype=table_dtype), dy.new_empty(0, dtype=prompt_dtype)
    if need_table:
        ids = input_ids.masked_fill(_unknown(input_ids, vocab), -1)  # the padding: skipped
        own = dy[:, length:].contiguous()
        dtable = torch.ops.aten.embedding_dense_backward(own, ids, vocab, -1, False)
    if need_prompt:
        args = (dy, prompt_ids, prompts, length, prompt_dtype)
        if choose_impl(dy.device.type, dy.dtype)[0] == "triton":
            from fusedpeft.kernels.soft_prompt import soft_prompt_bwd

            dprompt = soft_prompt_bwd(*args)
        else:
            dprompt = _aten_dprompt(*args)
    return dtable, dprompt


_lib.impl("soft_prompt_embedding", _forward, "CompositeExplicitAutograd")
_lib.impl("soft_prompt_embedding_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("fusedpeft::soft_prompt_embedding")
def _(input_ids, table, prompt, prompt_ids):
    b, t = input_ids.shape
    return table.new_empty(b, prompt.shape[1] + t, table.shape[1])


@torch.library.register_fake("fusedpeft::soft_prompt_embedding_backward")
def _(dy, input_ids, prompt_ids, vocab, prompts, length, table_dtype, prompt_dtype, need):
    d = dy.shape[2]
    return (
        dy.new_empty((vocab, d) if need[0] else 0, dtype=table_dtype),
        dy.new_empty((prompts, length, d) if need[1] else 0, dtype=prompt_dtype),
    )


def _setup_context(ctx, inputs, output) -> None:
    input_ids, table, prompt, prompt_ids = inputs
    ctx.sizes = (table.shape[0], *prompt.shape[:2], table.dtype, prompt.dtype)
    ctx.save_for_backward(input_ids, prompt_ids)


def _gradients(ctx, dy: Tensor, backward) -> tuple[Tensor | None, ...]:
    need = list(ctx.needs_input_grad[1:3])
    if not any(need):
        return (None,) * 4
    input_ids, prompt_ids = ctx.saved_tensors
    grads = backward(dy, input_ids, prompt_ids, *ctx.sizes, need)
    dtable, dprompt = (g if n else None for g, n in zip(grads, need, strict=True))
    return None, dtable, dprompt, None


torch.library.register_autograd(
    "fusedpeft::soft_prompt_embedding",
    lambda ctx, dy: _gradients(ctx, dy, torch.ops.fusedpeft.soft_prompt_embedding_backward),
    setup_context=_setup_context,
)


class _SoftPrompt(torch.autograd.Function):
    """The same op without the dispatcher: see lora.py."""

    @staticmethod
    def forward(ctx, *args):
        _setup_context(ctx, args, None)
        return _forward(*args)

    @staticmethod
    def backward(ctx, dy):
        return _gradients(ctx, dy, _backward)


# --- public -------------------------------------------------------------------------------------


def _check_ids(name: str, ids: Tensor, size: int) -> None:
    """Reading values on a GPU would stall it: only on request there (FUSEDPEFT_DEBUG=1)."""
    read = ids.device.type == "cpu" or os.environ.get("FUSEDPEFT_DEBUG") == "1"
    if not read or torch.compiler.is_compiling() or ids.numel() == 0:
        return
    low, high = ids.aminmax()
    if low < 0 or high >= size:
        at = _unknown(ids, size).nonzero()[0].tolist()
        raise ValueError(
            f"{name}: expected values in [0, {size}), got {int(ids[tuple(at)])} at {at}"
        )


def _check(input_ids, table, prompt, prompt_ids) -> None:
    named = (("input_ids", input_ids), ("table", table), ("prompt", prompt))
    for name, t in named if prompt_ids is None else (*named, ("prompt_ids", prompt_ids)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(t).__name__}")
    if table.ndim != 2 or 0 in table.shape:
        raise ValueError(f"table: expected [V, d], V and d >= 1, got {tuple(table.shape)}")
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids: expected [B, T], got {tuple(input_ids.shape)}")
    wanted = "[P, d]" if prompt_ids is None else "[n, P, d] (prompt_ids is given)"
    if prompt.ndim != (2 if prompt_ids is None else 3) or prompt.shape[-1] != table.shape[1]:
        raise ValueError(
            f"prompt: expected {wanted} with d = {table.shape[1]} (as table), "
            f"got {tuple(prompt.shape)}"
        )
    if not table.is_floating_point() or prompt.dtype not in (table.dtype, torch.float32):
        raise TypeError(
            f"table, prompt: expected one floating dtype, or a prompt in torch.float32, "
            f"got {table.dtype} and {prompt.dtype}"
        )
    for name, t in (("input_ids", input_ids), ("prompt_ids", prompt_ids)):
        if t is not None and t.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{name}: expected torch.int64 or torch.int32, got {t.dtype}")
    for name, t in (("input_ids", input_ids), ("prompt", prompt), ("prompt_ids", prompt_ids)):
        if t is not None and t.device != table.device:
            raise ValueError(f"{name}: expected device {table.device} (as table), got {t.device}")
    _check_ids("input_ids", input_ids, table.shape[0])
    if prompt_ids is not None:
        if tuple(prompt_ids.shape) != (input_ids.shape[0],):
            raise ValueError(
                f"prompt_ids: expected [B] = [{input_ids.shape[0]}], got {tuple(prompt_ids.shape)}"
            )
        _check_ids("prompt_ids", prompt_ids, prompt.shape[0])


def soft_prompt_embedding(
    input_ids: Tensor, table: Tensor, prompt: Tensor, prompt_ids: Tensor | None = None
) -> Tensor:
    """[prompt ; table[input_ids]]: [B, T] -> [B, P + T, d] in the table's dtype.

    input_ids [B, T] int64 or int32, table [V, d] in fp32, bf16, fp16 (fp64 on ATen), prompt [P, d]
    for every row, or with prompt_ids [B] one of a table of prompts [n, P, d]; in the table's dtype
    or fp32 beside a 16-bit one. P, T or B may be 0.

    dprompt sums dy over the rows that took the prompt, in fp32 and in the order of the batch, so
    the same bits always; a frozen table costs no gradient. Saved for backward: the ids alone.
    Raises TypeError or ValueError with the expected and the given value. On a CPU an id outside its
    table raises; on a GPU its row is NaN unless FUSEDPEFT_DEBUG=1 asks for the check.
    """
    refuse_transforms("soft_prompt_embedding")
    _check(input_ids, table, prompt, prompt_ids)
    args = (input_ids, table, prompt[None] if prompt_ids is None else prompt, prompt_ids)
    if not is_plain((input_ids, table, prompt)):
        return torch.ops.fusedpeft.soft_prompt_embedding(*args)
    if torch.is_grad_enabled() and (table.requires_grad or prompt.requires_grad):
        return _SoftPrompt.apply(*args)
    return _forward(*args)
