"""The append-only files of a run: a resumed log equals an uninterrupted one; costs add up."""

import json

import numpy as np
import pytest
from eval_rows import EVAL_ROW

from cptjax.common import run_log
from cptjax.common.files import read_jsonl
from cptjax.common.run_log import RecordsDamaged, RunLog
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


def recorded(tmp_path) -> tuple[RunLog, dict]:
    """A log of stage 1 with every kind of file, and its positions; later lines follow."""
    log = RunLog(tmp_path)
    for line in range(3):
        log.step(1, line, {"loss": 0.5})
        log.evals([EVAL_ROW])
        log.rollouts(1, [{"text": str(line)}])
        log.predictions(0, [{"text": str(line)}])
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "stage1_step0.jsonl").write_text("{}\n")
    positions = log.positions()
    log.evals([EVAL_ROW])
    log.close()
    return RunLog(tmp_path), json.loads(json.dumps(positions))


@pytest.mark.parametrize("name", ["evals.csv", "metrics.jsonl", "corpus/stage1_step0.jsonl"])
@pytest.mark.parametrize("how", ["removed", "truncated", "changed"])
def test_a_needed_file_that_is_lost_is_refused_before_any_is_cut(tmp_path, name, how):
    log, positions = recorded(tmp_path)
    path, text = tmp_path / name, (tmp_path / name).read_bytes()
    path.unlink()
    if how != "removed":
        path.write_bytes(text[:-5] if how == "truncated" else b"x" + text[1:])
    if how == "truncated" and name == "evals.csv":  # as long as the recorded part or shorter
        path.write_bytes(text[: positions[name]["bytes"] - 1])
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(RecordsDamaged, match=name):
        log.rewind(positions, stage=1)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_another_lost_file_is_a_warning_and_is_recorded(tmp_path, capsys):
    log, positions = recorded(tmp_path)
    (tmp_path / "predictions" / "stage0.jsonl").unlink()
    rollouts = tmp_path / "rollouts" / "stage1.jsonl"
    rollouts.write_text(rollouts.read_text()[:-3])
    log.rewind(positions, stage=2)
    err = " ".join(capsys.readouterr().err.split())
    assert "predictions/stage0.jsonl is missing; 42 bytes of it were recorded" in err
    assert "rollouts/stage1.jsonl has 39 bytes; 42 were recorded" in err
    assert len(read_jsonl(rollouts)) == 2 and not (tmp_path / "predictions/stage0.jsonl").exists()
    lines = read_jsonl(tmp_path / "metrics.jsonl")[3:]
    assert [(line["event"], line["file"]) for line in lines] == [
        ("lost", "predictions/stage0.jsonl"),
        ("lost", "rollouts/stage1.jsonl"),
    ]
    assert len(run_log.read_evals(tmp_path / "evals.csv")) == 3


def test_a_table_that_a_spreadsheet_saved_again_is_restored(tmp_path, capsys):
    log, positions = recorded(tmp_path)
    path = tmp_path / "evals.csv"
    before = path.read_bytes()
    path.write_bytes(before.replace(b"\n", b"\r\n"))
    log.rewind(positions, stage=1)
    assert path.read_bytes() == before[: positions["evals.csv"]["bytes"]]
    assert "line ends restored" in capsys.readouterr().err


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


def test_a_table_with_other_columns_is_refused_without_a_row_too(tmp_path):
    (tmp_path / "evals.csv").write_text("a,b\n")
    with pytest.raises(ValueError, match="evals.csv: columns metric, .* are missing"):
        run_log.read_evals(tmp_path / "evals.csv")


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


def test_what_methods_keep_counts_until_they_replace_it():
    """After stage 2, a keeps 30 bytes and b 5; after stage 3, a keeps 10."""
    ended = [(1, "a", 20), (2, "a", 30), (2, "b", 5), (3, "a", 10)]
    lines = [
        {"stage": s, "step": 1, "event": "stage_end", "method": m, "kept_bytes": n}
        for s, m, n in ended
    ]
    assert run_log.most_kept_bytes(lines) == 35 and run_log.most_kept_bytes([]) == 0
