"""A DynamicCache that appends in place: a decoded token costs its own keys and values, no copy of
all that came before.

transformers concatenates what a layer holds with what is new, two new tensors a layer at every
token. Here either lies at the front of a buffer with room behind it. What has been written is not
written again, so a tensor once handed out keeps its values: after a crop, a reordering or a copy of
the cache the next token begins a new buffer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import Cache, DynamicCache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from fusedpeft.ops.arguments import is_plain

ROOM = 64  # tokens: a buffer is copied once in so many, and so many at most are unused


def hook(model: nn.Module) -> RemovableHandle:
    """The caches that the model is given without gradients append in place from then on."""
    return model.register_forward_pre_hook(_before, with_kwargs=True)


def _before(model: nn.Module, args: tuple, kwargs: dict) -> None:
    if not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
        for name in ("cache", "past_key_values"):  # transformers' new name and its old one
            append_in_place(kwargs.get(name))


def append_in_place(cache: Cache | None) -> None:
    """Other kinds of caches and of layers stay as they are."""
    if type(cache) is EncoderDecoderCache:  # what is from the encoder does not grow
        cache = cache.self_attention_cache
    if type(cache) is not DynamicCache or cache.offloading:
        return
    for layer in cache.layers:
        if (kind := _KINDS.get(type(layer))) is not None:
            layer.__class__ = kind
    kind = cache.layer_class_to_replicate  # of layers that come with the first tokens
    cache.layer_class_to_replicate = _KINDS.get(kind, kind)


class _Buffer:
    """[B, H, tokens and room, D], of which `used` tokens are written. Copies of a layer share it;
    the first of them to go on has it."""

    def __init__(self, held: Tensor, more: int) -> None:
        batch, heads, self.used, dim = held.shape
        self.capacity = self.used + more + ROOM
        self.all = held.new_empty(batch, heads, self.capacity, dim)
        self.all[:, :, : self.used] = held
        self.sealed = self.all.is_inference()  # outside inference mode, by torch's rule

    def append(self, new: Tensor, more: int) -> None:
        used = self.used
        self.used = used + more
        self.all[:, :, used : used + more] = new


class _End(NamedTuple):
    """Where in a buffer the keys or the values end that a layer holds."""

    buffer: _Buffer
    used: int
    begin: int
    held: Tensor


class _Appending:
    """A layer whose keys and values have buffers; beside each it keeps where that ends."""

    def __setattr__(self, name: str, value: object) -> None:
        if name in ("keys", "values"):  # by a reordering, say: the buffer's memory is free again
            self.__dict__.pop(f"{name}_end", None)
        super().__setattr__(name, value)

    def _appends(self, keys: Tensor, values: Tensor) -> bool:
        """Not with gradients, whose graph keeps tensors, under a compiler, nor for what does not
        fit: that is cat's to do or to refuse."""
        if torch.is_grad_enabled() or not is_plain((keys, values)):
            return False
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        return _fits(self.keys, keys) and _fits(self.values, values)

    def _append(self, name: str, new: Tensor, most: int = 0) -> Tensor:
        """All that the layer holds of `name` and what is new. It then holds this, or with `most`
        the last so many."""
        own, more = self.__dict__, new.shape[2]
        held, end = own[name], own.get(f"{name}_end")
        if end is not None and _goes_on(end, held, more):
            buffer, begin = end.buffer, end.begin
        else:
            buffer, begin = _Buffer(held if held.numel() else new[:, :, :0], more), 0
        buffer.append(new, more)
        used = buffer.used
        whole = held = buffer.all[:, :, begin:used]
        if 0 < most < used - begin:
            begin = used - most
            held = buffer.all[:, :, begin:used]
        own[name], own[f"{name}_end"] = held, _End(buffer, used, begin, held)
        return whole


def _fits(held: Tensor, new: Tensor) -> bool:
    if new.ndim != 4 or held.dtype != new.dtype or held.device != new.device:
        return False
    if type(held) is not Tensor or held.ndim != 4:
        return held.numel() == 0
    (batch, heads, _, dim), of_new = held.shape, new.shape
    return of_new[0] == batch and of_new[1] == heads and of_new[3] == dim


def _goes_on(end: _End, held: Tensor, more: int) -> bool:
    buffer = end.buffer
    return (
        held is end.held
        and buffer.used == end.used
        and end.used + more <= buffer.capacity
        and not (buffer.sealed and not torch.is_inference_mode_enabled())
    )


class AppendingLayer(DynamicLayer, _Appending):
    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        if not self._appends(key_states, value_states):
            return super().update(key_states, value_states, *args, **kwargs)
        return self._append("keys", key_states), self._append("values", value_states)


class AppendingSlidingLayer(DynamicSlidingWindowLayer, _Appending):
    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        prompt = key_states.shape[2] > ROOM  # whose keys behind the window would stay in the buffer
        if prompt or self.record_past or not self._appends(key_states, value_states):
            return super().update(key_states, value_states, *args, **kwargs)
        self.cumulative_length += key_states.shape[2]
        most = self.sliding_window - 1
        return self._append("keys", key_states, most), self._append("values", value_states, most)


_KINDS = {DynamicLayer: AppendingLayer, DynamicSlidingWindowLayer: AppendingSlidingLayer}
