"""Metrics of scored responses: values, rows and standard errors."""

import numpy as np
import pytest

from cptjax.tasks.scoring.judged import write_verdict
from cptjax.tasks.scoring.scorers import (
    find_scorer,
    score_responses,
    summarise_records,
)
from cptjax.tasks.scoring.summaries import mean_metric, ratio_metric


def values(scorer, records):
    return {name: metric.value for name, metric in summarise_records(scorer, records).items()}


def test_pope_yes_ratio_counts_predictions():
    yes_no = find_scorer("yes_no")
    said = ["Yes, there is.", "yes", "yes", "There is a dog in it: yes", "no", "maybe"]
    gold = ["yes", "yes", "no", "no", "yes", "no"]
    metrics = values(yes_no, score_responses(yes_no, said, gold, [{}] * 6))
    assert metrics["accuracy"] == pytest.approx(2 / 6)
    assert metrics["precision"] == pytest.approx(2 / 4) and metrics["recall"] == pytest.approx(
        2 / 3
    )
    assert metrics["f1"] == pytest.approx(4 / 7)
    assert metrics["yes_ratio"] == pytest.approx(4 / 6)  # of the gold answers it would be 3/6
    assert metrics["neither"] == pytest.approx(1 / 6)


def test_pathvqa_reports_both_kinds():
    scorer = find_scorer("pathvqa_split")
    gold = ["yes", "no", "acute lung injury", "liver"]
    metrics = values(
        scorer, score_responses(scorer, ["Yes.", "yes", "lung injury", "liver"], gold, [{}] * 4)
    )
    assert (metrics["yes_no"], metrics["open"], metrics["accuracy"]) == (0.5, 0.5, 0.5)
    assert metrics["open_recall"] == pytest.approx((2 / 3 + 1) / 2) and metrics[
        "open_f1"
    ] == pytest.approx((0.8 + 1) / 2)


def test_every_metric_has_the_rows_and_the_error_of_its_own_group():
    found = summarise_records(
        find_scorer("pathvqa_split"),
        score_responses(
            find_scorer("pathvqa_split"),
            ["yes", "yes", "x", "no"],
            ["yes", "no", "liver", "no"],
            [{}] * 4,
        ),
    )
    assert {
        name: metric.n for name, metric in found.items() if "open" in name or "yes" in name
    } == {
        "yes_no": 3,
        "open": 1,
        "open_recall": 1,
        "open_f1": 1,
    }
    assert found["yes_no"].stderr == pytest.approx(
        (2 / 3 * 1 / 3 / 2) ** 0.5
    )  # p (1 - p) / (n - 1)
    assert np.isnan(found["open"].stderr)  # of one row
    closed = score_responses(find_scorer("pathvqa_split"), ["yes"], ["yes"], [{}])
    assert "open" not in summarise_records(find_scorer("pathvqa_split"), closed)
    metas = [{"category": "law"}] * 3 + [{"category": "math"}]
    groups = summarise_records(
        find_scorer("mmlu_pro"),
        score_responses(find_scorer("mmlu_pro"), ["B"] * 4, ["B"] * 4, metas),
    )
    assert (groups["category/law"].n, groups["category/math"].n, groups["accuracy"].n) == (3, 1, 4)


def test_errors_of_ratios_are_those_of_many_repetitions():
    """Precision, recall and F1 of POPE, resampled a thousand times."""
    rng = np.random.default_rng(0)
    yes, gold = rng.random((2, 1000, 400)) < [[[0.3]], [[0.6]]]
    hit = yes & gold
    for parts, wholes in ((hit, yes), (hit, gold), (2 * hit, yes * 1 + gold)):
        metrics = [ratio_metric(a, b) for a, b in zip(parts, wholes, strict=True)]
        assert np.mean([t.stderr for t in metrics]) == pytest.approx(
            np.std([t.value for t in metrics]), rel=0.1
        )
        assert metrics[0].n == (wholes[0] > 0).sum()
    assert mean_metric([1, 0, 0, 1]) == pytest.approx((0.5, 4, np.std([1, 0, 0, 1], ddof=1) / 2))


def test_mmmu_guess_is_the_same_each_time_and_reported():
    subjects = ("Art_Theory", "Math")
    metas = [
        {"id": f"validation_{subject}_{i}", "options": "['a', 'b', 'c', 'd']"}
        for i in range(50)
        for subject in subjects
    ]
    official, strict = find_scorer("mmmu_official"), find_scorer("mmmu_strict")
    runs = [score_responses(official, ["no idea"] * 100, ["B"] * 100, metas) for _ in range(2)]
    assert [r.score for r in runs[0]] == [r.score for r in runs[1]]
    metrics = values(official, runs[0])
    assert 0.1 < metrics["accuracy"] < 0.45 and metrics["unread_choice"] == 1.0
    assert {"discipline/art_and_design", "discipline/science"} <= set(metrics)
    unboxed = score_responses(official, ["I guess B"] * 100, ["B"] * 100, metas, extraction="boxed")
    assert (
        values(official, unboxed)["accuracy"] == 0.0
        and values(official, unboxed)["extraction_failure"] == 1.0
    )
    assert (
        values(strict, score_responses(strict, ["no idea"] * 100, ["B"] * 100, metas))["accuracy"]
        == 0.0
    )


def test_mmlu_pro_mean_is_weighted_by_size():
    scorer = find_scorer("mmlu_pro")
    metas = [{"category": "law"}] * 3 + [{"category": "math"}]
    metrics = values(
        scorer, score_responses(scorer, ["The answer is (A)"] * 4, ["A", "A", "A", "B"], metas)
    )
    assert (
        metrics["accuracy"] == 0.75
        and metrics["category/law"] == 1.0
        and metrics["category/math"] == 0.0
    )


def official_mme_points(rows):
    """Compute the sum over categories of mean(accuracy + accuracy+) as lmms-eval does."""
    categories = {}
    for meta, score in rows:
        images = categories.setdefault(meta["category"], {})
        images.setdefault(meta["question_id"], []).append(score)
    points = {}
    for category, images in categories.items():
        pairs = [100 * sum(s) / len(s) + 100 * (sum(s) == 2) for s in images.values()]
        points[category] = sum(pairs) / len(pairs)
    return points


def test_mme_sums_its_points_over_the_categories_of_perception_and_cognition():
    scorer, rng = find_scorer("mme"), np.random.default_rng(0)
    metas = [
        {"category": category, "question_id": f"{category}/{i}.png"}
        for category in ("OCR", "count", "code_reasoning")
        for i in range(6)
        for _ in range(2)
    ]
    said = [["Yes", "No.", "maybe"][k] for k in rng.integers(0, 3, len(metas))]
    gold = [["Yes", "No"][k] for k in rng.integers(0, 2, len(metas))]
    records = score_responses(scorer, said, gold, metas)
    points = official_mme_points([(m, r.score) for m, r in zip(metas, records, strict=True)])
    metrics = summarise_records(scorer, records)
    assert metrics["perception"].value == pytest.approx(points["OCR"] + points["count"])
    assert metrics["cognition"].value == pytest.approx(points["code_reasoning"])
    assert metrics["total"].value == pytest.approx(sum(points.values()))
    assert metrics["category/OCR"].value == pytest.approx(points["OCR"])
    # An image with one question left has no accuracy+, and counts in neither sum.
    assert summarise_records(scorer, records[1:])["category/OCR"].n == 5


def test_mmstar_averages_its_categories():
    scorer = find_scorer("mmstar")
    metas = [{"category": "math"}] * 3 + [{"category": "logical reasoning"}]
    records = score_responses(scorer, ["A", "A", "B", "B"], ["A", "A", "A", "B"], metas)
    metrics = summarise_records(scorer, records)
    assert metrics["category/math"].value == pytest.approx(2 / 3)
    assert metrics["average"].value == pytest.approx((2 / 3 + 1) / 2)
    assert metrics["accuracy"].value == 0.75


def test_pope_reports_llavas_metrics_and_its_kinds_of_questions():
    scorer = find_scorer("pope")
    said, gold = ["Yes", "no", "It is not", "maybe"], ["yes", "yes", "no", "no"]
    metas = [{"category": kind} for kind in ("random", "random", "popular", "popular")]
    metrics = summarise_records(scorer, score_responses(scorer, said, gold, metas))
    assert metrics["accuracy"].value == metrics["precision"].value == metrics["recall"].value == 0.5
    assert metrics["yes_ratio"].value == 0.5 and metrics["category/popular"].value == 0.5


def test_refusals_are_reported_for_harmful_and_benign_prompts():
    scorer = find_scorer("refusal")
    verdicts = [write_verdict(True), write_verdict(False), write_verdict(True), "I think so"]
    metrics = summarise_records(scorer, score_responses(scorer, verdicts, [1, 1, 0, 0], [{}] * 4))
    assert metrics["prompt/harmful"].value == 0.5 and metrics["prompt/benign"].value == 0.0
    assert metrics["unread_verdict"].value == 0.25
