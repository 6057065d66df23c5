"""Processes that cannot go on together end together, with a line that names the reason."""

import csv
import json
import os
import re
import signal

import cluster_workers
import gcs_server
import jax
import killed_runs
import numpy as np
import pytest
import run_helpers
from device_fixtures import see
from jax.sharding import NamedSharding, PartitionSpec
from PIL import Image
from run_workers import Workers

from cptjax import sharding
from cptjax.continual import driver
from cptjax.continual.checkpoint import CheckpointDamaged, Checkpoints
from cptjax.data import model_context

# Rows of a task whose first half has images: in an evaluation one process has all of them, and
# longer rows.
ROWS = 8
MORE = {"sft": {"method": {"penalty": {"name": "ewc", "coef": 10.0, "samples": 3}}}, "grpo": {}}
# The second stage of GRPO has two micro-batches in a step. All its rewards are 0, and without KL its
# gradient is exactly 0; with KL it would be rounding noise, which Adam amplifies. While sampling, two
# devices share the weights, those of two processes.
SECOND = {
    "sft": {},
    "grpo": {
        "train": {"micro_batch": 2},
        "method": {"kl_coef": 0.0},
        "rollout": {"model": 2, "gather": True},
    },
}


def sections(folder, method: str) -> dict:
    """Text alone, then a task of both kinds whose rows fall into two buckets."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(
        folder / "a.png"
    )
    ask = lambda i: (
        {"prompt": "<image>what is it", "images": ["a.png"]}
        if i < ROWS // 2
        else {"prompt": "red", "images": []}
    )
    (folder / "mixed.jsonl").write_text(
        "".join(json.dumps(ask(i) | {"answer": "red"}) + "\n" for i in range(ROWS))
    )
    facts = {"task": "synthetic", "family": "facts", "side": 32}
    mixed = {
        "train": str(folder / "mixed.jsonl"),
        "test": str(folder / "mixed.jsonl"),
        "template": "none",
        "scorer": "exact",
    }
    return {
        "stages": ({"task": "facts", "steps": 2}, {"task": "mixed", "steps": 2} | SECOND[method]),
        "tasks": {"facts": facts, "mixed": mixed},
        "eval": {"limit": ROWS, "batch": 4, "every": 1, "mini": 4},
        "data": {"buckets": (16, 32)},
        "checkpoint": {"every": 1},
        **MORE[method],
    }


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("failures")
    return folder, cluster_workers.run_pairs(folder, *cluster_workers.FAILURES)


def test_exchanges_of_any_size_compile_few_programs_and_never_answer_another(failures):
    folder, ended = failures
    for index in range(2):
        compiled, *refused = map(
            json.loads,
            [
                x
                for x in (folder / f"exchanges.{index}.out").read_text().splitlines()
                if x[0] == "{"
            ],
        )
        # 43 sizes above 32 kB are 4 size classes: 128, 256, 512 kB and 1 MB
        assert compiled == {"compilations": 4}
        assert "No such file or directory: '/nowhere0'" in refused[0]["refused"]
        assert "differ in lr: process 0 (host" in refused[1]["refused"]
        assert "has 0.01, process 1" in refused[1]["refused"]
        code, _, lines = ended[f"exchanges.{index}"]
        assert code == 2 and len(lines) == 1 and lines[0].startswith("error: at exchange 89 ")
        assert "other_exchange, process 1" in lines[0] and lines[0].endswith("data and folder")


def test_an_error_on_one_process_ends_both_at_once_with_its_reason(failures):
    _, ended = failures
    reason = "row 3 of rows.jsonl has no answer"
    assert ended["raises.1"][0] == 2 and ended["raises.1"][2] == [f"error: {reason}"]
    code, seconds, (line,) = ended["raises.0"]
    assert code == 2 and seconds < 30
    assert line.startswith("error: process 1 (host ") and f"stopped: {reason}; run the" in line
    assert ended["bug.0"][0] == 1 and ended["bug.0"][2][0].startswith("Traceback")
    assert ended["bug.1"][0] == 2 and "KeyError: 'weights'" in ended["bug.1"][2][0]


@pytest.mark.parametrize("name", ["kill 1", "kill 0", "stop 1", "stop 0"])
def test_a_process_that_dies_or_hangs_ends_the_other_with_a_line_that_names_it(failures, name):
    lost = int(name[-1])
    code, seconds, (line,) = failures[1][f"{name}.{1 - lost}"]
    assert code == 1 and 5 < seconds < 40  # lost after 6 s, in production after 30 s
    assert line.startswith(f"error: process {lost} (host ") and "died or hangs; run the" in line


@pytest.mark.parametrize("name", ["places", "programs", "sleeps"])
def test_processes_that_wait_for_each_other_at_different_places_end(failures, name):
    """Both send heartbeats, so only the places show that they would wait for ever."""
    for index in range(2):
        code, seconds, (line,) = failures[1][f"{name}.{index}"]
        assert code == 1 and 4 < seconds < 30
        assert re.fullmatch(
            r"error: process 0 \(host .*\) waits at cluster_workers.py:\d+ (wait_in_collective|"
            r"run_programs|wait_in_exchange) after [01] exchanges, process 1 \(host .*\) at "
            r"cluster_workers.py:\d+ (wait_in_exchange|run_programs|sleeps) after [01], for \d+ s so far: the processes do not run the same steps. "
            "Give all .* run the same command again to continue from the last save",
            line,
        ), line


def test_damage_in_the_part_of_one_process_is_found_by_two_processes_and_by_one(failures):
    """A flipped bit changes numbers silently; a file that is cut fails on its reader alone."""
    folder, ended = failures
    path = folder / "checkpoint" / "stages" / "1000003"
    for index in range(2):
        assert ended[f"damaged.{index}"][::2] == [0, []]
        lines = (folder / f"damaged.{index}.out").read_text().splitlines()
        found = [json.loads(line) for line in lines if line[0] == "{"]
        assert [line["how"] for line in found] == ["changed", "cut", "changed"]
        reasons = ["params['w'] does not match its checksum", "OUT_OF_RANGE: ", "params['w'] does"]
        for line, reason in zip(found, reasons, strict=True):
            assert f"stage 1, step 3 ({path}) is damaged: {reason}" in line["refused"]
    kept = Checkpoints(folder / "checkpoint", async_save=False)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    w = jax.ShapeDtypeStruct((64, 300), np.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    with pytest.raises(CheckpointDamaged, match=f"{path} is damaged: .*does not match its check"):
        kept.restore("stages", 1, 3, {"params": {"w": w}})
    kept.close()


def test_damaged_samples_are_refused_on_both_processes(failures):
    """The first process reads the samples, and each its own part."""
    folder, ended = failures
    for index in range(2):
        assert ended[f"damaged samples.{index}"][::2] == [0, []]
        lines = (folder / f"damaged samples.{index}.out").read_text().splitlines()
        whole, part = [json.loads(line)["refused"] for line in lines if line[0] == "{"]
        assert whole == "samples/stage1.jsonl was changed since it was written; restore it"
        assert part.startswith("samples/.stage1.jsonl.partial1: expected one JSON object per line")


def test_responses_that_move_to_another_process_have_equal_log_probabilities(failures):
    folder, ended = failures
    for index in range(2):
        assert ended[f"moved responses.{index}"][::2] == [0, []]
        lines = (folder / f"moved responses.{index}.out").read_text().splitlines()
        (found,) = [json.loads(line) for line in lines if line[0] == "{"]
        assert found["shards"] == [index, index + 2] and found["saved"] > 0.2
        assert found["sent" if index == 0 else "received"] > 0
        assert found["difference"] < 1e-5 < found["scale"]
        assert found["joined"] < 1e-5 and found["moved_in_joined"]


def test_a_process_that_works_may_let_another_wait(failures):
    """The time is counted as waiting, not as a part of the phase around it."""
    folder, ended = failures
    assert [ended[f"works.{index}"][0] for index in range(2)] == [0, 0]
    said = [(folder / f"works.{index}.out").read_text() for index in range(2)]
    waited = [json.loads(text.splitlines()[-1])["waited"] for text in said]
    assert waited[0] < cluster_workers.WAIT_SECONDS < waited[1]


def test_sigterm_to_one_process_ends_both_after_the_same_exchange(failures):
    for index in range(2):
        code, _, (line,) = failures[1][f"sigterm.{index}"]
        assert code == 0 and line.startswith("stopped by SIGTERM outside of training")


def test_processes_with_one_difference_are_refused_at_the_start(tmp_path):
    expected = {
        "learning rate": 'differ in config.train.lr: process 0 .* has "0.01", process 1 .* has "0.5"',
        "data": "differ in tasks.mine.test: rows.jsonl: process 0",
        "batch": 'differ in config.train.batch: process 0 .* has "4", process 1 .* has "2"',
        "steps": "differ in config.stages: process 0 .*process 1 .*; start all processes with",
        "code": 'cptjax/common/files.py: process 0 .* has "hash 0", process 1 .* has "hash 1"',
        "folder": "process 1 .* is another folder than on process 0 .*; give a folder that all",
    }
    ended = cluster_workers.run_pairs(tmp_path, *expected)
    for name, text in expected.items():
        for index in range(2):
            code, seconds, (line,) = ended[f"{name}.{index}"]
            assert code == 2 and seconds < 30 and re.search(text, line), line


@pytest.mark.slow
def test_a_run_ends_together_when_one_process_cannot_go_on(tmp_path):
    """Then the run that was stopped in an evaluation continues to its end, with uneven rows."""
    names = ("full disk", "reward", "interrupted", "then", "continued")
    ended = cluster_workers.run_pairs(tmp_path, *names, limit=400)
    for index in range(2):
        code, _, lines = ended[f"full disk.{index}"]
        assert code == 2 and "got 0.0 MB of free disk" in lines[-1]
        code, _, lines = ended[f"reward.{index}"]
        assert code == 2 and "ZeroDivisionError" in lines[-1]
        code, _, lines = ended[f"interrupted.{index}"]
        assert code == 0 and "stopped by SIGTERM" in lines[-1]
    assert [ended[f"continued.{index}"][0] for index in range(2)] == [0, 0]
    assert "continuing from step 1 of stage 1" in "".join(ended["continued.0"][2])
    steps = run_helpers.metrics_lines(tmp_path / "interrupted" / "run")
    assert [line["step"] for line in steps] == [1, 2]  # seven rows, a batch of four


@pytest.fixture(scope="module")
def short_runs(tmp_path_factory):
    """The same run: on the disk, in a bucket, and continued after it lost a process."""
    folder = tmp_path_factory.mktemp("short")
    if not gcs_server.INSTALLED:
        names = ("killed", "undisturbed", "then", "resumed")
        yield folder, cluster_workers.run_pairs(folder, *names, limit=400), None
        return
    names = ("killed", "undisturbed", "in a bucket", "then", "resumed")
    with pytest.MonkeyPatch.context() as patch, gcs_server.serve_bucket(folder) as server:
        server.use(patch, folder / "cache")
        address = f"gs://{gcs_server.BUCKET}/run"
        patch.setenv("BUCKET_WORKDIR", address)
        yield folder, cluster_workers.run_pairs(folder, *names, limit=400), address


@pytest.mark.slow
def test_a_run_that_lost_a_process_continues_to_the_same_end(short_runs):
    """The other process ends with a line that names the one that was killed with SIGKILL."""
    folder, ended, _ = short_runs
    assert ended["killed.1"][0] == -signal.SIGKILL and ended["killed.0"][0] == 1
    assert re.match(
        r"error: process 1 \(host .*\) .* died or hangs; run the same", ended["killed.0"][2][-1]
    )
    for index in range(2):
        assert ended[f"undisturbed.{index}"][0] == ended[f"resumed.{index}"][0] == 0
    states = [run_helpers.run_state(folder / n / "run") for n in ("undisturbed", "killed")]
    run_helpers.assert_same(*states)


@pytest.mark.slow
@pytest.mark.skipif(not gcs_server.INSTALLED, reason="needs the packages of the extra gcs")
def test_two_processes_in_a_bucket_equal_two_on_the_local_disk(short_runs, tmp_path):
    folder, ended, address = short_runs
    assert [ended[f"in a bucket.{index}"][0] for index in range(2)] == [0, 0]
    whole = run_helpers.run_state(folder / "undisturbed" / "run")
    run_helpers.assert_same(whole, run_helpers.bucket_state(address, tmp_path))


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("CPTJAX_LONG"), reason="15 kills each: set CPTJAX_LONG=1")
def test_kills_and_damaged_files_change_no_result(tmp_path):
    """As in test_resume, which kills runs of one process."""
    pair = Workers(2, tmp_path / "pair")
    try:
        for seed, name in enumerate(("mixed", "filter")):
            job = killed_runs.job(tmp_path, name)
            (tmp_path / name).mkdir()
            workdir = tmp_path / name / "whole"
            outcome = pair.run(job | {"workdir": str(workdir)})
            run = killed_runs.KilledRun(pair, job, workdir, outcome.events, seed)
            run.kill(15)
            assert run.outcomes["killed"] == 15 and run.outcomes["ended"]
    finally:
        pair.close()


def test_a_mesh_without_batch_shards_for_every_process_is_refused(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda *_: 2)
    with pytest.raises(ValueError, match=r"1 shards \(data x fsdp\) for 2 processes.*mesh.model"):
        model_context.load_model_context(
            run_helpers.config().model, {"data": 1, "fsdp": 1, "model": 8}, (32,)
        )


@pytest.mark.slow
@pytest.mark.parametrize(("method", "count"), [("sft", 4), ("grpo", 2)])
def test_several_processes_equal_one_and_another_mesh_continues(
    tmp_path, monkeypatch, method, count
):
    inside, settings = tmp_path / "inside", sections(tmp_path, method)
    see(monkeypatch, count)
    one = driver.run(run_helpers.config(method, **settings), tmp_path / "one")
    job = {"method": method, "sections": settings, "workdir": str(tmp_path / "several")}
    several = Workers(count, tmp_path / "workers", devices=count)
    try:
        outcome = several.run(job | {"copy": str(inside)})
    finally:
        several.close()
    first, *others = outcome.matrices
    assert others == [first] * (count - 1) and np.allclose(first, one)
    a, b = (run_helpers.read_records(tmp_path / name) for name in ("one", "several"))
    assert a.keys() == b.keys() and a["matrix.csv"] == b["matrix.csv"]
    assert_near(a, b)
    assert method != "sft" or max(line.get("penalty", 0) for line in a["metrics.jsonl"]) > 1e-3
    # One process with another mesh continues from the copy.
    see(monkeypatch, 2)
    mesh = {"data": 1, "fsdp": 1, "model": 2}
    driver.run(run_helpers.config(method, **settings, mesh=mesh), inside)
    assert "continuing from step 1 of stage 2" in (inside / "run.log").read_text()
    assert_near(a, run_helpers.read_records(inside))


def assert_near(a: dict, b: dict) -> None:
    """Assert that the records of two runs are equal within rounding."""
    rows = [list(csv.DictReader(r["evals.csv"].decode().splitlines())) for r in (a, b)]
    for x, y in zip(*rows, strict=True):
        values = [{k: float(v.pop(k) or 0) for k in ("value", "stderr")} for v in (x, y)]
        assert x == y and values[0] == pytest.approx(values[1], rel=1e-5, abs=1e-6)
    for x, y in zip(a["metrics.jsonl"], b["metrics.jsonl"], strict=True):
        assert x.keys() == y.keys() and (x["tokens"], x["rollouts"]) == (y["tokens"], y["rollouts"])
        for name in ("loss", "penalty"):  # the penalty of EWC is as large as the Fisher information
            assert x.get(name, 0) == pytest.approx(y.get(name, 0), rel=1e-4, abs=1e-6)
        for key in (
            "reward",
            "reward/shaped",
            "truncated",
            "response_length/mean",
            "advantage/std",
            "frac_reward_zero_std",
        ):
            assert x.get(key, 0) == pytest.approx(y.get(key, 0), rel=1e-6, abs=1e-7), key
    text = lambda s: [
        (r["id"], r["response"], r["reward"]) for r in map(json.loads, s.decode().splitlines())
    ]
    for name in (n for n in a if n.startswith("rollouts/")):
        assert text(a[name]) == text(b[name])
