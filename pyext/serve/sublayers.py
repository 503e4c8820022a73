"""What a served model computes beside its linears: bottleneck adapters, prefixes and soft prompts,
each row of a batch its own.

Rows may differ in all of it: a prefix of 8 beside one of 32 and a row without. Prefixes of one
length go into one call of attention, in decode all of them do. Soft prompts are aligned at their
ends: what a shorter one lacks in front is hidden, as padding on the left is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fusedpeft.errors import InputError
from fusedpeft.layers import bottleneck, prefix, prompt
from fusedpeft.layers.attention import CHILD, IMPLEMENTATION
from fusedpeft.layers.config import BottleneckAdapter
from fusedpeft.ops.multi_adapter import multi_bottleneck_adapter
from fusedpeft.ops.prefix_attention import prefix_attention
from fusedpeft.ops.prefix_attention_checks import MAX_DECODE_QUERIES
from fusedpeft.ops.prefix_decode import prefix_decode_attention
from fusedpeft.ops.slots import AdapterSlots, PrefixSlots, PromptSlots

if TYPE_CHECKING:
    from fusedpeft.serve.modules import Batch, Current
    from fusedpeft.serve.pool import AdapterPool


def install_sublayers(model: nn.Module, pool: AdapterPool, here: Current, undo: ExitStack) -> None:
    """undo: takes what makes the model as it was."""
    paths = {module: path for path, module in model.named_modules()}

    def found(module: nn.Module, kind: str) -> tuple:
        path = paths[module]
        return here, pool.at(path, kind=kind), pool.column(kind, path)

    if pool.bottleneck is not None:
        _install_bottlenecks(model, pool.bottleneck, found, undo)
    if pool.has("prefix"):
        _install_prefixes(model, found, undo)
    if pool.has("prompt"):
        _install_prompts(model, found, undo)


class _Served:
    """One place of the model, and what the batch has there."""

    def __init__(self, here: Current, slots, column: int) -> None:
        self.here, self.pool, self.column = here, slots, column

    def batch(self) -> Batch | None:
        """None where no row has an adapter here."""
        batch = self.here.batch
        return batch if batch is not None and any(self.lengths(batch)) else None

    def lengths(self, batch: Batch) -> list[int]:
        key = (self, "lengths")
        if key not in batch.made:
            batch.made[key] = batch.lengths(self.column)
        return batch.made[key]


def _check_rows(batch: Batch, rows: int) -> None:
    if rows != len(batch.sizes):
        raise ValueError(
            f"batch: expected {len(batch.sizes)} rows, one for each name, got {rows}: prefixes and "
            "prompts go by the rows of a batch"
        )


# --- bottleneck adapters ------------------------------------------------------------------------


class _Bottleneck(bottleneck.Hooks, _Served):
    pool: AdapterSlots

    def __init__(self, config: BottleneckAdapter, *where) -> None:
        _Served.__init__(self, *where)
        self.options = {"activation": config.activation, "norm": config.norm}

    def steps(self) -> Sequence[Callable[[Tensor, Tensor], Tensor]]:
        return () if self.batch() is None else (self._each_row,)

    def _each_row(self, x: Tensor, residual: Tensor) -> Tensor:
        slots = self.here.batch.of(x)
        return multi_bottleneck_adapter(x, self.pool, slots, residual=residual, **self.options)

    @property
    def _stream(self) -> Tensor | None:  # a batch's own
        return self.here.batch.stream

    @_stream.setter
    def _stream(self, x: Tensor | None) -> None:
        self.here.batch.stream = x


def _install_bottlenecks(model, config: BottleneckAdapter, found, undo: ExitStack) -> None:
    for block in bottleneck.blocks(model):
        for module, hook, _ in bottleneck.places(block, config.placement):
            served = _Bottleneck(config, *found(module, "bottleneck"))
            for handle in served.hook(module, block, hook):
                undo.callback(handle.remove)


# --- prefixes -----------------------------------------------------------------------------------


class _Prefix(_Served):
    """What `layers/attention.py` asks of an attention module's prefixes."""

    pool: PrefixSlots
    by_row = True

    def current(self) -> Batch | None:
        return self.batch()

    def attend(self, batch: Batch, q: Tensor, k: Tensor, v: Tensor, *, causal, scale, mask):
        pool, slots = self._table(batch, q.dtype)
        tokens = q.shape[2]
        if mask is None and tokens <= MAX_DECODE_QUERIES and (causal or tokens == 1):
            return prefix_decode_attention(q, k, v, pool, slots, scale=scale)
        out = torch.empty_like(q)
        for length, rows in self._by_length(batch, q.device):
            options = {"causal": causal, "scale": scale}
            given, ids = (q, k, v), slots
            if rows is not None:
                given, ids = [t.index_select(0, rows) for t in given], slots.index_select(0, rows)
            if mask is not None:
                whole = rows is None or mask.shape[0] == 1
                options["mask"] = mask if whole else mask.index_select(0, rows)
            sides = (side[:, :, :length] for side in (pool.k, pool.v))
            part = prefix_attention(*given, *sides, prefix_ids=ids, **options)
            if rows is None:
                return part
            out.index_copy_(0, rows, part)
        return out

    def _table(self, batch: Batch, dtype: torch.dtype) -> tuple[PrefixSlots, Tensor]:
        """The pool's prefixes and the row's slots. Beside a pool in fp32 a model in 16 bits has
        those that this batch names in its own dtype, cast once."""
        if self.pool.k.dtype == dtype:
            return self.pool, batch.slots
        key = (self, dtype)
        if key not in batch.made:
            named, ids = batch.slots.clamp(min=0).unique(return_inverse=True)
            k, v, length = (t.index_select(0, named) for t in self.pool)
            ids = ids.to(torch.int32).masked_fill(batch.slots < 0, -1)
            batch.made[key] = PrefixSlots(k.to(dtype), v.to(dtype), length), ids
        return batch.made[key]

    def _by_length(self, batch: Batch, device: torch.device) -> list[tuple[int, Tensor | None]]:
        """(length, rows that have it), None for all."""
        key = (self, "rows")
        if key not in batch.made:
            lengths = self.lengths(batch)
            batch.made[key] = [
                (one, torch.tensor([i for i, n in enumerate(lengths) if n == one], device=device))
                for one in sorted(set(lengths))
            ] if len(set(lengths)) > 1 else [(lengths[0], None)]  # fmt: skip
        return batch.made[key]


class _Positions:
    """Moves each row's tokens behind its prefix, before positions are embedded."""

    def __init__(self, layers: list[_Prefix], room: int | None) -> None:
        self.layers, self.room = layers, room

    def before(self, stack: nn.Module, args: tuple, kwargs: dict) -> None:
        batch = self.layers[0].here.batch
        longest = 0
        if batch is not None:
            longest = max(max(one.lengths(batch), default=0) for one in self.layers)
        if longest:
            if stack.config._attn_implementation != IMPLEMENTATION:
                raise InputError(
                    f"batch: expected the attention {IMPLEMENTATION!r} that serves prefixes, got "
                    f"{stack.config._attn_implementation!r}, set since the pool was installed"
                )
            given = (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
            rows, tokens = next(t for t in given if t is not None).shape[:2]
            _check_rows(batch, rows)
            if self.room is not None and tokens + longest > self.room:
                raise InputError(
                    f"batch: expected at most {self.room} positions, as the model has embeddings "
                    f"for, got {tokens} tokens behind a prefix of {longest}"
                )

    def shift(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        batch = self.layers[0].here.batch
        if batch is None:
            return args, kwargs
        if self not in batch.made:
            # An adapter may have a prefix in some layers alone: its longest one counts.
            each = zip(*(layer.lengths(batch) for layer in self.layers), strict=True)
            lengths = [max(row) for row in each]
            moved = torch.tensor(lengths, device=batch.slots.device)[:, None]
            batch.made[self] = moved if any(lengths) else None
        moved = batch.made[self]
        return (args, kwargs) if moved is None else prefix.shifted(args, kwargs, moved)


def _install_prefixes(model: nn.Module, found, undo: ExitStack) -> None:
    stack, before = model.base_model, model.config._attn_implementation
    served = []
    for layer in prefix.attention_layers(stack):
        served.append(_Prefix(*found(layer, "prefix")))
        setattr(layer, CHILD, served[-1])
        undo.callback(delattr, layer, CHILD)
    positions = _Positions(served, prefix.room_of(stack))
    undo.callback(stack.register_forward_pre_hook(positions.before, with_kwargs=True).remove)
    for module in prefix.positions_of(stack):
        for handle in (
            module.register_forward_pre_hook(positions.shift, with_kwargs=True),
            module.register_forward_hook(prefix.flattened),
        ):
            undo.callback(handle.remove)
    undo.callback(model.set_attn_implementation, before)
    model.set_attn_implementation(IMPLEMENTATION)


# --- soft prompts -------------------------------------------------------------------------------


class _Prompts(_Served):
    """Around the stack of layers: its rows run over prompt and tokens, and give back the tokens."""

    pool: PromptSlots

    def __init__(self, stack: nn.Module, *where) -> None:
        super().__init__(*where)
        self.names = tuple(inspect.signature(stack.forward).parameters)
        self.room = prefix.room_of(stack)

    def before(self, stack: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if (here := self.here.batch) is not None and here.cached:
            return args, kwargs
        batch = self.batch()
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        lengths = [0] if batch is None else self.lengths(batch)
        most, cache = max(lengths), prompt.cache_in(given)
        first = prompt.begins("batch", cache, most)
        if batch is None:
            return args, kwargs
        batch.cut = 0
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        tokens = ids if embeds is None else embeds
        rows, count = tokens.shape[:2]
        _check_rows(batch, rows)
        prompt.check_room("batch", self.room, count, most)
        prompt.widen_types(given, most)
        past = 0 if first else cache.get_seq_length()
        own, front = self._front(batch, lengths, most)
        mask, positions = given.get("attention_mask"), given.get("position_ids")
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
            raise InputError("batch: expected an attention_mask [B, T] beside prompts, got another")
        if mask is not None or min(lengths) < most:
            if mask is None:
                mask = front.new_ones(rows, count + (past - most if past else 0))
            given["attention_mask"] = torch.cat(((front >= 0).to(mask.dtype), mask), 1)
        if positions is None:
            start = past - most if past else 0
            positions = torch.arange(start, start + count, device=tokens.device)[None]
        positions = positions + own
        given.pop("cache_position", None)  # the stack counts for itself
        if past:
            return (), {**given, "position_ids": positions}
        prompt.make_room(cache, most)
        given["position_ids"] = torch.cat((front.clamp(min=0), positions), 1)
        given["input_ids"] = None
        embeds = stack.get_input_embeddings()(ids) if embeds is None else embeds
        at = batch.slots.long().clamp(min=0)[:, None], front.clamp(min=0)
        virtual = self.pool.prompt[at].to(embeds.dtype).masked_fill((front < 0)[..., None], 0.0)
        given["inputs_embeds"] = torch.cat((virtual, embeds), 1)
        batch.cut = most
        return (), given

    def _front(self, batch: Batch, lengths: list[int], most: int) -> tuple[Tensor, Tensor]:
        """[B, 1] the length of each row's prompt; [B, most] which of its tokens stands where, < 0
        for none."""
        key = (self, "front")
        if key not in batch.made:
            own = torch.tensor(lengths, device=batch.slots.device)[:, None]
            batch.made[key] = own, torch.arange(most, device=own.device) - (most - own)
        return batch.made[key]

    def after(self, stack: nn.Module, args: tuple, output):
        batch = self.batch()
        return output if batch is None else prompt.without_front(output, batch.cut)


def _install_prompts(model: nn.Module, found, undo: ExitStack) -> None:
    stack = prompt.stack_of(model)
    served = _Prompts(stack, *found(model.get_input_embeddings(), "prompt"))
    handles = (
        stack.register_forward_pre_hook(served.before, with_kwargs=True, prepend=True),
        stack.register_forward_hook(served.after),
    )
    for handle in handles:
        undo.callback(handle.remove)
    model.create_masks_for_generate = prompt.keep_mask
    undo.callback(delattr, model, "create_masks_for_generate")
    model.prepare_inputs_for_generation = prompt.Continue(model)
    undo.callback(delattr, model, "prepare_inputs_for_generation")
