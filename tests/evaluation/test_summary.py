"""Reading the result files of a run, and its matrix.csv and summary.json."""

import json
import math

import pytest

from cptjax.common import files, run_log
from cptjax.evaluation import matrix, summary
from cptjax.evaluation.matrix import AccuracyTable, Cell


def test_transitions_count_examples_that_changed():
    before = {("a", "1"): 1, ("a", "2"): 0, ("a", "3"): 1, ("a", "4"): 0.3, ("b", "1"): 1}
    after = {("a", "1"): 0, ("a", "2"): 0.6, ("a", "3"): 1, ("a", "4"): 0}
    assert summary.count_transitions(before, after) == {
        "a": {"lost": 1, "gained": 1, "kept": 1, "never": 1, "n": 4}
    }


def test_the_spread_is_the_sample_deviation():
    assert summary.mean_and_sd([1.0, 3.0, None, math.nan]) == {
        "mean": 2.0,
        "sd": pytest.approx(math.sqrt(2)),
        "n": 2,
    }
    assert (
        summary.mean_and_sd([1.0]) == {"mean": 1.0, "sd": None, "n": 1}
        and summary.mean_and_sd([None]) is None
    )


def test_groups_are_summarised_by_their_mean():
    cells = {(0, "a"): 0.2, (0, "facts"): 0.9, (0, "sums"): 0.8}
    cells |= {(1, "a"): 0.8, (1, "facts"): 0.5, (1, "sums"): 0.6}
    t = AccuracyTable(
        (("a",),),
        {key: Cell(value, 0.03, 100) for key, value in cells.items()},
        groups={"text": ("facts", "sums")},
    )
    assert summary.summarise_table(t)["groups"] == {
        "text": {
            "tasks": ["facts", "sums"],
            "base": pytest.approx(0.85),
            "final": pytest.approx(0.55),
        }
    }


def test_coverage_names_the_cells_that_are_missing():
    rows = [[0.2, 0.3, 0.4], [0.8, None, 0.4], [0.6, 0.9, 0.5], [0.7, None, None]]
    cells = {
        (i, task): Cell(value)
        for i, values in enumerate(rows)
        for task, value in zip("abc", values, strict=True)
        if value is not None
    }
    t = AccuracyTable((("a",), ("b",), ("c",)), cells)
    assert summary.describe_coverage(t) == "2 of 3 stages so far; not measured: b at stage 1"


def eval_row(stage, task, value, metric="accuracy", template="cot", step=9, stderr=math.nan):
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


def test_rows_of_evals_csv_become_a_table():
    rows = [
        eval_row(0, "a", 0.5),
        eval_row(0, "a", 0.9, template="direct"),
        eval_row(1, "a", 0.1),
        eval_row(1, "a", 0.8, stderr=0.5),
        eval_row(1, "a", 0.7, "accuracy_mini", step=4),
        eval_row(1, "a", 0.6, "accuracy_forced"),
        eval_row(1, "a", 2.5, "kl_base", template=""),
        eval_row(1, "a", 0.3, "f1"),
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


def test_matrix_and_summary_are_written_next_to_the_evaluations(tmp_path):
    files.write_json(
        tmp_path / "config.json",
        {"name": "run", "stages": [{"task": "a", "steps": 9}, {"task": ["b"], "steps": 9}]},
    )
    log = run_log.RunLog(tmp_path)
    log.evals(
        [
            eval_row(0, "a", 0.5),
            eval_row(0, "b", 0.25),
            eval_row(1, "a", 1.0),
            eval_row(1, "b", 0.25),
        ]
    )
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


def test_only_evaluated_tasks_count(tmp_path):
    asked = {"tasks": "a,c", "general": ["facts"], "groups": {"text": ["facts"]}}
    files.write_json(
        tmp_path / "config.json", {"stages": [{"task": ["a", "b", "c"], "steps": 9}], "eval": asked}
    )
    run_log.RunLog(tmp_path).evals([eval_row(1, task, 0.5) for task in ("a", "c", "facts")])
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


def test_a_folder_that_is_not_a_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not a run: it has no config.json"):
        summary.load_run_tables(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="expected a run's config with stages"):
        summary.load_run_tables(tmp_path)


def test_scores_are_those_of_scorers_without_kl():
    metrics = ("accuracy", "mme/perception", "accuracy_mini", "kl_base", "kl_base_sequence")
    rows = [eval_row(0, "a", 0.5, metric) for metric in metrics]
    found = [score["metric"] for score in summary.collect_scores(rows, 1)]
    assert found == ["accuracy", "mme/perception"]


def test_scores_before_the_first_stage_are_those_of_the_base_model_only():
    rows = [eval_row(0, "a", 0.5)]
    (score,) = summary.collect_scores(rows, 0)
    assert (score["base"], score["final"]) == (0.5, None)
