"""Ticks, smoothing, and what of a series is drawn."""

import math
import re
import xml.etree.ElementTree as xml

import pytest

from fusedpeft.evaluate.plots import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    bar,
    line_chart,
    smooth,
    ticks,
)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0, 240, [0, 50, 100, 150, 200]),
        (0.93, 3.4, [1.0, 1.5, 2.0, 2.5, 3.0]),
        (-0.3, 0.7, [-0.2, 0, 0.2, 0.4, 0.6]),
        (1e-6, 9e-6, [2e-6, 4e-6, 6e-6, 8e-6]),
        (4.0, 4.0, [4.0]),
    ],
)
def test_ticks_are_round(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize("low", [-7.3, 0.0, 0.011, 123.4])
@pytest.mark.parametrize("span", [1e-3, 0.77, 1.0, 5.1, 99.0, 12_345.0])
def test_ticks_lie_inside_and_are_few(low, span):
    found = ticks(low, low + span)
    assert 3 <= len(found) <= 8 and found == sorted(set(found))
    slack = 1e-6 * span
    assert low - slack <= found[0] and found[-1] <= low + span + slack


def test_smoothing_keeps_the_ends_and_the_steps():
    points = [(float(x), y) for x, y in enumerate([0.0, 10.0, 20.0, 30.0, 90.0])]
    assert smooth(points) == [(0, 10.0), (1, 15.0), (2, 30.0), (3, 37.5), (4, 140 / 3)]
    assert smooth([]) == []


def drawn(svg, style):
    """The points of one line, as numbers."""
    (points,) = re.findall(rf'<polyline class="{style}" points="([^"]*)"', svg)
    return [tuple(map(float, p.split(","))) for p in points.split()]


def test_a_line_goes_where_its_values_are():
    svg = line_chart({"loss": ("train", [(0.0, 3.0), (5.0, 2.0), (10.0, 1.0)])}, "T", "step")
    (x0, y0), (x1, y1), (x2, y2) = drawn(svg, "train")
    assert (x0, x2) == (LEFT, WIDTH - RIGHT) and x1 == pytest.approx((x0 + x2) / 2, abs=0.1)
    assert TOP < y0 < y1 < y2 < HEIGHT - BOTTOM  # y grows downwards
    assert y1 == pytest.approx((y0 + y2) / 2, abs=0.1)
    xml.fromstring(svg)  # well-formed


def test_points_that_are_not_finite_are_left_out():
    values = [1.0, math.nan, 0.5, math.inf, -math.inf, 0.25]
    svg = line_chart({"loss": ("train", list(enumerate(values)))}, "T", "step")
    clean = line_chart({"loss": ("train", [(0, 1.0), (2, 0.5), (5, 0.25)])}, "T", "step")
    assert svg == clean and len(drawn(svg, "train")) == 3
    assert "nan" not in svg and "inf" not in svg


def test_nothing_to_draw_is_no_chart():
    assert line_chart({}, "T", "step") == ""
    assert line_chart({"a": ("train", []), "b": ("held", [(1.0, math.nan)])}, "T", "step") == ""


def test_a_series_without_points_has_no_legend():
    svg = line_chart({"training": ("train", [(1, 2)]), "held out": ("held", [])}, "T", "step")
    assert "training" in svg and "held out" not in svg


def test_one_value_and_equal_values_can_be_drawn():
    for points in ([(3.0, 0.0)], [(0.0, 2.0), (9.0, 2.0)], [(0.0, -1.0)]):
        svg = line_chart({"loss": ("train", points)}, "T", "step")
        for x, y in drawn(svg, "train"):
            assert LEFT <= x <= WIDTH - RIGHT and TOP <= y <= HEIGHT - BOTTOM


def test_an_axis_of_losses_does_not_go_below_zero():
    svg = line_chart({"loss": ("train", [(0.0, 2.0), (9.0, 0.0)])}, "T", "step")
    labels = re.findall(r'text-anchor="end">([^<]*)<', svg)
    assert labels[0] == "0" and not any(label.startswith("-") for label in labels)


def test_few_points_are_marked_and_many_are_not():
    few = line_chart({"a": ("held", [(x, x) for x in range(12)])}, "T", "step")
    many = line_chart({"a": ("held", [(x, x) for x in range(13)])}, "T", "step")
    assert few.count("<circle") == 12 and "<circle" not in many


def test_texts_are_escaped():
    svg = line_chart({"<b>": ("train", [(0, 1)])}, 'a "<i>"', "<u>")
    xml.fromstring(svg)
    assert "<b>" not in svg and "<i>" not in svg and "<u>" not in svg
    assert "&lt;b&gt;" in svg and 'aria-label="a &quot;&lt;i&gt;&quot;"' in svg


def test_bar():
    assert bar(0.5, None, None) == '<div class="bar"><u style="width:50.0%"></u></div>'
    marks = bar(0.914, 0.512, 0.5)
    assert (
        'class="was" style="left:51.2%"' in marks and 'class="chance" style="left:50.0%"' in marks
    )
