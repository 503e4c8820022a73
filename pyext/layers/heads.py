"""Heads trained over a frozen model: FeatureBased and OutputLayer.

A head is a copy of the model's that stands in its place while it is active. Several take turns, the
model's own returns bit for bit, and a head tied to the embeddings trains without them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fusedpeft.errors import InputError
from fusedpeft.layers.config import FeatureBased, OutputLayer
from fusedpeft.layers.lora import LoraLinear
from fusedpeft.layers.targets import CLASSIFIERS

_CHILD = "fusedpeft_heads"


class Heads(nn.Module):
    """A child of the model: the heads that are not in place, and what the model's own counts."""

    def __init__(self, path: str, labels: int | None):
        super().__init__()
        self.path = path
        self.labels = labels
        self.own: nn.Module | None = None  # the model's, while another is in place
        self.waiting = nn.ModuleDict()
        self.active: str | None = None


def head_path(model: nn.Module, config: OutputLayer | FeatureBased) -> str:
    """Where the head is. Raises InputError where there is none of the kind."""
    found = next((n for n in CLASSIFIERS if isinstance(getattr(model, n, None), nn.Module)), None)
    if found is None and isinstance(config, OutputLayer):
        output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        found = next(
            (p for p, m in model.named_modules() if output is not None and m is output), None
        )
    if found is None:
        kind, name = type(config).__name__, type(model).__name__
        asked = "a classification model (AutoModelForSequenceClassification)"
        asked = asked if isinstance(config, FeatureBased) else "a model with an output layer"
        raise InputError(f"{kind}: expected {asked}, got {name}")
    return found


def new_head(model: nn.Module, config: OutputLayer | FeatureBased) -> nn.Module:
    """A copy of the model's head; FeatureBased: whose last linear is new, for its labels."""
    heads = getattr(model, _CHILD, None)
    own = heads.own if heads is not None else None
    head = copy.deepcopy(model.get_submodule(head_path(model, config)) if own is None else own)
    head.requires_grad_(True)
    if any(isinstance(m, LoraLinear) for m in head.modules()):
        kind = type(config).__name__
        raise InputError(
            f"{kind}: the head carries LoRA: attach the head first, or detach the LoRA"
        )
    if isinstance(config, OutputLayer):
        return head
    linears = [(p, m) for p, m in head.named_modules() if isinstance(m, nn.Linear)]
    if not linears:
        raise InputError(f"FeatureBased: found no nn.Linear in the head of {type(model).__name__}")
    path, last = linears[-1]
    weight = last.weight
    fresh = nn.Linear(
        last.in_features, config.num_labels, last.bias is not None, weight.device, weight.dtype
    )
    if not path:
        return fresh
    parent, _, name = path.rpartition(".")
    setattr(head.get_submodule(parent), name, fresh)
    return head


def head_of(model: nn.Module, name: str) -> nn.Module:
    heads = getattr(model, _CHILD)
    return model.get_submodule(heads.path) if heads.active == name else heads.waiting[name]


def head_tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    state = head_of(model, name).state_dict()
    return {f"head.{key}": t.detach().cpu().clone() for key, t in state.items()}


@torch.no_grad()
def set_head_tensors(model: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> None:
    for key, own in head_of(model, name).state_dict().items():
        own.copy_(tensors[f"head.{key}"])


# --- the methods --------------------------------------------------------------------------------


def plan(model: nn.Module, config: OutputLayer | FeatureBased, strict: bool) -> nn.Module:
    return new_head(model, config)


def add(model: nn.Module, config, name: str, head: nn.Module) -> None:
    if not hasattr(model, _CHILD):
        labels = getattr(getattr(model, "config", None), "num_labels", None)
        model.add_module(_CHILD, Heads(head_path(model, config), labels))
    head.train(model.training)
    head.num_labels_ = getattr(config, "num_labels", None)
    getattr(model, _CHILD).waiting[name] = head


def check_together(wanted: Mapping[str, OutputLayer | FeatureBased]) -> None:
    if len(wanted) > 1:
        raise InputError(f"one head acts at a time: expected one of {list(wanted)}")


def activate(model: nn.Module, names: Sequence[str]) -> None:
    heads = getattr(model, _CHILD, None)
    if heads is None:
        return
    parent_path, _, last = heads.path.rpartition(".")
    parent = model.get_submodule(parent_path)
    standing = getattr(parent, last)
    if heads.active is None:
        heads.own = standing
    else:
        heads.waiting[heads.active] = standing
    heads.active = names[0] if names else None
    if heads.active is None:
        setattr(parent, last, heads.own)
        heads.own = None
    else:
        setattr(parent, last, heads.waiting.pop(heads.active))
    for head in (*heads.waiting.values(), getattr(parent, last)):
        head.requires_grad_(heads.active is not None and head is getattr(parent, last))
    _count_labels(model, getattr(getattr(parent, last), "num_labels_", None) or heads.labels)


def remove(model: nn.Module, name: str) -> None:
    heads = getattr(model, _CHILD)
    del heads.waiting[name]
    if not heads.waiting and heads.active is None:
        delattr(model, _CHILD)


def _count_labels(model: nn.Module, labels: int | None) -> None:
    """What the model's loss and output shapes go by."""
    if labels is None or getattr(model.config, "num_labels", None) == labels:
        return
    model.config.num_labels = labels
    if hasattr(model, "num_labels"):
        model.num_labels = labels
