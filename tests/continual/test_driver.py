"""The driver from end to end on a config of seconds: stages, arms, seeds, orders, pre-stage, joint."""

import csv
import json
import os
import signal

import numpy as np
import pytest
import run_helpers
from device_fixtures import devices  # noqa: F401
from ml_collections import ConfigDict

import cptjax
from configs import demo
from cptjax.benchmark.bench import CompilationCounter
from cptjax.common import console
from cptjax.continual import driver, reevaluate, train_stage
from cptjax.evaluation.report import read
from cptjax.models import hf_checkpoint

QUICK = {"steps": 2, "eval": {"limit": 4, "batch": 4}}


@pytest.fixture(autouse=True)
def one_device(devices):
    devices(1)


def go(workdir, method="sft", /, **sections):
    c = run_helpers.config(method, **{**QUICK, **sections})
    return c, driver.run(c, workdir)


def lines(workdir, events: bool = False):
    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if ("event" in line) == events]


def matrix_file(workdir):
    with (workdir / "matrix.csv").open() as file:
        header, *rows = csv.reader(file)
    return header, rows


@pytest.mark.parametrize("method", ["sft", "grpo"])
@pytest.mark.parametrize("rank", [0, 2])
def test_a_run(tmp_path, method, rank):
    c, matrix = go(
        tmp_path,
        method,
        model={"lora": ConfigDict(dict(rank=rank, alpha=4.0, targets=("q", "v"), vision=False))},
    )
    assert matrix.shape == (3, 2) and np.isfinite(matrix).all()
    header, rows = matrix_file(tmp_path)
    assert header == ["stage", "stage_name", "colour", "digit"]
    assert [r[:2] for r in rows] == [["0", "base"], ["1", "colour"], ["2", "digit"]]
    assert np.allclose([[float(x) for x in r[2:]] for r in rows], matrix)
    evals = [r for r in run_helpers.evals(tmp_path) if r["metric"] == "accuracy"]
    assert [(r["stage"], r["step"], r["task"]) for r in evals] == [
        (s, step, t) for s, step in (("0", "0"), ("1", "2"), ("2", "2")) for t in run_helpers.TASKS
    ]
    assert {(r["n"], r["scorer"], r["template"], r["pixels"], r["decoding"]) for r in evals} == {
        ("4", evals[0]["scorer"], "none", "1024-1024", "greedy, 4 tokens")
    }
    assert [(x["stage"], x["step"]) for x in lines(tmp_path)] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    for name in (
        "config.json",
        "versions.json",
        "summary.json",
        "report.html",
        "predictions/stage2.jsonl",
    ):
        assert (tmp_path / name).stat().st_size
    assert (tmp_path / "rollouts" / "stage1.jsonl").exists() == (method == "grpo")
    names = run_helpers.arrays(tmp_path, run_helpers.stages(tmp_path)[0])
    assert names and all(("lora" in name) == bool(rank) for name in names)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["finished"] and summary["cost"]["rollouts"] >= 3 * 2 * 4
    assert (
        all(line["trained"] > 4 * 2 for line in lines(tmp_path))
        and summary["cost"]["works"]["evaluate"]["trained"] == 0
    )


@pytest.mark.slow
def test_seeds_orders_and_arms_lie_side_by_side(tmp_path):
    arms = {"sft": {}, "joint": {"stages": ({"task": ("facts", "digit"), "steps": 2},)}}
    c, found = go(
        tmp_path,
        arms=arms,
        seeds=(1, 2),
        stages=({"task": "facts", "steps": 1}, {"task": "digit", "steps": 1}),
    )
    assert found.shape == (4, 3, 2)
    assert (
        np.isfinite(found[2:]).all()
        and np.isnan(found[:2, 2]).all()
        and np.isfinite(found[:2, :2]).all()
    )
    subs = [
        "joint/seed1",
        "joint/seed2",
        "sft/seed1",
        "sft/seed2",
    ]  # a ConfigDict lists its arms by name
    assert (
        all((tmp_path / sub / "matrix.csv").exists() for sub in subs)
        and (tmp_path / "report.html").exists()
    )
    known = [
        json.loads((tmp_path / sub / "summary.json").read_text())["metrics"]["intransigence"][
            "value"
        ]
        for sub in subs
    ]
    assert [v is None for v in known] == [
        True,
        True,
        False,
        False,
    ]  # the joint runs are the others' reference
    assert json.loads((tmp_path / "report.json").read_text())["arms"]["sft"]["avg_acc"]["n"] == 2
    firsts = [lines(tmp_path / sub)[0] for sub in subs[2:]]
    assert firsts[0]["loss"] != firsts[1]["loss"]


@pytest.mark.slow
def test_orders(tmp_path):
    go(
        tmp_path,
        orders=((0, 1), (1, 0)),
        stages=({"task": "facts", "steps": 1}, {"task": "digit", "steps": 1}),
        eval={"before": False},
    )
    names = [[r[1] for r in matrix_file(tmp_path / f"order{i}")[1]] for i in (0, 1)]
    assert names == [["base", "facts", "digit"], ["base", "digit", "facts"]]


def test_a_prestage_makes_the_base_once(tmp_path):
    pre = {
        "name": "base",
        "stages": ({"task": ("colour", "facts"), "steps": 3},),
        "eval": {"before": False},
        "train": {"lr": 3e-3},
    }
    c, matrix = go(tmp_path, prestage=pre, stages=({"task": "digit", "steps": 1},))
    assert matrix.shape == (2, 1) and (tmp_path / "base" / "hf" / "model.safetensors").exists()
    assert json.loads((tmp_path / "config.json").read_text())["model"]["path"] == "base/hf"
    written = (tmp_path / "base" / "hf" / "model.safetensors").stat().st_mtime_ns
    driver.run(c, tmp_path)
    assert (tmp_path / "base" / "hf" / "model.safetensors").stat().st_mtime_ns == written
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    assert (
        np.array_equal(driver.run(c, moved), matrix)
        and cptjax.load(moved, dtype="float32").dtype == "float32"
    )
    c.prestage.train.lr, c.allow_change = 1e-3, True
    with pytest.raises(
        ValueError,
        match="base/hf was made with another config: train.lr: 0.003 -> 0.001. Other runs start from this model",
    ):
        driver.run(c, moved)
    c.prestage.stages = ({"task": "colour"},)
    with pytest.raises(ValueError, match="expected one of steps=N and epochs=N"):
        driver.run(c, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_each_seed_stands_on_a_base_of_its_own(tmp_path):
    pre = {"stages": ({"task": "facts", "steps": 1},), "eval": {"before": False}}
    c, found = go(tmp_path, prestage=pre, seeds=(3, 5), stages=({"task": "digit", "steps": 1},))
    assert found.shape == (2, 2, 1)
    own = [tmp_path / "base" / f"seed{s}" / "hf" for s in (3, 5)]
    assert (
        own[0].joinpath("model.safetensors").read_bytes()
        != own[1].joinpath("model.safetensors").read_bytes()
    )
    for seed, path in zip((3, 5), own, strict=True):
        config = json.loads((tmp_path / f"seed{seed}" / "config.json").read_text())
        assert config["seed"] == seed and config["model"]["path"] == f"../base/seed{seed}/hf"
        assert reevaluate.select_run(c, tmp_path / f"seed{seed}").model.path == str(path)
    assert [(a.label, len(a.runs)) for a in read.read_arms([tmp_path])] == [
        (tmp_path.name, 2)
    ]  # the bases are no arms


def test_the_optimiser_goes_on_where_asked(tmp_path):
    """Two stages on one task with the optimiser kept are one stage of twice the steps in what AdamW knows; a reset is not."""
    two = ({"task": "facts", "steps": 2}, {"task": "facts", "steps": 2})
    losses = {}
    for keep in (True, False):
        go(
            tmp_path / str(keep),
            stages=two,
            train={"reset_optimizer": not keep},
            eval={"before": False, "limit": 2},
            seed=3,
        )
        losses[keep] = [x["loss"] for x in lines(tmp_path / str(keep))]
        kept = tmp_path / str(keep) / "checkpoints" / "stages"
        assert [(p / "opt_state").exists() for p in sorted(kept.iterdir())] == [keep, False]
    assert losses[True][:3] == losses[False][:3] and losses[True][3] != losses[False][3]
    other = (
        {"task": "facts", "steps": 1},
        {
            "task": "facts",
            "steps": 1,
            "train": {"optimizer": "adafactor", "reset_optimizer": False},
        },
    )
    with pytest.raises(
        ValueError,
        match="stage 2: train.reset_optimizer=False needs the optimiser of the stage before",
    ):
        go(tmp_path / "other", stages=other, eval={"before": False, "limit": 2})


ARMS = {
    "prestage": {"stages": ({"task": "facts", "steps": 1},), "eval": {"before": False}},
    "arms": {"a": {}, "b": {"train": {"lr": 1e-3}}},
    "stages": ({"task": "digit", "steps": 1},),
}


@pytest.mark.parametrize(
    "ends", ["after the base", "in the export", "between the arms", "at the last summary"]
)
def test_several_runs_go_on_from_any_of_them(tmp_path, monkeypatch, ends):
    """SIGTERM is heard outside of runs too, and the same command goes on to the same files."""
    places = {
        "after the base": (driver, "expand_runs", 1),
        "in the export": (hf_checkpoint, "save_hf_checkpoint", 1),
        "between the arms": (driver, "open_run", 3),
        "at the last summary": (driver, "write_final_results", 3),
    }
    c, whole = go(tmp_path / "whole", **ARMS)
    module, name, count = places[ends]
    before, calls = getattr(module, name), []

    def stopped(*args, **more):
        calls.append(args)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGTERM)
        return before(*args, **more)

    with monkeypatch.context() as patched, pytest.raises(SystemExit) as end:
        patched.setattr(module, name, stopped)
        driver.run(c, tmp_path / "run")
    assert end.value.code == 0 and len(calls) == count
    assert np.array_equal(driver.run(c, tmp_path / "run"), whole)
    for sub in ("base", "a", "b"):
        run_helpers.same(
            run_helpers.state(tmp_path / "whole" / sub), run_helpers.state(tmp_path / "run" / sub)
        )
    assert (tmp_path / "run" / "report.html").exists()


@pytest.mark.parametrize("count, mesh", [(1, {}), (8, {}), (8, dict(data=2, fsdp=2, model=2))])
def test_a_later_stage_trains_with_the_programs_of_the_first(
    tmp_path, monkeypatch, devices, count, mesh
):
    """Programs return arrays in the places that were declared, but name them otherwise."""
    devices(count)
    heard, found, learn = CompilationCounter(), [], train_stage.train_stage

    def counted(*args):
        before = heard.count
        model_state = learn(*args)
        found.append(heard.count - before)
        return model_state

    monkeypatch.setattr(train_stage, "train_stage", counted)
    go(
        tmp_path,
        stages=[dict(task=t, steps=2) for t in (*run_helpers.TASKS, "colour")],
        mesh=mesh,
        train=dict(batch=8),
    )
    assert found[0] > found[1] == found[2] == 0


@pytest.mark.slow
def test_drift_counts_the_rows_that_were_asked_for(tmp_path, devices):
    """Three rows do not fill eight shards; how many devices there are changes nothing."""
    found = {}
    for count in (1, 8):
        devices(count)
        small = {"train": {"batch": 8}, "eval": {"drift": 3, "limit": 4, "batch": 8}}
        go(tmp_path / str(count), stages=({"task": "digit", "steps": 2},), **small)
        found[count] = [
            (r["stage"], r["n"], float(r["value"]))
            for r in run_helpers.evals(tmp_path / str(count))
            if r["metric"] == "kl_base"
        ]
    assert [(s, n) for s, n, _ in found[1]] == [("0", "3"), ("1", "3")] and found[1][1][2] > 1e-4
    assert [x[:2] for x in found[8]] == [x[:2] for x in found[1]]
    assert np.allclose([x[2] for x in found[8]], [x[2] for x in found[1]], rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_what_an_evaluation_records(tmp_path, monkeypatch, capsys):
    """Templates, forced prefix, drift, further scorers, small evaluations inside a stage, general tasks, no base row."""
    shown = []
    monkeypatch.setattr(
        console._PlainBar, "_show", lambda bar: shown.append(bar.shown.get("accuracy"))
    )
    digit = {
        "task": "synthetic",
        "family": "digit",
        "side": 32,
        "also": ("contains",),
        "template": "",
    }
    tasks = {"digit": digit, "facts": {"task": "synthetic", "family": "facts"}}
    wanted = {
        "before": False,
        "general": ("facts",),
        "templates": ("none", "answer"),
        "forced_prefix": True,
    }
    wanted |= {"drift": 2, "every": 1, "mini": 2, **QUICK["eval"]}
    long = {"prompt_limit": 256, "buckets": (256,)}
    _, matrix = go(
        tmp_path, tasks=tasks, stages=({"task": "digit", "steps": 3},), eval=wanted, data=long
    )
    assert np.isnan(matrix[0]).all() and np.isfinite(matrix[1]).all()
    rows = run_helpers.evals(tmp_path)
    of = lambda metric: [
        (r["step"], r["task"], r["template"], r["n"]) for r in rows if r["metric"] == metric
    ]
    both = [
        ("3", "digit", "none", "4"),
        ("3", "digit", "answer", "4"),
        ("3", "facts", "none", "4"),
    ]  # drawn facts have their own template
    assert of("accuracy") == of("accuracy_forced") == both
    assert of("contains/accuracy") == of("contains/extraction_failure") == both[:2]
    assert {r["scorer"] for r in rows if r["metric"] == "contains/accuracy"} == {"contains@1"}
    assert all(int(r["n"]) > 0 and float(r["stderr"]) >= 0 for r in rows)
    value = lambda metric: [float(r["value"]) for r in rows if r["metric"] == metric]
    assert set(shown) - {None} == set(value("accuracy_mini"))
    first = [
        100 * value("accuracy")[i] for i in (0, 2)
    ]  # of the first template, and of the general task
    assert (
        f"after stage 1 digit: digit {first[0]:.1f}; general {first[1]:.1f}\n"
        in capsys.readouterr().err
    )
    assert of("accuracy_mini") == [("1", "digit", "none", "2"), ("2", "digit", "none", "2")]
    assert [x[:2] for x in of("kl_base")] == [("3", "digit"), ("3", "facts")]
    drifted = [r for r in rows if r["metric"] == "kl_base"]
    assert all(
        float(r["value"]) > 0 and r["decoding"] == "the base's own, T=1, 4 tokens" for r in drifted
    )
    events = lines(tmp_path, events=True)
    assert [(e["step"], e.get("task"), e["rollouts"]) for e in events] == [
        (1, None, 2),
        (2, None, 2),
        (3, "digit", 16),
        (3, "facts", 8),
    ]
    assert all(e["tokens"] > 0 and e["seconds"] > 0 for e in events)


def test_evaluating_again(tmp_path):
    c, matrix = go(tmp_path, stages=({"task": "facts", "steps": 1}, {"task": "digit", "steps": 1}))
    files = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    value = lambda rows, task: next(
        r["value"] for r in rows if r["task"] == task and r["metric"] == "accuracy"
    )
    for stage in (0, 1, 2, None):
        rows = reevaluate.reevaluate_stage(c, tmp_path, stage)
        expected = matrix[2 if stage is None else stage]
        assert [value(rows, t) for t in ("facts", "digit")] == list(expected)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == files
    assert {r["task"] for r in reevaluate.reevaluate_stage(c, tmp_path, 1, tasks=("facts",))} == {
        "facts"
    }
    before = len(run_helpers.evals(tmp_path))
    added = reevaluate.reevaluate_stage(c, tmp_path, 2, tasks=("facts",), record=True)
    assert len(run_helpers.evals(tmp_path)) == before + len(added)
    driver.run(c, tmp_path)  # what was recorded stays
    assert len(run_helpers.evals(tmp_path)) == before + len(added)
    for arguments, message in (
        (dict(stage=3), "no finished stage 3"),
        (dict(tasks=("x",)), "--tasks names x; the config evaluates facts, digit"),
        (dict(model="m", stage=1), "--model is not a stage"),
    ):
        with pytest.raises(ValueError, match=message):
            reevaluate.reevaluate_stage(c, tmp_path, **arguments)
    assert reevaluate.format_eval_rows(added).splitlines()[0].split() == list(
        reevaluate.PRINTED_COLUMNS
    )


@pytest.mark.slow
def test_the_demo_in_short(tmp_path):
    """All five arms on the base that the pre-stage makes, and the report over them."""
    matrices = driver.run(demo.get_config("0,short"), tmp_path)
    assert matrices.shape == (5, 5, 4) and np.isfinite(matrices[:, -1]).any()
    arms = ["grpo", "iterative", "joint", "sft_bare", "sft_style"]
    assert all(
        json.loads((tmp_path / arm / "summary.json").read_text())["finished"] for arm in arms
    )
    assert sorted(a.label for a in read.read_arms([tmp_path])) == arms
    page = (tmp_path / "report.html").read_text()
    assert all(arm in page for arm in arms)


def test_a_mistake_is_told_before_anything_is_made(tmp_path):
    for sections, message in (
        ({"stages": ()}, "config.stages is empty"),
        ({"eval": {"batch": 0}}, "config.eval.batch: expected a whole number of at least 1, got 0"),
        (
            {"arms": {"a": {"trian": {}}}},
            "config.arms.a.trian does not exist; did you mean 'train'",
        ),
        (
            {"stages": ({"task": "digit", "steps": 1, "method": {"source": "nowhere"}},)},
            "method.source='nowhere'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            go(tmp_path / "run", **sections)
    assert not (tmp_path / "run").exists()
