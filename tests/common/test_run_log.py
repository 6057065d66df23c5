"""Sums with counts, and files that a kill can not spoil."""

import json
import math
import os
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from cptjax.common import console, files, run_log, trackers
from cptjax.common.files import LineFile, read_jsonl
from cptjax.common.run_log import RunLog
from cptjax.types import Mean, add_means

ROW = {
    "stage": 0,
    "stage_name": "base",
    "step": 0,
    "task": "a,b",
    "metric": "accuracy",
    "value": 0.5,
    "n": 4,
    "stderr": 0.25,
    "scorer": "exact",
    "template": "cot",
    "pixels": "1-2",
    "decoding": "T=0",
}


def test_means_of_unequal_micro_batches_add_up_to_the_whole():
    values = np.arange(10.0)
    whole = Mean(values.sum(), len(values))
    parts = [{"x": Mean(p.sum(), len(p))} for p in (values[:1], values[1:4], values[4:])]
    assert add_means(parts)["x"] == whole == sum(p["x"] for p in parts)
    assert whole.value == 4.5 and math.isnan(Mean(0, 0).value)


def test_a_resumed_log_equals_one_that_was_never_killed(tmp_path):
    straight, killed = RunLog(tmp_path / "a"), RunLog(tmp_path / "b")
    for log in (straight, killed):
        log.step(1, 1, {"loss": Mean(3.0, 2)})
        log.evals([ROW])
        log.rollouts(1, [{"prompt": "é\u2028", "reward": np.float32(1)}])
    stored = json.loads(json.dumps(killed.positions()))
    killed.step(1, 2, {"loss": 0.1})
    killed.rollouts(2, [{"prompt": "written after the checkpoint"}])
    killed.close()
    with (tmp_path / "b/metrics.jsonl").open("a") as file:
        file.write('{"stage": 1, "st')  # the kill falls into a write
    resumed = RunLog(tmp_path / "b")
    resumed.rewind(stored)
    for log in (straight, resumed):
        log.step(1, 2, {"loss": float("nan")})
        log.evals([ROW | {"stage": 1}])
    files = sorted(
        p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file()
    )
    assert files == sorted(
        p.relative_to(tmp_path / "b") for p in (tmp_path / "b").rglob("*") if p.is_file()
    )
    assert all(
        (tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files
    )
    assert read_jsonl(tmp_path / "b/rollouts/stage1.jsonl") == [
        {"prompt": "é\u2028", "reward": 1.0}
    ]
    assert read_jsonl(tmp_path / "b/metrics.jsonl")[1] == {"stage": 1, "step": 2, "loss": None}


def test_rewind_to_nothing_leaves_no_file(tmp_path):
    log = RunLog(tmp_path)
    log.step(1, 1, {})
    log.rewind({})
    assert not (tmp_path / "metrics.jsonl").exists()
    log.evals([ROW])
    header, line = (tmp_path / "evals.csv").read_text().splitlines()
    assert (
        header == "stage,stage_name,step,task,metric,value,n,stderr,scorer,template,pixels,decoding"
    )
    assert line == '0,base,0,"a,b",accuracy,0.5,4,0.25,exact,cot,1-2,T=0'
    assert run_log.read_evals(tmp_path / "evals.csv") == [ROW]


def test_the_share_of_steps_that_waited_for_data():
    line = lambda stage, waited: {
        "stage": stage,
        "seconds/data": waited,
        "seconds/batch": 0.5,
        "seconds/update": 1.5,
    }
    lines = [
        line(1, 1.9),
        line(1, 0.1),
        {"stage": 1, "event": "evaluate", "seconds": 9},
        line(1, 0.1),
        line(2, 1.9),
    ]
    assert run_log.data_wait_share(lines) == pytest.approx(
        0.2 / 4
    )  # without either stage's first step
    assert run_log.data_wait_share(lines[-1:]) is None


def test_a_file_shorter_than_the_checkpoint_says_is_refused(tmp_path):
    lines = LineFile(tmp_path / "x.jsonl")
    lines.append({"a": 1})
    with pytest.raises(ValueError, match=r"expects at least 99 bytes, the file has 9"):
        lines.truncate(99)


def test_half_a_line_is_cut_when_the_file_is_opened(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n{"a": ')
    lines = LineFile(tmp_path / "x.jsonl")
    lines.append({"a": 2})
    assert [row["a"] for row in files.read_jsonl(tmp_path / "x.jsonl")] == [1, 2]


def test_a_row_with_a_wrong_column_is_refused(tmp_path):
    with pytest.raises(ValueError, match="needs exactly stage,"):
        RunLog(tmp_path).evals([{**ROW, "oops": 1}])


def test_replacing_a_file_keeps_the_old_one_when_writing_fails(tmp_path, monkeypatch):
    files.write_json(tmp_path / "s.json", {"x": math.inf, "y": np.arange(2)})
    assert json.loads((tmp_path / "s.json").read_text()) == {"x": None, "y": [0, 1]}
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space"):
        files.write_json(tmp_path / "s.json", {})
    assert [p.name for p in tmp_path.iterdir()] == ["s.json"] and "[" in (
        tmp_path / "s.json"
    ).read_text()


def tracked(tmp_path, **log):
    return RunLog(
        tmp_path,
        trackers.open_trackers(
            tmp_path, {"name": "run", "log": {"tensorboard": False, "wandb": ""} | log}
        ),
    )


@pytest.mark.parametrize(
    "options, package", [({"tensorboard": True}, "tensorboardX"), ({"wandb": "p"}, "wandb")]
)
def test_a_tracker_whose_package_is_missing_says_so(tmp_path, monkeypatch, options, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=f"needs {package}: pip install"):
        tracked(tmp_path, **options)


def test_trackers_get_training_and_evaluations_and_are_closed(tmp_path, monkeypatch):
    points, opened, sent = [], [], []
    writer = SimpleNamespace(
        add_scalar=lambda *point: points.append(point), close=lambda: points.append("closed")
    )
    run = SimpleNamespace(log=sent.append, finish=lambda: sent.append("finished"))
    monkeypatch.setitem(
        sys.modules, "tensorboardX", SimpleNamespace(SummaryWriter=lambda folder: writer)
    )
    monkeypatch.setitem(
        sys.modules, "wandb", SimpleNamespace(init=lambda **about: opened.append(about) or run)
    )
    for folder in ("a", "b", "a"):  # two runs in one process, and the first again
        log = tracked(tmp_path / folder, tensorboard=True, wandb="project")
        log.step(2, 7, {"loss": 0.5, "event": "said"})
        log.evals(
            [
                ROW | {"stage": 2, "step": 9, "task": "a"},
                ROW | {"stage": 2, "step": 5, "task": "a", "metric": "accuracy_mini"},
            ]
        )
        log.close()
    metrics = {
        "stage2/loss": (0.5, 7),
        "eval/a/accuracy/cot": (0.5, 2),
        "stage2/eval/a/accuracy_mini/cot": (0.5, 5),
    }
    assert points == 3 * [*((name, *point) for name, point in metrics.items()), "closed"]
    assert (
        sent[1] == {"stage": 2, "step": 9, "eval/a/accuracy/cot": 0.5}
        and sent[3] == "finished"
        and len(sent) == 12
    )
    ids = [about["id"] for about in opened]
    assert ids[0] == ids[2] != ids[1] and all(
        about["resume"] == "allow" and about["project"] == "project" for about in opened
    )


def test_cost_adds_up_by_stage_and_kind_of_work(tmp_path):
    log = RunLog(tmp_path)
    log.step(1, 1, {"seconds": 2.0, "tokens": 10, "rollouts": 4})
    log.step(1, 2, {"seconds": 3.0, "tokens": 10, "rollouts": 4})
    log.step(1, 2, {"event": "evaluate", "seconds": 1.0})
    log.step(2, 1, {"seconds": 4.0, "trained": 50})
    cost = run_log.summarise_cost(files.read_jsonl(tmp_path / "metrics.jsonl"), tmp_path)
    assert (cost["seconds"], cost["tokens"], cost["rollouts"], cost["trained"]) == (10.0, 20, 8, 50)
    assert {work: spent["seconds"] for work, spent in cost["works"].items()} == {
        "evaluate": 1.0,
        "train": 9.0,
    }
    assert [(p["work"], p["seconds"]) for p in cost["parts"]] == [
        ("evaluate", 1.0),
        ("train", 5.0),
        ("train", 4.0),
    ]


def test_plain_progress_has_counts_eta_and_values(monkeypatch, capsys):
    monkeypatch.setattr(console, "_mode", "plain")
    monkeypatch.setattr(console, "PLAIN_EVERY", 0.0)
    with console.progress_bar("evaluate scienceqa", 4) as bar:
        bar.advance(2, accuracy=0.51239)
    with console.show_waiting("compiling"):
        pass
    err = capsys.readouterr().err
    assert (
        "evaluate scienceqa  2/4 (50%)  ETA 0s  accuracy 0.5124" in err
        and "compiling: took 0s" in err
    )


def test_a_plain_bar_speaks_while_its_first_step_compiles_and_no_longer(monkeypatch, capsys):
    monkeypatch.setattr(console, "_mode", "plain")
    monkeypatch.setattr(console, "PLAIN_EVERY", 0.02)
    with console.progress_bar("stage 1", 4) as bar:
        bar.advance(0, accuracy=0.5)  # no step
        time.sleep(0.1)
        assert "stage 1  0/4 (a first step compiles)" in capsys.readouterr().err
        bar.advance(1)
        capsys.readouterr()
        time.sleep(0.1)
        assert capsys.readouterr().err == ""
    with console.progress_bar("stage 2", 4, done=1):
        time.sleep(0.1)
    said = capsys.readouterr().err.splitlines()
    assert len(said) >= 3 and said[-2] == "stage 2  1/4 (a first step compiles)  0s so far"
    assert not [t for t in threading.enumerate() if t.name.endswith("(_remind)")]


def test_live_bars_nest_and_silence_is_silent(monkeypatch, capsys):
    monkeypatch.setattr(console, "_mode", "live")
    with console.progress_bar("stage 1 [colour]", 2) as outer, console.show_waiting("saving"):
        outer.advance(1, loss=1.0)
        console.print_warning("disk is [nearly] full")
    assert console._live is None and "disk is [nearly] full" in capsys.readouterr().err
    monkeypatch.setattr(console, "_mode", "silent")
    with console.progress_bar("x", 1) as bar:
        bar.advance()
    console.print_message("nothing")
    assert capsys.readouterr().err == ""


def test_eta_of_a_resumed_bar_counts_only_what_this_process_did():
    bar = console.ProgressBar("train", 100, done=90)
    bar.started -= 10
    bar.advance(5)
    assert bar.eta() == pytest.approx(10, rel=0.01)
