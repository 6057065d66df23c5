"""Sentences on one run, and number formats of the report."""

from cptjax.evaluation import matrix
from cptjax.evaluation.report import words


def test_changes_within_their_interval_are_not_called_changes():
    assert (
        words.describe_change({"value": -0.01, "stderr": 0.01})
        == "did not measurably change (−1.0 ± 2.0 points)"
    )
    assert words.describe_change({"value": -0.1, "stderr": 0.01}) == "fell by 10.0 points"
    assert (
        words.format_points(-0.0001) == "0.0"
        and words.format_points(None) == "–"
        and words.format_amount(12_340) == "12.3 k"
    )


def test_every_metric_has_a_title():
    assert {*matrix.FORMULAS, "format_share"} == set(words.METRIC_TITLES)
