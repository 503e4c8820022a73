"""PEFT's and AdapterHub's checkpoints as the tensors that `AdapterPool.put` takes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from fusedpeft.errors import InputError
from fusedpeft.layers import adapterhub as hub
from fusedpeft.layers.checkpoint import LORA_PREFIX, WEIGHTS_NAME, lora_by_path, read_weights
from fusedpeft.layers.config import ALL_LINEAR, BottleneckAdapter, LoRA, PrefixTuning, PromptTuning
from fusedpeft.layers.peft_config import read_config, selects_modules
from fusedpeft.layers.prefix import Shape, split
from fusedpeft.serve.places import Places

_VIRTUAL = "prompt_embeddings"  # the one tensor of a prefix or a prompt


def read_adapter(folder: Path, places: Places) -> dict[str, Tensor | float]:
    """{key of `put`: tensor} of the adapter in `folder`. Raises InputError: no such file, a pickle
    (never opened), a damaged file, settings that are not supported, tensors that are missing or
    not what the settings say. What does not fit the pool, `put` finds.
    """
    config, raw = read_config(folder)
    if isinstance(config, BottleneckAdapter):
        return _bottleneck(folder, config, str(raw.get("name")), places)
    if not isinstance(config, LoRA | PrefixTuning | PromptTuning):
        raise InputError(
            f"{folder}: expected LoRA, a prefix, a prompt or a bottleneck adapter, got "
            f"{type(config).__name__}"
        )
    tensors, path = read_weights(folder), folder / WEIGHTS_NAME
    if not isinstance(config, LoRA):
        return _virtual(path, config, tensors, places)
    if config.dora:
        raise InputError(
            f"{folder}: DoRA rescales the whole weight, row by row of a batch it cannot; merge it"
        )
    by_path, extra = lora_by_path(tensors)
    known = [place.path for place in places.of("lora")]
    # PEFT keeps the base's own weight beside an adapter on the head.
    extra = [key for key in extra if not _of_base(key, tuple(tensors[key].shape), places)]
    missing = set() if selects_modules(raw) else _targets(config, known) - by_path.keys()
    said = [f"{key} is no tensor of LoRA" for key in extra]
    said += [f"{module}.lora_A is missing" for module in sorted(missing)]
    found: dict[str, Tensor | float] = {}
    for module, own in by_path.items():
        rank, scale = config.rank_and_scale(module)
        found |= {f"{module}.{name}": t for name, t in own.items()} | {f"{module}.scale": scale}
        if "lora_A" in own and own["lora_A"].shape[:1] != (rank,):
            shape = tuple(own["lora_A"].shape)
            said.append(f"{module}.lora_A is {shape}, expected rank {rank}")
    if said:
        raise InputError(f"{path} is not what its settings say: {'; '.join(said)}")
    return found


def _of_base(key: str, shape: tuple[int, ...], places: Places) -> bool:
    path, _, leaf = key.removeprefix(LORA_PREFIX).rpartition(".")
    place = places.by_field.get((path.removesuffix(".base_layer"), "lora_A"))
    if place is None or leaf != "weight":
        return False
    return shape == (place.fields["lora_B"].shape[0], place.fields["lora_A"].shape[1])


# Parameter of `Bottleneck` -> its name in `put`.
_FIELDS = {
    "down": "down_w", "down_bias": "down_b", "up": "up_w", "up_bias": "up_b",
    "norm_weight": "norm_w", "norm_bias": "norm_b",
}  # fmt: skip


def _bottleneck(
    folder: Path, config: BottleneckAdapter, stored: str, places: Places
) -> dict[str, Tensor | float]:
    """AdapterHub's, or `fp.save_adapter`'s in its format."""
    path, of_pool = folder / hub.WEIGHTS_NAME, places.bottleneck
    if of_pool is None:
        raise InputError(f"{path} is a bottleneck adapter, and the pool was made without them")
    for name in ("placement", "activation", "norm"):
        want, got = getattr(of_pool, name), getattr(config, name)
        if want != got:
            raise InputError(f"{path}: expected {name} {want!r}, as the pool's, got {got!r}")
    tensors = read_weights(folder, hub.WEIGHTS_NAME, hub.PICKLE_NAME)
    want = {
        key: f"{here}.{_FIELDS[parameter]}"
        for there, here in places.hub.items()
        for key, parameter in hub.hub_keys(there, stored, config.norm is not None).items()
    }
    said = [f"{key} is missing" for key in sorted(want.keys() - tensors.keys())]
    said += [f"{key} is extra" for key in sorted(tensors.keys() - want.keys())]
    if said:
        more = f"; and {len(said) - 8} more" if len(said) > 8 else ""
        raise InputError(f"{path} is not what its settings say: {'; '.join(said[:8])}{more}")
    found: dict[str, Tensor | float] = {key: tensors[there] for there, key in want.items()}
    return found | {f"{here}.scale": config.scale for here in places.hub.values()}


def _targets(config: LoRA, paths: Iterable[str]) -> set[str]:
    """Those of `paths` that the settings name."""
    if config.targets == ALL_LINEAR:
        return set(paths)
    if isinstance(config.targets, str):
        return {p for p in paths if re.fullmatch(config.targets, p)}
    return {p for p in paths if any(p == t or p.endswith("." + t) for t in config.targets)}


def _virtual(
    path: Path, config: PrefixTuning | PromptTuning, tensors: dict[str, Tensor], places: Places
) -> dict[str, Tensor]:
    """A prefix [P, 2·layers·HKV·D], key and value of each layer in turn, or a prompt [P, d]."""
    kind = "prefix" if isinstance(config, PrefixTuning) else "prompt"
    here = places.of(kind)
    if not here:
        raise InputError(f"{path} is a {kind}, and the pool was made with max_{kind} 0")
    if kind == "prefix":
        heads, _, dim = here[0].fields["prefix_k"].shape
        shape = Shape(len(here), heads, dim, heads * dim)
        width = 2 * len(here) * heads * dim
    else:
        width = here[0].fields["prompt"].shape[1]
    got = {key: tuple(t.shape) for key, t in tensors.items()}
    if got != {_VIRTUAL: (config.length, width)}:
        raise InputError(
            f"{path} does not fit: expected {_VIRTUAL} [{config.length}, {width}], got {got}"
        )
    if kind == "prompt":
        return {f"{here[0].path}.prompt": tensors[_VIRTUAL]}
    return {
        f"{place.path}.{name}": t
        for place, pair in zip(here, split(tensors[_VIRTUAL], shape), strict=True)
        for name, t in zip(("prefix_k", "prefix_v"), pair, strict=True)
    }
