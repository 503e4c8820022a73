"""One training stage on `fusedpeft.train.Trainer`: a kill at any moment loses a few steps."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import (
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
    get_scheduler,
    set_seed,
)

from fusedpeft.errors import InputError
from fusedpeft.files import write_json
from fusedpeft.train import Trainer
from fusedpeft.workflow.config import Training
from fusedpeft.workflow.data import Rows
from fusedpeft.workflow.progress import ProgressBar
from fusedpeft.workflow.state import HISTORY, MARKER, Stage

# Names that go from the section to TrainingArguments as they are.
_PASSED = (
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "logging_steps",
    "save_steps",
)


class MarkComplete(TrainerCallback):
    """Called when a checkpoint is written to its end: the marker says so, and the time spent."""

    def __init__(self, seconds_before: float):
        self.start = time.monotonic() - seconds_before

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    def on_save(self, args, state, control, **kwargs) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        write_json(folder / MARKER, {"seconds": self.seconds})


def arguments(section: Training, stage: Stage, seed: int) -> TrainingArguments:
    """Raises InputError for what only transformers can judge: the scheduler's name, and whether it
    needs arguments that a configuration does not have."""
    try:
        made = TrainingArguments(
            output_dir=str(stage.checkpoints),
            seed=seed,
            save_strategy="steps",
            # The newest may be cut off in the middle: the one before it must still be there.
            save_total_limit=2,
            eval_strategy="steps" if section.eval_steps else "no",
            eval_steps=section.eval_steps,
            report_to="none",
            disable_tqdm=True,
            # A loss that is not finite is logged as it is: the filter would write 0.
            logging_nan_inf_filter=False,
            remove_unused_columns=False,
            dataloader_pin_memory=torch.cuda.is_available(),
            **{name: getattr(section, name) for name in _PASSED},
        )
    except ValueError as error:
        raise InputError(f"{stage.name}: {str(error).splitlines()[0]}") from error
    nothing = torch.optim.SGD([torch.zeros(1)], lr=section.learning_rate)
    try:
        get_scheduler(made.lr_scheduler_type, nothing, num_warmup_steps=0, num_training_steps=1)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{stage.name}: lr_scheduler_type: expected one that needs nothing but these settings, "
            f"such as linear or cosine, got {section.lr_scheduler_type} ({error})"
        ) from error
    return made


def make_trainer(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    objective: Any,
    rows: Rows,
    section: Training,
    stage: Stage,
    seed: int,
) -> Trainer:
    """The Trainer of a stage; it reads every row, so it raises InputError for one that is too long
    before anything is trained or written."""
    return Trainer(
        model,
        tokenizer,
        objective,
        rows.train,
        rows.measured(section.max_eval_rows),
        arguments(section, stage, seed),
        max_length=section.max_length,
        truncate=section.truncate,
    )


def train(trainer: Trainer, stage: Stage, seed: int, console: Console) -> dict[str, float]:
    """Train from the last whole checkpoint, or from the start, to the end; writes history.json.

    Returns {"train_seconds", "steps"}, of all attempts together. Raises InputError where a trained
    weight is not finite.
    """
    checkpoint, seconds = stage.last_checkpoint()
    if checkpoint is not None:
        console.print(f"{stage.name}: goes on from {checkpoint.name}")
    marker, bar = MarkComplete(seconds), ProgressBar(console, stage.name)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(marker)
    trainer.add_callback(bar)
    set_seed(seed)
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        bar.close()
    write_json(stage.dir / HISTORY, trainer.state.log_history)
    learned = ((n, p) for n, p in trainer.model.named_parameters() if p.requires_grad)
    require_finite(stage, {name: float(p.detach().abs().max()) for name, p in learned})
    return {"train_seconds": marker.seconds, "steps": trainer.state.global_step}


def require_finite(stage: Stage, values: dict[str, float | None]) -> None:
    """Raises InputError where training went astray: such weights are not kept as a result."""
    for name, value in values.items():
        if value is not None and not math.isfinite(value):
            raise InputError(
                f"{stage.name}: {name} is {value} after training: expected a finite number; "
                f"lower learning_rate and start the stage again with --fresh"
            )
