"""Ratios of a device as a picture: a line for each op, a dot for each shape."""

from __future__ import annotations

import math
from html import escape
from typing import NamedTuple

WIDTH, LINE, LEFT, RIGHT, TOP, BOTTOM = 860, 20, 300, 24, 46, 34
LOW, HIGH = 0.01, 10.0  # of the axis, at most
TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


class Line(NamedTuple):
    """An op, what of it and the dtype; ratios of ours and of the peers."""

    label: str
    ours: list[float]
    peers: list[float]


def ratios_svg(title: str, lines: list[Line]) -> str:
    """What a README can show on any background: its own is white."""
    every = [r for line in lines for r in (*line.ours, *line.peers)]
    low = max(LOW, max((t for t in TICKS if t <= min(every)), default=LOW))
    high = min(HIGH, min((t for t in TICKS if t >= max(every)), default=HIGH))
    low, high = min(low, 0.5), max(high, 2.0)
    height = TOP + LINE * len(lines) + BOTTOM
    end = height - BOTTOM

    def px(ratio: float) -> float:
        at = math.log(min(max(ratio, low), high) / low) / math.log(high / low)
        return LEFT + at * (WIDTH - LEFT - RIGHT)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'font-family="system-ui, sans-serif" font-size="12" role="img">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<circle cx="{LEFT}" cy="16" r="4" fill="#0b6e4f"/>'
        f'<text x="{LEFT + 10}" y="20" fill="#222222">fusedpeft</text>'
        f'<circle cx="{LEFT + 90}" cy="16" r="3.5" fill="none" stroke="#8a8f98"/>'
        f'<text x="{LEFT + 100}" y="20" fill="#222222">others</text>'
        f'<text x="{LEFT + 160}" y="20" fill="#666666">'
        "left of 1: faster than what it is measured against</text>",
    ]
    for tick in (t for t in TICKS if low <= t <= high):
        colour, width = ("#222222", 1.2) if tick == 1.0 else ("#dddddd", 1)
        x = f"{px(tick):.1f}"
        parts.append(
            f'<line x1="{x}" y1="{TOP - 8}" x2="{x}" y2="{end}" stroke="{colour}" '
            f'stroke-width="{width}"/>'
            f'<text x="{x}" y="{end + 16}" text-anchor="middle" fill="#444444">{tick:g}</text>'
        )
    for i, line in enumerate(lines):
        y = TOP + LINE * i + LINE / 2 - 4
        parts.append(
            f'<text x="{LEFT - 12}" y="{y + 4:g}" text-anchor="end" fill="#222222">'
            f"{escape(line.label)}</text>"
        )
        parts += [
            f'<circle cx="{px(r):.1f}" cy="{y:g}" r="3.5" fill="none" stroke="#8a8f98"/>'
            for r in line.peers
        ]
        parts += [
            f'<circle cx="{px(r):.1f}" cy="{y:g}" r="4" fill="#0b6e4f" fill-opacity="0.75"/>'
            for r in line.ours
        ]
    return "\n".join([*parts, "</svg>", ""])
