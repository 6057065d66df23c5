"""Axes of the charts."""

import math

import pytest

from cptjax.evaluation.report import svg


@pytest.mark.parametrize(
    "low, high, expected",
    [(0, 100, [0, 20, 40, 60, 80, 100]), (-0.3, 0.1, [-0.3, -0.2, -0.1, 0, 0.1]), (5, 5, [5, 6])],
)
def test_ticks_are_round_and_reach_both_ends(low, high, expected):
    assert svg.axis_ticks(low, high)[0] <= low and svg.axis_ticks(low, high)[-1] >= high
    assert svg.axis_ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(
    "low, high, labels",
    [
        (0, 20_000, ["0", "5000", "1e4", "1.5e4", "2e4"]),
        (0, 1e-6, ["0", "2.5e−7", "5e−7", "7.5e−7", "1e−6"]),
        (1000.1, 1000.9, ["1000", "1000.2", "1000.4", "1000.6", "1000.8", "1001"]),
        (200_001, 200_004, ["200001", "200002", "200003", "200004"]),
        (-0.3, 0.1, ["−0.3", "−0.2", "−0.1", "0", "0.1"]),
    ],
)
def test_the_labels_of_ticks_have_the_digits_that_tell_them_apart(low, high, labels):
    assert [name for _, name in svg.label_ticks(svg.axis_ticks(low, high, 4))] == labels


@pytest.mark.parametrize("value", [0.3, 0.45, 1.0, 2.0, 1000.0, -1.0])
@pytest.mark.parametrize("direction", [-math.inf, math.inf])
def test_values_that_differ_by_rounding_have_an_axis(value, direction):
    points = [svg.Point(0, value), svg.Point(1, math.nextafter(value, direction))]
    chart = svg.line_chart([svg.Series("x", points)], "title")
    assert "nan" not in chart and chart.count("<circle") == 2


def test_widened_axes_keep_their_limit():
    assert (
        svg.widen_range([94, 95], 20, 100) == [80, 100]
        and svg.widen_range([10, 60], 20, 100) == [10, 60]
        and svg.widen_range([5], 4) == [3, 7]
    )


def test_a_long_label_is_shortened_and_its_tooltip_is_whole():
    name = "a_method_with_a_very_long_name_0"
    chart = svg.dumbbell_chart([svg.DumbbellPair(name, 1, 2)], "title", "x", "before", "after")
    assert f">{name}<" not in chart and f"{name[: svg.LABEL_CHARS - 1]}…<" in chart
    assert f"{name}, before: 1" in chart
