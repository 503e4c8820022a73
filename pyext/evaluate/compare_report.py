"""`compare.html`: the methods of `fusedpeft compare` in one table and a row of charts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from fusedpeft.evaluate.figures import decimals
from fusedpeft.files import write_text


@dataclass(frozen=True)
class Measure:
    """A column: how it is found in a method's result, and what makes one better."""

    title: str
    value: Callable[[dict[str, Any]], float | None]
    show: Callable[[float], str]
    higher_is_better: bool = False


def _bytes(value: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return f"{value:.0f} B"


def _forgotten(result: dict[str, Any]) -> float | None:
    before, after = result.get("text_before"), result.get("text_after")
    return None if before is None or after is None else after - before


def measures(task: str) -> list[Measure]:
    quality = {
        "nsmc": [Measure("Accuracy", _quality("accuracy"), _percent, True)],
        "e2e": [
            Measure("Loss, nats a token", _quality("loss"), _number),
            Measure("Facts mentioned", _quality("coverage"), _percent, True),
        ],
    }[task]
    return [
        *quality,
        Measure("Trained parameters", lambda r: r["trainable"], lambda v: f"{v:,.0f}"),
        Measure("Stored for the task", lambda r: r["stored_bytes"], _bytes),
        Measure("Peak memory", lambda r: r["peak_bytes"], _bytes),
        Measure("Training step", lambda r: r["step_ms"], _ms),
        Measure("Inference", lambda r: r["latency_ms"], _ms),
        Measure("Forgotten, nats a token", _forgotten, lambda v: f"{v:+.3f}".replace("-", "−")),
    ]


def _quality(name: str) -> Callable[[dict[str, Any]], float | None]:
    return lambda result: result["quality"].get(name)


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _number(value: float) -> str:
    return decimals(value, 3)


def _ms(value: float) -> str:
    return f"{value:.1f} ms"


def write_page(found: dict[str, Any], path: Path) -> Path:
    """found: the content of compare.json."""
    style = (Path(__file__).parent / "style.css").read_text(encoding="utf-8")
    task = found["settings"]["task"]
    columns = measures(task)
    body = (
        _header(found)
        + _table(found["methods"], columns)
        + _charts(found["methods"], columns)
        + _samples(found["methods"])
        + _settings(found)
    )
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{task} – fusedpeft compare</title><style>\n{style}</style></head>"
        f"<body><main>{body}</main></body></html>\n"
    )
    write_text(path, page)
    return path


def _header(found: dict[str, Any]) -> str:
    settings = found["settings"]
    what = {"nsmc": "Sentiment of Korean film reviews", "e2e": "Facts into a sentence"}
    told = (
        f"{escape(Path(settings['base']).name)} · {settings['steps']} steps of "
        f"{settings['batch_size']} rows · {settings['test_rows']} rows to measure on"
    )
    return f"<header><h1>{what[settings['task']]}: seven ways</h1><p>{told}</p></header>"


def _table(methods: dict[str, dict], columns: list[Measure]) -> str:
    heads = "".join(f'<th class="n">{escape(c.title)}</th>' for c in columns)
    rows = ""
    for name, result in methods.items():
        cells = ""
        for column in columns:
            value = column.value(result)
            best = value is not None and value == _best(methods, column)
            style = ' class="good"' if best else ""
            text = "–" if value is None else f"<span{style}>{column.show(value)}</span>"
            cells += f'<td class="n" data-label="{escape(column.title)}">{text}</td>'
        rows += f"<tr><td>{escape(name)}</td>{cells}</tr>"
    return (
        "<h2>Side by side</h2><p>The best of each column is green. Each method had three learning "
        "rates, chosen on rows that are not these. Peak memory is the process's own above what it "
        "had before the model; forgotten is how much worse the base's own text is told afterwards."
        '</p><div class="card scroll"><table class="stack"><thead><tr><th>Method</th>'
        f"{heads}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _best(methods: dict[str, dict], column: Measure) -> float | None:
    values = [v for r in methods.values() if (v := column.value(r)) is not None]
    return (max if column.higher_is_better else min)(values) if values else None


def _charts(methods: dict[str, dict], columns: list[Measure]) -> str:
    charts = "".join(_chart(methods, column) for column in columns)
    return f'<h2>One measure at a time</h2><div class="charts">{charts}</div>' if charts else ""


def _chart(methods: dict[str, dict], column: Measure) -> str:
    """Bars from zero; what lies on the other side of it has none."""
    values = {name: column.value(r) for name, r in methods.items()}
    values = {name: v for name, v in values.items() if v is not None}
    if not values:
        return ""
    top = max(*values.values(), 0.0) or 1.0
    best = _best(methods, column)
    rows = "".join(
        f"<tr><td>{escape(name)}</td>"
        f'<td class="wide"><div class="bar"><u style="width:{100 * max(v, 0.0) / top:.1f}%"></u>'
        f'</div></td><td class="n{" good" if v == best else ""}">{column.show(v)}</td></tr>'
        for name, v in values.items()
    )
    return (
        f"<figure><figcaption>{escape(column.title)}</figcaption>"
        f'<table class="bars"><tbody>{rows}</tbody></table></figure>'
    )


def _samples(methods: dict[str, dict]) -> str:
    first = next((r["samples"] for r in methods.values() if r.get("samples")), None)
    if first is None:
        return ""
    cards = ""
    for number, sample in enumerate(first):
        answers = "".join(
            f'<div class="answer"><h3>{escape(name)}</h3>'
            f"<p>{escape(result['samples'][number]['answer']) or '(nothing)'}</p></div>"
            for name, result in methods.items()
            if result.get("samples")
        )
        facts = f"<p>{escape(sample['facts'])}</p>"
        cards += f'<div class="card sample">{facts}<div class="answers">{answers}</div></div>'
    return f"<h2>What they write</h2>{cards}"


def _settings(found: dict[str, Any]) -> str:
    rates = {name: result["tried"] for name, result in found["methods"].items()}
    parts = ""
    for title, value in (("Settings", found["settings"]), ("Learning rates tried", rates)):
        text = json.dumps(value, indent=2, ensure_ascii=False)
        parts += f"<details><summary>{title}</summary><pre>{escape(text)}</pre></details>"
    return f"<h2>How it was made</h2>{parts}"
