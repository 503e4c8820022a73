"""Checkpoints of PEFT and, for bottleneck adapters, of AdapterHub: written whole or not at all."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from fusedpeft.errors import InputError
from fusedpeft.files import replace_file
from fusedpeft.layers import adapterhub
from fusedpeft.layers.attach import attach_to, check_new
from fusedpeft.layers.config import (
    ALL_LINEAR,
    BottleneckAdapter,
    FeatureBased,
    FullFineTuning,
    LoRA,
    OutputLayer,
    PrefixTuning,
    PromptTuning,
)
from fusedpeft.layers.heads import head_tensors, new_head, set_head_tensors
from fusedpeft.layers.lora import LoraLinear
from fusedpeft.layers.lora_method import lora_modules
from fusedpeft.layers.peft_config import (
    CONFIG_NAME,
    check_model,
    expected_prompt,
    head_settings,
    in_layers,
    peft_order,
    prompt_to_peft,
    read_config,
    selects_modules,
    to_peft,
)
from fusedpeft.layers.peft_heads import (
    add_head,
    check_head,
    drop_base,
    head_beside,
    head_name,
    known_heads,
    output_layer,
    take_head,
)
from fusedpeft.layers.prefix import flat_prefix, set_prefix, shape_of, stack_of, whole
from fusedpeft.layers.prompt import prompt_of
from fusedpeft.layers.state import METHODS, state_of, unwrap
from fusedpeft.layers.targets import match_targets, of_body

WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
LORA_PREFIX = "base_model.model."  # of LoRA's keys
_PROMPT_PREFIX = "base_model."  # of a classifier's beside a prefix or a prompt
_PROMPT = "prompt_embeddings"  # the one tensor of a prefix or a prompt
# Tensor on disk -> the parameter's name here; the last is how PEFT wrote DoRA for a while.
_SUFFIXES = {
    ".lora_A.weight": "lora_A",
    ".lora_B.weight": "lora_B",
    ".lora_magnitude_vector": "lora_magnitude_vector",
    ".lora_magnitude_vector.weight": "lora_magnitude_vector",
}


def _folder(what: str, given: object) -> Path:
    if not isinstance(given, (str, os.PathLike)):
        raise InputError(f"{what}: expected a folder's path, got {given!r}")
    return Path(given)


def save_adapter(model: nn.Module, dir: str | Path, name: str = "default") -> Path:
    """Write an adapter in PEFT's format, for `PeftModel.from_pretrained(base, dir)` or
    `load_adapter`; a bottleneck adapter in AdapterHub's (layers/adapterhub.py), which PEFT does not
    have. Returns the folder, made if need be.

    Keys `base_model.model.<path>.lora_A.weight` [R, K], `.lora_B.weight` [N, R] and, with DoRA,
    `.lora_magnitude_vector` [N]; a prefix is one tensor `prompt_embeddings` [P, 2·layers·HKV·D],
    its projection folded away, a prompt one [P, d]; in the parameters' dtype. A head attached as
    OutputLayer under `<name>_head` goes with it, as PEFT's modules_to_save. The prefix of an
    encoder-decoder is for `load_adapter` alone, which reads PEFT's as well. Under FSDP2 every rank
    calls it. Killed at any moment it leaves the old adapter, the new one, or none that loads: never
    new weights under old settings.
    Raises InputError for an unknown name and where `dir` is a file or cannot be made.
    """
    model = unwrap(model)
    config = state_of(model, name).configs[name]
    folder = _folder("save_adapter", dir)
    if isinstance(config, BottleneckAdapter):
        adapterhub.to_hub(config, model, name)  # what cannot be written is said before any is
        if head_name(name) in state_of(model).configs:
            warnings.warn(
                f"save_adapter: {head_name(name)!r} stays behind, AdapterHub's format has no place "
                "for it: save it under its own name as well",
                stacklevel=2,
            )
    if isinstance(config, FullFineTuning):
        raise InputError(f"save_adapter: {name!r} is the whole model: model.save_pretrained(dir)")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise InputError(f"save_adapter: expected a folder, {error.filename} is a file") from error
    except OSError as error:
        raise InputError(
            f"save_adapter: cannot make the folder {folder} ({error.strerror}): name another"
        ) from error

    weights_name = WEIGHTS_NAME
    if isinstance(config, LoRA):
        tensors, settings = _with_head(model, name, LORA_PREFIX, *_lora(model, config, name))
    elif isinstance(config, BottleneckAdapter):
        settings, weights_name = adapterhub.to_hub(config, model, name), adapterhub.WEIGHTS_NAME
        tensors = adapterhub.hub_tensors(model, config, name)
    elif isinstance(config, FeatureBased | OutputLayer):
        tensors, settings = head_tensors(model, name), head_settings(config, model)
    else:
        made = _prompt(model, config, name)
        tensors, settings = _with_head(model, name, _PROMPT_PREFIX, *made)
    tensors = {key: whole(t).cpu().contiguous() for key, t in tensors.items()}
    text = (json.dumps(settings, indent=2, sort_keys=True) + "\n").encode()

    config_path = folder / CONFIG_NAME
    # The settings come last and mark the adapter complete: an old file that disagrees goes first.
    if config_path.is_file() and config_path.read_bytes() != text:
        config_path.unlink()
    replace_file(folder / weights_name, save(tensors, metadata={"format": "pt"}))
    replace_file(config_path, text)
    return folder


def _with_head(
    model: nn.Module, name: str, start: str, tensors: dict[str, Tensor], settings: dict
) -> tuple[dict[str, Tensor], dict]:
    more, said = head_beside(model, name, start)
    return tensors | more, settings | said


def _lora(model: nn.Module, config: LoRA, name: str) -> tuple[dict[str, Tensor], dict]:
    """(tensors, settings) as PEFT keeps them."""
    adapted = [(path, m) for path, m in lora_modules(model) if name in m.adapters]
    tensors: dict[str, Tensor] = {}
    for path, module in adapted:
        adapter = module.adapters[name]
        for suffix, attribute in list(_SUFFIXES.items())[:3]:
            value = getattr(adapter, attribute)
            if value is not None:
                tensors[LORA_PREFIX + path + suffix] = value
    targets = [p for p, _ in adapted] if config.targets == ALL_LINEAR else config.targets
    return tensors, to_peft(config, targets, model, any(m.transposed for _, m in adapted))


def _prompt(
    model: nn.Module, config: PrefixTuning | PromptTuning, name: str
) -> tuple[dict[str, Tensor], dict]:
    prefix = isinstance(config, PrefixTuning)
    values = flat_prefix(model, name) if prefix else prompt_of(model, name)
    return {_PROMPT: values}, prompt_to_peft(config, model)


def load_adapter(model: nn.Module, dir: str | Path, name: str = "default") -> nn.Module:
    """Attach the adapter (LoRA, prefix or prompt) that PEFT, or the bottleneck adapter that
    AdapterHub, or either that `save_adapter` wrote to `dir`, active and trainable, under `name`
    (free so far); returns the model.

    Reads rank_pattern, alpha_pattern, rsLoRA and DoRA. A head that PEFT saved with it becomes an
    OutputLayer `<name>_head`, active beside it. Raises InputError, before the model is
    changed: no such folder or file; a pickle, which is never opened; a damaged file; settings of
    PEFT that are not plain LoRA or DoRA, by name; tensors that are missing, extra, not finite or of
    another shape, and settings of another model, as in an adapter for another base.
    """
    inner = unwrap(model)
    folder = _folder("load_adapter", dir)
    config, raw = read_config(folder, known_heads(inner))
    check_new(inner, name)
    if isinstance(config, BottleneckAdapter):
        _load_bottleneck(folder, inner, config, name, raw)
        return model
    tensors = read_weights(folder)
    if isinstance(config, FeatureBased | OutputLayer):
        _load_head(folder, inner, config, name, tensors, raw)
        return model
    start = LORA_PREFIX if isinstance(config, LoRA) else _PROMPT_PREFIX
    saved = raw.get("modules_to_save") or ()
    head = take_head(tensors, start, inner, saved)
    check_head(folder / WEIGHTS_NAME, inner, name, head, saved)
    if isinstance(config, LoRA):
        drop_base(folder / WEIGHTS_NAME, start, inner, tensors)
        _load_lora(folder, inner, config, name, tensors, raw, bool(head))
    else:
        _load_prompt(folder, inner, config, name, tensors, raw)
    if head:
        add_head(inner, name, head)
    return model


def _load_lora(
    folder: Path,
    model: nn.Module,
    config: LoRA,
    name: str,
    tensors: dict[str, Tensor],
    raw: dict,
    head: bool,
) -> None:
    by_path, extra = lora_by_path(tensors)
    if head and config.targets != ALL_LINEAR:
        # A target's name may match in the head, which is saved whole.
        found = match_targets(model, config.targets, strict=False)
        found = [p for p in found if of_body(p) and p != output_layer(model)]
        config = LoRA(**{**vars(config), "targets": tuple(found)})
    if selects_modules(raw):
        # Layer numbers or exclusions chose among the targets: the tensors say which it came to.
        outside = {p: by_path.pop(p) for p in list(by_path) if not in_layers(raw, p)}
        extra += [f"{path}.{attribute}" for path, own in outside.items() for attribute in own]
        config = LoRA(**{**vars(config), "targets": tuple(by_path) or config.targets})
    _check_tensors(folder, model, config, by_path, extra)
    attach_to(model, config, name, strict=False)
    with torch.no_grad():
        for path, module in lora_modules(model):
            if name in module.adapters:
                for attribute, value in by_path[path].items():
                    getattr(module.adapters[name], attribute).copy_(value)


def _load_prompt(
    folder: Path,
    model: nn.Module,
    config: PrefixTuning | PromptTuning,
    name: str,
    tensors: dict[str, Tensor],
    raw: dict,
) -> None:
    METHODS[type(config)].plan(model, config, True)
    if raw.get("num_transformer_submodules") == 2 and _PROMPT in tensors:
        tensors = _of_two_stacks(model, config, tensors)
    want = expected_prompt(config, shape_of(stack_of(model)))
    got = {key: tuple(t.shape) for key, t in tensors.items()}
    if got != {_PROMPT: want} or not tensors[_PROMPT].is_floating_point():
        raise InputError(
            f"{folder / WEIGHTS_NAME} does not fit this {type(model).__name__}: expected one "
            f"floating tensor {_PROMPT} {want}, got {got}"
        )
    check_model(folder / CONFIG_NAME, raw, model)
    attach_to(model, config, name, strict=False)
    if isinstance(config, PrefixTuning):
        set_prefix(model, name, tensors[_PROMPT])
    else:
        with torch.no_grad():
            prompt_of(model, name).copy_(tensors[_PROMPT])


def _of_two_stacks(
    model: nn.Module, config: PrefixTuning | PromptTuning, tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """What PEFT keeps for an encoder-decoder as it acts there: a prefix's layers in `peft_order`;
    of twice as many prompt tokens the first half."""
    values = tensors[_PROMPT]
    if isinstance(config, PromptTuning):
        return {**tensors, _PROMPT: values[: config.length]}
    layers = shape_of(stack_of(model)).layers
    if values.ndim != 2 or values.shape[1] % layers:
        return tensors  # refused by its shape
    return {**tensors, _PROMPT: values.unflatten(1, (layers, -1))[:, peft_order(layers)].flatten(1)}


def _load_head(
    folder: Path,
    model: nn.Module,
    config: FeatureBased | OutputLayer,
    name: str,
    tensors: dict[str, Tensor],
    raw: dict,
) -> None:
    want = {f"head.{k}": tuple(t.shape) for k, t in new_head(model, config).state_dict().items()}
    got = {key: tuple(t.shape) for key, t in tensors.items()}
    if got != want:
        raise InputError(
            f"{folder / WEIGHTS_NAME} does not fit the head of this {type(model).__name__}: "
            f"expected {want}, got {got}"
        )
    check_model(folder / CONFIG_NAME, raw, model)
    attach_to(model, config, name, strict=False)
    set_head_tensors(model, name, tensors)


def _load_bottleneck(
    folder: Path, model: nn.Module, config: BottleneckAdapter, name: str, raw: dict
) -> None:
    tensors = read_weights(folder, adapterhub.WEIGHTS_NAME, adapterhub.PICKLE_NAME)
    stored = str(raw.get("name"))
    path = folder / adapterhub.WEIGHTS_NAME
    adapterhub.check_hub_tensors(path, model, config, stored, tensors)
    attach_to(model, config, name, strict=False)
    adapterhub.set_hub_tensors(model, config, name, stored, tensors)


def read_weights(
    folder: Path, name: str = WEIGHTS_NAME, pickle: str = PICKLE_NAME
) -> dict[str, Tensor]:
    path = folder / name
    if not path.is_file():
        if (folder / pickle).exists():
            how = "PEFT's save_pretrained" if name == WEIGHTS_NAME else "use_safetensors=True"
            raise InputError(
                f"{folder / pickle} is a pickle, which can run code and is never opened here: "
                f"convert it to {name} ({how}, where you trust it)"
            )
        raise InputError(f"expected {path}, there is no such file")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path} is damaged or no safetensors file ({error}): copy or save it again"
        ) from error
    for key, tensor in tensors.items():
        if not _finite(tensor):
            raise InputError(f"{path}: expected finite numbers, {key} has NaN or infinity in it")
    return tensors


def _finite(t: Tensor) -> bool:
    if not t.is_floating_point() or not t.numel():
        return True
    t = t.float() if t.element_size() == 1 else t
    return bool(torch.isfinite(torch.stack(t.aminmax())).all())  # one pass; NaN is both of them


def lora_by_path(tensors: dict[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """{module path: {parameter: tensor}}, and the keys that are no LoRA tensor."""
    by_path: dict[str, dict[str, Tensor]] = {}
    extra = []
    for key, tensor in tensors.items():
        suffix = next((s for s in _SUFFIXES if key.endswith(s)), None)
        if suffix is None or not key.startswith(LORA_PREFIX):
            extra.append(key)
            continue
        path = key[len(LORA_PREFIX) : -len(suffix)]
        by_path.setdefault(path, {})[_SUFFIXES[suffix]] = tensor
    return by_path, extra


def _listed(kind: str, names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{len(names)} {kind}: {', '.join(names[:3])}{more}"


def _expected(config: LoRA, path: str, module: nn.Module) -> dict[str, tuple[int, ...]]:
    n, k = module.weight.shape
    if isinstance(module, LoraLinear) or isinstance(module, nn.Linear):
        transposed = getattr(module, "transposed", False)
    else:
        transposed = True  # Conv1D keeps [K, N]
    n, k = (k, n) if transposed else (n, k)
    rank, _ = config.rank_and_scale(path)
    shapes = {"lora_A": (rank, k), "lora_B": (n, rank)}
    return {**shapes, "lora_magnitude_vector": (n,)} if config.dora else shapes


def _check_tensors(
    folder: Path,
    model: nn.Module,
    config: LoRA,
    by_path: dict[str, dict[str, Tensor]],
    extra: list[str],
) -> None:
    try:
        found = match_targets(model, config.targets, strict=False)
    except InputError as error:
        raise InputError(
            f"{folder} holds an adapter for another base than this {type(model).__name__}: {error}"
        ) from error
    missing, wrong = [], []
    for path, module in found.items():
        here = by_path.get(path, {})
        for attribute, shape in _expected(config, path, module).items():
            if attribute not in here:
                missing.append(f"{path}.{attribute}")
            elif tuple(here[attribute].shape) != shape:
                wrong.append(
                    f"{path}.{attribute} is {tuple(here[attribute].shape)}, expected {shape}"
                )
            elif not here[attribute].is_floating_point():
                wrong.append(f"{path}.{attribute} is {here[attribute].dtype}")
        extra += [f"{path}.{a}" for a in here if a not in _expected(config, path, module)]
    extra += [f"{path}.{a}" for path in by_path if path not in found for a in by_path[path]]
    kinds = (("missing", missing), ("of another shape", wrong), ("extra", extra))
    problems = [_listed(kind, names) for kind, names in kinds if names]
    if problems:
        raise InputError(
            f"{folder / WEIGHTS_NAME} does not fit this {type(model).__name__} and its own "
            f"settings; tensors {'; '.join(problems)}"
        )
