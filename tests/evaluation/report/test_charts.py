"""The charts of the report."""

import pytest
from report_runs import ARMS, make_run

from cptjax.evaluation.report import charts, read


def test_joint_training_is_left_out_of_the_format_chart(tmp_path):
    for arm in ARMS:
        make_run(tmp_path / arm, arm)
    chart = charts.arms_format_chart(read.read_arms([tmp_path]))
    assert "sft_bare, free" in chart and "joint" not in chart


def test_a_thinned_curve_keeps_its_mean_and_a_constant_stays_constant():
    xs, ys = charts.thin_curve([(i, float(i % 2)) for i in range(40)], 10)
    assert len(xs) == 10 and ys == [0.5] * 10 and sum(xs) / 10 == pytest.approx(19.5)
    assert charts.smooth_curve([2.0] * 30) == pytest.approx([2.0] * 30)
