"""The stages that train nothing: benchmarks of base, SFT and PRO, and the report."""

from __future__ import annotations

from dataclasses import replace

import torch

from fusedpeft.files import write_json
from fusedpeft.train import generate_answers
from fusedpeft.workflow.config import TRAINED
from fusedpeft.workflow.stages import Run, once
from fusedpeft.workflow.state import Stage

SAMPLES = "samples.json"


def models(run: Run) -> list[str]:
    """The models that are compared: the base and what the configuration's stages make of it."""
    return ["base", *(name for name in ("sft", "pro") if name in run.stages)]


def evaluate(run: Run, stage: Stage) -> dict:
    """{model: {task: {"acc", …}, "eval_loss" on the SFT stage's held-out rows}}."""
    from fusedpeft.evaluate import harness

    section, training = run.config.evaluate, run.config.sft
    stage.begin()
    found = {}
    for name in models(run):

        def measured(name=name) -> dict:
            run.console.print(f"evaluate: {name}")
            model = run.model(name).eval()
            scores: dict = {}
            if training is not None:
                held = run.rows["sft"].measured(training.max_eval_rows)
                scores["eval_loss"] = run.measure(training).sft_loss(model, held)
            if section.tasks:
                scores |= harness.run(
                    model,
                    run.tokenizer,
                    list(section.tasks),
                    section.data,
                    limit=section.limit,
                    batch_size=section.batch_size,
                    num_fewshot=section.num_fewshot,
                )
            return scores

        found[name] = once(stage, name, measured)
    return found


def report(run: Run, stage: Stage) -> dict:
    """Writes samples.json: held-out prompts answered by base, SFT and PRO, with the reward model's
    judgement. The page itself is made of it and of results.json when every stage has reported."""
    section = run.config.report
    stage.begin()
    source = next((n for n in reversed(TRAINED) if n in run.rows and n != "reward"), None)
    samples = []
    if source is not None:
        rows = run.rows[source].measured(section.samples)
        judge = run.judge() if source == "pro" else None
        if judge is not None:
            training = run.config.pro
            measure = replace(run.measure(training), truncate=True)
            # In the unit of PRO's mean reward, which is of these rows.
            spread = measure.spread(judge, run.rows["pro"].measured(training.answers))
        samples = [{"prompt": _last_turn(row), "answers": {}, "rewards": {}} for row in rows]
        for name in models(run):
            answers = generate_answers(
                run.model(name),
                run.tokenizer,
                [row["prompt"] for row in rows],
                max_new_tokens=section.max_new_tokens,
            )
            rewards = None
            if judge is not None:
                rewards = measure.rewards(judge, rows, answers, spread)
            for i, sample in enumerate(samples):
                sample["answers"][name] = answers[i]
                if rewards is not None:
                    sample["rewards"][name] = rewards[i]
    write_json(stage.dir.parent / SAMPLES, samples)
    return {"samples": len(samples), "source": source}


def _last_turn(row: dict) -> str:
    return row["prompt"][-1]["content"]


def versions() -> dict[str, str]:
    import importlib.metadata
    import platform

    names = ("fusedpeft", "torch", "transformers", "lm_eval")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {**found, "device": device}
