"""LoRA on a model: which linears, and the adapters in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import nn
from transformers.pytorch_utils import Conv1D

from fusedpeft.errors import InputError
from fusedpeft.layers.config import LoRA
from fusedpeft.layers.lora import LoraLinear, Siblings
from fusedpeft.layers.routing import route_of
from fusedpeft.layers.targets import CROSS, SIBLINGS, in_head, match_targets


def lora_modules(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """(path, module) of every adapted linear, shared ones once."""
    return ((p, m) for p, m in model.named_modules() if isinstance(m, LoraLinear))


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever `old` stands: a module can stand in several places."""
    for parent in list(model.modules()):
        if parent is new:
            continue
        for child, module in parent._modules.items():
            if module is old:
                parent._modules[child] = new


def restore(model: nn.Module, module: LoraLinear) -> None:
    """Put a LoraLinear's base back wherever it stood."""
    module.base_layer.train(module.training)
    _replace(model, module, module.base_layer)


def plan(model: nn.Module, config: LoRA, strict: bool) -> dict[str, nn.Module]:
    found = match_targets(model, config.targets, strict=strict)
    for path in found:
        if in_head(model, path):  # heads take turns there: the adapter would come and go with one
            raise InputError(
                f"LoRA targets: cannot adapt {path!r}, an attached head trains there as a whole: "
                "detach it, or name targets below it"
            )
    return found


def add(model: nn.Module, config: LoRA, name: str, found: dict[str, nn.Module]) -> None:
    for path, module in found.items():
        if not isinstance(module, LoraLinear):
            wrapper = LoraLinear(module, transposed=isinstance(module, Conv1D))
            _replace(model, module, wrapper)
            module = wrapper
        rank, scale = config.rank_and_scale(path)
        module.add(name, rank, scale, config.dropout, config.dora)


def check_together(wanted: Mapping[str, LoRA]) -> None:
    dora = [name for name, config in wanted.items() if config.dora]
    if dora and len(wanted) > 1:
        raise InputError(f"DoRA adapter {dora[0]!r} rescales the whole weight: activate it alone")


def activate(model: nn.Module, names: Sequence[str]) -> None:
    for _, module in lora_modules(model):
        module.activate(names)
        module._siblings = None
    for path, parent in model.named_modules():
        if path.rpartition(".")[2] in CROSS or getattr(parent, "is_cross_attention", False):
            continue  # its q reads another x
        for group in SIBLINGS:
            linears = tuple(getattr(parent, name, None) for name in group)
            if _of_one_kind(linears):
                siblings = Siblings(linears)
                for linear in linears:
                    linear._siblings = siblings


def _of_one_kind(linears: tuple[nn.Module | None, ...]) -> bool:
    """One adapter acts on each, with the same dropout and dtype."""
    if not all(isinstance(one, LoraLinear) and len(one._active) == 1 for one in linears):
        return False
    kinds = {(one._active[0].dropout, one._active[0].lora_A.dtype) for one in linears}
    return len(kinds) == 1 and len({id(one) for one in linears}) == len(linears)


def route(model: nn.Module, names: Sequence[str | None] | None) -> None:
    for _, module in lora_modules(model):
        module._route = route_of(names, module.weight.device)


def remove(model: nn.Module, name: str) -> None:
    for _, module in list(lora_modules(model)):
        if name in module.adapters:
            del module.adapters[name]
        if not module.adapters:
            restore(model, module)
