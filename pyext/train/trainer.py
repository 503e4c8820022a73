"""The trainer: `transformers.Trainer` with our losses, and checkpoints of what learns alone."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from fusedpeft.errors import InputError
from fusedpeft.train.chat import max_positions
from fusedpeft.train.models import TokenLogprobs
from fusedpeft.train.objectives import Objective, collator, encode_rows

WEIGHTS_NAME = "trainable.safetensors"


def row_limit(config: Any, max_length: int | None) -> int | None:
    """Tokens a row may have: `max_length`, the model's own limit by default. Raises InputError
    where more is asked for than the model takes."""
    limit = max_positions(config)
    if max_length is None or limit is None or max_length <= limit:
        return limit if max_length is None else max_length
    raise InputError(f"max_length: the model takes at most {limit} tokens, got {max_length}")


class Trainer(transformers.Trainer):
    """One of the objectives (`Sft`, `Reward`, `Pro`) on a model with an adapter.

    model: the causal LM, or a RewardModel for `Reward`. Rows as `fusedpeft.data.rows` gives them;
    all are tokenised here. max_length: tokens a row may have (the model's limit by default);
    truncate: cut a longer one instead of refusing it.
    Raises InputError, before anything is written, for a row that is too long.
    """

    def __init__(
        self,
        model: PreTrainedModel | nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        objective: Objective,
        train_rows: Sequence[dict[str, Any]],
        eval_rows: Sequence[dict[str, Any]],
        args: TrainingArguments,
        *,
        max_length: int | None = None,
        truncate: bool = False,
        **kwargs: Any,
    ):
        module = TokenLogprobs(model) if isinstance(model, PreTrainedModel) else model
        limit = row_limit(module.config, max_length)
        examples = [
            encode_rows(objective, tokenizer, rows, max_length=limit, truncate=truncate)
            for rows in (train_rows, eval_rows)
        ]
        self.objective = objective
        super().__init__(
            module,
            args,
            collator(pad_id(tokenizer)),
            train_dataset=examples[0],
            eval_dataset=examples[1],
            **kwargs,
        )
        # A step's loss is divided by all of its tokens or prompts, over accumulated batches too.
        self.model_accepts_loss_kwargs = True
        self.can_return_loss = True

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | None]:
        """The batches of a step, and the objective's count over all of them and all ranks."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        count = torch.stack([self.objective.count(batch) for batch in batches]).sum()
        return batches, self.accelerator.reduce(count.to(device), "sum")

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict]:
        loss = self.objective.loss(model, inputs, num_items_in_batch)
        # Ranks average their gradients; a loss divided by the count of all of them must not be.
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        return (loss, {}) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.objective.loss(model, inputs)
        count = self.objective.count(inputs)
        self._held_out += torch.stack([loss * count, count]).cpu()
        return loss.detach(), None, None

    def evaluation_loop(
        self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """As transformers', but the loss is the mean over all tokens or prompts, not of batches."""
        self._held_out = torch.zeros(2, dtype=torch.float64)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        mine = self._held_out.float().to(self.args.device)
        total, count = self.accelerator.reduce(mine, "sum").tolist()
        output.metrics[f"{metric_key_prefix}_loss"] = total / count
        return output

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Only what learns: the base is on disk already, and nothing here is a pickle to be read
        back but the optimiser's state, which transformers reads with weights_only."""
        folder = Path(output_dir or self.args.output_dir)
        os.makedirs(folder, exist_ok=True)
        save_file(_trainable(self.accelerator.unwrap_model(self.model)), folder / WEIGHTS_NAME)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        path = Path(resume_from_checkpoint) / WEIGHTS_NAME
        saved = load_file(path)
        here = dict(self.accelerator.unwrap_model(model or self.model).named_parameters())
        mine = {name for name, p in here.items() if p.requires_grad}
        if mine != set(saved):
            odd = sorted(mine ^ set(saved))
            raise InputError(f"{path} belongs to another adapter: {odd[0]} and {len(odd) - 1} more")
        with torch.no_grad():
            for name, value in saved.items():
                here[name].copy_(value)


def _trainable(module: nn.Module) -> dict[str, Tensor]:
    return {
        name: p.detach().cpu().contiguous()
        for name, p in module.named_parameters()
        if p.requires_grad
    }


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Any token serves as padding where it is masked."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0
