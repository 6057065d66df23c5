"""Axes of the charts."""

import pytest

from cptjax.evaluation.report import svg


@pytest.mark.parametrize(
    "low, high, expected",
    [(0, 100, [0, 20, 40, 60, 80, 100]), (-0.3, 0.1, [-0.3, -0.2, -0.1, 0, 0.1]), (5, 5, [5, 6])],
)
def test_ticks_are_round_and_reach_both_ends(low, high, expected):
    assert svg.axis_ticks(low, high)[0] <= low and svg.axis_ticks(low, high)[-1] >= high
    assert svg.axis_ticks(low, high) == pytest.approx(expected)


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
