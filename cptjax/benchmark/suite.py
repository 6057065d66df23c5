"""Measure GRPO steps of the trainer, and what each of its parts gains: the rows of one table.

    base            the step as configured: seconds by phase, padding, throughput, utilisation
    top_p=1         sampling without top_p
    slots           a quarter of the groups is decoded at a time, and free slots are refilled
    slot_rows       as many responses at a time, half of each of twice as many groups
    ahead           responses are sampled before the update of the step before
    layers          sampling with the layers in a loop if they are unrolled, or the reverse
    padded          attention of groups by cuDNN in the padded form, not in packed rows; GPUs only
    xla             the attention of every platform instead of the best one
    prefix          phases with unrelated rows, which share no prompt, against groups

Every number of a row is the median over steps that compiled nothing.
"""

import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from cptjax import sharding
from cptjax.benchmark import grpo_steps, phase_times
from cptjax.benchmark.grpo_steps import LENGTHS, STEP_SIZES, StepSize
from cptjax.benchmark.phase_times import CompilationCounter, time_calls
from cptjax.benchmark.workload import Workload
from cptjax.common import console
from cptjax.models import causal_lm, flops, trainable
from cptjax.models.config import ModelConfig
from cptjax.models.families import find_family
from cptjax.models.load import MODEL_DTYPES

SUITE_ROWS = ("base", "padded", "layers", "prefix", "ahead", "top_p=1", "slots", "slot_rows", "xla")
PHASES = ("rollout", "policy", "reference", "update", "idle")  # of seconds/device/
LABELS = {
    "step_s": "seconds of a step",
    **{f"{phase}_s": f"  {phase}" for phase in PHASES},
    "log_s": "seconds between steps",
    "throughput": "tokens/s/device, as EasyR1",
    "padding": "padding of updates",
    "mfu": "MFU of real tokens",
    "training_of_ceiling": "the same, scores and updates",
    "rollout_of_copy": "rollout: share of copy speed",
    "response_tokens": "tokens of a response",
    "longest_response": "  the longest",
    "mismatch": "trainer against sampler, nats",
    "peak_gib": "peak GiB of the process",
}


def run_suite(
    base: ConfigDict, size: str, rows: Sequence[str], repeat: int, minutes: float = 0.0
) -> dict[str, Any]:
    """Measure the rows in turn, and return them with the ceilings of the machine.

    base: `get_config()` of configs/base.py
    minutes: after so many no further row is started; 0 = all are measured
    """
    check_suite(size, rows)
    began, compilations = time.perf_counter(), CompilationCounter()
    step_size = STEP_SIZES[size].on_devices(sharding.make_mesh().size)
    ceilings = measure_ceilings(dict(step_size.model_settings).get("compute_dtype", "bfloat16"))
    out: dict[str, Any] = {"suite": size, "lengths": LENGTHS, **ceilings}
    out |= {"rows": [], "left_out": []}
    with tempfile.TemporaryDirectory() as folder, grpo_steps.preset(step_size.find_model()):
        for row in rows:
            if minutes and time.perf_counter() - began > 60 * minutes:
                out["left_out"].append(row)
                continue
            measured = measure_row(base, step_size, row, repeat, compilations, ceilings, folder)
            out |= {"versions": measured.pop("versions", out.get("versions"))}
            out["rows"].append(measured)
            console.print_message(json.dumps(rounded(measured)))
            gc.collect()  # the arrays of the row
    return rounded(out)


def platform_rows() -> list[str]:
    """Return the rows that this platform can measure."""
    return [row for row in SUITE_ROWS if row != "padded" or jax.default_backend() == "gpu"]


def check_suite(size: str, rows: Sequence[str]) -> None:
    """Refuse a suite that cannot be measured."""
    if size not in STEP_SIZES:
        raise ValueError(f"--size={size}: expected one of {', '.join(STEP_SIZES)} with --suite")
    for row in rows:
        if row not in SUITE_ROWS:
            raise ValueError(f"--rows={row}: expected some of {', '.join(SUITE_ROWS)}")
    if not rows:
        raise ValueError("--rows is empty; expected some of " + ", ".join(SUITE_ROWS))


def measure_row(
    base: ConfigDict,
    size: StepSize,
    row: str,
    repeat: int,
    compilations: CompilationCounter,
    ceilings: dict[str, Any],
    parent: str,
) -> dict[str, Any]:
    """Measure one row of the table."""
    if row == "prefix":
        return {"row": row} | measure_prefix(size, repeat)
    folder = Path(parent) / row
    folder.mkdir()
    limit = 4 * repeat + 1
    task = grpo_steps.write_task(size, size.prompts * min(limit, 4), folder)
    config = grpo_steps.make_config(base, size, limit, task, row_changes(row, size))
    found = grpo_steps.measure_steps(
        config, folder / "run", repeat, compilations, other_layers=row == "layers"
    )
    if row == "layers":
        row = "loop" if found["cfg"].compute.samples_unrolled else "unrolled"
    return {"row": row} | summarise(found, size, ceilings)


def row_changes(row: str, size: StepSize) -> dict[str, Any]:
    """Return the settings that a row changes."""
    half = {"slots": size.prompts // 2, "slot_rows": size.group // 2}
    return {
        "top_p=1": {"rollout": {"top_p": 1.0}},
        "slots": {"rollout": {"slots": size.prompts // 4}},
        "slot_rows": {"rollout": half},
        "ahead": {"rollout": {"ahead": 1}},
        "padded": {"model": {"attention": "cudnn_padded"}},
        "xla": {"model": {"attention": "xla"}},
    }.get(row, {})


def measure_prefix(size: StepSize, repeat: int) -> dict[str, Any]:
    """Measure log-probabilities and an update of rows that share no prompt, and of groups."""
    work = Workload(
        size.model,
        image=size.side,
        prompts=size.prompts // 4,  # unrelated rows need much more memory
        group=size.group,
        text=size.words,
        new=size.mean,
        repeat=repeat,
        micro=size.micro * size.group,
        dtype=dict(size.model_settings).get("compute_dtype", "bfloat16"),
        remat="dots",
    )
    found = phase_times.run_benchmark(work, ["rollout", "logp", "sft", "grpo"])
    shared = found["grpo_s"] - found["rollout_s"]
    unrelated = found["logp_s"] + found["sft_s"]
    return dict(shared_s=shared, unrelated_s=unrelated, gain=unrelated / shared) | {
        "compilations_after_warmup": sum(
            found[f"{phase}_compilations_after_warmup"] for phase in ("logp", "sft", "grpo")
        )
    }


def summarise(found: dict[str, Any], size: StepSize, ceilings: dict[str, Any]) -> dict[str, Any]:
    """Return the numbers of a row: medians over its steps, and shares of the ceilings."""
    steps, cfg = found["steps"], found["cfg"]

    def middle(key: str) -> float:
        return statistics.median(step[key] for step in steps)

    seconds = [step["seconds"] for step in steps]
    phases = {f"{phase}_s": middle(f"seconds/device/{phase}") for phase in PHASES}
    training = [step["flops"] - sampling_flops(cfg, size, step) for step in steps]
    train_seconds = [
        sum(step[f"seconds/device/{phase}"] for phase in ("policy", "reference", "update"))
        for step in steps
    ]
    peak = 1e12 * ceilings["ceiling_tflops"]
    reading = [decode_seconds(cfg, step, ceilings) for step in steps]
    return dict(
        steps=len(steps),
        warmup_steps=found["warmup"],
        compilations_after_warmup=found["compilations"],
        step_s=statistics.median(seconds),
        step_s_range=[min(seconds), max(seconds)],
        **phases,
        reward_s=middle("seconds/reward"),
        log_s=statistics.median(step["wall"] - step["seconds"] for step in steps),
        throughput=middle("perf/throughput"),
        padding=middle("perf/padding"),
        mfu=statistics.median(s["perf/flops_per_second"] for s in steps) / peak,
        training_of_ceiling=statistics.median(
            f / s / peak for f, s in zip(training, train_seconds, strict=True)
        ),
        rollout_of_copy=statistics.median(
            r / step["seconds/device/rollout"] for r, step in zip(reading, steps, strict=True)
        ),
        prompt_tokens=middle("prompt_length/mean"),
        response_tokens=middle("response_length/mean"),
        longest_response=max(step["response_length/max"] for step in steps),
        mismatch=middle("mismatch"),
        peak_gib=phase_times.peak_memory_gib(),
        attention=cfg.compute.attention,
        versions=found["versions"],
    )


def sampling_flops(cfg: ModelConfig, size: StepSize, step: dict[str, float]) -> float:
    """Return the FLOPs of a step's rollouts; the others are those of the scores and updates."""
    prompts, prompt = step["rollouts"] / size.group, step["prompt_length/mean"]
    grid = size.side // cfg.vision.patch
    slots = len(find_family(cfg).tower.frame_layout(grid, grid, cfg.vision).order)
    return (
        prompts * flops.vision_forward_flops(cfg, slots, slots)
        + flops.text_forward_flops(cfg, prompts, prompt, 1)
        + flops.decode_flops(cfg, prompts, prompt, size.group, step["response_length/mean"])
    )


def decode_seconds(cfg: ModelConfig, step: dict[str, float], ceilings: dict[str, Any]) -> float:
    """Return the seconds to read the text weights once for each token of the longest response.

    No rollout of one batch is faster on devices that have all weights; keys and values come on top.
    """
    weights = trainable.count_params(causal_lm.declare_params(cfg)["text"])
    if not cfg.text.tied:
        weights -= cfg.text.vocab * cfg.text.width  # of the embedding, only single rows are read
    size = jnp.dtype(MODEL_DTYPES[ceilings["dtype"]]).itemsize
    return step["response_length/max"] * weights * size / (1e12 * ceilings["copy_tb_s"])


def measure_ceilings(dtype: str) -> dict[str, Any]:
    """Return what matrix products of all devices and copies of one device reach."""
    return {
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "dtype": dtype,
        "ceiling_tflops": phase_times.measure_peak_flops(MODEL_DTYPES[dtype]) / 1e12,
        "copy_tb_s": measure_copy_speed() / 1e12,
    }


def measure_copy_speed(repeat: int = 5) -> float:
    """Return the bytes per second that a device reads and writes."""
    count = 2**24 if jax.default_backend() == "cpu" else 2**29
    add: Callable = jax.jit(lambda a: jax.lax.fori_loop(0, 10, lambda _, x: x + 1, a))
    a = jnp.zeros(count, jnp.float32)
    seconds = time_calls(lambda: add(a), repeat + 1)
    return 2 * 4 * count * 10 / min(seconds[1:])


def rounded(value: Any) -> Any:
    """Return a value for JSON with four significant digits."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, list | tuple) else value


def print_rows(found: dict[str, Any]) -> None:
    """Print a table with a column for each row of the suite."""
    steps = [row for row in found["rows"] if row["row"] != "prefix"]
    title = f"GRPO step, {found['suite']} on {found['devices']} x {found['device']}"
    if steps:
        lines = [[label, *(f"{row[key]:.3g}" for row in steps)] for key, label in LABELS.items()]
        console.print_table(title, ["", *(row["row"] for row in steps)], lines)
    for row in found["rows"]:
        if row["row"] == "prefix":
            console.print_message(
                f"scores and updates with a shared prefix: {row['shared_s']:.3g} s, with unrelated "
                f"rows {row['unrelated_s']:.3g} s, {row['gain']:.2f} times as long"
            )
    if found["left_out"]:
        console.print_warning(f"not run for lack of time: {', '.join(found['left_out'])}")
