"""The append-only files of a run: a resumed log equals an uninterrupted one; costs add up."""

import json

import numpy as np
import pytest
from eval_rows import EVAL_ROW

from cptjax.common import run_log
from cptjax.common.files import read_jsonl
from cptjax.common.run_log import RunLog
from cptjax.types import Mean


def test_a_resumed_log_equals_one_that_was_never_killed(tmp_path):
    straight, killed = RunLog(tmp_path / "a"), RunLog(tmp_path / "b")
    for log in (straight, killed):
        log.step(1, 1, {"loss": Mean(3.0, 2)})
        log.evals([EVAL_ROW])
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
        log.evals([EVAL_ROW | {"stage": 1}])
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
    log.evals([EVAL_ROW])
    header, line = (tmp_path / "evals.csv").read_text().splitlines()
    assert (
        header == "stage,stage_name,step,task,metric,value,n,stderr,scorer,template,pixels,decoding"
    )
    assert line == '0,base,0,"a,b",accuracy,0.5,4,0.25,exact,cot,1-2,T=0'
    assert run_log.read_evals(tmp_path / "evals.csv") == [EVAL_ROW]


def test_the_share_of_step_time_that_waited_for_data():
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


def test_a_row_with_a_wrong_column_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected a row with exactly stage,"):
        RunLog(tmp_path).evals([{**EVAL_ROW, "oops": 1}])


def test_cost_adds_up_by_stage_and_kind_of_work(tmp_path):
    log = RunLog(tmp_path)
    log.step(1, 1, {"seconds": 2.0, "tokens": 10, "rollouts": 4})
    log.step(1, 2, {"seconds": 3.0, "tokens": 10, "rollouts": 4})
    log.step(1, 2, {"event": "evaluate", "seconds": 1.0})
    log.step(2, 1, {"seconds": 4.0, "trained": 50})
    cost = run_log.summarise_cost(read_jsonl(tmp_path / "metrics.jsonl"), tmp_path)
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
