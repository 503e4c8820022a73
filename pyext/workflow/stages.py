"""The training stages: SFT, reward model, PRO. Each measures before and after on rows that no stage
trains on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from fusedpeft.errors import InputError
from fusedpeft.files import write_json
from fusedpeft.layers import save_adapter, trainable_parameters
from fusedpeft.train import Measure, Pro, Reward, RewardModel, Sft, generate_answers
from fusedpeft.train.metrics import combine
from fusedpeft.workflow.config import Config, Training
from fusedpeft.workflow.data import Rows
from fusedpeft.workflow.models import adapted, load_base
from fusedpeft.workflow.state import Stage, read_json
from fusedpeft.workflow.training import make_trainer, require_finite, train


@dataclass
class Run:
    """A run under way."""

    config: Config
    console: Console
    tokenizer: PreTrainedTokenizerBase
    rows: dict[str, Rows]
    stages: dict[str, Stage]

    def measure(self, section: Training) -> Measure:
        return Measure(
            self.tokenizer,
            batch_size=section.per_device_eval_batch_size,
            max_length=section.max_length,
            truncate=section.truncate,
        )

    def model(self, name: str) -> PreTrainedModel:
        """The base with the adapter of a complete stage; "base" is the base alone."""
        if name == "base":
            return load_base(self.config.base)
        return adapted(self.config, self.stages[name])

    def judge(self) -> RewardModel | None:
        """The trained reward model, None where the configuration has no such stage."""
        stage = self.stages.get("reward")
        if stage is None:
            return None
        return RewardModel.load(stage.adapter, load_base(self.config.base))


def once(stage: Stage, name: str, measure: Callable[[], dict]) -> dict:
    """Measure, or read what an attempt that was cut off has measured already."""
    path = stage.dir / f"{name}.json"
    found = read_json(path)
    if found is None:
        found = measure()
        write_json(path, found)
    return found


def sft(run: Run, stage: Stage) -> dict:
    section, rows = run.config.training("sft"), run.rows["sft"]
    held, seed = rows.measured(section.max_eval_rows), run.config.seed
    set_seed(seed)
    model = adapted(run.config, None)
    trainer = make_trainer(model, run.tokenizer, Sft(), rows, section, stage, seed)
    stage.begin()

    def loss() -> dict:
        return {"eval_loss": run.measure(section).sft_loss(model, held)}

    before = once(stage, "before", loss)["eval_loss"]
    told = train(trainer, stage, seed, run.console)
    after = loss()["eval_loss"]
    require_finite(stage, {"eval_loss": after})
    save_adapter(model, stage.adapter)
    return {
        "eval_loss_before": before,
        "eval_loss_after": after,
        **_counts(model, rows, held, told),
    }


def reward(run: Run, stage: Stage) -> dict:
    section, rows = run.config.training("reward"), run.rows["reward"]
    held, seed = rows.measured(section.max_eval_rows), run.config.seed
    set_seed(seed)
    aspects = {row["aspect"] for row in rows.train} - {None}
    model = RewardModel(adapted(run.config, run.stages.get("sft")))
    model.trained = tuple(a for a in model.trained if not aspects or a in aspects)
    trainer = make_trainer(model, run.tokenizer, Reward(), rows, section, stage, seed)
    stage.begin()

    def accuracy() -> dict:
        return run.measure(section).reward_accuracy(model, held)

    before = once(stage, "before", accuracy)
    told = train(trainer, stage, seed, run.console)
    after = accuracy()
    require_finite(stage, after)
    model.save(stage.adapter)
    return {"accuracy_before": before, "accuracy": after, **_counts(model, rows, held, told)}


def pro(run: Run, stage: Stage) -> dict:
    section, seed = run.config.pro, run.config.seed
    set_seed(seed)
    judge = run.judge()
    rows = _with_rewards(run, judge)
    held = rows.measured(section.max_eval_rows)
    asked = rows.measured(section.answers)
    model = adapted(run.config, run.stages.get("sft"))
    trainer = make_trainer(
        model, run.tokenizer, Pro(section.sft_weight), rows, section, stage, seed
    )
    stage.begin()
    measure = run.measure(section)
    # An answer may be as long as it likes: what the judge does not take is cut.
    judged = replace(measure, truncate=True)
    spread = None if judge is None else judged.spread(judge, asked)

    def found() -> dict:
        values = {"ranking_accuracy": measure.ranking_accuracy(model, held)}
        if judge is not None:
            answers = generate_answers(
                model,
                run.tokenizer,
                [row["prompt"] for row in asked],
                max_new_tokens=section.max_new_tokens,
                batch_size=section.per_device_eval_batch_size,
            )
            rewards = judged.rewards(judge, asked, answers, spread)
            values["reward"] = sum(rewards) / len(rewards)
        return values

    before = once(stage, "before", found)
    told = train(trainer, stage, seed, run.console)
    after = found()
    require_finite(stage, after)
    save_adapter(model, stage.adapter)
    return {
        **{f"{name}_before": value for name, value in before.items()},
        **{f"{name}_after": value for name, value in after.items()},
        "answers": len(asked),
        **_counts(model, rows, held, told),
    }


def _counts(model, rows: Rows, held: list, told: dict) -> dict:
    return {
        "trainable_parameters": trainable_parameters(model),
        "train_rows": len(rows.train),
        "eval_rows": len(held),
        "left_out_rows": rows.left_out,
        **told,
    }


def check_rewards(rows: Rows, judged: bool) -> bool:
    """True where the rows bring rewards, False where a reward model has to give them; raises
    InputError for a mixture, and where there is no reward model either."""
    every = rows.train + rows.held
    without = sum(row["rewards"] is None for row in every)
    if 0 < without < len(every):
        raise InputError(
            f"pro: {without} of {len(every)} rows have no rewards: expected rewards in every row, "
            f"or in none (then the reward model gives them)"
        )
    if without and not judged:
        raise InputError(
            "pro: the rows have no rewards and the configuration has no reward stage: add either"
        )
    return not without


def _with_rewards(run: Run, judge: RewardModel | None) -> Rows:
    """The lists with rewards: their own, or the reward model's where no row has any."""
    rows = run.rows["pro"]
    if check_rewards(rows, judge is not None):
        return rows
    every = rows.train + rows.held
    measure = run.measure(run.config.training("pro"))
    scores = measure.scores(judge, every, [row["responses"] for row in every])
    scored = [
        {**row, "rewards": combine(s, row["aspect"], judge.trained).tolist()}
        for row, s in zip(every, scores, strict=True)
    ]
    return replace(rows, train=scored[: len(rows.train)], held=scored[len(rows.train) :])
