"""The benchmark does the peer's work, and its numbers agree with each other."""

import mmap
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny

from cptjax.benchmark import checkpoint_loading, data_pipeline, phase_times, workload
from cptjax.benchmark.workload import MODEL_PHASES, Workload
from cptjax.common import chips
from cptjax.models import flops

ROOT = Path(__file__).parents[2]
NANO = workload.small_model(
    128, 64, 1, 512, dict(depth=2, width=32, mlp=32, heads=2, full_blocks=(1,))
)
WORK = Workload(
    "nano", image=84, prompts=8, group=2, text=8, new=4, repeat=1
)  # 84 pixels: a window that is not full


@pytest.fixture
def nano(monkeypatch):
    monkeypatch.setitem(workload.BENCH_SIZES, "nano", NANO)


@pytest.mark.slow
def test_every_phase_is_timed_against_the_peer(nano):
    """The peer is given our weights and inputs.

    The benchmark stops unless it computes the same log-probabilities.
    """
    pytest.importorskip("torch")
    metrics = phase_times.run_benchmark(WORK, MODEL_PHASES, "hf")
    assert metrics["peer_logp_gap"] < 1e-5
    assert metrics["prompt"] == 8 + 9 + 2 and metrics["seqs"] == 16
    for phase in MODEL_PHASES:
        tokens = 16 * (4 if phase == "rollout" else 19 + 4)
        assert metrics[f"{phase}_tok_s"] == pytest.approx(tokens / metrics[f"{phase}_s"])
        assert metrics[f"ratio_{phase}"] == pytest.approx(
            metrics[f"peer_{phase}_s"] / metrics[f"{phase}_s"]
        )
        assert metrics[f"{phase}_compilations_after_warmup"] == 0
        assert 0 < metrics[f"{phase}_mfu_text"] < metrics[f"{phase}_mfu"]
        assert "x the peer" in phase_times.phase_line(phase, metrics)
    assert metrics["logp_compilations"] == 1 and metrics["logp_compile_s"] > 0
    assert metrics["params"] == sum(int(np.prod(s)) for s in _shapes())


def _shapes():
    from cptjax.models import hf_checkpoint

    return [entry.shape for entry in hf_checkpoint.tensor_table(NANO).values()]


def test_without_a_peer_no_number_names_one(nano):
    metrics = phase_times.run_benchmark(WORK, ["logp"])
    assert not [k for k in metrics if "peer" in k or "ratio" in k]
    assert "peer" not in phase_times.phase_line("logp", metrics)


def test_micro_batches_are_the_same_rows(nano):
    whole, parts = (
        phase_times.BenchModel(
            Workload("nano", image=84, prompts=8, group=2, text=8, new=4, micro=m), False
        )
        for m in (0, 8)
    )
    assert [len(b.targets) for b in parts.micro_batches] == [8, 8]
    logps = [
        np.concatenate([np.asarray(x) for x in phase_times.logp_phase(s)()]) for s in (whole, parts)
    ]
    np.testing.assert_allclose(*logps, atol=1e-5)


def test_rows_equal_those_of_the_processor(nano):
    """Tokens, positions and patches of one row, built by the tests' own builder."""
    inputs = workload.random_inputs(WORK, NANO)
    ours = workload.equal_rows(inputs["prompts"][:1], inputs["patches"][:1], NANO, 1)
    row = tiny.random_row([4, tiny.Image(6, 6), 4], NANO, np.random.default_rng(0))
    row.tokens, row.media[0] = inputs["prompts"][0], (row.media[0][0], inputs["patches"][0])
    theirs = tiny.prompts([row], NANO)
    for name in ("tokens", "positions", "segments", "slots"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name), err_msg=name)
    for name in ("patches", "positions", "frames"):
        mine = getattr(ours.vision, name)
        np.testing.assert_array_equal(
            mine, getattr(theirs.vision, name)[:, :, : mine.shape[2]], err_msg=name
        )


def test_operations_follow_from_the_shapes():
    work, cfg = Workload("cpu-s", prompts=4, image=448), workload.BENCH_SIZES["cpu-s"]
    forward, step = (phase_times.phase_flops(phase, work, cfg) for phase in ("logp", "sft"))
    assert step == tuple(3 * x for x in forward)
    assert forward[1] == flops.vision_forward_flops(cfg, 32 * 1024, 1024)
    shared = phase_times.phase_flops("grpo", work, cfg)
    assert forward[0] + step[0] > 2 * shared[0], "groups share their prompts"
    assert forward[1] + step[1] == 8 * (
        shared[1] - phase_times.phase_flops("rollout", work, cfg)[1]
    ), "and their images"


def test_loading_is_measured_in_another_process(nano):
    metrics = phase_times.run_benchmark(WORK, ["load"])
    assert metrics["load_gb"] == pytest.approx(2 * sum(int(np.prod(s)) for s in _shapes()) / 1e9)
    assert metrics["load_s_per_gb"] == pytest.approx(metrics["load_s"] / metrics["load_gb"])
    assert (
        0 < metrics["load_peak_ratio"] < metrics["load_peak_gib"] * 2**30 / metrics["load_gb"] / 1e9
    )
    assert phase_times.phase_line("load", metrics).startswith("load")


def test_a_preset_can_be_loaded():
    metrics = phase_times.run_benchmark(Workload("tiny_qwen2", image=0), ["load"])
    assert metrics["load_gb"] > 0


def test_resident_memory_grows_with_an_array():
    before = checkpoint_loading.process_memory()
    with mmap.mmap(
        -1, 50_000_000
    ) as fresh:  # a numpy array may reuse memory that the suite has freed
        fresh.write(b"1" * len(fresh))
        assert checkpoint_loading.process_memory() - before > 0.9 * len(fresh)
    assert checkpoint_loading.process_memory(peak=True) >= checkpoint_loading.process_memory()


def test_data_is_measured_by_the_pipeline(nano, monkeypatch):
    monkeypatch.setattr(data_pipeline, "measure_data_pipeline", lambda: {"data_rows_s": 7.0})
    assert phase_times.run_benchmark(WORK.__class__(), ["data"]) == {"data_rows_s": 7.0}
    both = phase_times.run_benchmark(WORK, ["data", "sft"])
    assert both["data_over_sft"] == pytest.approx(
        7.0 / (16 / both["sft_s"])
    ) and "over_sft" in phase_times.phase_line("data", both)


@pytest.mark.parametrize(
    ("settings", "phases", "message"),
    [
        ({"size": "70b"}, ["sft"], "--size=70b: expected one of cpu-s, cpu-m, 3b, 7b"),
        (
            {},
            ["sft", "grop"],
            "--phases=grop: expected some of load, data, rollout, logp, sft, grpo",
        ),
        ({}, [], "--phases is empty"),
        ({"dtype": "fp8"}, ["sft"], "--dtype=fp8: expected one of float32, bfloat16"),
        ({"remat": "all"}, ["sft"], "--remat=all: expected one of none"),
        ({"image": 100}, ["sft"], "--image=100: expected a multiple of 28"),
        ({"micro": 7}, ["sft"], "--micro=7: it must divide the 64 rows"),
        ({"prompts": 3}, ["logp"], "--prompts=3: expected a multiple of the 8 devices"),
        ({"micro": 4}, ["logp"], "--micro=4: expected a multiple of the 8 devices"),
    ],
)
def test_a_mistake_is_reported_in_one_line(settings, phases, message):
    with pytest.raises(ValueError, match="^" + message.replace("(", r"\(")) as error:
        phase_times.run_benchmark(Workload(**settings), phases)
    assert "\n" not in str(error.value)


def test_a_peer_without_a_phase_of_its_own_is_refused():
    with pytest.raises(ValueError, match="^--peer=hf: --phases=load,data has nothing"):
        phase_times.run_benchmark(Workload(), ["load", "data"], "hf")


def test_the_launcher_exits_with_code_2():
    done = subprocess.run(
        [sys.executable, ROOT / "launch/bench.py", "--size=70b"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    expected = "error: --size=70b: expected one of cpu-s, cpu-m, 3b, 7b, or another preset of"
    assert done.stderr.strip() == f"{expected} config.model"


def test_the_launcher_lets_jax_allocate_as_much_of_a_gpu_as_a_run():
    code = (
        "import os, sys; from absl import flags; from launch import bench; flags.FLAGS(['bench']); "
        "bench.run_phases = lambda: print(os.environ['XLA_PYTHON_CLIENT_MEM_FRACTION']); "
        "bench.main()"
    )
    environ = {name: v for name, v in os.environ.items() if not name.endswith("MEM_FRACTION")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environ, capture_output=True, text=True
    )
    assert done.stdout.strip() == str(chips.GPU_MEMORY_SHARE), done.stderr


def test_the_memory_settings_for_a_cpu_extend_what_is_given_and_are_added_once():
    script = f"source {ROOT / 'launch/cpu_memory.sh'}; " * 2 + 'echo "$GLIBC_TUNABLES"'
    given = os.environ | {"GLIBC_TUNABLES": "glibc.malloc.check=0"}
    done = subprocess.run(["bash", "-euc", script], capture_output=True, text=True, env=given)
    tunables = done.stdout.strip().split(":")
    assert tunables[:2] == ["glibc.malloc.check=0", "glibc.malloc.hugetlb=1"], done.stderr
    assert len(tunables) == len(set(tunables)) == 6
