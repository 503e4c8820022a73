"""Where a transformer layer's attention and feed-forward network end, by architecture."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from torch import nn


class Block(NamedTuple):
    """A layer. What attention and ffn put out is added to the residual stream.

    With norms before (Llama, GPT-2, T5) the input of `ffn_in` is the stream and the output of `out`
    is what leaves the layer; so it is with norms of what is added (OLMo-2). With norms after the
    sum (BERT, BART) the input of `ffn_in` is the stream as well, and `out` is the last norm: it
    takes stream + ffn.
    """

    path: str
    attention: nn.Module
    ffn: nn.Module
    ffn_in: nn.Module
    out: nn.Module
    post_norm: bool
    hub: tuple[str, str]  # where AdapterHub keeps the two places' adapters, within the layer


_HUB = ("attention_adapters", "output_adapters")
# Class of the layer -> names of attention, ffn, ffn_in, out; post_norm; hub. The first match whose
# names are all there, a fifth one too: by the norms they have, layers tell where those stand.
_KINDS = (
    (r"T5Block", ("layer.0.dropout", "layer.-1.dropout", "layer.-1.layer_norm", "layer.-1"), False,
     ("layer.0", "layer.-1")),
    (r"Bart(En|De)coderLayer", ("self_attn", "fc2", "fc1", "final_layer_norm"), True, _HUB),
    (r"(Bert|Roberta|XLMRoberta|Electra)Layer",
     ("attention.output.dropout", "output.dropout", "intermediate", "output.LayerNorm"), True,
     ("attention.output", "output")),
    (r".*", ("post_attention_layernorm", "post_feedforward_layernorm",
             "pre_feedforward_layernorm", ""), False, _HUB),
    (r".*", ("post_attention_layernorm", "post_feedforward_layernorm", "mlp", ""), False, _HUB),
    (r".*", ("self_attn", "mlp", "post_attention_layernorm", "", "input_layernorm"), False, _HUB),
    (r"GPT2Block", ("attn", "mlp", "ln_2", ""), False, _HUB),
)  # fmt: skip


def _child(layer: nn.Module, name: str) -> nn.Module | None:
    for part in filter(None, name.split(".")):
        if isinstance(layer, nn.ModuleList) and part == "-1":
            layer = layer[-1]
        else:
            layer = layer._modules.get(part)
        if layer is None:
            return None
    return None if isinstance(layer, nn.ModuleList) else layer  # LongCat's, which nothing calls


def blocks(model: nn.Module) -> Iterator[Block]:
    """The layers of a model, in its order; none where its architecture is not known."""
    for path, parent in model.named_modules():
        if not isinstance(parent, nn.ModuleList):
            continue
        for at, layer in enumerate(parent):
            for kind, names, post_norm, hub in _KINDS:
                places = [_child(layer, name) for name in names]
                if re.fullmatch(kind, type(layer).__name__) and None not in places:
                    last = "" if hub is _HUB else str(len(getattr(layer, "layer", ())) - 1)
                    there = tuple(name.replace("-1", last) for name in hub)
                    yield Block(f"{path}.{at}", *places[:4], post_norm, there)
                    break
