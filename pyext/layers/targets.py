"""Which modules of a model an adapter's targets name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from torch import nn
from transformers.pytorch_utils import Conv1D

from fusedpeft.errors import InputError
from fusedpeft.layers.config import ALL_LINEAR
from fusedpeft.layers.linear import PLAIN_FORWARDS
from fusedpeft.layers.lora import LoraLinear

SIBLINGS = (  # children of one module that read the same x, in the order of a stacked weight
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("gate_proj", "up_proj"),
    ("wi_0", "wi_1"),
)
CROSS = ("EncDecAttention", "encoder_attn", "crossattention")  # attention over what an encoder gave
# Children of a classification model that are its head, which is trained as a whole or not at all.
CLASSIFIERS = ("score", "classifier", "classification_head", "qa_outputs")
OURS = "fusedpeft_"  # how the names of the modules begin that an adapter adds to a model
HEADS = OURS + "heads"  # layers/heads.py: a child of the model while heads are attached


def nearest(wanted: str, known: Iterable[str]) -> str:
    """ "; did you mean …?", or the names there are."""
    known = sorted(set(known))
    close = difflib.get_close_matches(wanted, known, n=3, cutoff=0.5)
    if close:
        return f"did you mean {', '.join(map(repr, close))}?"
    shown = ", ".join(map(repr, known[:8])) + (", …" if len(known) > 8 else "")
    return f"there are {shown}" if known else "there are none"


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> module, without adapters' own, the insides of a LoraLinear and the model itself."""
    found: dict[str, nn.Module] = {}
    inside: tuple[str, ...] = ()
    for path, module in model.named_modules():
        ours = path.rpartition(".")[2].startswith(OURS)
        if path.startswith(inside):
            continue
        if ours or isinstance(module, LoraLinear):
            inside += (path + ".",)
        if path and not ours:
            found[path] = module
    return found


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D, LoraLinear))


def _why_not(module: nn.Module) -> str | None:
    """Why LoRA cannot go on this module; None where it can."""
    if isinstance(module, LoraLinear):
        return None
    kind = type(module)
    if not _is_linear(module):
        return f"a {kind.__name__}: expected nn.Linear or Conv1D"
    # A subclass with its own forward (quantised, fused) does something that W alone does not tell,
    # and nn.MultiheadAttention reads its projection's weight without calling it.
    plain = kind.forward in (*PLAIN_FORWARDS, Conv1D.forward)
    if not plain or kind.__name__ == "NonDynamicallyQuantizableLinear":
        return f"a {kind.__module__}.{kind.__name__}: expected a plain nn.Linear or Conv1D"
    if not module.weight.is_floating_point() or module.weight.ndim != 2:
        return f"its weight is {module.weight.dtype}: expected a dense floating-point weight"
    if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
        return "it has hooks, which the fused call would skip: attach first, hook afterwards"
    return None


def _matches(name: str, path: str) -> bool:
    return path == name or path.endswith("." + name)


def of_body(path: str) -> bool:
    """Whether a module is not in a classifier."""
    return path.partition(".")[0] not in CLASSIFIERS


def in_head(model: nn.Module, path: str) -> bool:
    """Whether a module is in the place where FeatureBased or OutputLayer put heads."""
    heads = getattr(model, HEADS, None)
    return heads is not None and f"{path}.".startswith(f"{heads.path}.")


def match_targets(
    model: nn.Module, targets: str | tuple[str, ...], *, strict: bool = True
) -> dict[str, nn.Module]:
    """Path -> linear (or LoraLinear) for what `targets` names, in the model's order.

    strict: every name of a list must match something (a typo among good names is an error).
    Raises InputError, with the nearest names, where nothing matches or a match is no plain linear.
    """
    modules = _modules(model)
    linears = [path for path, m in modules.items() if _is_linear(m)]
    ends = {path.rpartition(".")[2] for path in linears}
    if targets == ALL_LINEAR:
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        chosen = [p for p in linears if modules[p] is not head and of_body(p)]
        if not chosen:
            raise InputError(
                f"LoRA targets 'all-linear': no nn.Linear or Conv1D in {type(model).__name__}"
            )
    elif isinstance(targets, str):
        try:
            chosen = [p for p in modules if re.fullmatch(targets, p)]
        except re.error as error:
            raise InputError(
                f"LoRA targets: expected a regular expression, got {targets!r}: {error}"
            ) from error
        if not chosen:
            hint = f'; for module names give a list, ["{targets}"]' if targets in ends else ""
            raise InputError(
                f"LoRA targets: the regular expression {targets!r} matches no module's whole path"
                f"{hint or '; ' + nearest(targets, linears)}"
            )
    else:
        lost = [t for t in targets if not any(_matches(t, p) for p in modules)]
        if lost and (strict or len(lost) == len(targets)):
            raise InputError(
                f"LoRA targets: no module is named {lost[0]!r}; {nearest(lost[0], ends)}"
            )
        chosen = [p for p in modules if any(_matches(t, p) for t in targets)]
    for path in chosen:
        if reason := _why_not(modules[path]):
            raise InputError(f"LoRA targets: cannot adapt {path!r}, {reason}")
    return {p: modules[p] for p in chosen}
