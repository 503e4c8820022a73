"""AdapterHub's checkpoints of bottleneck adapters (`adapters` 1.x), to and from the layers here.

`adapter.safetensors` (`save_adapter(…, use_safetensors=True)` there) and `adapter_config.json`.
Keys `<layer>.<place>.adapters.<name>.adapter_down.0.weight` [E, d], `.bias`, `.adapter_up.weight`
[d, E], `.bias`; with a norm the linear is adapter_down.1 and the norm stands twice, as
adapter_down.0 and as adapter_norm_before.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from fusedpeft.errors import InputError
from fusedpeft.layers.bottleneck import Bottleneck, adapters_of, hub_places, plan
from fusedpeft.layers.config import BottleneckAdapter

WEIGHTS_NAME = "adapter.safetensors"
PICKLE_NAME = "pytorch_adapter.bin"

_ACTIVATIONS = {  # there -> here
    "relu": "relu", "gelu": "gelu", "gelu_new": "gelu_tanh", "swish": "silu", "silu": "silu",
    "tanh": "tanh", "leakyrelu": "leaky_relu",
}  # fmt: skip
_PLACEMENTS = {
    "houlsby": {"mh_adapter": True, "output_adapter": True, "is_parallel": False,
                "original_ln_before": False},
    "pfeiffer": {"mh_adapter": False, "output_adapter": True, "is_parallel": False,
                 "original_ln_before": True},
    "parallel": {"mh_adapter": False, "output_adapter": True, "is_parallel": True,
                 "original_ln_before": False},
}  # fmt: skip
# What has one meaning here: another value is another architecture.
_FIXED = {
    "original_ln_after": True, "residual_before_ln": True, "ln_after": False, "use_gating": False,
    "phm_layer": False, "inv_adapter": None, "cross_adapter": False, "leave_out": [],
    "stochastic_depth": 0.0,
}  # fmt: skip


def to_hub(config: BottleneckAdapter, model: nn.Module, name: str) -> dict[str, Any]:
    """adapter_config.json."""
    if config.norm == "rms_norm":
        raise InputError(f"save_adapter: AdapterHub has no rms_norm, which {name!r} has")
    hidden, size = model.config.hidden_size, config.size
    # The size there is int(hidden // factor): half a unit keeps it from rounding below.
    factor = hidden // size if hidden % size == 0 else hidden / (size + 0.5)
    theirs = {here: there for there, here in _ACTIVATIONS.items() if there != "silu"}
    settings = {
        **_FIXED, **_PLACEMENTS[config.placement], "non_linearity": theirs[config.activation],
        "reduction_factor": factor, "scaling": float(config.scale), "dropout": config.dropout,
        "ln_before": config.norm == "layer_norm", "adapter_residual_before_ln": False,
        "init_weights": "mam_adapter", "init_weights_seed": None,
        "inv_adapter_reduction_factor": None,
    }  # fmt: skip
    return {
        "config": settings,
        "hidden_size": hidden,
        "model_class": next(
            c for c in type(model).__mro__ if not issubclass(c, FSDPModule)
        ).__name__,
        "model_name": getattr(model.config, "_name_or_path", "") or "",
        "model_type": model.config.model_type,
        "name": name,
        "version": "adapters.1.3.0",
    }


def from_hub(path: Path, raw: dict[str, Any]) -> BottleneckAdapter:
    """The config of an adapter_config.json. Raises InputError for what is built otherwise here."""
    settings = raw["config"]
    other = {k: settings[k] for k, v in _FIXED.items() if settings.get(k, v) != v}
    if other:
        named = ", ".join(f"{k}={v!r}" for k, v in other.items())
        raise InputError(f"{path}: not supported, expected AdapterHub's default: {named}")
    place = {k: settings.get(k, False) for k in _PLACEMENTS["houlsby"]}
    placement = next((name for name, keys in _PLACEMENTS.items() if keys == place), None)
    if placement is None:
        raise InputError(
            f"{path}: expected double_seq_bn (Houlsby), seq_bn (Pfeiffer) or par_bn, got {place}"
        )
    activation = _ACTIVATIONS.get(str(settings.get("non_linearity")).lower())
    if activation is None:
        raise InputError(
            f"{path}: non_linearity: expected one of {', '.join(_ACTIVATIONS)}, got "
            f"{settings.get('non_linearity')!r}"
        )
    factor, hidden = settings.get("reduction_factor"), raw.get("hidden_size")
    if not isinstance(factor, (int, float)) or not isinstance(hidden, int) or factor <= 0:
        raise InputError(
            f"{path}: expected one reduction_factor > 0 and a hidden_size, got {factor!r} and "
            f"{hidden!r}"
        )
    try:
        return BottleneckAdapter(
            size=max(int(hidden // factor), 1),
            placement=placement,
            activation=activation,
            scale=settings.get("scaling", 1.0),
            norm="layer_norm" if settings.get("ln_before") else None,
            dropout=settings.get("dropout", 0.0),
        )
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def hub_keys(place: str, name: str, norm: bool) -> dict[str, str]:
    """Key there -> the parameter of `Bottleneck`."""
    start = f"{place}.adapters.{name}"
    linear = "adapter_down.1" if norm else "adapter_down.0"
    found = {}
    for copy in ("adapter_norm_before", "adapter_down.0") if norm else ():
        found[f"{start}.{copy}.weight"] = "norm_weight"
        found[f"{start}.{copy}.bias"] = "norm_bias"
    for there, here in ((linear, "down"), ("adapter_up", "up")):
        found[f"{start}.{there}.weight"] = here
        found[f"{start}.{there}.bias"] = f"{here}_bias"
    return found


def _parameters(place: str, name: str, adapter: Bottleneck) -> dict[str, nn.Parameter]:
    """Key there -> the parameter here."""
    keys = hub_keys(place, name, adapter.norm_weight is not None)
    return {key: getattr(adapter, here) for key, here in keys.items()}


def hub_tensors(model: nn.Module, config: BottleneckAdapter, name: str) -> dict[str, Tensor]:
    """What adapter.safetensors holds; the norm's copies are copies."""
    return {
        key: parameter.detach().cpu().clone()
        for place, adapter in adapters_of(model, config, name)
        for key, parameter in _parameters(place, name, adapter).items()
    }


def check_hub_tensors(
    path: Path, model: nn.Module, config: BottleneckAdapter, name: str, got: dict[str, Tensor]
) -> None:
    """Raises InputError, listing, unless `got` is exactly what `config` asks of `model`."""
    plan(model, config, True)
    want = {}
    for place in hub_places(model, config):
        adapter = Bottleneck(config, torch.empty(0, device="meta"), model.config.hidden_size)
        want |= {k: tuple(p.shape) for k, p in _parameters(place, name, adapter).items()}
    have = {key: tuple(t.shape) for key, t in got.items() if t.is_floating_point()}
    problems = [
        f"{len(keys)} {kind}: {', '.join(sorted(keys)[:3])}{' …' if len(keys) > 3 else ''}"
        for kind, keys in (
            ("missing", want.keys() - have.keys()),
            ("extra", got.keys() - want.keys()),
            ("of another shape", {k for k in want.keys() & have.keys() if want[k] != have[k]}),
        )
        if keys
    ]
    if problems:
        raise InputError(
            f"{path} does not fit this {type(model).__name__} and its own settings; tensors "
            f"{'; '.join(problems)}"
        )


@torch.no_grad()
def set_hub_tensors(
    model: nn.Module, config: BottleneckAdapter, name: str, stored: str, tensors: dict[str, Tensor]
) -> None:
    """Write the tensors of adapter `stored` into the attached adapter `name`."""
    for place, adapter in adapters_of(model, config, name):
        for key, parameter in _parameters(place, stored, adapter).items():
            parameter.copy_(tensors[key])
