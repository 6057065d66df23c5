"""Programs of several processes, for tests of what happens when one of them fails.

The processes are forks of this one, which imports everything but starts no device.
"""

import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

LOST_SECONDS = 6.0  # instead of 30
WAIT_SECONDS = 4.0  # instead of 10 minutes


def exchanges(index: int) -> None:
    """Values of many sizes, decisions and comparisons; at the end another exchange on each."""
    import jax

    from cptjax.common import distributed

    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: (
            compiled.append(event) if event.endswith("backend_compile_duration") else None
        )
    )
    for size in [*range(0, 4000, 100), *range(40_000, 900_000, 20_000)]:
        values = distributed.gather_objects((index, bytes(size + index)))
        assert [(i, len(v)) for i, v in values] == [(0, size), (1, size + 1)]
    say(compilations=len(compiled))
    assert distributed.decide_on_main(lambda: f"by {index}") == "by 0"
    assert distributed.gather_objects("x" * 50_000 * index) == ["", "x" * 50_000]
    for act in (
        lambda: distributed.decide_on_main(lambda: open(f"/nowhere{index}")),
        lambda: distributed.require_equal(
            {"lr": [0.01, 0.5][index], "seed": 0}, "start them alike"
        ),
    ):
        try:
            act()
        except (OSError, ValueError) as error:
            say(refused=f"{type(error).__name__}: {error}")
    distributed.require_equal({"lr": 0.5}, "")
    if index:
        distributed.gather_objects("a")
    else:
        other_exchange()


def other_exchange() -> None:
    from cptjax.common import distributed

    distributed.gather_objects("a")


def raises(index: int) -> None:
    """Process 1 raises while process 0 waits in a collective."""
    if index:
        raise ValueError("row 3 of rows.jsonl has no answer")
    wait_in_collective()


def damaged(index: int) -> None:
    """A part of an array that process 1 wrote is changed, or cannot be read."""
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from cptjax.common import distributed
    from cptjax.continual.checkpoint import Checkpoints, abstract_tree

    rows = NamedSharding(Mesh(np.array(jax.devices()), "x"), PartitionSpec("x"))
    values = np.random.default_rng(0).normal(size=(64, 300)).astype(np.float32)
    tree = {"w": jax.make_array_from_callback(values.shape, rows, lambda part: values[part])}
    kept = Checkpoints("checkpoint")
    kept.save("stages", 1, 3, {"params": tree}, {})
    kept.save("steps", 999, 999_999, {"params": tree}, {})  # the largest numbers
    kept.wait()
    assert Checkpoints("checkpoint").found() == [(999, 999_999, "steps"), (1, 3, "stages")]
    kept.remove_steps(999)
    restore = lambda kind, stage, step: kept.restore(
        kind, stage, step, {"params": abstract_tree(tree)}
    )
    assert np.array_equal(
        kept.newest(restore)["params"]["w"].addressable_data(0), tree["w"].addressable_data(0)
    )
    path = max(
        kept.path("stages", 1, 3).glob("params/ocdbt.process_1/d/*"), key=lambda p: p.stat().st_size
    )
    for how in ("changed", "cut", "changed"):  # the last change stays for the test
        text = bytearray(path.read_bytes())
        distributed.gather_objects(None)
        if not index:
            text[len(text) // 2] ^= 1
            path.write_bytes(text[:100] if how == "cut" else text)
        distributed.gather_objects(None)
        try:
            kept.newest(restore)
        except ValueError as error:
            say(how=how, refused=f"{type(error).__name__}: {error}")
        distributed.gather_objects(None)
        if not index and how == "cut":
            path.write_bytes(text)
        distributed.gather_objects(None)
    kept.close()


def damaged_samples(index: int) -> None:
    """A file of samples was changed, and process 1 cannot parse its own part of another."""
    import jax
    import numpy as np
    from jax.sharding import Mesh

    from cptjax.common import distributed
    from cptjax.data.cost import WorkCost
    from cptjax.training import sampling_cache

    sampling_cache.cache_fingerprint = lambda _: "settings"
    path = Path("samples", "stage1.jsonl")
    if index:
        path.parent.mkdir()
        sampling_cache.write_samples(path, "{}\n", WorkCost(), "settings")
        path.write_text("[]\n")
        path.with_name(".stage1.jsonl.partial1").write_text("{\n")
    distributed.gather_objects(None)
    cache = sampling_cache.SamplingCache(path, None, Mesh(np.array(jax.devices()), "x"))
    for act in (cache.is_complete, lambda: cache.next_part(lambda: ([], WorkCost()))):
        try:
            act()
        except ValueError as error:
            say(refused=str(error))


def moved_responses(index: int) -> None:
    """Log-probabilities of responses on the shards of their prompts, and of balanced shards, also
    of two micro-batches in one device pass."""
    import math
    from types import SimpleNamespace

    import jax
    import jax.numpy as jnp
    import numpy as np
    import tiny
    from jax.sharding import Mesh

    from cptjax import sharding
    from cptjax.data import balance, packing
    from cptjax.data.device_batches import group_batch
    from cptjax.data.model_context import ModelContext
    from cptjax.models import logprobs
    from cptjax.training import device_passes

    packing.SMALLEST, balance._place_cost = 4, lambda *_: 0
    cfg, rng = tiny.our_config(family="qwen2"), np.random.default_rng(0)
    # The processes have every second shard.
    devices = np.array(sorted(jax.devices(), key=lambda d: (d.id % 2, d.process_index)))
    mesh = Mesh(devices.reshape(1, 4, 1), sharding.AXES)
    rows = [tiny.random_row([n], cfg, rng) for n in (4, 9, 6, 5, 3, 8, 7, 5)]
    lengths = [*[8, 8, 8, 7], *[1, 2, 1, 1], *[3, 1, 0, 1], *[1, 8, 2, 1]]
    mask = np.arange(8) < np.array(lengths)[:, None]
    tokens = rng.integers(10, 300, mask.shape).astype(np.int32)
    prompts = jax.tree.map(np.asarray, tiny.prompts(rows, cfg))
    shards = [i for i, device in enumerate(devices) if device.process_index == index]
    own = np.concatenate([[2 * i, 2 * i + 1] for i in shards])
    responses = (2 * own[:, None] + np.arange(2)).reshape(-1)
    rows_here = sharding.map_prompts(prompts, lambda x: x[own], lambda x: x[:, own])
    prompts = sharding.place_prompts(rows_here, mesh)
    tokens, mask = tokens[responses], mask[responses]
    ctx = ModelContext(cfg, None, mesh, jnp.float32, (16,))
    score, params = logprobs.make_scoring_program(cfg, ctx.dtype, 64, 1.0), tiny.random_params(cfg)
    params = jax.tree.map(np.asarray, params)
    plain = group_batch(ctx, prompts, tokens, mask, extra={})
    moved, placement = tiny.balanced_group_batch(ctx, prompts, tokens, mask, {})
    # Two micro-batches with a prompt of each shard, joined to one pass.
    device_passes._largest_pass_bytes = lambda *_: math.inf
    halves = [np.arange(first, len(own), 2) for first in range(2)]
    parts = [sharding.map_prompts(rows_here, lambda x: x[h], lambda x: x[:, h]) for h in halves]
    order = np.concatenate(halves)
    rows = (2 * order[:, None] + np.arange(2)).reshape(-1)
    builder = SimpleNamespace(model_ctx=ctx, tower=None, layout=SimpleNamespace(micro_batches=2))
    (joined,), _ = device_passes.build_passes(
        builder,
        [sharding.place_prompts(part, mesh) for part in parts],
        (rows_here.segments > 0).sum(1)[order],
        tokens[rows],
        mask[rows],
        {},
    )
    with jax.set_mesh(mesh):
        want, got, of_joined = (
            sharding.local_rows(score(params, batch)) for batch in (plain, moved, joined.batch)
        )
    difference = np.abs(balance.to_prompts(placement, got) - want)[mask].max()
    found = np.zeros_like(want)
    found[rows[joined.rows]] = balance.to_prompts(joined.placement, of_joined)
    say(
        joined=float(np.abs(found - want)[mask].max()),
        moved_in_joined=joined.placement is not None,
        shards=shards,
        sent=int(placement.leave.sum()),
        received=int(placement.guests.sum()),
        saved=1 - moved.tokens_with_padding / plain.tokens_with_padding,
        difference=float(difference),
        scale=float(np.abs(want[mask]).max()),
    )


def kill_in_program(index: int) -> None:
    """Process 1 dies while process 0 waits for a device program."""
    run_programs([])
    if index:
        os.kill(os.getpid(), signal.SIGKILL)
    run_programs([])


def bug(index: int) -> None:
    """Process 0 has an unexpected error while process 1 waits in an exchange."""
    from cptjax.common import distributed

    if index:
        distributed.gather_objects(1)
    raise KeyError("weights")


def lost(killed: int, number: int, wait: Callable[[], None]) -> Callable[[int], None]:
    def act(index: int) -> None:
        if index == killed:
            os.kill(os.getpid(), number)
        wait()

    return act


def wait_in_collective() -> None:
    import numpy as np
    from jax.experimental import multihost_utils

    multihost_utils.process_allgather(np.zeros(3))


def run_programs(names: list[str]) -> None:
    """Run `add` and `copy` with the other process, then the named ones without it."""
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    mesh = Mesh(np.array(jax.devices()), "x")
    rows, everywhere = (NamedSharding(mesh, PartitionSpec(*axis)) for axis in ("x", ()))
    x = jax.make_array_from_callback((2, 3), rows, lambda _: np.ones((1, 3)))
    add = jax.jit(lambda x: x.sum(0), out_shardings=everywhere)
    copy = jax.jit(lambda x: x[::-1] * 2, out_shardings=everywhere)
    for name in ("add", "copy", *names):
        if name == "add":
            np.asarray(add(x))
        else:
            np.asarray(copy(x))


def wait_in_exchange() -> None:
    from cptjax.common import distributed

    distributed.gather_objects(1)


def places(index: int) -> None:
    """Process 0 waits in a collective that process 1 does not run: it waits in an exchange."""
    if index:
        wait_in_exchange()
    wait_in_collective()


def sleeps(index: int) -> None:
    """Process 1 does not come to an exchange in which process 0 waits."""
    if index:
        time.sleep(1000)
    wait_in_exchange()


def programs(index: int) -> None:
    """Each process waits for another device program."""
    run_programs(["copy", "add"] if index else ["add"])
    wait_in_exchange()


def works(index: int) -> None:
    """Process 1 waits for long, but process 0 compiles, waits for a command and computes."""
    import numpy as np

    from cptjax.common import phases

    if not index:
        names = {"__name__": "jax._src.compiler", "sleep": time.sleep}
        exec("def compile(seconds): sleep(seconds)", names)
        names["compile"](WAIT_SECONDS + 2)
        subprocess.run(["sleep", str(WAIT_SECONDS + 2)], check=True)
        end = time.monotonic() + WAIT_SECONDS + 2
        while time.monotonic() < end:
            np.ones(10_000).sum()
    wait_in_exchange()
    say(waited=phases._clock.work_seconds()["waiting"])


def sigterm(index: int) -> None:
    """Only process 1 gets SIGTERM, outside of training."""
    from cptjax.common import distributed, signals

    handler = signals.StopSignals()
    with signals.handle_stop_signals(handler):
        with handler.deferred():
            os.kill(os.getpid(), signal.SIGTERM if index else 0)
            assert not index or handler.received
            assert distributed.gather_objects(index) == [0, 1]
            assert handler.agreed()
        for _ in range(10):
            distributed.gather_objects(index)
    raise AssertionError("still running")


FAILURES = {
    "exchanges": exchanges,
    "raises": raises,
    "bug": bug,
    "sigterm": sigterm,
    "damaged": damaged,
    "damaged samples": damaged_samples,
    "moved responses": moved_responses,
    "kill 1": kill_in_program,
    "kill 0": lost(0, signal.SIGKILL, wait_in_exchange),
    "places": places,
    "programs": programs,
    "sleeps": sleeps,
    "works": works,
    "stop 1": lost(1, signal.SIGSTOP, wait_in_exchange),
    "stop 0": lost(0, signal.SIGSTOP, wait_in_collective),
}


# ---- runs ----------------------------------------------------------------------------------------

ROWS = [
    {"prompt": f"say {word}", "answer": word} for word in "red green blue one two six ten".split()
]
REWARD = """import os

def reward(completion, answer):
    return 1 / (os.environ["HOST"] != "1")
"""
SHORT = {
    "steps": 2,
    "stages": ({"task": "mine", "epochs": 1},),
    "eval": {"before": False, "limit": 4, "batch": 4, "every": 1, "mini": 4},
    "checkpoint": {"every": 0},
}


def run(workdir: str, method: str = "sft", **sections: object) -> None:
    """Train on a task of seven rows with a batch of four, in the working folder."""
    import run_helpers

    from cptjax.continual import driver

    task = {"train": "rows.jsonl", "test": "rows.jsonl", "template": "none"}
    task |= {"reward": "reward.py:reward"} if method == "grpo" else {}
    short = SHORT | {"tasks": {"mine": task}, "model": run_helpers.TEXT}
    driver.run(run_helpers.config(method, **short | sections), workdir)


def in_folder(folder: str, rows: list[dict]) -> None:
    """Enter a folder with the files of a run; both processes may write them at the same time."""
    from cptjax.common import files

    Path(folder).mkdir(exist_ok=True)
    os.chdir(folder)
    files.write_text("rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    files.write_text("reward.py", REWARD)


def learning_rate(index: int) -> None:
    in_folder("learning rate", ROWS)
    run("run", train={"batch": 4, "lr": [0.01, 0.5][index]})


def batch(index: int) -> None:
    in_folder("batch", ROWS)
    run("run", train={"batch": [4, 2][index]})


def steps(index: int) -> None:
    in_folder("steps", ROWS)
    run("run", stages=({"task": "mine", "steps": 2 + index},))


def data(index: int) -> None:
    """The hosts have different copies of the data file."""
    shared = Path.cwd() / "data"
    in_folder(f"data of {index}", ROWS[: 7 - index])
    run(str(shared))


def code(index: int) -> None:
    from cptjax.continual import fingerprints

    fingerprints.source_hashes = lambda: {"common/files.py": f"hash {index}"}
    in_folder("code", ROWS)
    run("run")


def folder(index: int) -> None:
    """Each host has its own folder."""
    from cptjax.continual import workdir

    workdir.VISIBLE_SECONDS = 1.0
    in_folder(f"folder of {index}", ROWS)
    run("run")


def full_disk(index: int) -> None:
    import shutil

    if index:
        shutil.disk_usage = lambda _: shutil._ntuple_diskusage(10, 10, 0)
    in_folder("full disk", ROWS)
    run("run")


def reward(index: int) -> None:
    """A reward raises on the second process only."""
    in_folder("reward", ROWS)
    os.environ["HOST"] = str(index)
    run("run", "grpo")


def interrupted(index: int) -> None:
    """Process 1 gets SIGTERM in the evaluation after the first step."""
    from cptjax.continual import stage_evaluation

    evaluate = stage_evaluation.evaluate_within_stage

    def evaluate_after_signal(*args):
        if index:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*args)

    stage_evaluation.evaluate_within_stage = evaluate_after_signal
    in_folder("interrupted", ROWS)
    run("run")


def continued(index: int) -> None:
    in_folder("interrupted", ROWS)
    run("run")


def killed(index: int) -> None:
    """Process 1 dies with SIGKILL in the evaluation after the first step."""
    from cptjax.common import cluster
    from cptjax.continual import stage_evaluation

    evaluate = stage_evaluation.evaluate_within_stage

    def evaluate_and_die(*args):
        if index:
            os.kill(os.getpid(), signal.SIGKILL)
        return evaluate(*args)

    stage_evaluation.evaluate_within_stage = evaluate_and_die
    cluster.LOST_SECONDS = LOST_SECONDS
    resumed(index)


def run_saved(folder: str, workdir: str = "run") -> None:
    """Run, or continue, with a checkpoint after each step."""
    in_folder(folder, ROWS)
    run(workdir, checkpoint={"every": 1})


def resumed(index: int) -> None:
    run_saved("killed")


def undisturbed(index: int) -> None:
    run_saved("undisturbed")


def in_a_bucket(index: int) -> None:
    run_saved("bucket", os.environ["BUCKET_WORKDIR"])


RUNS = {
    "learning rate": learning_rate,
    "batch": batch,
    "steps": steps,
    "data": data,
    "code": code,
    "folder": folder,
    "full disk": full_disk,
    "reward": reward,
    "interrupted": interrupted,
    "continued": continued,
    "killed": killed,
    "resumed": resumed,
    "undisturbed": undisturbed,
    "in a bucket": in_a_bucket,
}


# ---- in a test -----------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def run_pairs(folder: Path, *names: str, limit: float = 60) -> dict[str, list]:
    """Run programs, all at the same time; those after "then" after those before.

    Return [exit code, seconds, lines on standard error] by "program.process".
    """
    import run_helpers

    ports = json.dumps([free_port() for _ in names])
    done = subprocess.run(
        [sys.executable, __file__, str(limit), ports, *names],
        cwd=folder,
        env=run_helpers.environment(),
        stdout=subprocess.PIPE,
        text=True,
        timeout=2 * limit + 60,
    )
    ended = json.loads(done.stdout.splitlines()[-1])
    said = {path.stem: path.read_text().splitlines() for path in folder.glob("*.err")}
    lines = {
        name: [x for x in said[name] if not x[1:].startswith(" processes with")] for name in said
    }
    return {name: [*ended.get(name, (None, None)), lines[name]] for name in lines}


# ---- processes -----------------------------------------------------------------------------------


def say(**values: object) -> None:
    print(json.dumps(values), flush=True)


def start(name: str, index: int, port: int) -> int:
    """Start one process of a program; what it prints goes to a file."""
    if pid := os.fork():
        return pid
    from cptjax.common import cli, cluster, console

    for number, stream in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{name}.{index}.{stream}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    if name in FAILURES:
        cluster.LOST_SECONDS = LOST_SECONDS
    if name == "moved responses":
        import jax

        jax.config.update("jax_num_cpu_devices", 2)
    console.set_console_mode("plain")
    sys.argv[1:] = []

    def main() -> None:
        wait_seconds = WAIT_SECONDS if name in FAILURES else 60.0
        cluster.connect(f"localhost:{port}", 2, index, wait_seconds=wait_seconds)
        (FAILURES | RUNS)[name](index)

    cli.run_launcher(main)
    os._exit(0)


def run_together(limit: float, ports: dict[str, int]) -> dict[str, tuple[int, float]]:
    """Run programs at the same time; return [exit code, seconds] of each process."""
    began, running, ended = time.monotonic(), {}, {}
    for name, port in ports.items():
        running |= {start(name, i, port): f"{name}.{i}" for i in range(2)}
    stopped = {f"stop {i}.{i}" for i in range(2)}  # they never end
    while set(running.values()) - set(ended) - stopped and time.monotonic() - began < limit:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            ended[running[pid]] = (os.waitstatus_to_exitcode(status), time.monotonic() - began)
        time.sleep(0.02)
    for pid in running:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return ended


def main() -> None:
    """Run programs, those before and after the word "then" one after the other."""
    from jax.experimental import multihost_utils  # noqa: F401

    from cptjax.common import cli, cluster, signals  # noqa: F401

    limit, ports, names = float(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3:]
    import run_helpers

    if set(names) & set(RUNS):
        from cptjax.continual import driver  # noqa: F401
    run_helpers.collect_rarely()
    groups = [list(group) for then, group in itertools.groupby(names, "then".__eq__) if not then]
    ended = {}
    for group in groups:
        ended |= run_together(limit, {name: ports.pop() for name in group})
    print(json.dumps(ended))


if __name__ == "__main__":
    main()
