"""`report.html`: one self-contained page about a run, from the files in its folder.

Reads results.json (needed), and of the complete stages that it names samples.json and history.json
where they are there. Every text that comes from a file is escaped; nothing is fetched when it is
opened.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

from fusedpeft.errors import InputError
from fusedpeft.evaluate.figures import Figure, decimals, duration, figures, signed
from fusedpeft.evaluate.plots import Points, bar, line_chart, smooth
from fusedpeft.files import write_text

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
NAMES = {
    "mmlu": "MMLU",
    "hellaswag": "HellaSwag",
    "acc": "accuracy",
    "acc_norm": "accuracy by character",
    "eval_loss": "Loss on held-out answers",
}
_SMOOTH_FROM = 24


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
    # What a stage has left that was removed or is under way again is not of these results.
    told = "report" in (results.get("seconds") or {})
    samples = (_read(run_dir / "samples.json") if told else None) or []
    trained = [s for s in ("sft", "reward", "pro") if s in results["stages"]]
    histories = {s: _read(run_dir / s / "history.json") or [] for s in trained}
    path = run_dir / "report.html"
    write_text(path, render(results, histories, samples))
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
    measured = list(figures(results["stages"]))
    name = escape(str(results.get("name", "run")))
    style = (Path(__file__).parent / "style.css").read_text(encoding="utf-8")
    body = "".join(
        (
            _header(name, results),
            _tiles(measured),
            _table(measured),
            _aspects(results["stages"]),
            _curves(histories),
            _scores(results["stages"].get("evaluate") or {}),
            _samples(samples, ["base", *results["stages"]]),
            _settings(results),
        )
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{name} – fusedpeft report</title><style>\n{style}</style></head>"
        f"<body><main>{body}</main></body></html>\n"
    )


def _header(name: str, results: dict[str, Any]) -> str:
    told = []
    stages = [TITLES.get(s, s) for s in results["stages"] if results["stages"][s] is not None]
    if stages:
        told.append(escape(", ".join(stages)))
    seconds = [s for s in (results.get("seconds") or {}).values() if s is not None]
    if seconds:
        told.append(f"{duration(sum(seconds))} in all")
    if results.get("peak_memory_bytes"):
        told.append(f"{results['peak_memory_bytes'] / 2**30:.2f} GiB at the peak")
    made = ""
    config = results.get("config") or {}
    if config.get("base") and (config.get("lora") or {}).get("rank"):
        model = escape(Path(str(config["base"])).name)
        made = f"<p>LoRA of rank {int(config['lora']['rank'])} on {model}"
        trained = (results["stages"].get("sft") or {}).get("trainable_parameters")
        made += f", {trained:,} trained parameters</p>" if trained else "</p>"
    return f"<header><h1>{name}</h1><p>{' · '.join(told)}</p>{made}</header>"


def _tiles(measured: list[Figure]) -> str:
    tiles = ""
    for f in measured:
        before = "" if f.before is None else f"<span>before {f.show(f.before)}</span>"
        tiles += (
            f'<div class="card tile"><span><b>{TITLES[f.stage]}</b> {escape(f.name)}</span>'
            f'<strong class="{f.style}">{f.show(f.after)}</strong>{before}</div>'
        )
    return f'<div class="tiles">{tiles}</div>' if tiles else ""


def _table(measured: list[Figure]) -> str:
    if not measured:
        return ""
    rows = "".join(
        f'<tr><td class="stage">{TITLES[f.stage]}</td><td>{escape(f.name)}</td>'
        f'<td class="n" data-label="Before">{f.show(f.before)}</td>'
        f'<td class="n" data-label="After">{f.show(f.after)}</td>'
        f'<td class="n" data-label="Change">{f.show_change()}</td></tr>'
        for f in measured
    )
    return (
        "<h2>Before and after each stage</h2>"
        "<p>Measured on rows that no stage trained on. PRO starts where SFT ended.</p>"
        '<div class="card scroll"><table class="stack"><thead><tr><th>Stage</th><th>Measure</th>'
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
        train, held = _points(history, "loss"), _points(history, "eval_loss")
        if len(train) >= _SMOOTH_FROM:
            series = {"training": ("raw", train), "mean of 5": ("train", smooth(train))}
        else:
            series = {"training": ("train", train)}
        series["held out"] = ("held", held)
        charts += line_chart(series, f"{TITLES[stage]}: loss", "step")
    return f'<h2>Training curves</h2><div class="charts">{charts}</div>' if charts else ""


def _points(history: list[dict], key: str) -> Points:
    """(step, value) of the entries that have both; a value that was not finite is null there."""
    wanted = ((entry.get("step"), entry.get(key)) for entry in history)
    return [(x, y) for x, y in wanted if x is not None and y is not None and math.isfinite(y)]


def _scores(evaluate: dict[str, Any]) -> str:
    """A row a task and metric, a column a model. The result is {model: {metric or task: …}}."""
    columns = [m for m in MODELS if isinstance(evaluate.get(m), dict)]
    flat = {m: dict(_flat(evaluate[m])) for m in columns}
    paths = list(dict.fromkeys(path for m in columns for path in flat[m]))
    rows = ""
    for path in paths:
        *task, metric = path
        if task and metric in ("n", "truncated"):
            continue
        counts = {k: max(flat[m].get((*task, k), 0) for m in columns) for k in ("n", "truncated")}
        note = f"{counts['n']:.0f} questions" if task and counts["n"] else ""
        if note and counts["truncated"]:
            note += f", {counts['truncated']:.0f} prompts cut to fit the model"
        cells = "".join(
            f'<td class="n" data-label="{TITLES[m]}">'
            f"{_score(flat[m].get(path), metric, counts['n'])}</td>"
            for m in columns
        )
        name = ": ".join(NAMES.get(key, key.replace("_", " ")) for key in path)
        rows += f"<tr><td>{escape(name)} <small>{note}</small></td>{cells}</tr>"
    if not rows:
        return ""
    heads = "".join(f'<th class="n">{TITLES[m]}</th>' for m in columns)
    return (
        "<h2>Evaluation</h2><p>The base model, after SFT and after PRO. ± is one standard error of "
        "the share of questions.</p>"
        '<div class="card scroll"><table class="stack"><thead><tr><th>Task and measure</th>'
        f"{heads}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _flat(value: dict[str, Any], *above: str) -> Iterable[tuple[tuple[str, ...], float]]:
    for key, inner in value.items():
        if isinstance(inner, dict):
            yield from _flat(inner, *above, str(key))
        elif isinstance(inner, (int, float)) and not isinstance(inner, bool):
            yield (*above, str(key)), inner


def _score(value: float | None, metric: str, n: float) -> str:
    if value is None:
        return "–"
    if metric in ("acc", "acc_norm"):
        error = f" <small>± {100 * math.sqrt(value * (1 - value) / n):.1f}</small>" if n else ""
        return f"{100 * value:.1f} %{error}"
    return f"{value:.0f}" if float(value).is_integer() else decimals(value, 3)


def _samples(samples: list[dict[str, Any]], there: list[str]) -> str:
    cards = ""
    for sample in samples:
        rewards = sample.get("rewards") or {}
        answers = ""
        for model in (m for m in MODELS if m in there):
            text = (sample.get("answers") or {}).get(model)
            if text is None:
                continue
            reward = rewards.get(model)
            chip = "" if reward is None else f"<span>reward {signed(reward)}</span>"
            paragraph = _paragraph(text) if text.strip() else '<p class="empty">(nothing)</p>'
            answers += (
                f'<div class="answer {model}"><h3>{TITLES[model]}{chip}</h3>{paragraph}</div>'
            )
        prompt = _paragraph(str(sample.get("prompt", "")))
        cards += f'<div class="card sample">{prompt}<div class="answers">{answers}</div></div>'
    if not cards:
        return ""
    return (
        "<h2>Answers side by side</h2><p>Prompts that no stage trained on, answered greedily. A "
        "reward of 0 is as good as the mean of the prompt's own responses in the data, 1 is one "
        f"standard deviation better.</p>{cards}"
    )


def _paragraph(text: str) -> str:
    # The language chooses the font where a browser has several for the same characters.
    korean = any("가" <= c <= "힣" for c in text)
    return f"<p{' lang=ko' if korean else ''}>{escape(text)}</p>"


def _settings(results: dict[str, Any]) -> str:
    parts = ""
    seconds = {k: v for k, v in (results.get("seconds") or {}).items() if v is not None}
    if seconds:
        rows = "".join(
            f'<tr><td>{escape(TITLES.get(s, s))}</td><td class="n">{duration(v)}</td></tr>'
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
