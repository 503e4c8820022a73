"""Line charts and bars as inline SVG. Colours and fonts are the page's: see `style.css`."""

from __future__ import annotations

import math
from html import escape

WIDTH, HEIGHT = 360, 230
LEFT, RIGHT, TOP, BOTTOM = 42, 12, 10, 40

Points = list[tuple[float, float]]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round values that cover [low, high] from inside."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * min((1, 2, 2.5, 5, 10), key=lambda m: abs(math.log(m * power / raw)))
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def smooth(points: Points, width: int = 5) -> Points:
    """Means over a window of `width` values, centred; shorter at the ends."""
    half = width // 2
    means = []
    for i, (x, _) in enumerate(points):
        near = [y for _, y in points[max(0, i - half) : i + half + 1]]
        means.append((x, sum(near) / len(near)))
    return means


def line_chart(series: dict[str, tuple[str, Points]], title: str, x_label: str) -> str:
    """An SVG with one line a series. series: {label: (CSS class, [(x, y), …])}; points that are not
    finite are left out. Empty string where nothing is left to draw."""
    kept = {
        label: (style, [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)])
        for label, (style, points) in series.items()
    }
    kept = {label: item for label, item in kept.items() if item[1]}
    every = [p for _, points in kept.values() for p in points]
    if not every:
        return ""
    x_low, x_high = min(0.0, min(x for x, _ in every)), max(x for x, _ in every)
    y_low, y_high = min(y for _, y in every), max(y for _, y in every)
    margin = 0.06 * (y_high - y_low) or 0.1 * abs(y_high) or 1.0
    # A loss is never below zero: neither is its axis.
    y_low = max(0.0, y_low - margin) if y_low >= 0 else y_low - margin
    y_high += margin
    x_high = x_high if x_high > x_low else x_low + 1

    def px(x: float) -> float:
        return LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def py(y: float) -> float:
        return HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    for y in ticks(y_low, y_high):
        at = f'y1="{py(y):.1f}" y2="{py(y):.1f}"'
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" {at}/>'
            f'<text class="tick" x="{LEFT - 8}" y="{py(y) + 4:.1f}" text-anchor="end">{y:g}</text>'
        )
    for x in ticks(x_low, x_high):
        parts.append(
            f'<text class="tick" x="{px(x):.1f}" y="{HEIGHT - BOTTOM + 18}" '
            f'text-anchor="middle">{x:g}</text>'
        )
    parts.append(
        f'<text class="tick" x="{(LEFT + WIDTH - RIGHT) / 2:.1f}" y="{HEIGHT - 4}" '
        f'text-anchor="middle">{escape(x_label)}</text>'
    )
    for style, points in kept.values():
        path = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in points)
        parts.append(f'<polyline class="{style}" points="{path}"/>')
        if len(points) <= 12:
            parts += [
                f'<circle class="{style}" cx="{px(x):.1f}" cy="{py(y):.1f}" r="3.5"/>'
                for x, y in points
            ]
    legend = "".join(
        f'<span><i class="{style}"></i>{escape(label)}</span>' for label, (style, _) in kept.items()
    )
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>{''.join(parts)}</svg>"
        f'<div class="legend">{legend}</div></figure>'
    )


def bar(value: float, before: float | None, chance: float | None) -> str:
    """A horizontal bar for a share from 0 to 1, with marks where it was and where chance is."""
    marks = ""
    for position, style in ((before, "was"), (chance, "chance")):
        if position is not None:
            marks += f'<b class="{style}" style="left:{100 * position:.1f}%"></b>'
    return f'<div class="bar"><u style="width:{100 * value:.1f}%"></u>{marks}</div>'
