"""Two processes reach the same result as one process with as many devices."""

import json
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
import run_helpers
from PIL import Image

from cptjax.data import model_context

# Rows of a task whose first half has images: in an evaluation one process has all of them, and
# longer rows.
ROWS = 6
MORE = {"sft": {"method": {"penalty": {"name": "ewc", "coef": 10.0, "samples": 3}}}, "grpo": {}}
SCRIPT = """
import json, sys
sys.path[:0] = [{tests!r}]
import jax
plan = json.loads(sys.argv[1])
if plan["count"] > 1:
    jax.distributed.initialize(plan["address"], plan["count"], plan["index"])
else:
    jax.config.update("jax_num_cpu_devices", 2)
import run_helpers
from cptjax.continual import driver
assert jax.device_count() == 2
print(json.dumps(driver.run(run_helpers.config(plan["method"], **plan["sections"]), plan["workdir"]).tolist()))
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def sections(folder) -> dict:
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
        "stages": ({"task": "facts", "steps": 2}, {"task": "mixed", "steps": 2}),
        "tasks": {"facts": facts, "mixed": mixed},
        "eval": {"limit": ROWS, "batch": 4, "every": 1, "mini": 4},
        "data": {"buckets": (16, 32)},
    }


def started(method: str, workdir, count: int) -> list[subprocess.Popen]:
    about = {
        "method": method,
        "sections": sections(workdir.parent) | MORE[method],
        "workdir": str(workdir),
    }
    plan = about | {"count": count, "address": f"localhost:{free_port()}"}
    script = SCRIPT.format(tests=str(run_helpers.ROOT / "tests"))
    orders = [[sys.executable, "-c", script, json.dumps(plan | {"index": i})] for i in range(count)]
    return [
        subprocess.Popen(
            o,
            env=run_helpers.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for o in orders
    ]


def ended(processes: list[subprocess.Popen]) -> list[list]:
    said = []
    try:
        said = [p.communicate(timeout=600) for p in processes]
    finally:
        for p in processes:
            p.kill()
    for p, (_, err) in zip(processes, said, strict=True):
        assert p.returncode == 0, err[-3000:]
    return [json.loads(out.splitlines()[-1]) for out, _ in said]


def test_a_mesh_without_batch_shards_for_every_process_is_refused(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda *_: 2)
    with pytest.raises(ValueError, match=r"1 shards \(data x fsdp\) for 2 processes.*mesh.model"):
        model_context.load_model_context(
            run_helpers.config().model, {"data": 1, "fsdp": 1, "model": 8}, (32,)
        )


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sft", "grpo"])
def test_two_processes_equal_one(tmp_path, method):
    (one,) = ended(started(method, tmp_path / "one", 1))
    first, second = ended(started(method, tmp_path / "two", 2))
    assert first == second and np.allclose(first, one)
    assert (tmp_path / "one" / "matrix.csv").read_bytes() == (
        tmp_path / "two" / "matrix.csv"
    ).read_bytes()
    a, b = run_helpers.read_records(tmp_path / "one"), run_helpers.read_records(tmp_path / "two")
    assert a.keys() == b.keys() and a["evals.csv"] == b["evals.csv"]
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
    assert method != "sft" or max(line.get("penalty", 0) for line in a["metrics.jsonl"]) > 1e-3
    text = lambda s: [
        (r["id"], r["response"], r["reward"]) for r in map(json.loads, s.decode().splitlines())
    ]
    for name in (n for n in a if n.startswith("rollouts/")):
        assert text(a[name]) == text(b[name])
