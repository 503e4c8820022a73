"""Models of a run: the base and its tokenizer from disk, adapters of earlier stages on it."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import PreTrainedTokenizerBase as Tokenizer

from fusedpeft.errors import InputError
from fusedpeft.layers import LoRA, attach, load_adapter
from fusedpeft.workflow.config import Config
from fusedpeft.workflow.state import Stage


def quiet() -> None:
    """One voice on the terminal: ours."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def load_tokenizer(base: Path) -> Tokenizer:
    """The tokenizer beside the model. Raises InputError where there is none."""
    if not base.is_dir():  # else transformers takes it for a name on a hub
        raise InputError(f"expected a folder with a model and its tokenizer, got {base}")
    try:
        return AutoTokenizer.from_pretrained(base, local_files_only=True)
    except (OSError, ValueError) as error:
        raise InputError(f"{base}: no tokenizer can be read ({_first(error)})") from error


def load_config(base: Path) -> PreTrainedConfig:
    """The model's configuration. Raises InputError for a folder without one that can be read."""
    try:
        return AutoConfig.from_pretrained(base, local_files_only=True)
    except (OSError, ValueError) as error:
        raise InputError(f"{base}: no model's config.json can be read ({_first(error)})") from error


def load_base(base: Path) -> PreTrainedModel:
    """The causal LM on this machine's device, in its stored dtype. Raises InputError for a folder
    without a model or with a damaged one."""
    if not (base / "config.json").is_file():
        raise InputError(f"expected a folder with a model's config.json, got {base}")
    try:
        model = AutoModelForCausalLM.from_pretrained(base, local_files_only=True)
    except SafetensorError as error:
        raise InputError(
            f"{base}: the weights are damaged ({_first(error)}): copy or download them again"
        ) from error
    except (OSError, ValueError) as error:
        raise InputError(f"{base}: no causal LM can be read ({_first(error)})") from error
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def _first(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def lora_config(config: Config) -> LoRA:
    return LoRA(**config.lora.model_dump())


def adapted(config: Config, after: Stage | None) -> PreTrainedModel:
    """The base with the adapter of the stage before, or with a fresh one."""
    model = load_base(config.base)
    if after is None:
        return attach(model, lora_config(config))
    return load_adapter(model, after.adapter)
