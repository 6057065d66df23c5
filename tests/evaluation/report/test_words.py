"""Sentences and number formats of the report."""

import types

from report_runs import make_run

from cptjax.evaluation import matrix
from cptjax.evaluation.report import read, words


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


def test_arms_that_differ_within_noise_are_not_ranked(tmp_path):
    for name, seed in (("a", 0), ("b", 1)):
        make_run(tmp_path / name, "grpo", seed=seed)
    sentences = words.comparison_headline(read.read_arms([tmp_path]))
    assert sentences[0].startswith("All keep about equally much of what they learned (FM <b>−")


def test_arms_that_differ_in_every_seed_are_ranked_although_seeds_vary():
    found = lambda value: {"value": value, "stderr": 0.0}
    metrics = lambda value: {
        "metric": lambda name: found(value),
        "summary": {"metrics": {"fm_diagonal": found(value)}},
    }
    table = types.SimpleNamespace(finished=True)
    run = lambda seed, value: types.SimpleNamespace(
        variant=f"seed{seed}", table=table, **metrics(value)
    )
    arm = lambda label, values: read.Arm(
        label, tuple(run(seed, v) for seed, v in enumerate(values))
    )
    sentences = lambda *values: words.best_and_worst_sentence(
        [arm("calm", (0.0, -0.01, 0.0)), arm("wild", values)],
        "fm_diagonal",
        "{best} {worst}",
        "alike",
    )
    assert "each of the <b>3</b> seeds" in sentences(-0.1, -0.7, -0.15) and sentences(
        -0.1, -0.7, 0.01
    ) == "alike" == sentences(-0.1, -0.7)


def test_every_metric_has_a_title():
    assert {*matrix.FORMULAS, "format_share"} == set(words.METRIC_TITLES)
