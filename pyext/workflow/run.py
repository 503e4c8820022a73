"""A run: its stages in order, each skipped where complete, resumed where not."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console

from fusedpeft.errors import InputError
from fusedpeft.files import digest_file, digest_model, write_json, write_text
from fusedpeft.train.chat import check_new_tokens
from fusedpeft.train.objectives import Pro, Reward, Sft, encode_rows
from fusedpeft.train.trainer import row_limit
from fusedpeft.workflow import evaluation, stages
from fusedpeft.workflow.config import STAGES, TRAINED, Config, dump_config
from fusedpeft.workflow.data import load_stages
from fusedpeft.workflow.models import load_config, load_tokenizer, quiet
from fusedpeft.workflow.stages import Run
from fusedpeft.workflow.state import RESULT, Stage, locked
from fusedpeft.workflow.training import arguments

_WORK: dict[str, Callable[[Run, Stage], dict]] = {
    "sft": stages.sft,
    "reward": stages.reward,
    "pro": stages.pro,
    "evaluate": evaluation.evaluate,
    "report": evaluation.report,
}
# What a stage reads of earlier ones, where the configuration has them.
_AFTER = {
    "sft": (),
    "reward": ("sft",),
    "pro": ("sft", "reward"),
    "evaluate": ("sft", "pro"),
    "report": ("sft", "reward", "pro", "evaluate"),
}
_OBJECTIVES = {"sft": Sft(), "reward": Reward(), "pro": Pro()}


def run(
    config: Config,
    only: Sequence[str] | None = None,
    *,
    fresh: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Run the configuration's stages (or `only` some), and write results.json and report.html
    after each; returns the content of results.json.

    A complete stage is skipped, one that was cut off goes on from its last checkpoint. fresh: throw
    away what the stages to run have, and what was made from it. Raises InputError, before anything
    is written, for rows and settings that cannot be used, for a stage whose settings have changed
    since, and where an earlier stage is needed that is not complete.
    """
    console = console or Console(stderr=True, soft_wrap=True, highlight=False)
    quiet()
    wanted = _wanted(config, only)
    tokenizer, rows = load_tokenizer(config.base), load_stages(config)
    plan = _plan(config)
    again = _again(plan, wanted) if fresh else set()
    todo = [n for n in wanted if n in again or plan[n].result() is None]
    for name in plan:
        if name not in again:
            plan[name].check()
    for name in todo:
        for earlier in _AFTER[name]:
            if earlier in plan and earlier not in todo and plan[earlier].result() is None:
                raise InputError(
                    f"{name} needs the stage {earlier}, which is not complete in "
                    f"{config.run_dir}: run it first"
                )
    _check(config, tokenizer, rows, plan, todo)

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    with locked(config.run_dir):
        if "report" in again:
            (config.run_dir / evaluation.SAMPLES).unlink(missing_ok=True)
        for name in reversed(list(plan)):
            if name in again:
                plan[name].clear()
        write_text(config.run_dir / "config.yaml", dump_config(config))
        this = Run(
            config, console, tokenizer, rows, {n: s for n, s in plan.items() if n != "report"}
        )
        for name in wanted:
            stage = plan[name]
            if stage.result() is not None:
                console.print(f"{name}: complete, skipped")
                continue
            started = time.monotonic()
            result = _WORK[name](this, stage)
            _complete(stage, result, time.monotonic() - started)
            console.print(f"{name}: {_told(name, result)}")
            write_results(config, plan)
        results = write_results(config, plan)
    console.print(f"report: {config.run_dir / 'report.html'}")
    return results


def _wanted(config: Config, only: Sequence[str] | None) -> list[str]:
    there = config.stages()
    for name in only or ():
        if name not in STAGES:
            raise InputError(f"--stage: expected one of {', '.join(STAGES)}, got {name!r}")
        if name not in there:
            raise InputError(f"the configuration has no section {name!r}: add it")
    return [name for name in there if not only or name in only]


def _plan(config: Config) -> dict[str, Stage]:
    """{stage: its folder}, in order, with identities that say what each is made from."""
    every = config.model_dump(mode="json")
    sections = {n: config.training(n) for n in TRAINED if every[n] is not None}
    # The files of all: what one stage holds out is missing from the others' rows.
    files = {path for section in sections.values() for path in section.data}
    inputs = {str(path): digest_file(path) for path in sorted(files)}
    inputs["base"] = digest_model(config.base)
    plan: dict[str, Stage] = {}
    for name in config.stages():
        settings = dict(every[name])
        if name in TRAINED:
            settings |= {
                "lora": every["lora"],
                "seed": config.seed,
                "threads": config.threads,
                "every_holdout": {n: section.holdout for n, section in sections.items()},
            }
        read = config.evaluate.files() if name == "evaluate" else []
        own = {str(path): digest_file(path) for path in read if path.is_file()}
        after = {n: plan[n].digest for n in _AFTER[name] if n in plan}
        identity = {"settings": settings, "inputs": inputs | own, "after": after}
        plan[name] = Stage(config.run_dir, name, identity)
    return plan


def _again(plan: dict[str, Stage], wanted: Sequence[str]) -> set[str]:
    """The wanted stages and those made from them."""
    found = set(wanted)
    for name in plan:
        if any(earlier in found for earlier in _AFTER[name]):
            found.add(name)
    return found & set(plan)


def _check(config: Config, tokenizer, rows: dict, plan: dict[str, Stage], names: list[str]) -> None:
    """Every row and setting of every stage to come is fit for use: not an hour later, in the third
    stage, is it told that one is not."""
    model_config = load_config(config.base)
    answering = {"report": config.sft or config.pro, "pro": config.reward}
    for name in (n for n, yes in answering.items() if yes and n in names):
        most = getattr(config, name).max_new_tokens
        check_new_tokens(model_config, most, f"{name}.max_new_tokens")
    for file in config.evaluate.files() if "evaluate" in names else ():
        if not file.is_file():
            raise InputError(f"evaluate.data: there is no file {file}")
    names = [n for n in names if n in TRAINED]
    if "pro" in names:
        stages.check_rewards(rows["pro"], judged=config.reward is not None)
    for name in names:
        section = config.training(name)
        arguments(section, plan[name], config.seed)
        limit = row_limit(model_config, section.max_length)
        for part in (rows[name].train, rows[name].measured(section.max_eval_rows)):
            encode_rows(
                _OBJECTIVES[name], tokenizer, part, max_length=limit, truncate=section.truncate
            )


def _complete(stage: Stage, result: dict, seconds: float) -> None:
    # Where attempts were cut off, the training they had saved counts too.
    seconds = max(seconds, result.get("train_seconds", 0.0))
    write_json(
        stage.dir / RESULT,
        {"result": result, "seconds": seconds, "peak_memory_bytes": _peak_bytes()},
    )


def _peak_bytes() -> int:
    """The most this process has ever held in memory."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def write_results(config: Config, plan: dict[str, Stage]) -> dict[str, Any]:
    """results.json and report.html of what is complete."""
    from fusedpeft.evaluate.report import write_report

    done = {name: stage.result() for name, stage in plan.items()}
    done = {name: found for name, found in done.items() if found is not None}
    results = {
        "name": config.name,
        "stages": {n: found["result"] for n, found in done.items() if n != "report"},
        "seconds": {n: round(found["seconds"], 1) for n, found in done.items()},
        "peak_memory_bytes": max((f["peak_memory_bytes"] for f in done.values()), default=0),
        "versions": evaluation.versions(),
        "config": config.model_dump(mode="json"),
    }
    write_json(config.run_dir / "results.json", results)
    write_report(config.run_dir)
    return results


def _told(name: str, result: dict) -> str:
    """The stage's figures in one line."""
    if name == "sft":
        before, after = result["eval_loss_before"], result["eval_loss_after"]
        return f"held-out loss {before:.3f} → {after:.3f} nats a token"
    if name == "reward":
        pairs = result["accuracy"].items()
        before = result["accuracy_before"]
        return "held-out accuracy " + ", ".join(f"{n} {before[n]:.3f} → {v:.3f}" for n, v in pairs)
    if name == "pro":
        told = []
        for key, label in (("ranking_accuracy", "ranking accuracy"), ("reward", "mean reward")):
            if result.get(f"{key}_after") is not None:
                told.append(f"{label} {result[f'{key}_before']:.3f} → {result[f'{key}_after']:.3f}")
        return "held-out " + ", ".join(told)
    if name == "evaluate":
        return ", ".join(
            f"{model} {task} {scores['acc']:.3f}"
            for model, tasks in result.items()
            for task, scores in tasks.items()
            if isinstance(scores, dict)
        ) or ", ".join(f"{m} held-out loss {s['eval_loss']:.3f}" for m, s in result.items())
    return f"{result['samples']} prompts answered side by side"
