"""A run that goes on can be watched and profiled, and says at its end how its time was spent."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import run_helpers

from cptjax.common.profiler import StepProfiler
from cptjax.continual import driver, live_report
from cptjax.evaluation import report

SECTIONS = {
    "model": run_helpers.TEXT,
    "stages": ({"task": "facts", "steps": 3},),
    "eval": {"limit": 4, "batch": 4, "every": 2, "mini": 4, "tasks": "facts"},
    "log": {"report_minutes": 1e-9},
}


def run_watched(folder: Path) -> None:
    """A run of which each page is kept, and whose second step is profiled."""
    pages, write = [], report.write_run_report

    def keep_page(tables, summary, is_live=False):
        path = write(tables, summary, is_live)
        pages.append((is_live, path.read_text()))
        return path

    live_report.LEAST_PAUSE, report.write_run_report = 0, keep_page
    driver.run(run_helpers.config("grpo", **SECTIONS), folder / "run", profile="1:2:1")
    (folder / "pages.json").write_text(json.dumps(pages))


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """The run in a process of its own: where libtpu is loaded, a profile without a TPU crashes."""
    folder = tmp_path_factory.mktemp("live")
    code = "import pathlib, sys, test_live_report as t; t.run_watched(pathlib.Path(sys.argv[1]))"
    here = Path(__file__).parent
    path = os.pathsep.join(map(str, (here, here.parent, here.parents[1])))
    subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        check=True,
        env=run_helpers.environment(PYTHONPATH=path),
        capture_output=True,
    )
    return folder / "run", json.loads((folder / "pages.json").read_text())


def test_the_page_of_a_running_run_loads_itself_again_until_it_is_finished(watched):
    _, pages = watched
    assert [is_live for is_live, _ in pages[:-2]] == [True] * (len(pages) - 2)
    # After the base model, after it and its only task, after each step but the last.
    assert len(pages) >= 5 and not pages[-1][0] and not pages[-2][0]
    assert all((' http-equiv="refresh"' in page) == is_live for is_live, page in pages)


def test_the_summary_says_how_the_time_was_spent(watched):
    workdir, pages = watched
    found = json.loads((workdir / "summary.json").read_text())["goodput"]
    assert found["sessions"] == 1 and sum(found["shares"].values()) == pytest.approx(1)
    for work in ("training", "sampling", "evaluating", "compiling", "saving"):
        assert found["shares"][work] > 0, work
    assert "in 1 session, those that were killed included:" in pages[-1][1]
    # The report's seconds of the steps are not larger than the time of the session.
    cost = json.loads((workdir / "summary.json").read_text())["cost"]["seconds"]
    assert cost < found["seconds"]


def test_the_profile_has_the_phases_of_the_steps_that_it_names(watched):
    workdir, _ = watched
    (trace,) = workdir.glob("profile/plugins/profile/*/*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(trace)).planes
    names = [event.name for plane in planes for line in plane.lines for event in line.events]
    assert {"step", "rollout", "rewards", "logps", "update"} <= {*names}
    assert sum(name == "step" for name in names) == 1


@pytest.mark.parametrize("steps", ["1", "1:2", "0:1:1", "1:0:1", "1:1:0", "a:1:1", "2:1:1"])
def test_a_wrong_profile_is_refused(tmp_path, steps):
    with pytest.raises(ValueError, match=f"--profile={steps}: expected"):
        StepProfiler(steps, tmp_path, stages=1)


def test_a_report_that_cannot_be_written_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise FileNotFoundError(2, "No such file or directory", "checkpoints/steps/1000092")

    monkeypatch.setattr(live_report.summary, "load_run_tables", fail)
    monkeypatch.setattr(live_report, "LEAST_PAUSE", 0)
    watched = live_report.LiveReport(tmp_path, 1e-9)
    watched.write_if_due()
    assert "warning: the report is not written: FileNotFoundError" in capsys.readouterr().err
    due = watched.due
    watched.write_if_due()
    assert watched.due > due  # it is tried again
