"""`report.html`: one self-contained page about a run, from the files in its folder.

Reads results.json (needed), and where they are there config.yaml, samples.json and each stage's
history.json. Every text that comes from a file is escaped; nothing is fetched when it is opened.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from fusedpeft.errors import InputError
from fusedpeft.evaluate.plots import bar, line_chart, smooth

TITLES = {
    "base": "Base",
    "sft": "SFT",
    "reward": "Reward model",
    "pro": "PRO",
    "evaluate": "Evaluation",
    "report": "Report",
}
MODELS = ("base", "sft", "pro")
ASPECTS = ("helpful", "safe", "overall")
_SMOOTH_FROM = 24


@dataclass(frozen=True)
class Figure:
    """A measured value before and after a stage, on rows never trained on."""

    stage: str
    name: str
    before: float | None
    after: float
    higher_is_better: bool
    percent: bool = False

    def show(self, value: float | None) -> str:
        if value is None:
            return "–"
        text = f"{100 * value:.1f} %" if self.percent else f"{value:.3f}"
        return text.replace("-", "−")

    @property
    def change(self) -> float | None:
        return None if self.before is None else self.after - self.before

    @property
    def style(self) -> str:
        """good, bad, or nothing where it cannot be told."""
        if not self.change:
            return ""
        return "good" if (self.change > 0) == self.higher_is_better else "bad"

    def show_change(self) -> str:
        if self.change is None:
            return "–"
        arrow = "▲" if self.change > 0 else "▼" if self.change < 0 else "="
        size = abs(self.change)
        text = f"{100 * size:.1f} points" if self.percent else f"{size:.3f}"
        word = {"good": "better", "bad": "worse", "": "unchanged"}[self.style]
        return f'<span class="{self.style}">{arrow} {text} <small>{word}</small></span>'


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into the run's folder and return its path. Raises InputError where
    results.json is missing or a file is damaged."""
    run_dir = Path(run_dir)
    results = _read(run_dir / "results.json")
    if not isinstance(results, dict) or not isinstance(results.get("stages"), dict):
        raise InputError(
            f"{run_dir / 'results.json'}: expected a run's results with 'stages': run the stages "
            f"first (fusedpeft run)"
        )
    samples = _read(run_dir / "samples.json") or []
    histories = {s: _read(run_dir / s / "history.json") or [] for s in ("sft", "reward", "pro")}
    path = run_dir / "report.html"
    temporary = run_dir / f".report.{os.getpid()}.tmp"
    temporary.write_text(render(results, histories, samples), encoding="utf-8")
    os.replace(temporary, path)
    return path


def _read(path: Path) -> Any:
    """The file's JSON; None where there is no file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: expected JSON ({error}): run its stage again") from error


def render(
    results: dict[str, Any], histories: dict[str, list[dict]], samples: list[dict[str, Any]]
) -> str:
    """The page as text."""
    figures = list(_figures(results["stages"]))
    name = escape(str(results.get("name", "run")))
    style = (Path(__file__).parent / "style.css").read_text(encoding="utf-8")
    body = "".join(
        (
            _header(name, results),
            _tiles(figures),
            _table(figures),
            _aspects(results["stages"]),
            _curves(histories),
            _scores(results["stages"].get("evaluate") or {}),
            _samples(samples),
            _settings(results),
        )
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{name} – fusedpeft report</title><style>\n{style}</style></head>"
        f"<body><main>{body}</main></body></html>\n"
    )


def _figures(stages: dict[str, Any]) -> Iterable[Figure]:
    sft, reward, pro = (stages.get(s) or {} for s in ("sft", "reward", "pro"))
    if sft.get("eval_loss_after") is not None:
        yield Figure(
            "sft",
            "Loss on held-out answers, nats a token",
            sft.get("eval_loss_before"),
            sft["eval_loss_after"],
            False,
        )
    accuracy, before = reward.get("accuracy") or {}, reward.get("accuracy_before") or {}
    if accuracy.get("overall") is not None:
        yield Figure(
            "reward",
            "Held-out pairs in the right order",
            before.get("overall"),
            accuracy["overall"],
            True,
            percent=True,
        )
    for key, title, percent in (
        ("ranking_accuracy", "Held-out lists: best answer ranked above", True),
        ("reward", "Mean reward of its own answers", False),
    ):
        if pro.get(f"{key}_after") is not None:
            yield Figure("pro", title, pro.get(f"{key}_before"), pro[f"{key}_after"], True, percent)


def _header(name: str, results: dict[str, Any]) -> str:
    told = []
    stages = [TITLES.get(s, s) for s in results["stages"] if results["stages"][s] is not None]
    if stages:
        told.append(escape(", ".join(stages)))
    seconds = [s for s in (results.get("seconds") or {}).values() if s is not None]
    if seconds:
        told.append(f"{_duration(sum(seconds))} in all")
    if results.get("peak_memory_bytes"):
        told.append(f"{results['peak_memory_bytes'] / 2**30:.2f} GiB at the peak")
    return f"<header><h1>{name}</h1><p>{' · '.join(told)}</p></header>"


def _tiles(figures: list[Figure]) -> str:
    tiles = ""
    for f in figures:
        before = "" if f.before is None else f"<span>before: {f.show(f.before)}</span>"
        tiles += (
            f'<div class="card tile"><span>{TITLES[f.stage]}: {escape(f.name.lower())}</span>'
            f'<strong class="{f.style}">{f.show(f.after)}</strong>{before}</div>'
        )
    return f'<div class="tiles">{tiles}</div>' if tiles else ""


def _table(figures: list[Figure]) -> str:
    if not figures:
        return ""
    rows = "".join(
        f"<tr><td>{TITLES[f.stage]}</td><td>{escape(f.name)}</td>"
        f'<td class="n">{f.show(f.before)}</td><td class="n">{f.show(f.after)}</td>'
        f'<td class="n">{f.show_change()}</td></tr>'
        for f in figures
    )
    return (
        "<h2>Before and after each stage</h2>"
        "<p>Measured on rows that no stage trained on. PRO starts where SFT ended.</p>"
        '<div class="card scroll"><table><thead><tr><th>Stage</th><th>Measure</th>'
        '<th class="n">Before</th><th class="n">After</th><th class="n">Change</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _aspects(stages: dict[str, Any]) -> str:
    reward = stages.get("reward") or {}
    accuracy, before = reward.get("accuracy") or {}, reward.get("accuracy_before") or {}
    rows = ""
    for aspect in ASPECTS:
        if accuracy.get(aspect) is not None:
            was = before.get(aspect)
            rows += (
                f"<tr><td>{aspect.capitalize()}</td>"
                f'<td class="n">{"–" if was is None else f"{100 * was:.1f} %"}</td>'
                f'<td class="n">{100 * accuracy[aspect]:.1f} %</td>'
                f'<td class="wide">{bar(accuracy[aspect], was, 0.5)}</td></tr>'
            )
    if not rows:
        return ""
    return (
        "<h2>Reward model by aspect</h2>"
        "<p>Share of held-out pairs whose chosen answer scores higher. Solid mark: before "
        "training; dashed mark: chance.</p>"
        '<div class="card scroll"><table><thead><tr><th>Aspect</th><th class="n">Before</th>'
        f'<th class="n">After</th><th></th></tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _curves(histories: dict[str, list[dict]]) -> str:
    charts = ""
    for stage, history in histories.items():
        train = [(h["step"], h["loss"]) for h in history if "loss" in h and "step" in h]
        held = [(h["step"], h["eval_loss"]) for h in history if "eval_loss" in h and "step" in h]
        if len(train) >= _SMOOTH_FROM:
            series = {"training, each log": ("raw", train), "mean of 5": ("train", smooth(train))}
        else:
            series = {"training": ("train", train)}
        series["held out"] = ("held", held)
        charts += line_chart(series, f"{TITLES[stage]}: loss", "step")
    return f'<h2>Training curves</h2><div class="charts">{charts}</div>' if charts else ""


def _scores(evaluate: dict[str, Any]) -> str:
    """A row a task and metric, a column a model. The result is {model: {metric or task: …}}."""
    columns = [m for m in MODELS if isinstance(evaluate.get(m), dict)]
    flat = {m: dict(_flat(evaluate[m])) for m in columns}
    names = list(dict.fromkeys(name for m in columns for name in flat[m]))
    if not names:
        return ""
    rows = ""
    for name in names:
        cells = "".join(f'<td class="n">{_number(flat[m].get(name), name)}</td>' for m in columns)
        rows += f"<tr><td>{escape(name)}</td>{cells}</tr>"
    heads = "".join(f'<th class="n">{TITLES[m]}</th>' for m in columns)
    return (
        '<h2>Evaluation</h2><div class="card scroll"><table><thead><tr><th>Task and measure</th>'
        f"{heads}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _flat(value: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, float]]:
    for key, inner in value.items():
        name = f"{prefix}{str(key).replace('_', ' ')}"
        if isinstance(inner, dict):
            yield from _flat(inner, f"{name}: ")
        elif isinstance(inner, (int, float)) and not isinstance(inner, bool):
            yield name, inner


def _number(value: float | None, name: str) -> str:
    if value is None:
        return "–"
    if name.rpartition(": ")[2] in ("acc", "acc norm"):
        return f"{100 * value:.1f} %"
    return f"{value:.0f}" if float(value).is_integer() else f"{value:.3f}"


def _samples(samples: list[dict[str, Any]]) -> str:
    cards = ""
    for sample in samples:
        rewards = sample.get("rewards") or {}
        answers = ""
        for model in MODELS:
            text = (sample.get("answers") or {}).get(model)
            if text is None:
                continue
            reward = rewards.get(model)
            chip = "" if reward is None else f"<span>reward {_signed(reward)}</span>"
            paragraph = _paragraph(text) if text.strip() else '<p class="empty">(nothing)</p>'
            answers += (
                f'<div class="answer {model}"><h3>{TITLES[model]}{chip}</h3>{paragraph}</div>'
            )
        prompt = _paragraph(str(sample.get("prompt", "")))
        cards += f'<div class="card sample">{prompt}<div class="answers">{answers}</div></div>'
    if not cards:
        return ""
    return (
        "<h2>Answers side by side</h2><p>Prompts that no stage trained on, answered greedily. The "
        f"reward model's score is standardised over held-out rows.</p>{cards}"
    )


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def _paragraph(text: str) -> str:
    # The language chooses the font where a browser has several for the same characters.
    korean = any("가" <= c <= "힣" for c in text)
    return f"<p{' lang=ko' if korean else ''}>{escape(text)}</p>"


def _settings(results: dict[str, Any]) -> str:
    parts = ""
    seconds = {k: v for k, v in (results.get("seconds") or {}).items() if v is not None}
    if seconds:
        rows = "".join(
            f'<tr><td>{escape(TITLES.get(s, s))}</td><td class="n">{_duration(v)}</td></tr>'
            for s, v in seconds.items()
        )
        parts += (
            f"<details open><summary>Time</summary><table><tbody>{rows}</tbody></table></details>"
        )
    for title, key in (("Configuration", "config"), ("Versions", "versions")):
        if results.get(key):
            text = json.dumps(results[key], indent=2, ensure_ascii=False)
            parts += f"<details><summary>{title}</summary><pre>{escape(text)}</pre></details>"
    return f"<h2>How it was made</h2>{parts}" if parts else ""


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{int(seconds // 60)} min {round(seconds % 60):02d} s"
