"""Every formula against numbers worked out by hand, signs included."""

import json
import math

import pytest

from cptjax.common import files, run_log
from cptjax.evaluation import matrix, summary
from cptjax.evaluation.matrix import AccuracyTable, Cell


def make(rows, stages, tasks=None, **more):
    tasks = tasks or list(dict.fromkeys(t for s in stages for t in s))
    cells = {
        (i, t): Cell(v, 0.03, 100)
        for i, row in enumerate(rows)
        for t, v in zip(tasks, row, strict=True)
        if v is not None
    }
    return AccuracyTable(tuple(map(tuple, stages)), cells, **more)


THREE = make(
    [[0.2, 0.3, 0.4], [0.8, 0.35, 0.4], [0.6, 0.9, 0.5], [0.7, 0.5, 0.95]], ["a", "b", "c"]
)
FOUR = make(
    [
        [0.1, 0.2, 0.3, 0.4],
        [0.5, 0.2, 0.3, 0.4],
        [0.7, 0.6, 0.2, 0.4],
        [0.4, 0.8, 0.7, 0.5],
        [0.3, 0.9, 0.5, 0.6],
    ],
    "abcd",
)


@pytest.mark.parametrize(
    "table, name, value, terms",
    [
        (THREE, "avg_acc", 2.15 / 3, 3),
        (THREE, "base_acc", 0.3, 3),
        (THREE, "learned_acc", 2.65 / 3, 3),
        (THREE, "learned_gain", 1.75 / 3, 3),  # .6 + .6 + .55
        (THREE, "fm_peak", -0.25, 2),  # (.7 - .8 + .5 - .9) / 2
        (THREE, "fm_peak_all", -0.5 / 3, 3),
        (THREE, "fm_diagonal", -0.25, 2),
        (THREE, "bwt", -0.25, 2),
        (THREE, "forgetting", 0.25, 2),
        (THREE, "fwt", 0.075, 2),  # (.35 - .3 + .5 - .4) / 2
        (THREE, "maa", (0.8 + 0.75 + 2.15 / 3) / 3, 3),
        (THREE, "gain", 1.25 / 3, 3),
        (FOUR, "avg_acc", 0.575, 4),
        (FOUR, "learned_acc", 0.6, 4),
        (FOUR, "learned_gain", 1.4 / 4, 4),
        (FOUR, "fm_peak", -0.2, 3),  # (.3 - .7 + .9 - .9 + .5 - .7) / 3
        (FOUR, "fm_peak_all", -0.15, 4),
        (FOUR, "fm_diagonal", -0.1 / 3, 3),  # (.3 - .5 + .9 - .6 + .5 - .7) / 3
        (FOUR, "bwt", -0.1 / 3, 3),
        (FOUR, "forgetting", 0.5 / 3, 3),  # (.7 - .3 + .8 - .9 + .7 - .5) / 3
        (FOUR, "fwt", 0.0, 3),  # 0 - .1 + .1
        (FOUR, "maa", (0.5 + 0.65 + 1.9 / 3 + 0.575) / 4, 4),
    ],
)
def test_hand_computed(table, name, value, terms):
    found = matrix.forgetting_metrics(table)[name]
    assert found["value"] == pytest.approx(value, abs=1e-12) and found["terms"] == terms
    assert found["formula"] == matrix.FORMULAS[name].text


def test_intransigence_is_positive_where_joint_training_learned_more():
    joint = make([[0.2, 0.3, 0.4], [0.9, 1.0, 0.9]], [("a", "b", "c")])
    assert matrix.forgetting_metrics(THREE, joint)["intransigence"]["value"] == pytest.approx(
        (0.1 + 0.1 - 0.05) / 3
    )
    assert matrix.forgetting_metrics(THREE)["intransigence"]["value"] is None
    own = matrix.forgetting_metrics(joint)
    assert own["fm_peak"]["value"] is own["fm_peak_all"]["value"] is None
    assert own["forgetting"]["terms"] == 0 and own["avg_acc"]["value"] == pytest.approx(2.8 / 3)


def test_a_task_trained_twice_and_a_joint_stage():
    t = make(
        [
            [0, 0, 0, 0],
            [0.5, 0, 0, 0],
            [0.1, 0.6, 0.1, 0],
            [0.8, 0.4, 0.3, 0.2],
            [0.6, 0.5, 0.9, 0.7],
        ],
        ["a", "b", "a", ("c", "d")],
        tasks="abcd",
    )
    found = {name: n["value"] for name, n in matrix.forgetting_metrics(t).items()}
    assert t.last("a") == 3 and t.first("a") == 1 and t.old() == ["a", "b"]
    assert found["learned_acc"] == pytest.approx((0.8 + 0.6 + 0.9 + 0.7) / 4)
    assert found["fm_diagonal"] == pytest.approx((0.6 - 0.8 + 0.5 - 0.6) / 2)
    assert found["fwt"] == pytest.approx(
        (0 + 0.3 + 0.2) / 3
    )  # b before stage 2, c and d before stage 4
    assert found["maa"] == pytest.approx((0.5 + 0.35 + 0.6 + 0.675) / 4)
    stage4 = matrix.per_stage_metrics(t)[3]
    assert stage4["gain"] == pytest.approx((0.6 + 0.5) / 2) and stage4["drop"] == pytest.approx(
        (0.2 - 0.1) / 2
    )


def test_general_tasks_and_paper_c_signs():
    rows = [[0.2, 0.9], [0.8, 0.5]]
    found = matrix.forgetting_metrics(make(rows, ["a"], tasks=["a", "facts"]))
    assert found["general_delta"]["value"] == pytest.approx(-0.4) and found["drop"][
        "value"
    ] == pytest.approx(0.4)
    assert found["gain"]["value"] == pytest.approx(0.6) and found["avg_acc"]["terms"] == 1
    stage = matrix.per_stage_metrics(make(rows, ["a"], tasks=["a", "facts"]))[0]
    assert stage["drop"] == stage["loss"] == pytest.approx(0.4)


def test_groups_of_general_tasks_have_numbers_of_their_own():
    rows, names = [[0.2, 0.9, 0.8, 1.0], [0.8, 0.5, 0.6, 1.0]], ["a", "facts", "sums", "puzzle"]
    forced = make([[0.2, 0.9, 0.8, 1.0], [0.8, 0.9, 0.7, 1.0]], ["a"], tasks=names).cells
    t = make(rows, ["a"], tasks=names, forced=forced, groups={"text": ("facts", "sums")})
    found = matrix.forgetting_metrics(t)
    assert (
        found["text"]["value"] == pytest.approx(-0.3)
        and found["text"]["terms"] == 2
        and found["text"]["better"] == "higher"
    )
    assert found["text_forced"]["value"] == pytest.approx(-0.05) and found["general_delta"][
        "value"
    ] == pytest.approx(-0.2)
    assert "facts, sums" in found["text"]["formula"]
    assert summary.summarise_table(t)["groups"] == {
        "text": {
            "tasks": ["facts", "sums"],
            "base": pytest.approx(0.85),
            "final": pytest.approx(0.55),
        }
    }


def test_partial_runs_are_judged_by_their_last_complete_row():
    t = make(
        [[0.2, 0.3, 0.4], [0.8, None, 0.4], [0.6, 0.9, 0.5], [0.7, None, None]], ["a", "b", "c"]
    )
    found = matrix.forgetting_metrics(t)
    assert t.final == 2 and not t.finished
    assert (
        found["fm_diagonal"]["value"] == pytest.approx(-0.2) and found["fm_diagonal"]["terms"] == 1
    )
    assert found["fwt"]["terms"] == 1  # b was not measured before its stage
    assert summary.describe_coverage(t) == "2 of 3 stages so far; not measured: b at stage 1"
    assert math.isnan(t.array()[1, 1])


def test_only_a_base_row_gives_a_base_and_no_claim():
    found = matrix.forgetting_metrics(make([[0.2, 0.9]], ["a"], tasks=["a", "facts"]))
    assert found["base_acc"]["value"] == 0.2
    assert all(
        found[name]["value"] is None
        for name in ("learned_acc", "fm_peak", "gain", "general_delta", "drop", "maa")
    )


def test_intervals_follow_from_the_cells():
    found = matrix.forgetting_metrics(THREE)
    assert found["avg_acc"]["stderr"] == pytest.approx(0.03 / math.sqrt(3))
    assert found["fm_diagonal"]["stderr"] == pytest.approx(0.03)  # four cells with weight 1/2
    assert found["fm_diagonal"]["ci95"] == pytest.approx([-0.25 - 1.96 * 0.03, -0.25 + 1.96 * 0.03])
    steady = make(
        [[0.1, 0.1], [0.5, 0.1], [0.6, 0.7]], "ab"
    )  # the peak is the last row: no change, and none to doubt
    assert matrix.forgetting_metrics(steady)["fm_peak"] | {"formula": 0} == {
        "value": 0.0,
        "stderr": 0.0,
        "ci95": [0.0, 0.0],
        "terms": 1,
        "formula": 0,
        "better": "higher",
    }


def test_forced_prefix_splits_format_from_knowledge():
    free = [[0.2, 0.3, 1.0], [0.9, 0.3, 0.6], [0.1, 0.9, 0.2]]
    forced = [[0.2, 0.3, 1.0], [0.9, 0.3, 1.0], [0.8, 0.9, 0.9]]
    t = make(
        free,
        ["a", "b"],
        tasks=["a", "b", "facts"],
        forced=make(forced, ["a", "b"], tasks=["a", "b", "facts"]).cells,
    )
    found = matrix.forgetting_metrics(t)
    assert found["fm_diagonal"]["value"] == pytest.approx(-0.8) and found["fm_forced"][
        "value"
    ] == pytest.approx(-0.1)
    assert found["general_delta_forced"]["value"] == pytest.approx(-0.1)
    share = matrix.measure_format_share(t)
    assert (share["loss"], share["loss_forced"]) == (pytest.approx(0.8), pytest.approx(0.1))
    assert share["value"] == pytest.approx(1 - 0.1 / 0.8)
    assert matrix.measure_format_share(THREE)["value"] is None


def test_transitions_count_flips():
    before = {("a", "1"): 1, ("a", "2"): 0, ("a", "3"): 1, ("a", "4"): 0.3, ("b", "1"): 1}
    after = {("a", "1"): 0, ("a", "2"): 0.6, ("a", "3"): 1, ("a", "4"): 0}
    assert summary.count_transitions(before, after) == {
        "a": {"lost": 1, "gained": 1, "kept": 1, "never": 1, "n": 4}
    }


def test_spread_is_the_sample_deviation():
    assert summary.mean_and_sd([1.0, 3.0, None, math.nan]) == {
        "mean": 2.0,
        "sd": pytest.approx(math.sqrt(2)),
        "n": 2,
    }
    assert (
        summary.mean_and_sd([1.0]) == {"mean": 1.0, "sd": None, "n": 1}
        and summary.mean_and_sd([None]) is None
    )


def row(stage, task, value, metric="accuracy", template="cot", step=9, stderr=math.nan):
    return {
        "stage": stage,
        "stage_name": "s",
        "step": step,
        "task": task,
        "metric": metric,
        "value": value,
        "n": 25,
        "stderr": stderr,
        "scorer": "exact",
        "template": template,
        "pixels": "",
        "decoding": "",
    }


def test_rows_sort_into_a_table():
    rows = [
        row(0, "a", 0.5),
        row(0, "a", 0.9, template="direct"),
        row(1, "a", 0.1),
        row(1, "a", 0.8, stderr=0.5),
        row(1, "a", 0.7, "accuracy_mini", step=4),
        row(1, "a", 0.6, "accuracy_forced"),
        row(1, "a", 2.5, "kl_base", template=""),
        row(1, "a", 0.3, "f1"),
    ]
    t = summary.build_accuracy_table(rows, [("a",)])
    assert t.cells == {
        (0, "a"): Cell(0.5, 0.1, 25),
        (1, "a"): Cell(0.8, 0.5, 25),
    }  # sqrt(.25 / 25) where no stderr is given
    assert (
        t.forced[1, "a"].value == 0.6
        and t.base_kl[1, "a"].value == 2.5
        and t.within_stage == ((1, 4, "a", 0.7),)
    )
    assert matrix.forgetting_metrics(t)["kl_new"]["value"] == 2.5


def test_write_puts_matrix_and_summary_beside_the_evaluations(tmp_path):
    files.write_json(
        tmp_path / "config.json",
        {"name": "run", "stages": [{"task": "a", "steps": 9}, {"task": ["b"], "steps": 9}]},
    )
    log = run_log.RunLog(tmp_path)
    log.evals([row(0, "a", 0.5), row(0, "b", 0.25), row(1, "a", 1.0), row(1, "b", 0.25)])
    log.predictions(0, [{"task": "a", "id": 7, "score": 1.0}])
    log.predictions(1, [{"task": "a", "id": 7, "score": 0.0}])
    found = summary.write_summary(summary.load_run_tables(tmp_path))
    assert (
        tmp_path / "matrix.csv"
    ).read_text() == "stage,stage_name,a,b\n0,base,0.5,0.25\n1,a,1.0,0.25\n2,b,,\n"
    assert found == json.loads((tmp_path / "summary.json").read_text())
    assert found["finished"] is False and found["covers"] == "1 of 2 stages so far"
    assert found["transitions"]["since_base"] == {
        "a": {"lost": 1, "gained": 0, "kept": 0, "never": 0, "n": 1}
    }
    assert found["metrics"]["learned_acc"] | {"stderr": 0, "ci95": 0} == {
        "value": 1.0,
        "stderr": 0,
        "ci95": 0,
        "terms": 1,
        "formula": matrix.FORMULAS["learned_acc"].text,
        "better": "higher",
    }


def test_a_run_is_judged_by_the_tasks_that_it_examines(tmp_path):
    asked = {"tasks": "a,c", "general": ["facts"], "groups": {"text": ["facts"]}}
    files.write_json(
        tmp_path / "config.json", {"stages": [{"task": ["a", "b", "c"], "steps": 9}], "eval": asked}
    )
    run_log.RunLog(tmp_path).evals([row(1, task, 0.5) for task in ("a", "c", "facts")])
    found = summary.write_summary(summary.load_run_tables(tmp_path))
    assert found["finished"] and found["covers"] == "its one stage; not measured: the base model"
    assert (
        tmp_path / "matrix.csv"
    ).read_text() == "stage,stage_name,a,c\n0,base,,\n1,a+b+c,0.5,0.5\n"
    assert (
        list(found["general"]) == ["facts"]
        and found["metrics"]["avg_acc"]["terms"] == 2
        and found["groups"]["text"]["final"] == 0.5
    )


def test_what_is_no_run_is_named(tmp_path):
    with pytest.raises(ValueError, match="is no run: it has no config.json"):
        summary.load_run_tables(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="expected a run's config with stages"):
        summary.load_run_tables(tmp_path)
