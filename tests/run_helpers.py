"""Runs that take seconds, and the comparison of two runs."""

import csv
import dataclasses
import gc
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from configs.base import METHODS
from configs.base import get_config as base
from cptjax.models.families import PRESETS

ROOT = Path(__file__).parents[1]
# The models of runs have one layer, a fifth less to compile; the tests of models have more.
SMALL_TEXT, SMALL = (
    dataclasses.replace(
        PRESETS[name], text=dataclasses.replace(PRESETS[name].text, depth=1, mlp=64)
    )
    for name in ("tiny_qwen2", "tiny")
)
SMALL = dataclasses.replace(
    SMALL, vision=dataclasses.replace(SMALL.vision, depth=1, full_blocks=(0,))
)
TASKS = ("colour", "digit")
TIMES = ("seconds", "perf/")  # what may differ between two equal runs
METHOD = {
    "sft": METHODS["sft"],
    "grpo": METHODS["grpo"] | {"kl_coef": 0.05},
    "iterative": METHODS["iterative_sft"] | {"refresh": "2"},
    "sdft": METHODS["sdft"],
}


def config(method: str = "sft", /, steps: int = 3, **sections: Any) -> ConfigDict:
    """Two stages with a synthetic task each; sections are updated by name."""
    PRESETS.update(small=SMALL, small_text=SMALL_TEXT)
    c = base()
    c.model.update(
        preset="small", compute_dtype="float32", min_pixels=1024, max_pixels=1024, remat="none"
    )
    c.data.update(template="none", prompt_limit=32, buckets=(32,), limit=48, prefetch=1)
    c.tasks = ConfigDict({t: dict(task="synthetic", family=t, side=32) for t in (*TASKS, "facts")})
    c.tasks.words = dict(task="synthetic", family="facts", world=1)
    c.stages = tuple(dict(task=t, steps=steps) for t in TASKS)
    c.train.update(batch=4, lr=1e-2, b2=0.99)
    c.rollout.update(group=2, max_new_tokens=4, check_every=4)
    c.eval.update(limit=8, batch=8, max_new_tokens=4)
    c.checkpoint.update(every=2)
    c.method.update(METHOD[method])
    for name, values in sections.items():
        with c.unlocked(), c.ignore_type():
            if isinstance(values, dict) and name in c and name not in ("arms", "tasks", "prestage"):
                c[name].update(values)
            else:
                c[name] = ConfigDict(values) if isinstance(values, dict) else values
    return c


TEXT = {"preset": "small_text"}  # for runs without images: a third less to compile
TEXT_STAGES = ({"task": "facts", "steps": 1}, {"task": "words", "steps": 1})
QUICK = {"steps": 2, "eval": {"limit": 4, "batch": 4}}


def run_quickly(workdir: Path, method: str = "sft", /, **sections: Any) -> tuple[ConfigDict, Any]:
    """Run two stages of two steps in this process; return the config and the accuracy matrix."""
    from cptjax.continual import driver

    c = config(method, **{**QUICK, **sections})
    return c, driver.run(c, workdir)


def metrics_lines(workdir: Path, events: bool = False) -> list[dict[str, Any]]:
    """The training steps in metrics.jsonl, or its other events."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if ("event" in row) == events]


def environment(**more: str) -> dict[str, str]:
    """One device, and the tests' cache of compiled programs."""
    return (
        os.environ
        | {
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(ROOT),
            "JAX_COMPILATION_CACHE_DIR": os.environ["JAX_COMPILATION_CACHE_DIR"],
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "HF_HUB_OFFLINE": "1",
            "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {os.environ['CPTJAX_TEST_XLA_FLAGS']}",
        }
        | more
    )


def collect_rarely() -> None:
    """Look for cycles of garbage rarely, and never in what is imported.

    Tracing makes very many objects, the default collects after each 700, and jax does some work
    each time: a tenth of all time. In a fork a collection would also copy the pages of memory that
    it shares with its parent.
    """
    gc.set_threshold(50_000, 10, 10)
    gc.freeze()


def process(plan: dict[str, Any], **more: str) -> subprocess.Popen:
    """Start a process that carries out `plan`, see `main`."""
    order = [sys.executable, __file__, json.dumps(plan)]
    return subprocess.Popen(
        order,
        env=environment(**more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


def run_processes(plan: dict[str, Any], limit: float = 900, **more: str) -> list[dict[str, Any]]:
    """Carry out `plan` in a process.

    Return seconds, exit code and output of each of its children.
    """
    running = process(plan, **more)
    out, err = running.communicate(timeout=limit)
    assert running.returncode == 0, err[-2000:]
    return [json.loads(line) for line in out.splitlines()]


def run_state(workdir: Path) -> dict[str, Any]:
    """Everything that two equal runs share: their records, and the arrays saved at the end of each
    stage.
    """
    return read_records(workdir) | {
        f"stage {n}: {path}": x
        for n in saved_stages(workdir)
        for path, x in stage_arrays(workdir, n).items()
    }


def bucket_state(address: str, folder: Path) -> dict[str, Any]:
    """Everything that two equal runs share, from a copy of all objects."""
    from cptjax.common import buckets

    shutil.rmtree(folder, ignore_errors=True)
    for name, blob in buckets.list_objects(address).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        blob.download_to_filename(str(folder / name))
    return run_state(folder)


def read_records(workdir: Path) -> dict[str, Any]:
    """The csv files, rollouts and predictions, and metrics without their times."""
    found: dict[str, Any] = {
        name: (workdir / name).read_bytes() for name in ("matrix.csv", "evals.csv")
    }
    for path in sorted(
        p
        for folder in ("rollouts", "predictions", "corpus", "filters")
        for p in workdir.glob(f"{folder}/*.jsonl")
    ):
        found[str(path.relative_to(workdir))] = path.read_bytes()
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    found["metrics.jsonl"] = [
        {k: v for k, v in line.items() if not k.startswith(TIMES)} for line in lines
    ]
    return found


def saved_stages(workdir: Path) -> list[int]:
    return sorted(
        int(p.name) for p in (workdir / "checkpoints" / "stages").iterdir() if p.name.isdigit()
    )


def stage_arrays(workdir: Path, number: int) -> dict[str, bytes]:
    """The arrays saved at the end of a stage, by name, as bytes."""
    import jax
    import orbax.checkpoint as ocp

    folder = workdir.absolute() / "checkpoints" / "stages" / str(number) / "params"
    with ocp.PyTreeCheckpointer() as reader:  # of any number of processes
        tree = reader.metadata(folder).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        tree = reader.restore(folder, restore_args=as_numpy)
    return {
        jax.tree_util.keystr(path): np.asarray(x).tobytes()
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    """Assert equality byte for byte; name what differs."""
    assert a.keys() == b.keys()
    different = [name for name in a if a[name] != b[name]]
    assert not different, f"{len(different)} of {len(a)} differ: {different[:5]}"


def read_evals(workdir: Path) -> list[dict[str, str]]:
    with (workdir / "evals.csv").open() as file:
        return list(csv.DictReader(file))


def child(method: str, workdir: str, sections: dict[str, Any], log: str, only: str = "") -> int:
    """A run as launch/train.py does it, in a fork of this process; returns its id."""
    pid = os.fork()
    if pid:
        return pid
    from cptjax.common import cli, console
    from cptjax.continual import driver

    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    console.set_console_mode("plain")
    sys.argv[1:] = []
    cli.run_launcher(lambda: driver.run(config(method, **sections), workdir, only=only))
    os._exit(0)


def main() -> None:
    """Start the run once per item of `plan["signals"]`, each in a fresh process, and send a signal after some seconds (None = never).

    Or start a process per item (workdir, --only) of `plan["together"]`, all at the same time.

    The processes are forks of this one, which imports everything but starts no device: starting Python takes longer than the run.
    """
    from cptjax.continual import driver  # noqa: F401

    collect_rarely()
    plan = json.loads(sys.argv[1])
    logs = [
        f"{plan.get('log') or folder}.{i}.log"
        for i, (folder, _) in enumerate(plan.get("together", ()))
    ]
    pids = [
        child(plan["method"], folder, plan["sections"], log, only)
        for log, (folder, only) in zip(logs, plan.get("together", ()), strict=True)
    ]
    for pid, log in zip(pids, logs, strict=True):
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(json.dumps({"code": code, "said": Path(log).read_text()}), flush=True)
    for number, seconds in plan.get("signals", ()):
        log = plan.get("log") or f"{plan['workdir']}.log"
        began, code = time.monotonic(), None
        pid = child(plan["method"], plan["workdir"], plan.get("sections", {}), log)
        while code is None and (seconds is None or time.monotonic() - began < seconds):
            code = ended(pid)
            time.sleep(0.01)
        sent = time.monotonic()
        if code is None:
            os.kill(pid, number)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        took = {"seconds": sent - began, "after": time.monotonic() - sent}
        print(json.dumps({"code": code, **took, "said": Path(log).read_text()}), flush=True)


def ended(pid: int) -> int | None:
    """The exit code, or None while it runs."""
    done, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


if __name__ == "__main__":
    main()
