"""Benchmarks through lm-eval's harness on a model in memory, offline over local files.

`run(model, tokenizer, ["mmlu", "hellaswag"], data_dir, limit=100)` reads `data_dir`; a name such as
"hub:mmlu" takes the harness's own task instead, which downloads its data.

How each is scored, see DESIGN: MMLU by the next token after "Answer:", five shots of the subject,
context and answer encoded together, averaged over questions; HellaSwag's acc_norm divides by the
characters of the ending.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import random
import sys
import unittest.mock
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import yaml

from fusedpeft.errors import InputError
from fusedpeft.evaluate.benchmarks import MMLU_SHOTS, hellaswag_rows, mmlu_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LOCAL = ("mmlu", "hellaswag")
HUB = "hub:"
_FEWSHOT_SEED = 1234  # the harness's own, so that its tasks draw the shots they always draw
TASKS = Path(__file__).parent / "tasks"


def run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: list[str],
    data_dir: Path | None,
    limit: int | None = None,
    batch_size: int = 8,
    *,
    num_fewshot: int | None = None,
) -> dict[str, dict[str, float]]:
    """{task: {"acc", "acc_norm" where the task has it, "n", "truncated"}}.

    data_dir: the folder with `mmlu/` and `hellaswag/`; not needed for tasks of the hub.
    limit: questions of each task, at even distances (of a hub task: the first ones).
    num_fewshot: MMLU's shots, 5 by default; for a hub task its own by default.
    truncated: prompts longer than the model takes, which the harness cuts from the left (shots
    first); a warning tells how many. The model is left in the mode it came in and the random state
    where it was; adapters stay active. Raises InputError for unknown tasks, missing or damaged
    files and where lm-eval is not installed.
    """
    _check(tasks, data_dir, limit, batch_size, num_fewshot)
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise InputError(
            "evaluation needs lm-eval: expected it installed, pip install 'fusedpeft[evaluate]'"
        ) from error
    with _untouched(model), _quiet(), torch.no_grad():
        results = {}
        for name in tasks:
            results[name] = _run_one(
                model, tokenizer, name, data_dir, limit, batch_size, num_fewshot
            )
        return results


def _check(
    tasks: list[str],
    data_dir: Path | None,
    limit: int | None,
    batch_size: int,
    num_fewshot: int | None,
) -> None:
    for name in tasks:
        if name not in LOCAL and not name.startswith(HUB):
            raise InputError(
                f"tasks: expected {', '.join(LOCAL)}, or hub:NAME for a task of the harness, "
                f"got {name!r}"
            )
        if name in LOCAL and (data_dir is None or not Path(data_dir).is_dir()):
            raise InputError(f"data: expected the folder with {name}'s files, got {data_dir}")
    if limit is not None and limit < 1:
        raise InputError(f"limit: expected at least 1, got {limit}")
    if batch_size < 1:
        raise InputError(f"batch_size: expected at least 1, got {batch_size}")
    if num_fewshot is not None and num_fewshot < 0:
        raise InputError(f"num_fewshot: expected at least 0, got {num_fewshot}")


def _run_one(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    data_dir: Path | None,
    limit: int | None,
    batch_size: int,
    num_fewshot: int | None,
) -> dict[str, float]:
    from lm_eval import evaluate
    from lm_eval.tasks import TaskManager

    if name in LOCAL:
        task: str | dict[str, Any] = local_task(name, Path(data_dir or "."), limit, num_fewshot)
        manager = TaskManager(include_path=str(TASKS), include_defaults=False)
        limit, num_fewshot = None, None
    else:
        task, manager = name.removeprefix(HUB), TaskManager()
        if task not in manager.all_tasks:
            raise InputError(f"tasks: the harness has no task {task!r}")
    loaded = manager.load([task])
    for inner in loaded["tasks"].values():
        own = inner.get_config("num_fewshot")
        # As the harness does it: a task that fixes 0 keeps 0.
        shots = (own or 0) if num_fewshot is None or own == 0 else num_fewshot
        inner.set_config(key="num_fewshot", value=shots)
        inner.set_fewshot_seed(seed=_FEWSHOT_SEED)
    lm = _counting_lm(model, tokenizer, batch_size)
    # Not simple_evaluate: it spends seconds on asking git, pip and the machine about themselves.
    found = evaluate(lm, loaded, limit=limit, bootstrap_iters=0, log_samples=False)
    key = name.removeprefix(HUB)
    groups = found.get("groups") or {}
    scores = groups.get(key) or found["results"][key]
    counts = [n["effective"] for n in found["n-samples"].values()]
    result = {
        metric: float(scores[f"{metric},none"])
        for metric in ("acc", "acc_norm")
        if f"{metric},none" in scores
    }
    result |= {"n": float(sum(counts)), "truncated": float(len(lm.truncated))}
    if lm.truncated:
        warnings.warn(
            f"{name}: {len(lm.truncated)} of {len(lm.contexts)} prompts are longer than the "
            f"{lm.max_length} tokens the model takes and were cut from the left: lower num_fewshot",
            stacklevel=3,
        )
    return result


def local_task(
    name: str, data_dir: Path, limit: int | None, num_fewshot: int | None
) -> dict[str, Any]:
    """The task of `tasks/<name>.yaml` over rows of `data_dir`, as lm-eval takes it."""
    if name == "mmlu":
        rows = mmlu_rows(data_dir, limit, MMLU_SHOTS if num_fewshot is None else num_fewshot)
    else:
        rows = hellaswag_rows(data_dir, limit)

    def dataset(**_: Any) -> dict[str, Any]:
        from datasets import Dataset

        # Not through a JSON file: its reader guesses types, and makes times of texts like dates.
        return {"test": Dataset.from_list(rows)}

    # Read here, not by name: lm-eval drops the registered file where a dict overrides a part of it.
    task = yaml.safe_load((TASKS / f"{name}.yaml").read_text(encoding="utf-8"))
    return {**task, "custom_dataset": dataset}


def _counting_lm(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int
) -> Any:
    """lm-eval's HFLM that remembers which contexts it had to cut."""
    from lm_eval.models.huggingface import HFLM

    class CountingLM(HFLM):
        def __init__(self) -> None:
            # A copy: HFLM sets a padding token on the tokenizer it gets.
            super().__init__(
                pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size
            )
            self.contexts: set[tuple[int, ...]] = set()
            self.truncated: set[tuple[int, ...]] = set()

        def loglikelihood(self, requests, disable_tqdm=False):
            # Bars belong on a terminal, not into a log file.
            return super().loglikelihood(requests, disable_tqdm or not sys.stderr.isatty())

        def _loglikelihood_tokens(self, requests, *args, **kwargs):
            for _, context, continuation in requests:
                self.contexts.add(tuple(context))
                # HFLM's own bound: the last token of the continuation is never an input.
                if len(context) + len(continuation) > self.max_length + 1:
                    self.truncated.add(tuple(context))
            return super()._loglikelihood_tokens(requests, *args, **kwargs)

    return CountingLM()


@contextlib.contextmanager
def _untouched(model: torch.nn.Module) -> Iterator[None]:
    """Evaluating in the middle of a training run must not change it: every module keeps its mode,
    and the generators of Python, numpy and torch stay where they are."""
    modes = [(module, module.training) for module in model.modules()]
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        torch.cuda.set_rng_state_all(cuda)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without a line for each cut prompt (they are counted) and without bars over the rows."""
    import datasets
    from lm_eval.api import task
    from tqdm import tqdm

    loggers = [logging.getLogger(name) for name in ("lm_eval", "transformers")]
    levels, bars = [logger.level for logger in loggers], datasets.are_progress_bars_disabled()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        with unittest.mock.patch.object(task, "tqdm", functools.partial(tqdm, disable=True)):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()
