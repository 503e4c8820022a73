"""The one YAML file that fixes a run: its schema, and reading it with errors that name the fix."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from fusedpeft.errors import InputError
from fusedpeft.evaluate.benchmarks import FILES
from fusedpeft.workflow.yaml_file import apply_override, expand, read_yaml, set_value

STAGES = ("sft", "reward", "pro", "evaluate", "report")
TRAINED = STAGES[:3]


class Section(BaseModel):
    # validate_default: a default that is written out is the same configuration, 16 and 16.0 too.
    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_yes_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        # Elsewhere true is 1. Here `eval_steps: yes` would mean every step.
        kind = cls.model_fields[info.field_name].annotation
        if isinstance(value, bool) and bool not in (kind, *get_args(kind)):
            raise ValueError("expected another value than true or false")
        return value


def _as_list(value: Any) -> Any:
    if isinstance(value, (str, Path)):
        return [value]
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError("expected a file or a list of files")
    return value


Paths = Annotated[list[Path], BeforeValidator(_as_list)]


class Lora(Section):
    """The arguments of `fusedpeft.LoRA`, which checks their ranges itself."""

    rank: int = 8
    alpha: float = 16
    dropout: float = 0.0
    targets: str | list[str] = "all-linear"
    rslora: bool = False
    dora: bool = False


class Training(Section):
    """One training stage. Names and meanings are those of `transformers.TrainingArguments`, but:

    data: one file or several, relative to the YAML file. holdout: the last fraction of each file's
    rows, never trained on. max_eval_rows: how many of them are measured (the first ones; all by
    default). max_length: tokens a row may have (the model's limit by default); a longer row is an
    error, with `truncate: true` it is cut. save_steps: a checkpoint after so many steps.
    """

    data: Paths
    holdout: float = Field(0.2, gt=0.0, lt=1.0)
    max_eval_rows: int | None = Field(None, ge=1)
    num_train_epochs: float = Field(1.0, gt=0)
    max_steps: int = Field(-1, ge=-1)
    per_device_train_batch_size: int = Field(8, ge=1)
    per_device_eval_batch_size: int = Field(16, ge=1)
    gradient_accumulation_steps: int = Field(1, ge=1)
    learning_rate: float = Field(1e-3, gt=0)
    lr_scheduler_type: str = "linear"
    warmup_steps: float = Field(0, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, ge=0)
    logging_steps: int = Field(10, ge=1)
    eval_steps: int | None = Field(None, ge=1)
    save_steps: int = Field(50, ge=1)
    max_length: int | None = Field(None, ge=2)
    truncate: bool = False


class Reward(Training):
    """The reward model: pairs, each with an aspect ("helpful", "safe") that names the head it
    trains. aspect: of rows that name none (by default such a row trains both heads alike)."""

    aspect: Literal["helpful", "safe"] | None = None


class Pro(Training):
    """PRO: lists with stored `rewards`; without them the reward stage's model scores them.

    aspect: of rows that name none, for the reward of answers. answers: how many held-out prompts
    are answered greedily, before and after, for the mean reward; max_new_tokens: of each answer.
    """

    aspect: Literal["helpful", "safe"] | None = None
    sft_weight: float = Field(0.05, ge=0)
    answers: int = Field(32, ge=1)
    max_new_tokens: int = Field(64, ge=1)


class Evaluate(Section):
    """Benchmark tasks for base, SFT and PRO. data: the folder with the tasks' files;
    limit: questions of each task (all by default). num_fewshot: MMLU's shots (5 by default)."""

    tasks: list[Literal["mmlu", "hellaswag"]] = []
    data: Path | None = None
    limit: int | None = Field(None, ge=1)
    num_fewshot: int | None = Field(None, ge=0)
    batch_size: int = Field(8, ge=1)

    def files(self) -> list[Path]:
        """Those that its tasks read."""
        return [self.data / name for task in self.tasks for name in FILES[task]]


class Report(Section):
    """samples: held-out prompts whose answers the report shows side by side."""

    samples: int = Field(6, ge=1)
    max_new_tokens: int = Field(64, ge=1)


class Config(Section):
    """A run. A stage without a section is left out (the report always has its defaults).

    base: folder of a Hugging Face causal LM with its tokenizer. output: the run's folder,
    `runs/<name>` under the working directory by default. threads: of torch (its default where
    unset); results are bit-equal only between runs of the same number.
    """

    name: str = Field(pattern=r"^[\w][\w.-]*$")
    seed: int = Field(0, ge=0, lt=2**32)  # numpy's range
    threads: int | None = Field(None, ge=1, le=1024)
    base: Path
    output: Path | None = None
    lora: Lora = Lora()
    sft: Training | None = None
    reward: Reward | None = None
    pro: Pro | None = None
    evaluate: Evaluate | None = None
    report: Report = Report()

    @property
    def run_dir(self) -> Path:
        return self.output or Path("runs") / self.name

    def stages(self) -> list[str]:
        return [s for s in STAGES if getattr(self, s) is not None]

    def training(self, stage: str) -> Training:
        section = getattr(self, stage)
        if section is None:
            raise InputError(f"the configuration has no section {stage!r}: add it")
        return section


def load_config(
    path: str | Path,
    overrides: list[str] | tuple[str, ...] = (),
    shorten: int | None = None,
    evaluate_data: Path | None = None,
) -> Config:
    """Read, expand and check a configuration.

    overrides: "sft.learning_rate=1e-3", values as in YAML. `${NAME}` in a value is the
    environment's, `${NAME:-value}` has a default. Relative paths start at the YAML file's folder,
    `output` at the working directory. shorten: at most so many steps a training stage, and
    measurements on few rows; the run's folder gets the suffix "-short". evaluate_data: the value of
    evaluate.data, as it stands.
    Raises InputError for all that is wrong with the file; nothing is written.
    """
    path = Path(path)
    raw = read_yaml(path)
    for override in overrides:
        apply_override(raw, override)
    raw = expand(raw, path)
    if evaluate_data is not None:
        set_value(raw, "evaluate.data", str(evaluate_data))
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        raise InputError(f"{path}: {_explain(error)}") from error
    config = _absolute(config, path.resolve().parent)
    _check_paths(config, path)
    return config if shorten is None else shortened(config, shorten)


def _explain(error: ValidationError) -> str:
    """The first problem in one line, and how many there are beside it."""
    # Of "a text or a list of texts" each half complains at the same place, or one further inside.
    places = [tuple(_location(p)) for p in error.errors()]
    problems: dict[tuple, Any] = {}
    for place, problem in zip(places, error.errors(), strict=True):
        if not any(len(q) > len(place) and q[: len(place)] == place for q in places):
            problems.setdefault(place, problem)
    # An unknown key often is why another one is missing: it comes first.
    loc, first = min(problems.items(), key=lambda p: p[1]["type"] != "extra_forbidden")
    where = ".".join(str(part) for part in loc)
    if first["type"] == "extra_forbidden":
        section: type[BaseModel] = Config
        for part in loc[:-1]:
            section = _section_type(section, str(part))
        names = list(section.model_fields)
        close = difflib.get_close_matches(str(loc[-1]), names, n=1, cutoff=0.6)
        inside = f"section {'.'.join(map(str, loc[:-1]))!r}" if loc[:-1] else "the top level"
        fix = f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(names)}"
        text = f"unknown key {str(loc[-1])!r} in {inside}: {fix}"
    elif first["type"] == "missing":
        text = f"expected a value for {where!r}, there is none"
    else:
        problem = first["msg"].removeprefix("Value error, ")
        text = f"{where}: {problem}, got {first['input']!r:.60}"
    more = len(problems) - 1
    return text + (f" (and {more} more problem{'s' if more > 1 else ''})" if more else "")


def _location(problem: Any) -> list[str | int]:
    return [part for part in problem["loc"] if part not in ("str", "list[str]")]


def _section_type(section: type[BaseModel], field: str) -> type[BaseModel]:
    kind = section.model_fields[field].annotation
    options = getattr(kind, "__args__", (kind,))
    return next(t for t in options if isinstance(t, type) and issubclass(t, BaseModel))


def _absolute(config: Config, folder: Path) -> Config:
    update: dict[str, Any] = {"base": _join(folder, config.base)}
    for stage in TRAINED:
        section = getattr(config, stage)
        if section is not None:
            paths = [_join(folder, p) for p in section.data]
            update[stage] = section.model_copy(update={"data": paths})
    if config.evaluate is not None and config.evaluate.data is not None:
        data = _join(folder, config.evaluate.data)
        update["evaluate"] = config.evaluate.model_copy(update={"data": data})
    update["output"] = Path(os.path.abspath(config.run_dir.expanduser()))
    return config.model_copy(update=update)


def _join(folder: Path, path: Path) -> Path:
    return Path(os.path.normpath(folder / path.expanduser()))


def _check_paths(config: Config, path: Path) -> None:
    if not (config.base / "config.json").is_file():
        raise InputError(
            f"{path}: base: expected a folder with a model's config.json, got {config.base}"
        )
    if config.output is not None and config.output.exists() and not config.output.is_dir():
        raise InputError(f"{path}: output: expected a folder, {config.output} is a file")
    for stage in TRAINED:
        section = getattr(config, stage)
        for file in section.data if section else ():
            if not file.is_file():
                raise InputError(f"{path}: {stage}.data: there is no file {file}")
    evaluate = config.evaluate
    if evaluate and evaluate.tasks and (evaluate.data is None or not evaluate.data.is_dir()):
        raise InputError(
            f"{path}: evaluate.data: expected the folder with the files of "
            f"{', '.join(evaluate.tasks)}, got {evaluate.data}"
        )
    if evaluate and not evaluate.tasks and config.sft is None:
        raise InputError(
            f"{path}: evaluate: expected tasks ({', '.join(FILES)}), or a section sft whose "
            f"held-out loss it measures, got neither"
        )


def shortened(config: Config, steps: int) -> Config:
    """The same run with at most `steps` steps a stage and few rows measured: what CI runs."""
    if steps < 1:
        raise InputError(f"--shorten: expected a number of steps >= 1, got {steps}")
    update: dict[str, Any] = {"output": config.run_dir.with_name(config.run_dir.name + "-short")}
    for stage in TRAINED:
        section = getattr(config, stage)
        if section is None:
            continue
        cut: dict[str, Any] = {
            "max_steps": steps if section.max_steps < 1 else min(steps, section.max_steps),
            "max_eval_rows": min(4 * steps, section.max_eval_rows or 4 * steps),
            "logging_steps": 1,
            "eval_steps": None,
            "save_steps": min(section.save_steps, max(1, steps // 2)),
        }
        if isinstance(section, Pro):
            cut["answers"] = min(steps, section.answers)
        update[stage] = section.model_copy(update=cut)
    if config.evaluate is not None:
        limit = min(steps, config.evaluate.limit or steps)
        update["evaluate"] = config.evaluate.model_copy(update={"limit": limit})
    samples = min(config.report.samples, 2)
    update["report"] = config.report.model_copy(update={"samples": samples})
    return config.model_copy(update=update)


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML, paths absolute: it can be run again as it stands."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
