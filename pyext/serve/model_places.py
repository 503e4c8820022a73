"""Which places a Hugging Face model has for adapters."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

from torch import nn
from transformers.pytorch_utils import Conv1D

from fusedpeft.errors import InputError
from fusedpeft.layers import bottleneck, prefix, prompt
from fusedpeft.layers.config import BottleneckAdapter, PrefixTuning, PromptTuning
from fusedpeft.layers.targets import SIBLINGS, match_targets
from fusedpeft.serve.places import Places


def width(linear: nn.Module) -> tuple[int, int]:
    """(N, K) of an nn.Linear or a Conv1D."""
    n, k = linear.weight.shape
    return (k, n) if isinstance(linear, Conv1D) else (n, k)


def places_of(
    model: nn.Module,
    slots: int,
    targets: str | tuple[str, ...],
    max_rank: int,
    max_prefix: int,
    max_prompt: int,
    adapter: BottleneckAdapter | None,
) -> Places:
    """The places that a model has for the kinds asked for (0, None: none). Raises InputError."""
    places = Places(slots)
    if max_rank:
        linears = match_targets(model, targets)
        for paths in stacks(linears):
            sizes = tuple(width(linears[p])[0] for p in paths)
            places.add_lora(paths, sizes, width(linears[paths[0]])[1], max_rank)
    if (max_prefix or max_prompt) and getattr(model.config, "is_encoder_decoder", False):
        raise InputError(
            f"for_model: prefixes and prompts are served of decoders and encoders alone, "
            f"{type(model).__name__} has both: expected max_prefix 0 and max_prompt 0"
        )
    paths = {module: path for path, module in model.named_modules()}
    if max_prefix:
        prefix.plan(model, PrefixTuning(max_prefix), True)
        layers, shape = prefix.attention_layers(model.base_model), prefix.shape_of(model.base_model)
        if hasattr(layers[0], "has_relative_attention_bias"):
            raise InputError(
                f"for_model: expected rotations or a table of positions where prefixes are served "
                f"by row, {type(model).__name__} has a bias of relative ones"
            )
        for layer in layers:
            places.add_prefix(paths[layer], shape.heads, shape.dim, max_prefix)
    if max_prompt:
        prompt.plan(model, PromptTuning(max_prompt), True)
        if prompt.is_encoder(model):
            raise InputError(
                f"for_model: prompts are served of decoders, {type(model).__name__} is an encoder: "
                "expected max_prompt 0"
            )
        stack = prompt.stack_of(model)
        taken = inspect.signature(stack.forward).parameters
        if prefix.room_of(stack) is not None and "position_ids" not in taken:
            raise InputError(
                f"for_model: prompts by row need positions by row, and {type(stack).__name__} "
                "counts its own: expected max_prompt 0"
            )
        table = model.get_input_embeddings()
        places.add_prompt(paths[table], table.weight.shape[1], max_prompt)
    if adapter is not None:
        places.bottleneck, d = adapter, model.config.hidden_size
        norms = ("norm_w", "norm_b")[: {None: 0, "rms_norm": 1, "layer_norm": 2}[adapter.norm]]
        for block in bottleneck.plan(model, adapter, True):
            for module, _, hub in bottleneck.places(block, adapter.placement):
                places.add_bottleneck(paths[module], d, adapter.size, norms)
                places.hub[f"{block.path}.{hub}"] = paths[module]
    return places


def stacks(linears: Mapping[str, nn.Module]) -> list[tuple[str, ...]]:
    """The paths of linears in groups: SIBLINGS that are all there and of one K; others alone."""
    groups: dict[str, tuple[str, ...]] = {}
    for path in linears:
        parent, dot, name = path.rpartition(".")
        siblings = next((s for s in SIBLINGS if name in s), (name,))
        group = tuple(f"{parent}{dot}{s}" for s in siblings)
        whole = all(p in linears and _alike(linears[p], linears[path]) for p in group)
        groups.setdefault((group if whole else (path,))[0], group if whole else (path,))
    return list(groups.values())


def _alike(one: nn.Module, two: nn.Module) -> bool:
    biases = (one.bias is None) == (two.bias is None)
    same = one.weight.dtype == two.weight.dtype and one.weight.device == two.weight.device
    return type(one) is type(two) and width(one)[1] == width(two)[1] and biases and same
