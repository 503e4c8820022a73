"""Prompt tuning on a model: trained embeddings before those of the tokens.

(Lester et al. 2021, §2.) The backbone runs over P + T positions and gives back the last T, so that
logits and labels stay one for each token. Of an encoder-decoder it is the encoder that reads the
prompt, and the decoder attends to all P + T, as in PEFT. A classifier that reads an encoder's first
position (BERT, RoBERTa) reads the prompt's first, as in PEFT.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, Cache, PreTrainedModel

from fusedpeft.errors import InputError
from fusedpeft.layers.config import PromptTuning
from fusedpeft.layers.prefix import attention_layers, room_of
from fusedpeft.ops import soft_prompt_embedding

_CHILD = "fusedpeft_prompt"
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")  # what a tokenizer that is no folder is named by


class Prompts(nn.Module):
    """A child of the stack: the prompts [P, d] by name, and which one acts."""

    def __init__(self, stack: nn.Module, keeps: bool):
        super().__init__()
        self.keeps = keeps  # what the prompt became is read by what follows the stack
        self.room = room_of(stack)
        self.prompts = nn.ParameterDict()
        self.active: str | None = None
        self._names = tuple(inspect.signature(stack.forward).parameters)
        self._cut = 0  # positions in front that this call is to give back without
        self._handles: list = []

    def before(self, stack: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        self._cut = 0
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        cache = cache_in(given)
        length = 0 if self.active is None else len(self.prompts[self.active])
        first = begins("PromptTuning", cache, length)
        if self.active is None:
            return args, kwargs
        prompt, ids, embeds = (
            self.prompts[self.active], given.get("input_ids"), given.get("inputs_embeds")
        )  # fmt: skip
        tokens = (ids if embeds is None else embeds).shape[1]
        check_room("PromptTuning", self.room, tokens, length)
        mask, positions = given.get("attention_mask"), given.get("position_ids")
        if mask is not None:
            if not isinstance(mask, Tensor) or mask.ndim != 2:
                raise InputError("PromptTuning: expected an attention_mask [B, T], got another")
            given["attention_mask"] = torch.cat((mask.new_ones(len(mask), length), mask), 1)
        if positions is not None:
            positions = positions + length
            if first:
                front = torch.arange(length, device=positions.device, dtype=positions.dtype)
                # [B, T], or Qwen-VL's [3, B, T]
                positions = torch.cat((front.expand(*positions.shape[:-1], -1), positions), -1)
            given["position_ids"] = positions
        widen_types(given, length)
        given.pop("cache_position", None)  # the stack counts for itself
        if not first:
            return (), given
        if any(given.get(f"{what}_grid_thw") is not None for what in ("image", "video")):
            raise InputError(
                "PromptTuning: expected text alone: the positions of images come from input_ids, "
                "in whose place a prompt's embeddings go"
            )
        make_room(cache, length)
        given["input_ids"] = None
        given["inputs_embeds"] = _embed(stack.get_input_embeddings(), ids, embeds, prompt)
        self._cut = 0 if self.keeps else length
        return (), given

    def after(self, stack: nn.Module, args: tuple, output):
        return without_front(output, self._cut)

    def widen(self, decoder: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Before a decoder: the mask over the encoder's T positions lets the prompt's be seen."""
        mask, states = kwargs.get("encoder_attention_mask"), kwargs.get("encoder_hidden_states")
        if self.active is None or mask is None or states is None:
            return args, kwargs
        front = mask.new_ones(len(mask), states.shape[1] - mask.shape[1])
        return args, {**kwargs, "encoder_attention_mask": torch.cat((front, mask), 1)}


def check_room(who: str, room: int | None, tokens: int, length: int) -> None:
    if room is not None and tokens + length > room:
        raise InputError(
            f"{who}: expected at most {room} positions, as the model has embeddings for, got "
            f"{tokens} tokens behind a prompt of {length}"
        )


def widen_types(given: dict, length: int) -> None:
    if (types := given.get("token_type_ids")) is not None:
        given["token_type_ids"] = torch.cat((types.new_zeros(len(types), length), types), 1)


def without_front(output, length: int):
    """What a stack gives back, less the first `length` positions; its cache knows of them."""
    if not length:
        return output
    for part in output if isinstance(output, tuple) else output.values():
        if isinstance(part, Cache):
            setattr(part, _CHILD, length)
    if isinstance(output, tuple):
        return (output[0][:, length:], *output[1:])
    if (gates := output.get("router_logits")) is not None:  # [B·(P+T), experts] each
        rows = len(output.last_hidden_state)
        cut = [g.unflatten(0, (rows, -1))[:, length:].flatten(0, 1) for g in gates]
        output.router_logits = tuple(cut)
    output.last_hidden_state = output.last_hidden_state[:, length:]
    if (states := output.get("hidden_states")) is not None:
        output.hidden_states = tuple(t[:, length:] for t in states)
    return output


def keep_mask(*, attention_mask: Tensor | None = None, **_) -> Tensor | None:
    """What generate() is to pass on beside a static cache: [B, T], which the prompt can go before,
    and not the four dimensions that it makes of it."""
    return attention_mask


class Continue:
    """A model's prepare_inputs_for_generation. What follows a filled cache, generate() counts from
    the cache's length, in which the prompt's positions are and its tokens are not."""

    def __init__(self, model: nn.Module):
        self.model = model

    @property
    def __signature__(self) -> inspect.Signature:  # generate() looks for names in it
        return inspect.signature(type(self.model).prepare_inputs_for_generation)

    def __call__(self, input_ids: Tensor, **kwargs) -> dict:
        count, cache = kwargs.get("next_sequence_length"), cache_in(kwargs)
        if count is not None and cache is not None:
            embeds = kwargs.get("inputs_embeds") if kwargs.get("is_first_iteration") else None
            total = (input_ids if embeds is None else embeds).shape[1]
            if count == total - cache.get_seq_length() < total:
                kwargs["next_sequence_length"] = count + getattr(cache, _CHILD, 0)
        own = type(self.model).prepare_inputs_for_generation
        return own(self.model, input_ids, **kwargs)


def cache_in(kwargs: Mapping) -> Cache | None:
    """The cache among the arguments, under transformers' new name or its old one."""
    cache = kwargs.get("cache")
    return kwargs.get("past_key_values") if cache is None else cache


def begins(who: str, cache: Cache | None, length: int) -> bool:
    """Whether a prompt of `length` is still to go before what the cache will hold. Raises
    InputError for a cache that was filled behind one of another length, or behind none."""
    if cache is None or cache.get_seq_length() == 0:
        if hasattr(cache, _CHILD):  # filled again, perhaps without a prompt
            delattr(cache, _CHILD)
        return True
    if (got := getattr(cache, _CHILD, 0)) != length:
        raise InputError(
            f"{who}: expected a cache that was filled behind a prompt of {length}, as acts now, "
            f"got one of {got}: give the whole text with a new cache"
        )
    return False


def make_room(cache, length: int) -> None:
    """Static caches are sized for the tokens before the prompt is known: `length` more, while they
    have allocated nothing yet. One that slides may then hold more than its window: the mask, which
    goes by positions, hides the rest."""
    for layer in getattr(cache, "layers", ()):
        if not hasattr(layer, "max_cache_len") or getattr(layer, _CHILD, 0) >= length:
            continue
        if layer.is_initialized:
            kind = type(layer).__name__
            raise InputError(
                f"PromptTuning: expected a new cache, or one that grows, got a {kind} without room "
                f"for the {length} positions of the prompt"
            )
        layer.max_cache_len += length - getattr(layer, _CHILD, 0)
        setattr(layer, _CHILD, length)


def _embed(embedding: nn.Module, ids: Tensor | None, embeds: Tensor | None, prompt: Tensor):
    """[B, T] ids (or [B, T, d] embeddings) -> [B, P + T, d]."""
    plain = type(embedding) is nn.Embedding and not embedding.padding_idx
    plain = plain and not embedding._forward_hooks and not embedding._forward_pre_hooks
    if ids is not None and plain and embedding.max_norm is None:
        return soft_prompt_embedding(ids, embedding.weight, prompt.to(embedding.weight.dtype))
    embeds = embedding(ids) if embeds is None else embeds  # Gemma's scales, others' have hooks
    return torch.cat((prompt.to(embeds.dtype).expand(len(embeds), -1, -1), embeds), 1)


# --- the method ---------------------------------------------------------------------------------


def stack_of(model: nn.Module) -> nn.Module:
    """The module that embeds the tokens: the backbone, an encoder-decoder's encoder, or a decoder
    in a backbone that OPT's and BART's causal models go around."""
    backbone = getattr(model, "base_model", model)
    if getattr(getattr(backbone, "config", None), "is_encoder_decoder", False):
        return getattr(backbone, "encoder", backbone)
    inner = getattr(backbone, "decoder", None)
    return inner if isinstance(inner, PreTrainedModel) else backbone


def is_encoder(model: nn.Module) -> bool:
    """Whether every token attends to every other one."""
    causal = any(getattr(m, "is_causal", False) for m in attention_layers(stack_of(model)))
    return not causal and not model.can_generate()  # Bloom's attention does not say


def reads_first(model: nn.Module) -> bool:
    """Whether what follows the stack reads its first position."""
    return is_encoder(model) and type(model).__name__.endswith("ForSequenceClassification")


def plan(model: nn.Module, config: PromptTuning, strict: bool) -> Tensor:
    """The prompt's first values [P, d]."""
    kind = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise InputError(f"PromptTuning: expected a model of transformers, got {kind}")
    stack = stack_of(model)
    embedding = stack.get_input_embeddings() if hasattr(stack, "get_input_embeddings") else None
    weight = getattr(embedding, "weight", None)
    if stack is model and model.config.is_encoder_decoder:
        raise InputError(f"PromptTuning: expected an encoder and a decoder in {kind}, found none")
    if weight is None or weight.ndim != 2 or not list(attention_layers(stack)):
        raise InputError(
            f"PromptTuning: expected a model of text, with embeddings of tokens, in {kind}"
        )
    if "inputs_embeds" not in inspect.signature(stack.forward).parameters:
        raise InputError(f"PromptTuning: expected {type(stack).__name__} to take inputs_embeds")
    vocabulary, hidden = weight.shape
    dtype = torch.promote_types(weight.dtype, torch.float32)
    if config.init == "random":
        ids = torch.arange(vocabulary, device=weight.device)
    elif config.init == "vocab":
        ids = torch.randint(vocabulary, (config.length,), device=weight.device)
    else:
        ids = _text_ids(config, vocabulary).to(weight.device)
    with torch.no_grad():
        values = embedding(ids).to(dtype)  # Gemma's and BART's scale what they look up
    if config.init == "random":
        return values.new_empty(config.length, hidden).normal_() * values.std()
    return values


def _text_ids(config: PromptTuning, vocabulary: int) -> Tensor:
    tokenizer = config.tokenizer
    if not callable(tokenizer):
        if not _HUB_NAME.fullmatch(str(tokenizer)) and not os.path.exists(tokenizer):
            raise InputError(
                f"PromptTuning tokenizer: expected a folder with one, got {str(tokenizer)!r}, "
                "which does not exist"
            )
        try:
            tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        except (OSError, ValueError) as error:
            why = str(error).splitlines()[0]
            raise InputError(
                f"PromptTuning tokenizer: cannot load {config.tokenizer!r}: {why}"
            ) from error
    ids = torch.tensor(tokenizer(config.init_text, add_special_tokens=False)["input_ids"])
    if not ids.numel():
        raise InputError(f"PromptTuning init_text: {config.init_text!r} has no token")
    if ids.max() >= vocabulary:
        raise InputError(
            f"PromptTuning tokenizer: expected ids below {vocabulary}, as the model's embeddings, "
            f"got {int(ids.max())}: the tokenizer is another model's"
        )
    return ids.repeat(-(-config.length // len(ids)))[: config.length]


def add(model: nn.Module, config: PromptTuning, name: str, values: Tensor) -> None:
    stack = stack_of(model)
    root = getattr(stack, _CHILD, None)
    if root is None:
        two = model.config.is_encoder_decoder
        root = Prompts(stack, keeps=two or reads_first(model))
        root._handles = [
            stack.register_forward_pre_hook(root.before, with_kwargs=True, prepend=True),
            stack.register_forward_hook(root.after),
        ]
        stack.add_module(_CHILD, root.train(stack.training))
        if two:
            decoder = model.base_model.decoder
            root._handles.append(decoder.register_forward_pre_hook(root.widen, with_kwargs=True))
        else:
            model.create_masks_for_generate = keep_mask
            model.prepare_inputs_for_generation = Continue(model)
    root.prompts[name] = nn.Parameter(values)


def check_together(wanted: Mapping[str, PromptTuning]) -> None:
    if len(wanted) > 1:
        raise InputError(f"one prompt acts at a time: expected one of {list(wanted)}")


def activate(model: nn.Module, names: Sequence[str]) -> None:
    root = getattr(stack_of(model), _CHILD, None)
    if root is None:
        return
    root.active = names[0] if names else None
    for key, parameter in root.prompts.items():
        parameter.requires_grad_(key == root.active)


def remove(model: nn.Module, name: str) -> None:
    stack = stack_of(model)
    root = getattr(stack, _CHILD)
    del root.prompts[name]
    if not root.prompts:
        for handle in root._handles:
            handle.remove()
        delattr(stack, _CHILD)
        for name in ("create_masks_for_generate", "prepare_inputs_for_generation"):
            model.__dict__.pop(name, None)


def prompt_of(model: nn.Module, name: str) -> nn.Parameter:
    """The parameter [P, d]."""
    return getattr(stack_of(model), _CHILD).prompts[name]
