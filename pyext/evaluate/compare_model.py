"""A base with one of the methods of `fusedpeft compare` on it, and its rows as tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from fusedpeft import layers as fp
from fusedpeft.errors import InputError
from fusedpeft.evaluate.compare_tasks import Row

if TYPE_CHECKING:
    from fusedpeft.evaluate.compare import Settings


def method_config(name: str, task: str) -> Any:
    """The config that `fp.attach` takes."""
    made: dict[str, Callable[[], Any]] = {
        "feature-based": lambda: fp.FeatureBased(num_labels=2),
        "output layer": fp.OutputLayer,
        "full": fp.FullFineTuning,
        "LoRA": lambda: fp.LoRA(rank=8, alpha=16),
        "bottleneck": lambda: fp.BottleneckAdapter(size=16),
        "prefix": lambda: fp.PrefixTuning(length=16),
        "prompt": lambda: fp.PromptTuning(length=20, init="vocab"),
    }
    return made[name]()


def read_base(kind: Any, base: str, **options: Any) -> Any:
    """`kind` from the folder. Raises InputError where it cannot be read."""
    try:
        return kind.from_pretrained(base, local_files_only=True, **options)
    except (OSError, ValueError, SafetensorError) as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"compare BASE: {base}: no model can be read ({why})") from error


def load_model(settings: Settings) -> tuple[nn.Module, Any]:
    torch.manual_seed(settings.seed)
    tokenizer = read_base(AutoTokenizer, settings.base)
    if settings.task == "nsmc":
        model = read_base(AutoModelForSequenceClassification, settings.base, num_labels=2)
    else:
        model = read_base(AutoModelForCausalLM, settings.base)
    pad = next(t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if t is not None)
    model.config.pad_token_id = pad
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def adapt(model: nn.Module, name: str, task: str) -> None:
    """The method on the model; a classification head, new as it is, trains with every one."""
    config = method_config(name, task)
    fp.attach(model, config, "method")
    heads = (fp.FeatureBased, fp.OutputLayer, fp.FullFineTuning)
    if task == "nsmc" and not isinstance(config, heads):
        fp.attach(model, fp.OutputLayer(), "head")
        fp.activate(model, ["method", "head"])


def encode(task: str, tokenizer, row: Row, most: int) -> tuple[list[int], list[int]]:
    """(ids, labels); of a sentence only the answer is learned."""
    if task == "nsmc":
        return tokenizer(row.text)["input_ids"][:most], []
    prompt = tokenizer(f"{row.text} || ")["input_ids"]
    answer = tokenizer(row.answer, add_special_tokens=False)["input_ids"]
    ids = [*prompt, *answer, tokenizer.eos_token_id][:most]
    return ids, [*([-100] * len(prompt)), *answer, tokenizer.eos_token_id][:most]


def batch(task: str, rows: Sequence[tuple[Row, tuple]], pad: int, device) -> dict[str, Tensor]:
    longest = max(len(ids) for _, (ids, _) in rows)
    ids = torch.tensor([[*i, *([pad] * (longest - len(i)))] for _, (i, _) in rows], device=device)
    mask = torch.tensor([[1] * len(i) + [0] * (longest - len(i)) for _, (i, _) in rows])
    if task == "nsmc":
        labels = torch.tensor([row.label for row, _ in rows])
    else:
        labels = torch.tensor([[*y, *([-100] * (longest - len(y)))] for _, (_, y) in rows])
    return {"input_ids": ids, "attention_mask": mask.to(device), "labels": labels.to(device)}
