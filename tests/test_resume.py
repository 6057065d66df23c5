"""A run that is killed at any instant and started again ends in the same bits."""

import os
import shutil
import signal

import killed_runs
import pytest
import run_helpers
from device_fixtures import devices  # noqa: F401
from run_workers import Workers

from cptjax.common import signals
from cptjax.continual import driver, resume, stage_end
from cptjax.data import device_batches

KILLS = 15 if os.environ.get("CPTJAX_LONG") else 3  # of each run; test_multiprocess has as many
SFT = {
    "steps": 5,
    "train": {"reset_optimizer": False},
    "method": {"penalty": {"name": "ewc", "coef": 1.0, "samples": 4}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def killed(folder):
    """A run whose process is killed with SIGKILL in its second stage."""
    first = Workers(1, folder / "first")
    workdir = folder / "killed"
    first.start(
        killed_runs.job(folder, "ewc") | {"workdir": str(workdir), "stop": 150, "die": True}
    )
    assert first.ended() == [-signal.SIGKILL]
    assert run_helpers.saved_stages(workdir) == [10**6 + 2]
    return workdir


@pytest.fixture(scope="module")
def worker(folder, killed):
    """The process of all other runs; the first one continues the run that was killed."""
    worker = Workers(1, folder / "worker")
    job = killed_runs.job(folder, "ewc")
    assert not worker.run(job | {"workdir": str(killed)}).refused
    yield worker
    worker.close()


@pytest.fixture(scope="module")
def whole(folder, worker):
    """Return the job, the workdir and the file events of an undisturbed run; each is made once."""
    made = {}

    def get(name: str):
        if name not in made:
            job = killed_runs.job(folder, name)
            workdir = folder / name / "whole"
            workdir.parent.mkdir()
            outcome = worker.run(job | {"workdir": str(workdir)})
            assert not outcome.refused, outcome.said
            made[name] = job, workdir, outcome.events
        return made[name]

    return get


def test_a_process_that_is_killed_is_continued_by_another_one(whole, killed):
    run_helpers.assert_same(run_helpers.run_state(whole("ewc")[1]), run_helpers.run_state(killed))


@pytest.mark.parametrize("name", ["ewc", "filter"])
def test_kills_and_damaged_files_change_no_result(whole, worker, name):
    """The run ends in the same bits, or refuses in one line that names the damaged file."""
    job, workdir, events = whole(name)
    run = killed_runs.KilledRun(worker, job, workdir, events, seed=KILLS)
    run.kill(KILLS)
    print(dict(run.outcomes))
    assert run.outcomes["killed"] == KILLS and run.outcomes["ended"]


def test_sigterm_saves_and_says_how_to_continue(whole, worker, tmp_path):
    job, workdir, events = whole("ewc")
    job |= {"workdir": str(tmp_path / "run")}
    before = worker.log(0).count("stopped by SIGTERM")
    for part in (8, 4, 4, 4):
        outcome = worker.run(job | {"stop": events[0] // part}, copy_to=tmp_path / "copy")
        assert outcome.killed
        shutil.rmtree(tmp_path / "copy")
    said = [line for line in worker.log(0).splitlines() if "stopped by SIGTERM" in line][before:]
    assert len(said) == 4 and all("run the same command again to go on" in line for line in said)
    assert any(", saved; " in line for line in said)
    assert not worker.run(job).refused
    run_helpers.assert_same(run_helpers.run_state(workdir), run_helpers.run_state(tmp_path / "run"))


def test_a_finished_run_does_not_change_when_started_again(whole, worker):
    job, workdir, _ = whole("ewc")
    before = run_helpers.run_state(workdir)
    assert not worker.run(job | {"workdir": str(workdir)}).refused
    assert f"{workdir}: finished, at the end of stage 3" in worker.log(0)
    run_helpers.assert_same(before, run_helpers.run_state(workdir))


def test_every_response_is_counted_in_one_line_of_metrics(whole):
    """Lines hold what was spent since the last, whatever log.every: every answer of every step is
    in one of them.
    """
    lines = run_helpers.metrics_lines(whole("ewc")[1])
    assert [(x["stage"], x["step"], x["rollouts"]) for x in lines if x["stage"] == 3] == [
        (3, 3, 24),
        (3, 4, 8),
    ]
    evaluations = [
        line["rollouts"]
        for line in run_helpers.metrics_lines(whole("ewc")[1], events=True)
        if line["event"] == "evaluate"
    ]
    # Four rows of two tasks, with and without the forced prefix, and of one task at a time; four
    # rows of two tasks in the second and the third stage.
    assert sorted(evaluations) == sorted(4 * 2 * [8] + 2 * [8])


def test_sigterm_stops_an_estimate_of_the_fisher_between_two_rows(tmp_path, monkeypatch, devices):
    """The stage's last step is saved, and the next start only repeats the estimate."""
    short = {"stages": ({"task": "facts", "steps": 2},), "eval": {"before": False, "limit": 2}}
    short["model"] = run_helpers.TEXT
    c, estimated, agreed, answers = (
        run_helpers.config("sft", **SFT, **short),
        [],
        signals.StopSignals.agreed,
        device_batches.conversation_batch,
    )
    monkeypatch.setattr(
        stage_end,
        "conversation_batch",
        lambda *row, **more: estimated.append(row) or answers(*row, **more),
    )
    with monkeypatch.context() as patched, pytest.raises(signals.Preempted):
        patched.setattr(
            signals.StopSignals, "agreed", lambda self: len(estimated) == 2 or agreed(self)
        )
        driver.run(c, tmp_path / "run")
    assert len(estimated) == 2 and not list(
        (tmp_path / "run" / "checkpoints" / "stages").glob("1*")
    )
    said = (tmp_path / "run" / "metrics.jsonl").read_text()
    driver.run(c, tmp_path / "run")
    assert len(estimated) == 2 + 4 and (tmp_path / "run" / "metrics.jsonl").read_text().startswith(
        said
    )
    driver.run(c, tmp_path / "whole")
    run_helpers.assert_same(
        run_helpers.run_state(tmp_path / "whole"), run_helpers.run_state(tmp_path / "run")
    )


@pytest.mark.slow
def test_responses_that_are_sampled_ahead_are_saved(tmp_path, monkeypatch, devices):
    """A checkpoint holds the responses of weights that it does not hold."""
    c = run_helpers.config(
        "grpo",
        model=run_helpers.TEXT,
        stages=({"task": "facts", "steps": 4},),
        method={"ratio": "token", "updates_per_batch": 2},
        rollout={"ahead": 1},
        eval={"before": False, "limit": 2},
    )
    agreed, saved = signals.StopSignals.agreed, []
    save = resume.rollouts.rollouts_to_arrays
    monkeypatch.setattr(
        resume.rollouts, "rollouts_to_arrays", lambda *a: saved.append(a[1]) or save(*a)
    )
    with monkeypatch.context() as patched, pytest.raises(signals.Preempted):
        patched.setattr(signals.StopSignals, "agreed", lambda self: len(saved) == 1 or agreed(self))
        driver.run(c, tmp_path / "run")
    driver.run(c, tmp_path / "run")
    driver.run(c, tmp_path / "whole")
    run_helpers.assert_same(
        run_helpers.run_state(tmp_path / "whole"), run_helpers.run_state(tmp_path / "run")
    )
