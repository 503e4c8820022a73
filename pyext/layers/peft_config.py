"""adapter_config.json, PEFT's settings file, to and from the configs here; AdapterHub's, read."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from fusedpeft.errors import InputError
from fusedpeft.layers.adapterhub import from_hub
from fusedpeft.layers.config import (
    FeatureBased,
    LoRA,
    OutputLayer,
    PrefixTuning,
    PromptTuning,
)
from fusedpeft.layers.prefix import Shape, shape_of, stack_of
from fusedpeft.layers.targets import CLASSIFIERS

CONFIG_NAME = "adapter_config.json"

# Read into LoRA.
_READ = {
    "r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora",
    "rank_pattern", "alpha_pattern",
}  # fmt: skip
# Choose modules: taken from the tensors instead.
_SELECT = ("exclude_modules", "layers_to_transform", "layers_pattern")
# Say nothing about what the tensors mean (fan_in_fan_out follows from the module's type; the
# *_config of initialisations that leave the base alone only say how A and B began).
_IGNORED = {
    "peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "peft_version",
    "inference_mode", "fan_in_fan_out", "qalora_group_size", "megatron_core", "runtime_config",
    "eva_config", "ensure_weight_tying", "bias", "init_lora_weights", "_commit_hash", *_SELECT,
}  # fmt: skip
# PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA, MiCA change the base at the start or freeze a factor.
_PLAIN_INITS = (None, True, False, "gaussian", "eva", "orthogonal")


def to_peft(config: LoRA, targets: Sequence[str] | str, model: nn.Module, conv1d: bool) -> dict:
    """The settings as PEFT writes them; what is left out takes PEFT's defaults."""
    return {
        "peft_type": "LORA",
        **_about(model),
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "use_rslora": config.rslora,
        "use_dora": config.dora,
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": dict(config.alpha_pattern),
        "fan_in_fan_out": conv1d,
        "bias": "none",
        "init_lora_weights": True,
    }


_TRANSFORMERS = "transformers.models."
_GENERATING = ("CAUSAL_LM", "SEQ_2_SEQ_LM")
_TASKS = {  # how a model's class ends -> PEFT's name of what it does
    "ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}  # fmt: skip


def _about(model: nn.Module) -> dict:
    can_generate = getattr(model, "can_generate", None)
    config = getattr(model, "config", None)
    name = getattr(config, "_name_or_path", None)
    kind = "SEQ_2_SEQ_LM" if getattr(config, "is_encoder_decoder", False) else "CAUSAL_LM"
    heads = (task for end, task in _TASKS.items() if type(model).__name__.endswith(end))
    generates = can_generate is not None and can_generate()
    return {
        "task_type": kind if generates else next(heads, None),
        "base_model_name_or_path": name or None,
        "inference_mode": True,
    }


def _architecture(model: nn.Module) -> dict:
    """Of which architecture a prompt or a head is, which its one tensor does not tell; as PEFT says
    it. FSDP2's and a user's own class stand before transformers'."""
    kinds = (c for c in type(model).__mro__ if c.__module__.startswith(_TRANSFORMERS))
    if (kind := next(kinds, None)) is None:
        return {}
    own = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    return {"auto_mapping": own}


def head_settings(config: FeatureBased | OutputLayer, model: nn.Module) -> dict:
    """Ours: neither neighbour has a head alone."""
    return {
        "method": type(config).__name__,
        **_about(model),
        **_architecture(model),
        **vars(config),
    }


def prompt_to_peft(config: PrefixTuning | PromptTuning, model: nn.Module) -> dict:
    """The same for virtual tokens. A prefix counts key heads, as PEFT does for grouped queries.

    An encoder-decoder's prefix is in settings of ours: PEFT has every other one of its tensor's
    layers act, twice (`peft_order`), so it has no place for one of each layer's own.
    """
    shape = shape_of(stack_of(model))
    if isinstance(config, PrefixTuning) and model.config.is_encoder_decoder:
        own = {"num_virtual_tokens": config.length, "num_layers": shape.layers}
        return {"method": "PrefixTuning", **_about(model), **_architecture(model), **own}
    settings = {
        **_about(model),
        **_architecture(model),
        "num_virtual_tokens": config.length,
        "num_transformer_submodules": 1,
        "num_layers": shape.layers,
    }
    if isinstance(config, PromptTuning):
        heads = model.config.num_attention_heads
        sizes = {"num_attention_heads": heads, "token_dim": shape.hidden}
        return {"peft_type": "PROMPT_TUNING", **settings, **sizes, "prompt_tuning_init": "RANDOM"}
    sizes = {"num_attention_heads": shape.heads, "token_dim": shape.heads * shape.dim}
    # The projection is folded away, so none has to be built to read it.
    folded = {"encoder_hidden_size": shape.hidden, "prefix_projection": False}
    return {"peft_type": "PREFIX_TUNING", **settings, **sizes, **folded}


def check_model(path: Path, raw: dict[str, Any], model: nn.Module) -> None:
    """Raises InputError where the settings of a prefix, a prompt or a head tell of another model.
    Of an encoder-decoder's two counts either will do: PEFT writes the encoder's."""
    expected = _sizes(model) if "num_virtual_tokens" in raw else {}
    task, kind = _about(model)["task_type"], _architecture(model).get("auto_mapping", {})
    if task in _GENERATING and raw.get("task_type") in _GENERATING:
        expected["task_type"] = [task]
    mapping = raw.get("auto_mapping")
    library = mapping.get("parent_library") if isinstance(mapping, dict) else None
    if kind and str(library).startswith(_TRANSFORMERS):
        expected["parent_library"] = [kind["parent_library"]]
    for name, own in expected.items():
        got = library if name == "parent_library" else raw.get(name)
        if got is not None and got not in own:
            raise InputError(
                f"{path} is for another model than this {type(model).__name__}: expected {name} "
                f"{' or '.join(map(repr, own))}, got {got!r}"
            )


def _sizes(model: nn.Module) -> dict[str, list]:
    """Under PEFT's names, what it or `prompt_to_peft` may have written for this model."""
    stack = stack_of(model)
    shape = shape_of(stack)

    def either(*names: str) -> set[int]:
        found = [getattr(c, name, None) for c in (model.config, stack.config) for name in names]
        return {n for n in found if isinstance(n, int)}  # some models count layer by layer: no say

    heads = either("num_attention_heads", "encoder_attention_heads", "decoder_attention_heads")
    layers, dims = either("num_hidden_layers", "encoder_layers"), either("hidden_size")
    if not isinstance(shape.heads, int):
        return {"num_layers": sorted(layers), "token_dim": sorted(dims)}
    grouped = {dim // count * shape.heads for dim in dims for count in heads}
    return {
        "num_layers": sorted({shape.layers} | layers),
        "num_attention_heads": sorted({shape.heads} | heads),
        "token_dim": sorted({shape.heads * shape.dim} | dims | grouped),
    }


def peft_order(layers: int) -> list[int]:
    """Which layer of the tensor that PEFT keeps acts in each layer of an encoder-decoder: it puts
    the layers once more behind themselves and gives each layer four, keys and values for itself and
    for cross attention, of which the latter two are then dropped."""
    return [2 * layer % layers for layer in range(layers)]


def expected_prompt(config: PrefixTuning | PromptTuning, shape: Shape) -> tuple[int, int]:
    """The shape of `prompt_embeddings`."""
    if isinstance(config, PromptTuning):
        return config.length, shape.hidden
    return config.length, 2 * shape.layers * shape.heads * shape.dim


def read_config(folder: Path, saveable: Sequence[str] = CLASSIFIERS) -> tuple[Any, dict[str, Any]]:
    """(the config, the raw settings), PEFT's or AdapterHub's. saveable: what modules_to_save may
    name. Raises InputError: missing, no JSON, another method, a variant of one."""
    if not folder.is_dir():
        raise InputError(f"expected a folder with an adapter at {folder}, there is none")
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise InputError(f"expected {path}, there is no such file")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: expected JSON ({error})") from error
    if not isinstance(raw, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(raw).__name__}")
    _check_types(path, raw)
    if "peft_type" not in raw and isinstance(raw.get("config"), dict):
        return from_hub(path, raw), raw
    if raw.get("method") == "PrefixTuning":
        raw = {**raw, "peft_type": "PREFIX_TUNING"}
    heads = {"FeatureBased": FeatureBased, "OutputLayer": OutputLayer}
    if raw.get("method") in heads:
        try:
            own = {k: raw[k] for k in ("num_labels",) if k in raw}
            return heads[raw["method"]](**own), raw
        except (InputError, TypeError) as error:
            raise InputError(f"{path}: {error}") from error
    try:
        virtual = {"PREFIX_TUNING": PrefixTuning, "PROMPT_TUNING": PromptTuning}
        if raw.get("peft_type") in virtual:
            return virtual[raw["peft_type"]](length=raw.get("num_virtual_tokens")), raw
    except InputError as error:
        raise InputError(f"{path}: num_virtual_tokens: {error}") from error
    _check_plain(path, raw, saveable)
    try:
        config = LoRA(
            rank=raw.get("r", 8),
            alpha=raw.get("lora_alpha", 8),  # PEFT's default, not LoRA's
            dropout=raw.get("lora_dropout", 0.0),
            targets=raw.get("target_modules"),
            rslora=raw.get("use_rslora", False),
            dora=raw.get("use_dora", False),
            rank_pattern=raw.get("rank_pattern") or {},
            alpha_pattern=raw.get("alpha_pattern") or {},
        )
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return config, raw


def selects_modules(raw: dict[str, Any]) -> bool:
    # layers_to_transform may be the layer 0.
    return any(raw.get(key) not in (None, [], "") for key in _SELECT)


def in_layers(raw: dict[str, Any], module: str) -> bool:
    """Whether PEFT's layers_to_transform has the layer that a module is in."""
    layers = _several(raw.get("layers_to_transform"))
    patterns = _several(raw.get("layers_pattern")) or ["[^.]*"]
    found = (re.match(rf"(?:^|.*?\.){p}\.(\d+)\.", module) for p in patterns)
    at = next((int(match[1]) for match in found if match), None)
    return not layers or at is None or at in layers


def _several(given: object) -> list:
    return given if isinstance(given, list) else [] if given in (None, "") else [given]


def _check_types(path: Path, raw: dict[str, Any]) -> None:
    for key in ("peft_type", "method"):
        if not isinstance(raw.get(key), str | None):
            raise InputError(f"{path}: {key}: expected a name, got {raw[key]!r}")
    for key, kind, what in (
        ("modules_to_save", str, "a list of names"),
        ("layers_to_transform", int, "a list of whole numbers"),
        ("layers_pattern", str, "a list of regular expressions"),
    ):
        sound = all(isinstance(one, kind) for one in _several(raw.get(key)))
        if not sound or (key == "layers_pattern" and not _compile(_several(raw.get(key)))):
            raise InputError(f"{path}: {key}: expected {what}, got {raw[key]!r}")


def _compile(patterns: list[str]) -> bool:
    try:
        return all(re.compile(p) for p in patterns)
    except re.error:
        return False


def _check_plain(path: Path, raw: dict[str, Any], saveable: Sequence[str]) -> None:
    if raw.get("peft_type") != "LORA":
        known = "'LORA', 'PREFIX_TUNING' or 'PROMPT_TUNING'"
        raise InputError(f"{path}: expected peft_type {known}, got {raw.get('peft_type')!r}")
    if raw.get("bias", "none") != "none":
        raise InputError(f"{path}: bias={raw['bias']!r} is not supported, only 'none'")
    init = raw.get("init_lora_weights")
    if init not in _PLAIN_INITS:
        raise InputError(
            f"{path}: init_lora_weights={init!r} is not supported: it changes the base's weights; "
            "convert it with PEFT's save_pretrained(path_initial_model_for_weight_conversion=…)"
        )
    unknown = [k for k in raw if k not in _READ and k not in _IGNORED and raw[k]]
    if "modules_to_save" in unknown and set(raw["modules_to_save"]) <= set(saveable):
        unknown.remove("modules_to_save")  # their tensors say what there is
    if unknown:
        named = ", ".join(f"{k}={raw[k]!r}" for k in unknown)
        raise InputError(f"{path}: not supported, only plain LoRA and DoRA are: {named}")
