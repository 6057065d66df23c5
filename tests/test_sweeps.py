"""Several processes share the workdir of a sweep; single stages are run from the base model."""

import json

import numpy as np
import pytest
import run_helpers
from device_fixtures import devices  # noqa: F401

from cptjax.continual import driver, reevaluate, workdir

SWEEP = {
    "prestage": {"stages": ({"task": "facts", "steps": 1},)},
    "sweep": {"train": {"lr": (0.01, 0.001)}},
    "stages": ({"task": "facts", "steps": 2},),
    "eval": {"limit": 4, "batch": 4, "before": False},
}
RUNS = ("lr=0.01", "lr=0.001")


def test_two_processes_with_parts_of_a_sweep_equal_one(tmp_path):
    """They need one base model: one makes it, the other waits. Both write the report on all."""
    together = [("one", ""), ("two", RUNS[0]), ("two", RUNS[1])]
    together = [(str(tmp_path / folder), only) for folder, only in together]
    plan = {"method": "sft", "sections": SWEEP, "together": together}
    ended = run_helpers.run_processes(plan)
    assert [process["code"] for process in ended] == [0, 0, 0], ended
    said = [process["said"] for process in ended[1:]]
    waited = [
        f"waiting for {tmp_path / 'two' / 'base'}, which is in use by process" in s for s in said
    ]
    assert sorted(waited) == [False, True]
    for name in ("base", *RUNS):
        one, two = tmp_path / "one" / name, tmp_path / "two" / name
        run_helpers.assert_same(run_helpers.run_state(one), run_helpers.run_state(two))
        assert len(json.loads((two / "versions.json").read_text())["starts"]) == 1
        assert "done:" in (two / "run.log").read_text()
    for name in ("report.json", "runs.json"):
        assert (tmp_path / "one" / name).read_text() == (tmp_path / "two" / name).read_text()
    assert json.loads((tmp_path / "two" / "runs.json").read_text()) == list(RUNS)
    page = (tmp_path / "two" / "report.html").read_text()
    assert all(name in page for name in RUNS) and "not started" not in page
    losses = [run_helpers.metrics_lines(tmp_path / "two" / name)[-1]["loss"] for name in RUNS]
    assert losses[0] != losses[1]


def test_a_part_that_another_process_runs_is_refused_before_anything_is_run(tmp_path, devices):
    devices(1)
    c = run_helpers.config("sft", **SWEEP)
    with (
        workdir.lock_workdir(tmp_path / RUNS[1]),
        pytest.raises(ValueError, match=f"{RUNS[1]} is in use by process .*; wait for it, or stop"),
    ):
        driver.run(c, tmp_path)
    assert not list(tmp_path.glob("**/config.json"))
    with pytest.raises(ValueError, match="--only=lr=0.1: no run is named 'lr=0.1'; did you mean"):
        driver.run(c, tmp_path, only="lr=0.1")


def test_plasticity_compares_with_the_stage_trained_from_the_base_model(tmp_path, devices):
    devices(1)
    stages = run_helpers.TEXT_STAGES
    c, matrix = run_helpers.run_quickly(tmp_path, stages=stages, model=run_helpers.TEXT, fresh=True)
    assert matrix.shape == (3, 2)
    fresh = tmp_path / "fresh" / "stage2"
    accuracy = {r["task"]: float(r["value"]) for r in run_helpers.read_evals(fresh)}
    assert accuracy.keys() == {"words"}
    found = json.loads((tmp_path / "summary.json").read_text())["metrics"]["plasticity"]
    assert found["value"] == pytest.approx(matrix[2, 1] - accuracy["words"])
    assert "Plasticity</th>" in (tmp_path / "report.html").read_text()
    assert reevaluate.select_run(c, fresh).eval.tasks == "words"
    assert np.array_equal(driver.run(c, tmp_path), matrix)
    assert json.loads((tmp_path / "summary.json").read_text())["metrics"]["plasticity"] == found
