"""Paired differences from the baseline, their intervals, and what the page says of few seeds."""

import json
import math
import re

import numpy as np
import pytest
from report_runs import make_run, write_page

from cptjax.common import files
from cptjax.evaluation import report, summary
from cptjax.evaluation.report import differences, read
from cptjax.evaluation.report.differences import Difference

# 0.975 quantiles of Student's t distribution, from a printed table, by degrees of freedom.
STUDENT = {2: 4.303, 3: 3.182, 4: 2.776, 9: 2.262, 30: 2.042}


def test_an_interval_is_that_of_students_t():
    """By hand: the differences 1, 2, 6 have the mean 3 and the deviation sqrt((4 + 1 + 9) / 2)."""
    d = Difference({"seed0": 1.0, "seed1": 2.0, "seed2": 6.0})
    assert d.mean == 3 and d.sd == pytest.approx(math.sqrt(7))
    assert d.half_width == pytest.approx(4.303 * math.sqrt(7 / 3), rel=1e-4)
    assert d.to_dict()["ci95"] == [d.mean - d.half_width, d.mean + d.half_width]
    assert not d.is_clear and Difference({"a": 2.0, "b": 2.1, "c": 2.2}).is_clear
    for degrees, quantile in STUDENT.items():
        assert differences.student_quantile(degrees + 1) == pytest.approx(quantile, abs=6e-4)


def test_intervals_of_random_differences_cover_the_mean():
    """An interval with the quantile 1.96 would cover it in 86 of 100 cases."""
    rng = np.random.default_rng(0)
    covered = [
        abs(d.mean - 5.0) <= d.half_width
        for row in rng.normal(5.0, 2.0, (2000, 4))
        for d in [Difference(dict(enumerate(row)))]
    ]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.015)


def test_fewer_than_three_pairs_have_no_interval():
    one, two = Difference({"a": 1.0}), Difference({"a": 1.0, "b": 1.0})
    assert one.sd is one.half_width is two.half_width is None and two.sd == 0
    assert not two.is_clear and two.to_dict()["ci95"] is None
    many = {k: Difference(dict.fromkeys(map(str, range(k)), 0.1)) for k in (1, 2, 3, 5)}
    assert differences.too_few_pairs([many[5]]) == differences.too_few_pairs([]) == ""
    for k, text in ((1, "is one pair"), (2, "are 2 pairs"), (3, "With 3 pairs the intervals are")):
        assert text in differences.too_few_pairs([many[5], many[k]])
    assert "4.3 standard errors" in differences.too_few_pairs([many[3]])


def test_runs_are_paired_by_seed_and_only_finished_ones(tmp_path):
    for arm, seeds in (("grpo", (1, 2, 3, 4)), ("sft_bare", (2, 3, 4, 5))):
        for seed in seeds:
            make_run(tmp_path / arm / f"seed{seed}", arm, seed=seed)
    make_run(tmp_path / "grpo/seed5", seed=5, upto=3)
    text = write_page(tmp_path)
    numbers = json.loads((tmp_path / "report.json").read_text())
    assert numbers["baseline"] == "sft_bare" and list(numbers["differences"]) == ["grpo"]
    value = lambda arm, seed: summary.summarise_run(
        summary.load_run_tables(tmp_path / arm / f"seed{seed}")
    )["metrics"]["fm_diagonal"]["value"]
    expected = {f"seed{s}": value("grpo", s) - value("sft_bare", s) for s in (2, 3, 4)}
    found = numbers["differences"]["grpo"]["fm_diagonal"]
    assert found["pairs"] == pytest.approx(expected) and found["n"] == 3
    d = np.array(list(expected.values()))
    half = 4.3027 * d.std(ddof=1) / math.sqrt(3)
    assert found["ci95"] == pytest.approx([d.mean() - half, d.mean() + half], rel=1e-4)
    assert "Differences from sft_bare" in text and "With 3 pairs the intervals are wide" in text
    shown = f"+{100 * d.mean():.1f} ± {100 * half:.1f}"
    assert re.search(rf'<td class="best" title="seed2: [^"]*">{re.escape(shown)}</td>', text)
    for baseline, labels in (("grpo", ["sft_bare"]), ("sft_bare", ["grpo"])):
        report.write_report([tmp_path], tmp_path / "x.html", baseline)
        assert list(json.loads((tmp_path / "x.json").read_text())["differences"]) == labels
    with pytest.raises(
        ValueError, match="the baseline is the arm 'sft_bar'; did you mean 'sft_bare'"
    ):
        report.write_report([tmp_path], tmp_path / "x.html", "sft_bar")


def test_the_config_names_the_baseline_and_the_order(tmp_path):
    for arm in ("grpo", "joint", "sft_bare", "sft_style"):
        config = files.read_json(make_run(tmp_path / arm, arm) / "config.json")
        settings = {"baseline": "sft_style", "sort": "fm_diagonal"}
        files.write_json(tmp_path / arm / "config.json", config | {"report": settings})
    arms = read.read_arms([tmp_path])
    assert [arm.label for arm in arms] == ["grpo", "sft_style", "sft_bare", "joint"]
    assert differences.choose_baseline(arms).label == "sft_style"
    assert differences.choose_baseline(arms[2:]) is None  # it has no run yet
    assert "There is one pair of runs" in write_page(tmp_path)
    worst_first = read.read_arms([tmp_path], "forgetting")
    assert [arm.label for arm in worst_first] == ["grpo", "sft_style", "sft_bare", "joint"]
    with pytest.raises(ValueError, match="sort='fm_diag' is no metric.*did you mean 'fm_diagonal'"):
        read.read_arms([tmp_path], "fm_diag")
