"""Prefix tuning on a model: trained keys and values that stand before every layer's own.

(Li and Liang 2021, "Prefix-Tuning", §4.) They enter through transformers' attention interface into
`ops.prefix_attention`: no cache is filled and nothing is copied by row, so generation without a
cache, gradient checkpointing, sliding windows and LoRA beside it work. Of an encoder-decoder it is
the decoder's self-attention that has one, as in PEFT.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from fusedpeft.errors import InputError
from fusedpeft.layers.attention import CHILD, IMPLEMENTATION
from fusedpeft.layers.config import PrefixTuning
from fusedpeft.layers.routing import check_rows
from fusedpeft.layers.targets import CROSS
from fusedpeft.ops import prefix_attention

_INIT_STD = 0.02  # as in the paper's code


# --- parameters ---------------------------------------------------------------------------------


class LayerPrefix(nn.Module):
    """One layer's share of a prefix: prefix_key, prefix_value [HKV, P, D]."""

    def __init__(self, like: Tensor, shape: tuple[int, int, int]):
        super().__init__()
        dtype = torch.promote_types(like.dtype, torch.float32)
        for name in ("prefix_key", "prefix_value"):
            values = torch.empty(shape, dtype=dtype, device=like.device)
            self.register_parameter(name, nn.Parameter(nn.init.normal_(values, std=_INIT_STD)))


class Projection(nn.Module):
    """A prefix as the output of an MLP over P embeddings, which trains more stably."""

    def __init__(self, like: Tensor, length: int, hidden: int, width: int, out: int):
        super().__init__()
        dtype = torch.promote_types(like.dtype, torch.float32)
        where = {"dtype": dtype, "device": like.device}
        self.embedding = nn.Parameter(torch.empty(length, hidden, **where).normal_(std=_INIT_STD))
        self.down = nn.Linear(hidden, width, **where)
        self.up = nn.Linear(width, out, **where)

    def forward(self) -> Tensor:
        """[P, 2 · layers · HKV · D]: key and value of layer 0, of layer 1, …"""
        return self.up(torch.tanh(self.down(self.embedding)))

    def of_layer(self, i: int, width: int) -> Tensor:
        """[P, width]: what forward() has of layer i."""
        own = slice(i * width, (i + 1) * width)
        hidden = torch.tanh(self.down(self.embedding))
        return F.linear(hidden, self.up.weight[own], self.up.bias[own])


class AttentionPrefixes(nn.Module):
    """A child of each attention module: its share of each prefix, and which one acts."""

    def __init__(self, root: Prefixes, index: int) -> None:
        super().__init__()
        self._root = (root,)  # in a tuple: not its child
        self.index = index  # of the layer
        self.adapters = nn.ModuleDict()
        self.active: str | None = None
        self.folded: dict[str, tuple[Tensor, Tensor]] = {}  # from projections, at each forward
        # Those that were read without gradients though they have some: reentrant checkpointing. It
        # goes back through each layer alone, which the one graph of all layers does not outlive.
        self.alone: set[str] = set()
        self.route: tuple[list[str], Tensor] | None = None  # within `rows`: names, ids into them

    def current(self) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """What `ops.prefix_attention` takes as prefix_k, prefix_v, prefix_ids."""
        if self.route is not None:
            names, ids = self.route
            pairs = [self._pair(name) for name in names]
            return (*(torch.stack(side) for side in zip(*pairs, strict=True)), ids)
        return None if self.active is None else (*self._pair(self.active), None)

    @property
    def by_row(self) -> bool:
        return self.route is not None

    def attend(self, current, q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
        key, value, ids = current
        heads, dim = key.shape[-3], key.shape[-1]
        if k.shape[1::2] != (heads, dim) or v.shape[3] != dim:  # JetMoE's, by its experts
            raise InputError(
                f"PrefixTuning: expected {heads} heads of {dim}, as the config says, got keys "
                f"{[*k.shape]} and values {[*v.shape]}: not supported"
            )
        prefix = key.to(q.dtype), value.to(q.dtype)
        return prefix_attention(q, k, v, *prefix, prefix_ids=ids, **options)

    def bias(self) -> Tensor | None:
        return self._root[0].bias

    def _pair(self, name: str) -> tuple[Tensor, Tensor]:
        if name in self.adapters:
            own = self.adapters[name]
            return own.prefix_key, own.prefix_value
        key, value = self.folded[name]
        if not torch.is_grad_enabled():
            if key.requires_grad:
                self.alone.add(name)
        elif name in self.alone:
            heads, _, dim = key.shape
            flat = self._root[0].projections[name].of_layer(self.index, 2 * heads * dim)
            return split(flat, Shape(1, heads, dim, heads * dim))[0]
        return key, value

    def __getstate__(self) -> dict:  # a copy of the model makes its own
        return {**self.__dict__, "folded": {}, "alone": set()}


class Prefixes(nn.Module):
    """A child of the stack: projections, and how far the tokens' positions are moved."""

    def __init__(self, previous: str, room: int | None, first: nn.Module):
        super().__init__()
        self.projections = nn.ModuleDict()
        self.active: str | None = None
        self.length: int | Tensor = 0  # [B, 1] within `rows`
        self.previous = previous  # the attention implementation before
        self.room = room  # positions that the model has embeddings for, where it has a table
        self.routed: list[str] | None = None
        self.bias: Tensor | None = None  # T5: what the scores of the prefix get, [1, H, T, P]
        # The layer that makes it, if any; in a tuple: not a child.
        self._relative = (first,) if getattr(first, "has_relative_attention_bias", False) else ()
        self._handles: list = []
        self._folded_from: dict[str, tuple] = {}

    def before(self, stack: nn.Module, args: tuple, kwargs: dict) -> None:
        """Before the stack runs: checks, the projections folded, T5's bias."""
        if isinstance(self.length, int) and self.length == 0:
            return
        if stack.config._attn_implementation != IMPLEMENTATION:
            raise InputError(
                f"PrefixTuning: expected the attention {IMPLEMENTATION!r}, which reads the prefix, "
                f"got {stack.config._attn_implementation!r}, set since it was attached"
            )
        given = (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        tokens = next(t for t in given if t is not None)
        if isinstance(self.length, Tensor):
            check_rows(tokens, len(self.length))
        elif self.room is not None and tokens.shape[1] + self.length > self.room:
            raise InputError(
                f"PrefixTuning: expected at most {self.room} positions, as the model has embeddings"
                f" for, got {tokens.shape[1]} tokens behind a prefix of {self.length}"
            )
        for name in [self.active] if self.routed is None else self.routed:
            if name in self.projections:
                self._fold(stack, name)
        if self._relative and isinstance(self.length, int):
            cache = kwargs.get("cache")  # transformers' new name
            cache = kwargs.get("past_key_values") if cache is None else cache
            past = 0 if cache is None else cache.get_seq_length()
            self.bias = self._relative[0].compute_bias(
                tokens.shape[1], self.length, past_seen_tokens=self.length + past
            )

    def _fold(self, stack: nn.Module, name: str) -> None:
        """Every layer's keys and values from the projection.

        Without gradients only when a parameter has been written since: generation is not to pay
        for the MLP at each token.
        """
        projection = self.projections[name]
        parameters = list(projection.parameters())
        grad = torch.is_grad_enabled() and any(p.requires_grad for p in parameters)
        made_from = tuple((p.data_ptr(), p._version) for p in parameters)
        if not grad and self._folded_from.get(name) == made_from:
            return
        layers = attention_layers(stack)
        for layer, pair in zip(layers, split(projection(), shape_of(stack)), strict=True):
            own = getattr(layer, CHILD)
            own.folded[name] = pair
            own.alone.discard(name)
        self._folded_from[name] = () if grad else made_from

    def length_of(self, stack: nn.Module, name: str) -> int:
        if name in self.projections:
            return len(self.projections[name].embedding)
        own = getattr(attention_layers(stack)[0], CHILD).adapters[name]
        return own.prefix_key.shape[1]

    def shift(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Before positions are embedded: the prefix stands at 0 … P − 1."""
        if isinstance(self.length, int) and self.length == 0:
            return args, kwargs
        return shifted(args, kwargs, self.length)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_folded_from": {}, "bias": None}


def flattened(module: nn.Module, args: tuple, output):
    """After positions are embedded: BART's table takes one row for all, [T], and puts a dimension
    before what it is given; positions by row, [B, T], have theirs already."""
    by_row = isinstance(module, nn.Embedding) and output.ndim == 4
    return output[0] if by_row else output


def shifted(args: tuple, kwargs: dict, length: int | Tensor) -> tuple[tuple, dict]:
    """What a module that embeds positions is given, `length` ([B, 1] by row) further on."""
    if "position_ids" in kwargs:
        return args, {**kwargs, "position_ids": kwargs["position_ids"] + length}
    at = len(args) - 1 if len(args) == 1 else 1  # an embedding's (ids), a rotary's (x, ids, …)
    return (*args[:at], args[at] + length, *args[at + 1 :]), kwargs


def split(flat: Tensor, shape: Shape) -> list[tuple[Tensor, Tensor]]:
    """[P, 2 · layers · HKV · D] -> (key, value), each [HKV, P, D], for every layer."""
    parts = flat.view(len(flat), 2 * shape.layers, shape.heads, shape.dim).permute(1, 2, 0, 3)
    each = parts.unbind(0)
    return list(zip(each[0::2], each[1::2], strict=True))


def whole(t: Tensor) -> Tensor:
    """All of a parameter that FSDP2 has sharded: every rank takes part."""
    t = t.detach()
    return t.full_tensor() if isinstance(t, DTensor) else t


def flat_prefix(model: nn.Module, name: str) -> Tensor:
    """A prefix as PEFT keeps it, [P, 2 · layers · HKV · D]."""
    stack = stack_of(model)
    root = getattr(stack, CHILD)
    if name in root.projections:
        return root.projections[name]().detach()
    own = [getattr(layer, CHILD).adapters[name] for layer in attention_layers(stack)]
    pairs = [whole(t) for one in own for t in (one.prefix_key, one.prefix_value)]
    return torch.stack(pairs).permute(2, 0, 1, 3).flatten(1)


def set_prefix(model: nn.Module, name: str, flat: Tensor) -> None:
    """Write a prefix in PEFT's layout into one without a projection."""
    stack = stack_of(model)
    pairs = split(flat, shape_of(stack))
    for layer, (key, value) in zip(attention_layers(stack), pairs, strict=True):
        own = getattr(layer, CHILD).adapters[name]
        with torch.no_grad():
            own.prefix_key.copy_(key)
            own.prefix_value.copy_(value)


# --- the model ----------------------------------------------------------------------------------


class Shape(NamedTuple):
    layers: int
    heads: int  # HKV
    dim: int  # D
    hidden: int


def stack_of(model: nn.Module) -> nn.Module:
    """The module whose layers have the prefix: the backbone, an encoder-decoder's decoder."""
    backbone = getattr(model, "base_model", model)
    two = getattr(getattr(backbone, "config", None), "is_encoder_decoder", False)
    return getattr(backbone, "decoder", backbone) if two else backbone


def attention_layers(stack: nn.Module) -> list[nn.Module]:
    """The self-attention modules, in the order of the layers."""
    found = [
        m
        for path, m in stack.named_modules()
        if type(m).__name__.endswith("Attention")
        and isinstance(getattr(m, "layer_idx", None), int)
        and path.rpartition(".")[2] not in CROSS
        and ".crossattention." not in path
    ]
    return sorted(found, key=lambda m: m.layer_idx)


def shape_of(stack: nn.Module) -> Shape:
    config = stack.config
    decoder = config.is_encoder_decoder or getattr(config, "is_decoder", False)
    of_decoder = decoder and hasattr(config, "decoder_layers")  # BART's one config
    layers = config.decoder_layers if of_decoder else config.num_hidden_layers
    heads = config.decoder_attention_heads if of_decoder else config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    one = 1 if getattr(config, "multi_query", False) else None  # GPTBigCode's
    groups = one or getattr(config, "num_key_value_heads", None) or heads
    return Shape(layers, groups, dim, config.hidden_size)


def positions_of(stack: nn.Module) -> list[nn.Module]:
    """The modules that turn positions into rotations or embeddings."""
    ends = ("rotary_emb", "wpe", "position_embeddings", "embed_positions")
    return [m for path, m in stack.named_modules() if path.rpartition(".")[2] in ends]


def room_of(stack: nn.Module) -> int | None:
    """Positions that a table of embeddings has rows for."""
    for table in positions_of(stack):
        if isinstance(table, nn.Embedding):
            unused = 0 if table.padding_idx is None else table.padding_idx + 1  # RoBERTa's
            return table.num_embeddings - getattr(table, "offset", unused)  # BART's
    return None


def plan(model: nn.Module, config: PrefixTuning, strict: bool) -> None:
    kind = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise InputError(f"PrefixTuning: expected a model of transformers, got {kind}")
    if not model._can_set_attn_implementation():
        raise InputError(
            f"PrefixTuning: {kind} does not take its attention from transformers' interface, so "
            "a prefix cannot reach it"
        )
    stack = stack_of(model)
    if not all(
        hasattr(stack.config, f"num_{name}") for name in ("hidden_layers", "attention_heads")
    ):
        raise InputError(
            f"PrefixTuning: expected a model of text with attention in its layers, got {kind}, "
            "whose config has no num_hidden_layers or no num_attention_heads"
        )
    layers, shape = attention_layers(stack), shape_of(stack)
    if len(layers) != shape.layers:
        raise InputError(
            f"PrefixTuning: expected {shape.layers} self-attention layers in {kind}, found "
            f"{len(layers)}"
        )
    for name in ("attn_logit_softcapping", "sinks", "lambda_q1"):  # the last is DiffLlama's
        if getattr(model.config, name, None) or hasattr(layers[0], name):
            raise InputError(f"PrefixTuning: {kind} has {name}, which the prefix kernels do not do")
    for layer in layers:
        _check_layer(model, stack, layer, shape)
        names = ("k_proj", "key", "k")
        key = next((m for n in names if (m := getattr(layer, n, None)) is not None), None)
        out = getattr(key, "out_features", shape.heads * shape.dim)
        if out != shape.heads * shape.dim:
            raise InputError(
                f"PrefixTuning: expected {shape.heads} key heads of {shape.dim} in every layer of "
                f"{kind}, layer {layer.layer_idx} has {out} features"
            )
    if not positions_of(stack) and not hasattr(layers[0], "has_relative_attention_bias"):
        raise InputError(
            f"PrefixTuning: expected embeddings of positions, rotary or a table, in {kind}, which "
            "a prefix moves, found none"
        )


def _check_layer(model: nn.Module, stack: nn.Module, layer: nn.Module, shape: Shape) -> None:
    """Raises InputError for attention that would pass the prefix by, or see what it must not."""
    at = f"PrefixTuning: layer {layer.layer_idx} of {type(model).__name__}, {type(layer).__name__},"
    if "ALL_ATTENTION_FUNCTIONS" not in inspect.unwrap(type(layer).forward).__code__.co_names:
        raise InputError(f"{at} goes around transformers' interface: a prefix cannot reach it")
    dims = [getattr(layer, name, shape.dim) for name in ("qk_head_dim", "v_head_dim")]
    if dims != [shape.dim] * 2:  # latent attention: DeepSeek
        raise InputError(f"{at} expected keys and values of {shape.dim} a head, got {dims}")
    if model.can_generate() and not (stack._supports_sdpa or getattr(layer, "is_causal", True)):
        raise InputError(f"{at} does not say that it is causal, by which the fused op goes")


def _set_attention(model: nn.Module, stack: nn.Module, name: str) -> None:
    model.set_attn_implementation(name)
    if stack.config._attn_implementation != name:  # T5's stacks have copies of the model's config
        stack.set_attn_implementation(name)


def add(model: nn.Module, config: PrefixTuning, name: str, planned: None) -> None:
    stack = stack_of(model)
    layers, shape = attention_layers(stack), shape_of(stack)
    root = getattr(stack, CHILD, None)
    if root is None:
        root = Prefixes(model.config._attn_implementation, room_of(stack), layers[0])
        root._handles = [stack.register_forward_pre_hook(root.before, with_kwargs=True)]
        for module in positions_of(stack):
            root._handles.append(module.register_forward_pre_hook(root.shift, with_kwargs=True))
            root._handles.append(module.register_forward_hook(flattened))
        stack.add_module(CHILD, root.train(stack.training))
        for i, layer in enumerate(layers):
            layer.add_module(CHILD, AttentionPrefixes(root, i).train(layer.training))
        _set_attention(model, stack, IMPLEMENTATION)
    like = next(layers[0].parameters())
    if config.projection is None:
        for layer in layers:
            own = LayerPrefix(like, (shape.heads, config.length, shape.dim))
            getattr(layer, CHILD).adapters[name] = own.train(layer.training)
        return
    out = 2 * shape.layers * shape.heads * shape.dim
    root.projections[name] = Projection(
        like, config.length, shape.hidden, config.projection, out
    ).train(stack.training)


def check_together(wanted: Mapping[str, PrefixTuning]) -> None:
    if len(wanted) > 1:
        raise InputError(f"one prefix acts at a time: expected one of {list(wanted)}")


def activate(model: nn.Module, names: Sequence[str]) -> None:
    stack = stack_of(model)
    root = getattr(stack, CHILD, None)
    if root is None:
        return
    root.active = names[0] if names else None
    root.length = root.length_of(stack, root.active) if names else 0
    for key, projection in root.projections.items():
        projection.requires_grad_(key == root.active)
    for layer in attention_layers(stack):
        own = getattr(layer, CHILD)
        own.active = root.active
        for key, prefix in own.adapters.items():
            prefix.requires_grad_(key == root.active)


def route(model: nn.Module, names: Sequence[str | None] | None) -> None:
    stack = stack_of(model)
    root = getattr(stack, CHILD, None)
    if root is None:
        return
    order = list(dict.fromkeys(n for n in names or () if n is not None))
    lengths = {name: root.length_of(stack, name) for name in order}
    if len(set(lengths.values())) > 1:
        raise InputError(f"rows: expected prefixes of one length, got {lengths}")
    layers = attention_layers(stack)
    device = next(layers[0].parameters()).device
    chosen = None
    root.length = 0 if root.active is None else root.length_of(stack, root.active)
    root.routed = None if names is None else order
    if names is not None:
        ids = torch.tensor([-1 if n is None else order.index(n) for n in names], device=device)
        own = torch.tensor([lengths.get(n, 0) for n in names], device=device)
        root.length, chosen = own[:, None] if order else 0, (order, ids)
    for layer in layers:
        child = getattr(layer, CHILD)
        child.route = chosen if order else None
        child.active = root.active if names is None else None


def remove(model: nn.Module, name: str) -> None:
    stack = stack_of(model)
    root = getattr(stack, CHILD)
    layers = attention_layers(stack)
    root.projections.pop(name) if name in root.projections else None
    for layer in layers:
        own = getattr(layer, CHILD)
        own.adapters.pop(name) if name in own.adapters else None
    if root.projections or getattr(layers[0], CHILD).adapters:
        return
    for handle in root._handles:
        handle.remove()
    for module in (stack, *layers):
        delattr(module, CHILD)
    _set_attention(model, stack, root.previous)
