"""What a run shows while it works: a bar a stage on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

_QUIET_SECONDS = 15.0


class ProgressBar(TrainerCallback):
    """Steps, last loss and time left of one training stage."""

    def __init__(self, console: Console, title: str):
        self.console, self.title = console, title
        self.loss = ""
        self.told = 0.0
        self.bar: Progress | None = None

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.told = time.monotonic()
        if self.console.is_terminal:
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[loss]}"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self.bar.start()
            self.task = self.bar.add_task(
                self.title, total=state.max_steps, completed=state.global_step, loss=""
            )

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if logs and "loss" in logs:
            self.loss = f"loss {float(logs['loss']):.3f}"

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=state.global_step, loss=self.loss)
        elif time.monotonic() - self.told > _QUIET_SECONDS:
            self.told = time.monotonic()
            self.console.print(
                f"{self.title}: step {state.global_step} of {state.max_steps} {self.loss}"
            )

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.close()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
