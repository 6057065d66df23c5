"""What goes wrong in real runs: one clear line, exit code 2, and nothing that was saved is lost."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import device_fixtures
import pytest
import run_helpers
from device_fixtures import devices, said  # noqa: F401

from cptjax.continual import driver, workdir
from cptjax.continual.checkpoint import Checkpoints
from cptjax.data.mixture import Mixture

KILL = int(signal.SIGKILL)
TINY = {
    "model": run_helpers.TEXT,
    "steps": 4,
    "stages": ({"task": "facts", "steps": 4},),
    "eval": {"before": False, "limit": 4},
}


def go(workdir, start_over=False, **sections):
    return driver.run(run_helpers.config("sft", **{**TINY, **sections}), workdir, start_over)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One stage of facts, uninterrupted, that keeps its checkpoint inside the stage; read only."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        device_fixtures.see(patch, 1)
        patch.setattr(Checkpoints, "remove_steps", lambda *_: None)
        go(folder)
    return folder


@pytest.mark.parametrize("gone", ["stages", "steps"])
def test_a_truncated_newest_checkpoint_is_skipped_with_a_warning(
    whole, tmp_path, devices, said, capsys, gone
):
    folder = shutil.copytree(whole, tmp_path / "run")
    number = 10**6 + (4 if gone == "stages" else 2)
    (folder / "progress.json").unlink()  # killed before the evaluation was recorded
    if gone == "steps":  # killed in the stage, and the newest step checkpoint is the only one
        shutil.rmtree(folder / "checkpoints" / "stages" / str(10**6 + 4))
    for path in (
        p for p in (folder / "checkpoints" / gone / str(number)).rglob("*") if p.is_file()
    ):
        os.truncate(path, path.stat().st_size // 3)
    if gone == "stages":  # its results are not cut without being asked
        with pytest.raises(ValueError, match="checkpoint stages of stage 1, step 4 .*--start_over"):
            go(folder)
    go(folder, start_over=gone == "stages")
    err = capsys.readouterr().err
    assert f"warning: checkpoint {gone} of stage 1" in err and "cannot be read" in err
    assert ("continuing from step 2 of stage 1" in err) == (gone == "stages")
    run_helpers.assert_same(run_helpers.run_state(whole), run_helpers.run_state(folder))


def test_another_config_is_refused_and_its_differences_are_named(whole, tmp_path, devices):
    folder = shutil.copytree(whole, tmp_path / "run")
    files = lambda: [p for p in folder.rglob("*") if p.is_file() and p.name != "run.log"]
    before = {p: p.read_bytes() for p in files()}
    with pytest.raises(
        ValueError,
        match="was started with another config: train.lr: 0.01 -> 0.5. .*--config.allow_change=True",
    ):
        go(folder, train={"lr": 0.5})
    assert {p: p.read_bytes() for p in files()} == before
    go(folder, train={"lr": 0.5}, allow_change=True)  # finished: only the config is another
    assert (
        "was finished before these changes, which config.json now has: train.lr: 0.01 -> 0.5"
        in (folder / "run.log").read_text()
    )
    assert json.loads((folder / "config.json").read_text())["train"]["lr"] == 0.5
    run_helpers.assert_same(run_helpers.run_state(whole), run_helpers.run_state(folder))


def test_another_config_is_refused_by_the_record_of_a_checkpoint(whole, tmp_path, devices):
    """Without config.json, the record of the checkpoint decides, and no config.json is written."""
    folder = shutil.copytree(whole, tmp_path / "run")
    (folder / "config.json").unlink()
    with pytest.raises(
        ValueError, match="checkpoint of stage 1, step 4 was saved with another config"
    ):
        go(folder, train={"lr": 0.5})
    assert not (folder / "config.json").exists()
    go(folder)
    run_helpers.assert_same(run_helpers.run_state(whole), run_helpers.run_state(folder))


def test_another_optimizer_is_refused_and_no_checkpoint_is_moved(whole, tmp_path, devices):
    folder = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(folder / "checkpoints" / "stages" / str(10**6 + 4))
    (folder / "progress.json").unlink()
    with pytest.raises(
        ValueError,
        match="checkpoint steps of stage 1, step 2 does not fit: state.opt_state.*change the config back",
    ):
        go(folder, train={"optimizer": "adafactor"}, allow_change=True)
    assert not (folder / "checkpoints" / "damaged").exists()
    assert json.loads((folder / "config.json").read_text())["train"]["optimizer"] == "adamw"


def test_a_second_process_on_a_workdir_is_refused(whole, tmp_path, devices):
    folder = shutil.copytree(whole, tmp_path / "run")
    with (
        workdir.lock_workdir(folder),
        pytest.raises(
            ValueError,
            match=f"run is in use by process {os.getpid()} on .*; wait for it, or stop it",
        ),
    ):
        go(folder)
    holder = subprocess.Popen(["flock", "-F", str(folder / ".lock"), "sleep", "60"])
    try:
        while (
            subprocess.run(["flock", "-n", str(folder / ".lock"), "true"], check=False).returncode
            == 0
        ):
            time.sleep(0.01)
        with pytest.raises(ValueError, match="is in use by another process"):
            go(folder)
    finally:
        holder.kill()
        holder.wait()
    run_helpers.assert_same(run_helpers.run_state(whole), run_helpers.run_state(folder))


def test_the_address_of_another_service_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for address in ("s3://bucket/run", Path("s3://bucket/run")):
        with pytest.raises(ValueError, match="--workdir=.*bucket/run: expected a folder on a disk"):
            go(address)
    assert not list(tmp_path.iterdir())


def test_a_run_continues_on_another_mesh(whole, tmp_path, devices):
    """Killed in the stage on one device, finished on four."""
    folder = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(folder / "checkpoints" / "stages" / str(10**6 + 4))
    (folder / "progress.json").unlink()
    devices(4)
    go(folder)
    one, four = run_helpers.run_state(whole), run_helpers.run_state(folder)
    assert one["matrix.csv"] == four["matrix.csv"] and one.keys() == four.keys()
    pairs = [
        (a, b)
        for a, b in zip(one["metrics.jsonl"], four["metrics.jsonl"], strict=True)
        if "loss" in a
    ]
    assert (
        all(a["loss"] == pytest.approx(b["loss"], rel=1e-4) for a, b in pairs) and len(pairs) == 4
    )


@pytest.mark.slow
def test_a_teacher_that_follows_is_restored_in_float32(tmp_path, devices):
    """Killed in a stage of SDFT: the teacher that follows in float32 is restored, while the weights
    are used in bfloat16.
    """
    changes = {
        "model": run_helpers.TEXT | {"compute_dtype": "bfloat16"},
        "rollout": {"group": 1},
        "method": {"distill": {"ema": 0.3}},
    }
    c = run_helpers.config("sdft", **{**TINY, **changes})
    driver.run(c, tmp_path / "whole")
    folder = shutil.copytree(tmp_path / "whole", tmp_path / "run")
    shutil.rmtree(folder / "checkpoints" / "stages" / str(10**6 + 4))
    (folder / "progress.json").unlink()
    driver.run(c, folder)
    run_helpers.assert_same(
        run_helpers.run_state(tmp_path / "whole"), run_helpers.run_state(folder)
    )


def test_losses_that_are_not_finite_stop_the_run(tmp_path, devices):
    with pytest.raises(
        ValueError,
        match="3 updates in a row had a gradient or loss that is not finite, .*Lower train.lr",
    ):
        go(
            tmp_path,
            train={"lr": 1e38, "clip": None, "max_skipped": 3},
            stages=({"task": "facts", "steps": 9},),
        )
    saved = sorted(
        int(p.name) - 10**6
        for p in (tmp_path / "checkpoints" / "steps").iterdir()
        if p.name.isdigit()
    )
    assert saved == [2]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in lines] == [0, 1, 1] and lines[2]["loss"] is None


REWARD = """
import time
def reward(completion, answer, **columns):
    if columns["n"] == {}:
        {}
    return float(len(completion) % 2)
"""


@pytest.mark.parametrize(
    "body, line",
    [
        (
            "raise RuntimeError('no luck')",
            "failed on row .*: RuntimeError: no luck .*rewards.on_error=zero",
        ),
        ("time.sleep(60)", "failed on row .*: no result within 1 s"),
        ("return float('nan')", "failed on row .*nan.*; correct the function"),
    ],
    ids=["raises", "hangs", "nan"],
)
def test_a_reward_that_fails_stops_the_run_with_the_steps_saved(tmp_path, devices, body, line):
    (tmp_path / "mine.py").write_text(
        REWARD.format(Mixture((8,), 1, stage=1).rows(4)[0].index, body)
    )  # the fifth step's
    rows = [{"prompt": f"say {i}", "answer": str(i), "n": i} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    mine = {
        "train": str(tmp_path / "rows.jsonl"),
        "test": str(tmp_path / "rows.jsonl"),
        "reward": f"{tmp_path / 'mine.py'}:reward",
    }
    changes = {
        "tasks": {"mine": mine},
        "stages": ({"task": "mine", "steps": 9},),
        "rewards": {"timeout": 1.0, "processes": 1},
        "checkpoint": {"every": 1},
        "data": {"limit": None},
        "train": {"batch": 1},
    }
    c = run_helpers.config("grpo", **{**TINY, **changes})
    with pytest.raises(ValueError, match=line):
        driver.run(c, tmp_path / "run")
    steps = [
        json.loads(x)["step"] for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    saved = sorted(
        int(p.name) - 10**6
        for p in (tmp_path / "run" / "checkpoints" / "steps").iterdir()
        if p.name.isdigit()
    )
    assert steps == [1, 2, 3, 4] and saved == [3, 4]
    # with errors worth 0 the same run goes on from there
    c.rewards.on_error, c.allow_change = "zero", True
    driver.run(c, tmp_path / "run")
    steps = [
        json.loads(x)["step"]
        for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        if "event" not in x
    ]
    assert steps == list(range(1, 10))


def error_line(metrics: dict) -> str:
    assert metrics["code"] == 2, metrics
    lines = [line for line in metrics["said"].splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in metrics["said"], metrics["said"]
    return lines[0]


def test_a_workdir_that_cannot_be_created_ends_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    (metrics,) = run_helpers.run_processes(
        {
            "method": "sft",
            "workdir": str(tmp_path / "file" / "run"),
            "sections": TINY,
            "signals": [(KILL, None)],
            "log": str(tmp_path / "log"),
        }
    )
    assert str(tmp_path / "file" / "run") in error_line(metrics)


@contextlib.contextmanager
def mounted(folder: Path, options: str):
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "small", str(folder)],
        capture_output=True,
        check=False,
    )
    if done.returncode:
        pytest.skip("mounting a disk is not permitted")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def small_disk(whole, tmp_path):
    """A disk with room for half of what a run's checkpoints take."""
    size = sum(p.stat().st_size for p in (whole / "checkpoints").rglob("*") if p.is_file()) // 2
    with mounted(tmp_path / "disk", f"size={size}") as folder:
        yield folder


def test_a_read_only_disk_ends_in_one_line(tmp_path):
    """Read only, which stops even root: a folder that cannot be made, and one that is there."""
    with mounted(tmp_path / "disk", "ro") as folder:
        places = (folder, folder / "run")
        plan = {
            "method": "sft",
            "sections": TINY,
            "together": [(str(place), "") for place in places],
            "log": str(tmp_path / "log"),
        }
        for place, metrics in zip(places, run_helpers.run_processes(plan), strict=True):
            assert f"Read-only file system: '{place}" in error_line(metrics)


def test_a_full_disk_ends_in_one_line_and_the_run_continues_later(whole, small_disk, tmp_path):
    """Without space for a second checkpoint the run ends in one line; with space it continues."""
    plan = {
        "method": "sft",
        "workdir": str(small_disk / "run"),
        "sections": TINY,
        "signals": [(KILL, None)],
        "log": str(tmp_path / "log"),
    }
    (metrics,) = run_helpers.run_processes(plan)
    line = error_line(metrics)
    assert "space" in line and "run the same command again" in line
    moved = shutil.copytree(small_disk / "run", tmp_path / "run")
    (metrics,) = run_helpers.run_processes({**plan, "workdir": str(moved)})
    assert metrics["code"] == 0, metrics["said"]
    run_helpers.assert_same(run_helpers.run_state(whole), run_helpers.run_state(moved))
