"""The figures of a run: what each stage changed, and how numbers are written."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


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
        return f"{100 * value:.1f} %" if self.percent else decimals(value, 3)

    @property
    def change(self) -> float | None:
        return None if self.before is None else self.after - self.before

    @property
    def style(self) -> str:
        """good, bad, or nothing where it cannot be told from the figures as shown."""
        if self.change is None or self.show(self.before) == self.show(self.after):
            return ""
        return "good" if (self.change > 0) == self.higher_is_better else "bad"

    def show_change(self) -> str:
        if self.change is None:
            return "–"
        if not self.style:
            return "<span>= <small>unchanged</small></span>"
        arrow, size = "▲" if self.change > 0 else "▼", abs(self.change)
        text = f"{100 * size:.1f} points" if self.percent else f"{size:.3f}"
        word = "better" if self.style == "good" else "worse"
        return f'<span class="{self.style}">{arrow} {text} <small>{word}</small></span>'


def figures(stages: dict[str, Any]) -> Iterable[Figure]:
    """The figures that the results have, in the order of the stages."""
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
        ("ranking_accuracy", "Held-out answers: better one ranked above", True),
        ("reward", "Mean reward of its own answers", False),
    ):
        if pro.get(f"{key}_after") is not None:
            yield Figure("pro", title, pro.get(f"{key}_before"), pro[f"{key}_after"], True, percent)


def decimals(value: float, digits: int) -> str:
    # + 0.0: a minus before nothing but zeros says nothing.
    return f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "−")


def signed(value: float) -> str:
    return f"{round(value, 2) + 0.0:+.2f}".replace("-", "−")


def duration(seconds: float) -> str:
    if seconds < 119.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 120:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
