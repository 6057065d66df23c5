"""A run in a bucket ends in the bits of a run on the local disk, whatever interrupts it."""

import asyncio
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from types import SimpleNamespace

import gcs_server
import jax
import numpy as np
import pytest
import run_helpers
from device_fixtures import one_device  # noqa: F401

from cptjax import api
from cptjax.common import buckets
from cptjax.continual import checkpoint, driver, reevaluate, workdir
from cptjax.evaluation import report

pytestmark = [
    pytest.mark.usefixtures("one_device"),
    pytest.mark.skipif(
        not gcs_server.INSTALLED, reason="needs the packages of pip install '.[gcs,test]'"
    ),
]
SECTIONS = {"steps": 4, "eval": {"limit": 4, "batch": 4}}
TEXTS = {  # two stages without images
    "model": run_helpers.TEXT,
    "tasks": {t: {"task": "synthetic", "family": t} for t in ("facts", "arithmetic")},
    "stages": ({"task": "facts", "steps": 4}, {"task": "arithmetic", "steps": 4}),
}
KILL = int(signal.SIGKILL)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with gcs_server.serve_bucket(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture
def bucket(server, tmp_path, monkeypatch):
    """The address of a folder of this test alone."""
    server.use(monkeypatch, tmp_path / "cache")
    return f"gs://{gcs_server.BUCKET}/{tmp_path.name}"


def run_here(folder, **more):
    return driver.run(run_helpers.config("sft", **SECTIONS | more), folder)


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """A run on the local disk in this process."""
    folder = tmp_path_factory.mktemp("local") / "run"
    run_here(folder)
    return folder


@pytest.fixture(scope="module")
def finished(local, server, tmp_path_factory):
    """The same run in a bucket, made once; tests only read it."""
    with pytest.MonkeyPatch.context() as patch:
        cache = tmp_path_factory.mktemp("finished")
        for name, value in server.environment(cache).items():
            patch.setenv(name, value)
        patch.setattr(buckets, "_local", threading.local())
        run_here(f"gs://{gcs_server.BUCKET}/finished/run")
    return f"gs://{gcs_server.BUCKET}/finished/run"


def test_a_run_in_a_bucket_equals_one_on_the_local_disk(local, finished, bucket, tmp_path):
    run_helpers.assert_same(
        run_helpers.run_state(local), run_helpers.bucket_state(finished, tmp_path / "objects")
    )
    assert (tmp_path / "objects" / "report.html").is_file()
    log = (tmp_path / "objects" / "run.log").read_text()
    assert f"done: {finished}/report.html" in log and str(buckets.copies_folder()) not in log
    assert not (tmp_path / "objects" / ".lock").exists()


def test_tools_read_a_run_in_a_bucket(local, finished, bucket):
    """Each has a copy of its own, made at its start."""
    config = run_helpers.config("sft", **SECTIONS)
    rows = reevaluate.reevaluate_stage(config, finished, tasks=("colour",))
    recorded = [r for r in run_helpers.read_evals(local) if r["stage"] == "2"]
    expected = {r["metric"]: float(r["value"]) for r in recorded if r["task"] == "colour"}
    assert rows and all(row["value"] == expected[row["metric"]] for row in rows)
    conversation = [[{"role": "user", "content": "Which colour?"}]]
    models = [api.load(folder, dtype="float32", stage=1) for folder in (local, finished)]
    assert len({str(api.generate(model, conversation)) for model in models}) == 1
    page = report.write_report([finished])
    assert buckets.shown(page) == f"{finished}/report.html"


def test_a_second_process_is_refused_in_one_line(bucket, tmp_path, monkeypatch):
    """It is on another host, so it has another copy and no lock of the operating system."""
    first = buckets.write_path(f"{bucket}/run", 0)
    with workdir.lock_workdir(first):
        with pytest.raises(ValueError, match="is in use by process") as error:
            run_here(f"{bucket}/run")
        assert "renewed" not in str(error.value)  # one of this host, by the operating system
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
        with pytest.raises(ValueError, match="which renewed its lock") as error:
            run_here(f"{bucket}/run")
        assert f"remove {bucket}/run/.lock" in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("moment", ["before a save", "during a save"])
def test_the_server_stops_in_the_middle(local, bucket, server, tmp_path, monkeypatch, moment):
    """The run ends in one line with the address; the same command ends in the same bits."""
    monkeypatch.setattr(buckets, "RETRY_SECONDS", 2.0)
    # gcsfs tries a request six times, with pauses of 31 seconds in all.
    short = SimpleNamespace(sleep=lambda seconds: asyncio.sleep(seconds / 20))
    monkeypatch.setattr("gcsfs.retry.asyncio", short)
    saves, save = [], checkpoint.Checkpoints.save
    pushes, push = [], buckets.FolderCopy.push

    def stopping_save(self, *args):
        save(self, *args)
        saves.append(args)
        if len(saves) == 2 and moment == "during a save":
            server.stop()

    def stopping_push(self):
        pushes.append(self)
        if len(saves) == 2 and moment == "before a save" and server.process.poll() is None:
            server.stop()
        push(self)

    monkeypatch.setattr(checkpoint.Checkpoints, "save", stopping_save)
    monkeypatch.setattr(buckets.FolderCopy, "push", stopping_push)
    try:
        with pytest.raises(OSError, match=f"{bucket}/run") as error:
            run_here(f"{bucket}/run")
    finally:
        server.stop()
        server.start()
    assert "\n" not in str(error.value) and "run the same command again" in str(error.value)
    monkeypatch.setattr(checkpoint.Checkpoints, "save", save)
    monkeypatch.setattr(buckets.FolderCopy, "push", push)
    run_here(f"{bucket}/run")
    run_helpers.assert_same(
        run_helpers.run_state(local),
        run_helpers.bucket_state(f"{bucket}/run", tmp_path / "objects"),
    )


def test_a_damaged_checkpoint_in_a_bucket_is_set_aside(bucket, monkeypatch, capsys):
    """Nothing in a bucket can be renamed, so its objects are copied and deleted."""
    tree = {"w": jax.numpy.arange(64.0)}
    like = {"w": jax.ShapeDtypeStruct((64,), np.float32, sharding=tree["w"].sharding)}
    folder = buckets.write_path(f"{bucket}/run", 0)
    kept = checkpoint.Checkpoints(checkpoint.checkpoint_folder(folder), keep=3)

    def read(kind, stage, step):
        return kept.restore(kind, stage, step, {"params": like})["params"]["w"], step

    for step in (2, 4):
        kept.save("steps", 1, step, {"params": {"w": tree["w"] + step}}, {})
    kept.wait()
    for name, blob in buckets.list_objects(f"{bucket}/run/checkpoints/steps/1000004").items():
        if "/d/" in name:
            blob.upload_from_string(b"x" * 100)
    found, step = kept.newest(read)
    assert step == 2 and np.array_equal(found, tree["w"] + 2)
    assert "checkpoint steps of stage 1, step 4 cannot be read" in capsys.readouterr().err
    damaged = buckets.list_objects(f"{bucket}/run/checkpoints/damaged/steps-stage1-step4")
    assert damaged and kept.newest_name() == (1, 4, "steps")
    kept.save("steps", 1, 4, {"params": {"w": tree["w"] + 5}}, {})
    kept.wait()
    assert np.array_equal(kept.newest(read)[0], tree["w"] + 5)
    kept.move_all(folder / "old" / "checkpoints")
    assert kept.found() == []
    assert buckets.list_objects(f"{bucket}/run/old/checkpoints/steps/1000004")
    kept.save("stages", 1, 4, {"params": tree}, {})
    kept.remove_steps(1)
    kept.close()
    checkpoint.remove_checkpoints(folder)
    assert not buckets.list_objects(f"{bucket}/run/checkpoints")


WORKER = """
import sys
import jax
from cptjax.common import buckets, cluster, console, distributed, files
from cptjax.continual import workdir
cluster.connect(sys.argv[1], 2, int(sys.argv[2]))
index = distributed.process_index()
console.set_console_mode("silent")
folder = buckets.write_path(sys.argv[3], index)
with workdir.lock_workdir(folder), console.keep_log(folder / (f"run.{index}.log" if index else "run.log")):
    path = folder / "corpus" / "stage1.jsonl"
    if not index:
        files.write_text(path, "{}")
    distributed.wait_for_file(path)
    assert path.read_text() == "{}"
    if not index:
        files.write_text(folder / "evals.csv", "a")
assert (folder / "evals.csv").read_text() == "a"  # all hosts have what the first has written
cluster.disconnect()
"""


def test_two_processes_share_files_through_the_bucket(bucket, server, tmp_path):
    """Each has a local copy of its own, as on two hosts; the second one puts only its log."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    running = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, address, str(index), f"{bucket}/run"],
            env=run_helpers.environment(**server.environment(tmp_path / "cache")),
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    ends = [(process.communicate(timeout=300)[1], process.returncode) for process in running]
    assert [code for _, code in ends] == [0, 0], ends
    assert sorted(buckets.list_objects(f"{bucket}/run")) == [
        "corpus/stage1.jsonl",
        "evals.csv",
        "run.1.log",
        "run.log",
    ]


OTHER = """
import sys
from cptjax.common import buckets, files
from cptjax.continual import workdir
root = buckets.write_path(sys.argv[1], 0)
with workdir.lock_workdir(root / "a"):
    lines = files.LineFile(root / "a" / "metrics.jsonl")
    lines.append({"step": 1})
    buckets.push(root / "a")
    lines.append({"step": 2})
    print("ready", flush=True)
    sys.stdin.readline()
    lines.append({"step": 3})
"""


def test_a_comparison_leaves_the_files_of_another_process_of_this_host(bucket, server, tmp_path):
    """Both write runs of one folder, in the same local copy."""
    root = buckets.write_path(bucket, 0)
    other = subprocess.Popen(
        [sys.executable, "-c", OTHER, bucket],
        env=run_helpers.environment(**server.environment(tmp_path / "cache")),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout.readline() == "ready\n"
    with workdir.lock_workdir(root / "b"):
        (root / "b" / "evals.csv").write_text("x")
        with workdir.lock_workdir(root, wait=True, name=".comparison.lock") as folder:
            assert (folder / "b" / "evals.csv").read_text() == "x"
            assert (folder / "a" / "metrics.jsonl").read_text() == '{"step": 1}\n'
            (folder / "report.html").write_text("page")
    other.communicate("go\n", timeout=60)
    objects = buckets.list_objects(bucket)
    assert objects["report.html"].download_as_bytes() == b"page"
    lines = objects["a/metrics.jsonl"].download_as_bytes().decode().splitlines()
    assert lines == ['{"step": 1}', '{"step": 2}', '{"step": 3}']


def test_a_model_is_put_before_the_config_that_says_that_it_is_made(bucket, monkeypatch):
    folder, put = buckets.write_path(bucket, 0), []
    monkeypatch.setattr(buckets, "_put", lambda path, address: put.append(address))
    for name in ("hf/config.json", "hf/model.safetensors", "progress.json", "z.csv"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    copy = buckets.FolderCopy(folder)
    renewed = []
    copy.lock = SimpleNamespace(renew=lambda after: renewed.append(len(put)))
    copy.push()
    assert [address.removeprefix(f"{bucket}/") for address in put] == [
        "hf/model.safetensors",
        "z.csv",
        "hf/config.json",
        "progress.json",
    ]
    assert renewed == [0, 1, 2, 3]  # before each file


def kills(count: int, length: float, seed: int) -> list[tuple[int, float]]:
    rng = random.Random(seed)
    return [(KILL, rng.uniform(0.3, length)) for _ in range(count)]


@pytest.mark.parametrize("place", ["bucket", "local"])
def test_killed_runs_end_in_the_same_bits(bucket, server, tmp_path, place):
    """With CPTJAX_LONG, ten kills in a bucket and ten on the local disk; else two in a bucket."""
    count = 10 if os.environ.get("CPTJAX_LONG") else 2
    if place == "local" and count == 2:
        pytest.skip("tests/test_resume.py kills runs on the local disk; set CPTJAX_LONG=1")
    more = server.environment(tmp_path / "cache")
    plan = {"method": "grpo", "sections": SECTIONS | TEXTS, "log": str(tmp_path / "log")}
    whole = tmp_path / "whole"
    again = (KILL, None)
    run_helpers.run_processes({**plan, "workdir": str(whole), "signals": [again]}, **more)
    target = f"{bucket}/run" if place == "bucket" else str(tmp_path / "killed")
    # Compiled programs are in the cache now, so that the first undisturbed run gives the time.
    (metrics,) = run_helpers.run_processes(
        {**plan, "workdir": f"{target}-time", "signals": [again]}, **more
    )
    metrics = run_helpers.run_processes(
        {**plan, "workdir": target, "signals": [*kills(count, metrics["seconds"], 3), again]},
        **more,
    )
    assert metrics[-1]["code"] == 0, metrics[-1]["said"]
    assert sum(m["code"] == -KILL for m in metrics) >= count // 2
    state = run_helpers.bucket_state(target, tmp_path / "objects") if place == "bucket" else None
    run_helpers.assert_same(
        run_helpers.run_state(whole), state or run_helpers.run_state(tmp_path / "killed")
    )
