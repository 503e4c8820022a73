"""The one YAML file that fixes a run: its schema, and reading it with errors that name the fix."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from fusedpeft.errors import InputError

STAGES = ("sft", "reward", "pro", "evaluate", "report")
TRAINED = STAGES[:3]

_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, (str, Path)) else value


Paths = Annotated[list[Path], BeforeValidator(_as_list), Field(min_length=1)]


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
    limit: questions of each task (all by default)."""

    tasks: list[Literal["mmlu", "hellaswag"]] = []
    data: Path | None = None
    limit: int | None = Field(None, ge=1)
    batch_size: int = Field(8, ge=1)


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
    seed: int = Field(0, ge=0)
    threads: int | None = Field(None, ge=1)
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


class _Loader(yaml.SafeLoader):
    """YAML in which a key that is written twice is an error, not the last one's victory."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(k, deep=True) for k, _ in node.value]
        for i, key in enumerate(keys):
            if key in keys[:i]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} stands here twice", node.value[i][0].start_mark
                )
        return super().construct_mapping(node, deep)


def load_config(
    path: str | Path, overrides: list[str] | tuple[str, ...] = (), shorten: int | None = None
) -> Config:
    """Read, expand and check a configuration.

    overrides: "sft.learning_rate=1e-3", values as in YAML. `${NAME}` in a value is the
    environment's, `${NAME:-value}` has a default. Relative paths start at the YAML file's folder,
    `output` at the working directory. shorten: at most so many steps a training stage, and
    measurements on few rows; the run's folder gets the suffix "-short".
    Raises InputError for all that is wrong with the file; nothing is written.
    """
    path = Path(path)
    raw = _read(path)
    for override in overrides:
        _apply(raw, override)
    raw = _expand(raw, path)
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        raise InputError(f"{path}: {_explain(error)}") from error
    config = _absolute(config, path.resolve().parent)
    _check_paths(config, path)
    return config if shorten is None else shortened(config, shorten)


def _read(path: Path) -> dict:
    if not path.is_file():
        raise InputError(f"{path}: expected a YAML file, there is none")
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "unreadable"
        raise InputError(f"{path}{where}: not valid YAML: {problem}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected UTF-8 text ({error.reason})") from error
    if not isinstance(raw, dict):
        raise InputError(f"{path}: expected a mapping with name, base, sft, …, got {raw!r:.40}")
    return raw


def _apply(raw: dict, override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not all(key.split(".")):
        raise InputError(f"--set: expected KEY=VALUE such as sft.max_steps=10, got {override!r}")
    *parents, last = key.split(".")
    for parent in parents:
        if raw.get(parent) is None:
            raw[parent] = {}
        raw = raw[parent]
        if not isinstance(raw, dict):
            raise InputError(f"--set {key}: {parent!r} is a value, not a section")
    try:
        raw[last] = yaml.load(value, _Loader)
    except yaml.YAMLError as error:
        raise InputError(f"--set {key}: not valid YAML: {value!r}") from error


def _expand(value: Any, path: Path) -> Any:
    def variable(match: re.Match) -> str:
        name, default = match.groups()
        found = os.environ.get(name) or default
        if found is None:
            raise InputError(f"{path}: {match[0]}: the environment variable {name} is not set")
        return found

    if isinstance(value, dict):
        return {k: _expand(v, path) for k, v in value.items()}
    if isinstance(value, list):
        return [_expand(v, path) for v in value]
    return _VARIABLE.sub(variable, value) if isinstance(value, str) else value


def _explain(error: ValidationError) -> str:
    """The first problem in one line, and how many there are beside it."""
    problems = error.errors()
    # An unknown key often is why another one is missing: it comes first.
    first = min(problems, key=lambda p: p["type"] != "extra_forbidden")
    loc = [part for part in first["loc"] if part not in ("str", "list[str]")]
    where = ".".join(str(part) for part in loc)
    if first["type"] == "extra_forbidden":
        section: type[BaseModel] = Config
        for part in loc[:-1]:
            section = _section_type(section, str(part))
        names = list(section.model_fields)
        close = difflib.get_close_matches(str(loc[-1]), names, n=1, cutoff=0.5)
        inside = f"section {'.'.join(map(str, loc[:-1]))!r}" if loc[:-1] else "the top level"
        fix = f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(names)}"
        text = f"unknown key {str(loc[-1])!r} in {inside}: {fix}"
    elif first["type"] == "missing":
        text = f"expected a value for {where!r}, there is none"
    else:
        text = f"{where}: {first['msg']}, got {first['input']!r:.60}"
    more = len(problems) - 1
    return text + (f" (and {more} more problem{'s' if more > 1 else ''})" if more else "")


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
    update["output"] = Path(os.path.abspath(config.run_dir))
    return config.model_copy(update=update)


def _join(folder: Path, path: Path) -> Path:
    return Path(os.path.normpath(folder / path.expanduser()))


def _check_paths(config: Config, path: Path) -> None:
    if not (config.base / "config.json").is_file():
        raise InputError(
            f"{path}: base: expected a folder with a model's config.json, got {config.base}"
        )
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
