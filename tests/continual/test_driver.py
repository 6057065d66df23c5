"""The driver from end to end: stages, arms, seeds, orders, pre-stage, joint."""

import csv
import json
import os
import signal

import numpy as np
import pytest
import run_helpers
from device_fixtures import one_device  # noqa: F401
from ml_collections import ConfigDict

import cptjax
from configs import demo
from cptjax.continual import driver, reevaluate
from cptjax.evaluation.report import read
from cptjax.models import hf_checkpoint
from cptjax.models.families import PRESETS

pytestmark = pytest.mark.usefixtures("one_device")


def matrix_file(workdir):
    with (workdir / "matrix.csv").open() as file:
        header, *rows = csv.reader(file)
    return header, rows


@pytest.mark.parametrize("method", ["sft", "grpo"])
@pytest.mark.parametrize("rank", [0, 2])
def test_a_run_writes_its_matrix_logs_and_checkpoints(tmp_path, method, rank):
    c, matrix = run_helpers.run_quickly(
        tmp_path,
        method,
        model={"lora": ConfigDict(dict(rank=rank, alpha=4.0, targets=("q", "v"), vision=False))},
        log={"changed_weights": True},
    )
    assert matrix.shape == (3, 2) and np.isfinite(matrix).all()
    header, rows = matrix_file(tmp_path)
    assert header == ["stage", "stage_name", "colour", "digit"]
    assert [r[:2] for r in rows] == [["0", "base"], ["1", "colour"], ["2", "digit"]]
    assert np.allclose([[float(x) for x in r[2:]] for r in rows], matrix)
    evals = [r for r in run_helpers.read_evals(tmp_path) if r["metric"] == "accuracy"]
    assert [(r["stage"], r["step"], r["task"]) for r in evals] == [
        (s, step, t) for s, step in (("0", "0"), ("1", "2"), ("2", "2")) for t in run_helpers.TASKS
    ]
    assert {(r["n"], r["scorer"], r["template"], r["pixels"], r["decoding"]) for r in evals} == {
        ("4", evals[0]["scorer"], "none", "1024-1024", "greedy, 4 tokens")
    }
    assert [(x["stage"], x["step"]) for x in run_helpers.metrics_lines(tmp_path)] == [
        (1, 1),
        (1, 2),
        (2, 1),
        (2, 2),
    ]
    changed = [line["changed_weights"] for line in run_helpers.metrics_lines(tmp_path)]
    assert all(0 <= share <= 1 for share in changed) and changed[-1] > 0.1
    for name in (
        "config.json",
        "versions.json",
        "summary.json",
        "report.html",
        "predictions/stage2.jsonl",
    ):
        assert (tmp_path / name).stat().st_size
    assert (tmp_path / "rollouts" / "stage1.jsonl").exists() == (method == "grpo")
    names = run_helpers.stage_arrays(tmp_path, run_helpers.saved_stages(tmp_path)[0])
    assert names and all(("lora" in name) == bool(rank) for name in names)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["finished"] and summary["cost"]["rollouts"] >= 3 * 2 * 4
    assert (
        all(line["trained"] > 4 * 2 for line in run_helpers.metrics_lines(tmp_path))
        and summary["cost"]["works"]["evaluate"]["trained"] == 0
    )


@pytest.mark.slow
def test_arms_and_seeds_run_side_by_side_with_joint_as_reference(tmp_path):
    joint = {"stages": ({"task": ("facts", "words"), "steps": 2},)}
    arms = {"sft": {"checkpoint": {"keep_stages": False}}, "joint": joint}
    c, found = run_helpers.run_quickly(
        tmp_path,
        arms=arms,
        seeds=(1, 2),
        stages=run_helpers.TEXT_STAGES,
        model=run_helpers.TEXT,
    )
    assert found.shape == (4, 3, 2)
    assert (
        np.isfinite(found[:2]).all()
        and np.isnan(found[2:, 2]).all()
        and np.isfinite(found[2:, :2]).all()
    )
    subs = ["sft/seed1", "sft/seed2", "joint/seed1", "joint/seed2"]
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
        False,
        False,
        True,
        True,
    ]  # the joint runs are the others' reference
    assert json.loads((tmp_path / "report.json").read_text())["arms"]["sft"]["avg_acc"]["n"] == 2
    firsts = [run_helpers.metrics_lines(tmp_path / sub)[0] for sub in subs[:2]]
    assert firsts[0]["loss"] != firsts[1]["loss"]
    kept = {sub: (tmp_path / sub / "checkpoints").exists() for sub in subs}
    assert kept == {sub: sub.startswith("joint") for sub in subs}
    assert np.array_equal(driver.run(c, tmp_path), found, equal_nan=True)  # all are finished


@pytest.mark.slow
def test_an_order_rearranges_the_stages(tmp_path):
    run_helpers.run_quickly(
        tmp_path,
        orders=((0, 1), (1, 0)),
        stages=run_helpers.TEXT_STAGES,
        model=run_helpers.TEXT,
        eval={"before": False},
    )
    names = [[r[1] for r in matrix_file(tmp_path / f"order{i}")[1]] for i in (0, 1)]
    assert names == [["base", "facts", "words"], ["base", "words", "facts"]]


def test_a_prestage_trains_the_base_model_once(tmp_path):
    pre = {
        "name": "base",
        "stages": ({"task": ("colour", "facts"), "steps": 3},),
        "eval": {"before": False},
        "train": {"lr": 3e-3},
    }
    c, matrix = run_helpers.run_quickly(
        tmp_path, prestage=pre, stages=({"task": "digit", "steps": 1},)
    )
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


def test_each_seed_starts_from_a_base_model_of_its_own(tmp_path):
    pre = {"stages": ({"task": "facts", "steps": 1},), "eval": {"before": False}}
    c, found = run_helpers.run_quickly(
        tmp_path, prestage=pre, seeds=(3, 5), stages=({"task": "digit", "steps": 1},)
    )
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


ARMS = {
    "prestage": {"stages": ({"task": "facts", "steps": 1},), "eval": {"before": False}},
    "arms": {"a": {}, "b": {"train": {"lr": 1e-3}}},
    "stages": ({"task": "digit", "steps": 1},),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The config, the matrix and the folder of several runs without a disturbance."""
    folder = tmp_path_factory.mktemp("whole")
    return *run_helpers.run_quickly(folder, **ARMS), folder


@pytest.mark.parametrize(
    "ends", ["after the base", "in the export", "between the arms", "at the last summary"]
)
def test_several_runs_continue_after_sigterm_in_any_of_them(whole, tmp_path, monkeypatch, ends):
    """SIGTERM also has an effect outside of runs, and the same command continues the same files."""
    places = {
        "after the base": (driver, "run_one", 2),
        "in the export": (hf_checkpoint, "save_hf_checkpoint", 1),
        "between the arms": (driver, "open_run", 3),
        "at the last summary": (driver, "write_final_results", 3),
    }
    c, matrix, undisturbed = whole
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
    assert np.array_equal(driver.run(c, tmp_path / "run"), matrix)
    for sub in ("base", "a", "b"):
        run_helpers.assert_same(
            run_helpers.run_state(undisturbed / sub),
            run_helpers.run_state(tmp_path / "run" / sub),
        )
    assert (tmp_path / "run" / "report.html").exists()


@pytest.mark.slow
def test_a_short_demo_runs_all_arms_and_reports_them(tmp_path, monkeypatch):
    """All five arms on the base model of a pre-stage that is cut further, and the report on them.

    The model of the preset has one layer here.
    """
    monkeypatch.setitem(PRESETS, "tiny", run_helpers.SMALL)
    c = demo.get_config("0,short")
    c.prestage.stages = tuple({**stage, "steps": 60} for stage in c.prestage.stages)
    c.stages = tuple({**stage, "steps": 2} for stage in c.stages)
    c.eval.general = demo.TEXT
    matrices = driver.run(c, tmp_path)
    assert matrices.shape == (5, 5, 4) and np.isfinite(matrices[:, -1]).any()
    arms = ["grpo", "iterative", "joint", "sft_bare", "sft_style"]
    assert all(
        json.loads((tmp_path / arm / "summary.json").read_text())["finished"] for arm in arms
    )
    assert sorted(a.label for a in read.read_arms([tmp_path])) == arms
    page = (tmp_path / "report.html").read_text()
    assert all(arm in page for arm in arms)


def test_a_mistake_is_refused_before_anything_is_written(tmp_path):
    for sections, message in (
        ({"stages": ()}, "config.stages: expected 1 to 1000 stages"),
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
            run_helpers.run_quickly(tmp_path / "run", **sections)
    assert not (tmp_path / "run").exists()
