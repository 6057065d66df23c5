"""The driver from end to end on a config of seconds: stages, arms, seeds, orders, pre-stage, joint, a user's own data."""

import csv
import json

import numpy as np
import pytest
import runs
from alone import devices, said  # noqa: F401
from ml_collections import ConfigDict
from PIL import Image

import cptjax
from cptjax import continual, reexam
from cptjax.report import read

QUICK = {"steps": 2, "eval": {"limit": 4, "batch": 4}}


@pytest.fixture(autouse=True)
def one_device(devices):  # noqa: F811
    devices(1)


def go(workdir, method="sft", /, **sections):
    c = runs.config(method, **{**QUICK, **sections})
    return c, continual.run(c, workdir)


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
    c, matrix = go(tmp_path, method, model={"lora": ConfigDict(dict(rank=rank, alpha=4.0, targets=("q", "v"), vision=False))})
    assert matrix.shape == (3, 2) and np.isfinite(matrix).all()
    header, rows = matrix_file(tmp_path)
    assert header == ["stage", "stage_name", "colour", "digit"]
    assert [r[:2] for r in rows] == [["0", "base"], ["1", "colour"], ["2", "digit"]]
    assert np.allclose([[float(x) for x in r[2:]] for r in rows], matrix)
    evals = [r for r in runs.evals(tmp_path) if r["metric"] == "accuracy"]
    assert [(r["stage"], r["step"], r["task"]) for r in evals] == [
        (s, step, t) for s, step in (("0", "0"), ("1", "2"), ("2", "2")) for t in runs.TASKS
    ]
    assert {(r["n"], r["scorer"], r["template"], r["pixels"], r["decoding"]) for r in evals} == {
        ("4", evals[0]["scorer"], "none", "1024-1024", "greedy, 4 tokens")
    }
    assert [(x["stage"], x["step"]) for x in lines(tmp_path)] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    for name in ("config.json", "versions.json", "summary.json", "report.html", "predictions/stage2.jsonl"):
        assert (tmp_path / name).stat().st_size
    assert (tmp_path / "rollouts" / "stage1.jsonl").exists() == (method == "grpo")
    names = runs.arrays(tmp_path, runs.stages(tmp_path)[0])
    assert names and all(("lora" in name) == bool(rank) for name in names)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["finished"] and summary["cost"]["rollouts"] >= 3 * 2 * 4


def test_python_and_a_users_own_two_tasks(tmp_path, said, capsys):  # noqa: F811
    """The README's way: jsonl rows with pictures, a reward and a scorer of one's own."""
    (tmp_path / "mine.py").write_text(
        "def reward(completion, answer, **columns):\n    return {'reward': float(answer in completion), 'length': len(completion)}\n"
        "def score(prediction, answer, **columns):\n    return float(answer in prediction)\n"
    )
    for name, question in (("cells", "<image>How many cells?"), ("words", "Which word?")):
        rows = [{"prompt": question, "answer": str(i % 5)} | ({"images": [f"{i}.png"]} if "image" in question else {}) for i in range(12)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    for i in range(12):
        Image.new("RGB", (32, 32), (20 * i, 0, 0)).save(tmp_path / f"{i}.png")
    own = {"test": 0.25, "reward": f"{tmp_path / 'mine.py'}:reward", "scorer": f"{tmp_path / 'mine.py'}:score"}
    tasks = {name: {"train": str(tmp_path / f"{name}.jsonl"), **own} for name in ("cells", "words")}
    stages = tuple(dict(task=t, steps=2) for t in tasks)
    c = runs.config("grpo", **{**QUICK, "tasks": tasks, "stages": stages, "data": {"limit": None}})
    matrix = cptjax.run(c, tmp_path / "run")
    assert matrix.shape == (3, 2) and "done:" in capsys.readouterr().err
    row = json.loads((tmp_path / "run" / "rollouts" / "stage1.jsonl").read_text().splitlines()[0])
    assert {"reward", "length"} <= row["rewards"].keys()
    assert row["prompt"] == "<image>How many cells?" and row["image"].startswith("data:image")
    (tmp_path / "cells.jsonl").write_text('{"prompt": "<image>?", "images": [], "answer": "1"}\n')
    with pytest.raises(ValueError, match="cells.jsonl.*1 <image> in the prompt but 0"):
        cptjax.run(c, tmp_path / "other")


def test_seeds_orders_and_arms_lie_side_by_side(tmp_path):
    arms = {"sft": {}, "joint": {"stages": ({"task": ("colour", "digit"), "steps": 2},)}}
    _, found = go(tmp_path, arms=arms, seeds=(1, 2), stages=({"task": "facts", "steps": 1}, {"task": "digit", "steps": 1}))
    assert found.shape == (4, 3, 2)
    assert np.isfinite(found[2:]).all() and np.isnan(found[:2, 2]).all() and np.isfinite(found[:2, :2]).all()
    subs = ["joint/seed1", "joint/seed2", "sft/seed1", "sft/seed2"]  # a ConfigDict lists its arms by name
    assert all((tmp_path / sub / "matrix.csv").exists() for sub in subs) and (tmp_path / "report.html").exists()
    firsts = [lines(tmp_path / sub)[0] for sub in subs[2:]]
    assert firsts[0]["loss"] != firsts[1]["loss"]


def test_orders(tmp_path):
    go(tmp_path, orders=((0, 1), (1, 0)), stages=({"task": "facts", "steps": 1}, {"task": "digit", "steps": 1}), eval={"before": False})
    names = [[r[1] for r in matrix_file(tmp_path / f"order{i}")[1]] for i in (0, 1)]
    assert names == [["base", "facts", "digit"], ["base", "digit", "facts"]]


def test_a_prestage_makes_the_base_once(tmp_path):
    pre = {"name": "base", "stages": ({"task": ("colour", "facts"), "steps": 3},), "eval": {"before": False}, "train": {"lr": 3e-3}}
    c, matrix = go(tmp_path, prestage=pre, stages=({"task": "digit", "steps": 1},))
    assert matrix.shape == (2, 1) and (tmp_path / "base" / "hf" / "model.safetensors").exists()
    assert json.loads((tmp_path / "config.json").read_text())["model"]["path"] == str(tmp_path / "base" / "hf")
    written = (tmp_path / "base" / "hf" / "model.safetensors").stat().st_mtime_ns
    continual.run(c, tmp_path)
    assert (tmp_path / "base" / "hf" / "model.safetensors").stat().st_mtime_ns == written
    c.prestage.train.lr = 1e-3
    with pytest.raises(ValueError, match="base was started with another config: train.lr: 0.003 -> 0.001"):
        continual.run(c, tmp_path)
    c.prestage.stages = ({"task": "colour"},)
    with pytest.raises(ValueError, match="expected one of steps=N and epochs=N"):
        continual.run(c, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_each_seed_stands_on_a_base_of_its_own(tmp_path):
    pre = {"stages": ({"task": "facts", "steps": 1},), "eval": {"before": False}}
    c, found = go(tmp_path, prestage=pre, seeds=(3, 5), stages=({"task": "digit", "steps": 1},))
    assert found.shape == (2, 2, 1)
    own = [tmp_path / "base" / f"seed{s}" / "hf" for s in (3, 5)]
    assert own[0].joinpath("model.safetensors").read_bytes() != own[1].joinpath("model.safetensors").read_bytes()
    for seed, path in zip((3, 5), own, strict=True):
        config = json.loads((tmp_path / f"seed{seed}" / "config.json").read_text())
        assert config["seed"] == seed and config["model"]["path"] == str(path)
        assert reexam.chosen(c, tmp_path / f"seed{seed}").model.path == str(path)
    assert [(a.label, len(a.runs)) for a in read.arms([tmp_path])] == [(tmp_path.name, 2)]  # the bases are no arms


def test_the_optimiser_goes_on_where_asked(tmp_path):
    """Two stages on one task with the optimiser kept are one stage of twice the steps in what AdamW knows; a reset is not."""
    two = ({"task": "facts", "steps": 2}, {"task": "facts", "steps": 2})
    losses = {}
    for keep in (True, False):
        go(tmp_path / str(keep), stages=two, train={"reset_optimizer": not keep}, eval={"before": False, "limit": 2}, seed=3)
        losses[keep] = [x["loss"] for x in lines(tmp_path / str(keep))]
        kept = tmp_path / str(keep) / "checkpoints" / "stages"
        assert [(p / "opt_state").exists() for p in sorted(kept.iterdir())] == [keep, False]
    assert losses[True][:3] == losses[False][:3] and losses[True][3] != losses[False][3]
    other = ({"task": "facts", "steps": 1}, {"task": "facts", "steps": 1, "train": {"optimizer": "adafactor", "reset_optimizer": False}})
    with pytest.raises(ValueError, match="stage 2: train.reset_optimizer=False needs the optimiser of the stage before"):
        go(tmp_path / "other", stages=other, eval={"before": False, "limit": 2})


def test_what_an_evaluation_records(tmp_path):
    """Templates, forced prefix, drift, further scorers, small evaluations inside a stage, general tasks, no base row."""
    digit = {"task": "drawn", "family": "digit", "side": 32, "also": ("contains",), "template": ""}
    tasks = {"digit": digit, "facts": {"task": "drawn", "family": "facts"}}
    wanted = {"before": False, "general": ("facts",), "templates": ("none", "answer"), "forced_prefix": True}
    wanted |= {"drift": 2, "every": 1, "mini": 2, **QUICK["eval"]}
    long = {"prompt_limit": 256, "buckets": (256,)}
    _, matrix = go(tmp_path, tasks=tasks, stages=({"task": "digit", "steps": 3},), eval=wanted, data=long)
    assert np.isnan(matrix[0]).all() and np.isfinite(matrix[1]).all()
    rows = runs.evals(tmp_path)
    of = lambda metric: [(r["step"], r["task"], r["template"], r["n"]) for r in rows if r["metric"] == metric]
    both = [("3", "digit", "none", "4"), ("3", "digit", "answer", "4"), ("3", "facts", "none", "4")]  # drawn facts have their own template
    assert of("accuracy") == of("accuracy_forced") == both
    assert of("contains/accuracy") == of("contains/extraction_failure") == both[:2]
    assert {r["scorer"] for r in rows if r["metric"] == "contains/accuracy"} == {"contains@1"}
    assert all(int(r["n"]) > 0 and float(r["stderr"]) >= 0 for r in rows)
    assert of("accuracy_mini") == [("1", "digit", "none", "2"), ("2", "digit", "none", "2")]
    assert [x[:2] for x in of("kl_base")] == [("3", "digit"), ("3", "facts")]
    assert all(float(r["value"]) > 0 for r in rows if r["metric"] == "kl_base")
    events = lines(tmp_path, events=True)
    assert [(e["step"], e.get("task"), e["rollouts"]) for e in events] == [(1, None, 2), (2, None, 2), (3, "digit", 16), (3, "facts", 8)]
    assert all(e["tokens"] > 0 and e["seconds"] > 0 for e in events)


def test_evaluating_again(tmp_path):
    c, matrix = go(tmp_path, stages=({"task": "facts", "steps": 1}, {"task": "digit", "steps": 1}))
    files = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    value = lambda rows, task: next(r["value"] for r in rows if r["task"] == task and r["metric"] == "accuracy")
    for stage in (0, 1, 2, None):
        rows = reexam.run(c, tmp_path, stage)
        expected = matrix[2 if stage is None else stage]
        assert [value(rows, t) for t in ("facts", "digit")] == list(expected)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == files
    assert {r["task"] for r in reexam.run(c, tmp_path, 1, tasks=("facts",))} == {"facts"}
    before = len(runs.evals(tmp_path))
    added = reexam.run(c, tmp_path, 2, tasks=("facts",), record=True)
    assert len(runs.evals(tmp_path)) == before + len(added)
    continual.run(c, tmp_path)  # what was recorded stays
    assert len(runs.evals(tmp_path)) == before + len(added)
    for arguments, message in (
        (dict(stage=3), "no finished stage 3"), (dict(tasks=("x",)), "--tasks names x; the config evaluates facts, digit"),
        (dict(model="m", stage=1), "--model is not a stage"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            reexam.run(c, tmp_path, **arguments)
    assert reexam.table(added).splitlines()[0].split() == list(reexam.SHOWN)


def test_a_mistake_is_told_before_anything_is_made(tmp_path):
    for sections, message in (
        ({"stages": ()}, "config.stages is empty"), ({"eval": {"batch": 0}}, "config.eval.batch is 0"),
        ({"arms": {"a": {"trian": {}}}}, "config.arms.a.trian does not exist; did you mean 'train'"),
        ({"stages": ({"task": "digit", "steps": 1, "method": {"source": "nowhere"}},)}, "method.source='nowhere'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            go(tmp_path / "run", **sections)
    assert not (tmp_path / "run").exists()
