"""Heads trained over a frozen model: FeatureBased and OutputLayer.

A head is a copy of the model's that stands in its place while it is active. Several take turns, the
model's own returns bit for bit, and a head tied to the embeddings trains without them: transformers
is told of no tie while it stands there.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fusedpeft.errors import InputError
from fusedpeft.layers.config import FeatureBased, OutputLayer
from fusedpeft.layers.lora import LoraLinear
from fusedpeft.layers.targets import CLASSIFIERS, HEADS


class Heads(nn.Module):
    """A child of the model: the heads that are not in place, and what the model's own counts."""

    def __init__(self, path: str):
        super().__init__()
        self.path = path
        self.labels: dict = {}  # what the config says of the model's own, while another is in place
        self.own: nn.Module | None = None  # the model's, while another is in place
        self.waiting = nn.ModuleDict()
        self.active: str | None = None
        self.ties: list[tuple[nn.Module, dict]] = []  # (model, its attributes) while untied
        self.own_tied: set[str] = set()  # parameters of `own` that stand elsewhere as well
        self.register_state_dict_post_hook(_without_tied)
        self.register_load_state_dict_post_hook(_no_tied_missing)


def _without_tied(heads: Heads, state: dict, prefix: str, metadata: dict) -> None:
    """A tied weight is in the state dict where it is tied to: twice, `save_pretrained` refuses."""
    for name in heads.own_tied:
        state.pop(f"{prefix}own.{name}", None)


def _no_tied_missing(heads: Heads, incompatible) -> None:
    gone = tuple(f"{HEADS}.own.{name}" for name in heads.own_tied)
    for key in [k for k in incompatible.missing_keys if k.endswith(gone)] if gone else ():
        incompatible.missing_keys.remove(key)


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
    heads = getattr(model, HEADS, None)
    own = heads.own if heads is not None else None
    head = copy.deepcopy(model.get_submodule(head_path(model, config)) if own is None else own)
    head.requires_grad_(True)
    if any(isinstance(m, LoraLinear) for m in head.modules()):
        kind = type(config).__name__
        raise InputError(
            f"{kind}: the head carries LoRA, which a head trained as a whole replaces: detach it"
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
    heads = getattr(model, HEADS)
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
    if not hasattr(model, HEADS):
        model.add_module(HEADS, Heads(head_path(model, config)).train(model.training))
    head.train(model.training)
    head.num_labels_ = getattr(config, "num_labels", None)
    getattr(model, HEADS).waiting[name] = head


def check_together(wanted: Mapping[str, OutputLayer | FeatureBased]) -> None:
    if len(wanted) > 1:
        raise InputError(f"one head acts at a time: expected one of {list(wanted)}")


def activate(model: nn.Module, names: Sequence[str]) -> None:
    heads = getattr(model, HEADS, None)
    if heads is None:
        return
    parent_path, _, last = heads.path.rpartition(".")
    parent = model.get_submodule(parent_path)
    standing = getattr(parent, last)
    if heads.active is None:
        heads.own = standing
        heads.labels = {n: getattr(getattr(model, "config", None), n, None) for n in _LABELS}
    else:
        heads.waiting[heads.active] = standing
    heads.active = names[0] if names else None
    if heads.active is None:
        setattr(parent, last, heads.own)
        heads.own = None
    else:
        setattr(parent, last, heads.waiting.pop(heads.active))
    if heads.path not in CLASSIFIERS:
        _resize_like(standing, getattr(parent, last))
    _tie(model, heads)
    for head in (*heads.waiting.values(), getattr(parent, last)):
        head.requires_grad_(heads.active is not None and head is getattr(parent, last))
    _count_labels(model, heads, getattr(getattr(parent, last), "num_labels_", None))


@torch.no_grad()
def _resize_like(standing: nn.Module, head: nn.Module) -> None:
    """`resize_token_embeddings` reaches the head that stands in place: rows that another lacks are
    that one's."""
    for name, there in standing.named_parameters():
        here = head.get_parameter(name)
        if len(here) != len(there):
            rows = min(len(here), len(there))
            here.data = torch.cat([here[:rows], there[rows:].to(here)])
    if hasattr(standing, "out_features"):
        head.out_features = standing.out_features


def _tie(model: nn.Module, heads: Heads) -> None:
    """Takes the head out of what `tie_weights` ties while another than the model's own is in place;
    with its own back, all is as it was."""
    for module, were in heads.ties:
        for name, value in were.items():
            if value is None:
                delattr(module, name)  # the class's is seen again
            else:
                setattr(module, name, value)
    heads.ties, heads.own_tied = [], set()
    if heads.own is None:
        return
    shared = {id(p) for part, m in model.named_children() if part != HEADS for p in m.parameters()}
    heads.own_tied = {name for name, p in heads.own.named_parameters() if id(p) in shared}
    heads.ties = drop_ties(model, f"{heads.path}.")


def drop_ties(model: nn.Module, what: str) -> list[tuple[nn.Module, dict]]:
    """Takes the parameters whose paths begin with `what` out of what `tie_weights` ties; returns
    (model, its attributes as they were)."""
    dropped = []
    for path, module in model.named_modules():
        start = f"{path}." if path else ""
        if not isinstance(module, PreTrainedModel) or not what.startswith(start):
            continue
        inner = what.removeprefix(start)
        ties = {
            "_tied_weights_keys": module.get_expanded_tied_weights_keys(),
            "all_tied_weights_keys": module.all_tied_weights_keys,
        }
        dropped.append((module, {name: vars(module).get(name) for name in ties}))
        for name, pairs in ties.items():
            kept = [pair for pair in pairs.items() if not any(k.startswith(inner) for k in pair)]
            setattr(module, name, dict(kept))
    return dropped


def remove(model: nn.Module, name: str) -> None:
    heads = getattr(model, HEADS)
    del heads.waiting[name]
    if not heads.waiting and heads.active is None:
        delattr(model, HEADS)


_LABELS = ("num_labels", "id2label", "label2id", "problem_type")


def _count_labels(model: nn.Module, heads: Heads, labels: int | None) -> None:
    """What the model's loss and output shapes go by; labels: None for as many as its own has."""
    own = heads.labels
    if own["num_labels"] is None:
        return
    config = model.config
    if labels is None:
        for name, value in own.items():
            setattr(config, name, value)
    elif config.num_labels != labels:
        config.num_labels = labels  # names them anew
        config.problem_type = None  # the forward pass guessed it from other labels
    if hasattr(model, "num_labels"):
        model.num_labels = config.num_labels
