"""Which places a Hugging Face model has for adapters."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fusedpeft.errors import InputError
from fusedpeft.layers.prefix import attention_layers, shape_of
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
    max_bottleneck: int,
) -> Places:
    """The places that a model has for the kinds asked for (0: none). Raises InputError."""
    places = Places(slots)
    if max_rank:
        linears = match_targets(model, targets)
        for paths in stacks(linears):
            sizes = tuple(width(linears[p])[0] for p in paths)
            places.add_lora(paths, sizes, width(linears[paths[0]])[1], max_rank)
    if not (max_prefix or max_prompt or max_bottleneck):
        return places
    if not isinstance(model, PreTrainedModel):
        raise InputError(
            f"{type(model).__name__}: expected a model of transformers for adapters other than LoRA"
        )
    paths = {module: path for path, module in model.named_modules()}
    backbone, shape = model.base_model, shape_of(model.base_model)
    layers = attention_layers(backbone)
    if len(layers) != shape.layers:
        raise InputError(
            f"{type(model).__name__}: expected {shape.layers} attention modules that know their "
            f"layer_idx, found {len(layers)}"
        )
    for layer in layers if max_prefix else ():
        places.add_prefix(paths[layer], shape.heads, shape.dim, max_prefix)
    if max_prompt:
        table = model.get_input_embeddings()
        places.add_prompt(paths[table], table.weight.shape[1], max_prompt)
    for layer in layers if max_bottleneck else ():
        block = model.get_submodule(paths[layer].rpartition(".")[0])
        for module in (layer, *(m for m in block.children() if "MLP" in type(m).__name__)):
            places.add_bottleneck(paths[module], shape.hidden, max_bottleneck)
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
