"""Time the phases of a run on this machine, alone or alternating with transformers and torch.

    rollout   N prompts x G responses of exactly `new` tokens, temperature 1
    logp      log-probabilities of the `new` tokens of N * G unrelated rows, an image each
    sft       forward, backward and AdamW on the same rows
    grpo      rollout, logp and update of N groups, prompts shared

tok_s counts prompt and new tokens of every row (for rollout, only the new ones), whether or not
rows share a prompt. MFU is the FLOPs that the phase needs by formula (`models/flops`), divided by
its seconds and by the FLOPs per second that this machine reaches in matrix products during the same
benchmark.
"""

import contextlib
import dataclasses
import functools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cptjax import sharding
from cptjax.benchmark import checkpoint_loading, data_pipeline, peer_hf
from cptjax.benchmark.checkpoint_loading import process_memory
from cptjax.benchmark.workload import (
    BENCH_DTYPES,
    MODEL_PHASES,
    Workload,
    check_workload,
    equal_rows,
    find_size,
    random_inputs,
)
from cptjax.common import console
from cptjax.data.packing import plan_packing
from cptjax.generation import decode_loop
from cptjax.generation.sampling_config import SamplingConfig
from cptjax.models import (
    attention,
    causal_lm,
    flops,
    hf_checkpoint,
    logprobs,
    trainable,
)
from cptjax.models.config import ComputeConfig, ModelConfig
from cptjax.models.families import find_family
from cptjax.models.vision_qwen2_5 import normalise_patches
from cptjax.training import train_step
from cptjax.training.algorithms.losses import LossConfig
from cptjax.training.algorithms.objective import Objective
from cptjax.training.algorithms.optimizers import OptimizerConfig, make_optimizer
from cptjax.types import Batch, Packing, Params, Rollouts

BENCH_OPTIMIZER = OptimizerConfig("adamw", 0.9, 0.999, 1e-8, 0.0, 1.0, "float32")


class BenchModel:
    """A model with its training state, and the inputs of every phase on the mesh."""

    def __init__(self, work: Workload, training: bool):
        self.work, self.mesh = work, sharding.make_mesh()
        self.dtype = BENCH_DTYPES[work.dtype]
        shards = sharding.batch_shards(self.mesh)
        if work.prompts % shards:
            raise ValueError(
                f"--prompts={work.prompts}: "
                f"expected a multiple of the {shards} devices that share a batch"
            )
        if work.micro % shards:
            raise ValueError(
                f"--micro={work.micro}: "
                f"expected a multiple of the {shards} devices that share a batch"
            )
        size = find_size(work.size)
        compute = ComputeConfig(
            remat=work.remat,
            attention=attention.choose_backend(self.mesh, size, self.dtype),
            unroll=self.is_cpu,
            unroll_sampling=self.mesh.devices.flat[0].platform != "tpu",
        )
        self.cfg = dataclasses.replace(size, compute=compute)
        declared = causal_lm.declare_params(self.cfg)
        self.param_count = trainable.count_params(declared)
        rules = sharding.rules_for(self.cfg.text.kv_heads, self.mesh)
        weights = sharding.init_params(declared, jax.random.key(0), self.dtype, self.mesh, rules)
        self.optimizer = make_optimizer(BENCH_OPTIMIZER)
        # The training state uses the buffers of the weights, so only one of the two attributes
        # refers to them.
        self.state = train_step.init_state(self.optimizer, weights, self.mesh) if training else None
        self.weights = None if training else weights
        self.inputs = random_inputs(work, self.cfg)
        prompts = equal_rows(self.inputs["prompts"], self.inputs["patches"], self.cfg, shards)
        self.prompts = sharding.place_prompts(prompts, self.mesh)
        size = work.micro or work.rows
        self.micro_batches = [
            sharding.place_batch(self._unrelated_rows(slice(i, i + size), shards), self.mesh)
            for i in range(0, work.rows, size)
        ]
        self.key = jax.random.key(1)

    @property
    def is_cpu(self) -> bool:
        return self.mesh.devices.flat[0].platform == "cpu"

    @property
    def params(self) -> Params:
        return self.weights if self.state is None else self.state.params

    def _unrelated_rows(self, part: slice, shards: int) -> Batch:
        """Return rows that share nothing: each has its own prompt, response and image."""
        prompts, patches = (
            np.repeat(self.inputs[name], self.work.group, 0)[part]
            for name in ("prompts", "patches")
        )
        responses = self.inputs["responses"][part].astype(np.int32)
        tokens = np.concatenate([prompts, responses], 1)
        predicting = np.arange(self.work.prompt - 1, tokens.shape[1] - 1, dtype=np.int32)
        return Batch(
            equal_rows(tokens, patches, self.cfg, shards),
            targets=responses,
            mask=np.ones(responses.shape, bool),
            where=np.broadcast_to(predicting, responses.shape),
        )

    @functools.cached_property
    def _packing(self) -> tuple[jax.Array, jax.Array, Packing]:
        """The mask of responses, and how groups are packed: all rows are equally long."""
        mask = np.ones((self.work.rows, self.work.new), bool)
        prompt_mask = np.ones(self.prompts.tokens.shape, bool)
        plan = plan_packing(prompt_mask, mask, sharding.batch_shards(self.mesh))
        return sharding.place_rows((mask, *plan), self.mesh)

    def group_batch(self, responses: jax.Array, extra: dict[str, jax.Array] | None = None) -> Batch:
        """Return the prompts with responses [N * G R] as packed groups."""
        mask, where, packing = self._packing
        return Batch(
            self.prompts,
            responses,
            mask,
            where,
            extra or {},
            packing,
        )

    @functools.cached_property
    def score(self) -> Callable[[Params, Batch], jax.Array]:
        """The program that computes log-probabilities."""
        return logprobs.make_scoring_program(self.cfg, self.dtype, self.work.chunk, 1.0)

    def step_programs(self, kind: str, **settings: Any) -> train_step.StepPrograms:
        loss = dataclasses.replace(LossConfig.plain(kind, self.work.chunk), **settings)
        return train_step.make_step_programs(
            train_step.StepFunctions(
                self.cfg,
                Objective(loss),
                self.optimizer,
                train_step.StateShardings.of(self.state),
                self.dtype,
            )
        )


# ---- phases: each function returns the function that is timed ------------------------------------


def rollout_phase(model: BenchModel) -> Callable[[], Rollouts]:
    """Sample the rollouts of one batch without a stop token: every row gets `new` tokens."""
    work = model.work
    sampling = SamplingConfig(
        group=work.group, max_new_tokens=work.new, temperature=1.0, check_every=16
    )

    def run() -> Rollouts:
        return decode_loop.generate_rollouts(
            model.params,
            model.prompts,
            model.key,
            model.cfg,
            sampling,
            dtype=model.dtype,
            stop=(-1,),
        )

    return run


def logp_phase(model: BenchModel) -> Callable[[], list[jax.Array]]:
    """Compute the log-probabilities of unrelated rows."""
    return lambda: [model.score(model.params, batch) for batch in model.micro_batches]


def sft_phase(model: BenchModel) -> Callable[[], Any]:
    """Run one update on unrelated rows."""
    steps = model.step_programs("sft")

    def run() -> Any:
        model.state, metrics = steps.run(model.state, {}, model.micro_batches, 1e-6)
        return model.state, metrics

    return run


def grpo_phase(model: BenchModel) -> Callable[[], Any]:
    """Run one step of GRPO: rollouts are scored and trained on without leaving the device."""
    sample = rollout_phase(model)
    steps = model.step_programs("policy", ratio="token", clip_low=0.2, clip_high=0.3, clip_dual=3.0)
    rows = model.work.rows
    random = np.random.default_rng(2).standard_normal(rows, np.float32)
    advantages = sharding.place_rows(random, model.mesh)

    def run() -> Any:
        rollouts = sample()
        extra = {"advantages": advantages, "sampler_logps": rollouts.logps}
        batch = model.group_batch(rollouts.tokens, extra)
        old_logps = model.score(model.params, batch)
        batch = batch.replace(extra=extra | {"old_logps": old_logps})
        model.state, metrics = steps.run(model.state, {}, [batch], 1e-6)
        return model.state, metrics

    return run


PHASE_FUNCTIONS = {
    "rollout": rollout_phase,
    "logp": logp_phase,
    "sft": sft_phase,
    "grpo": grpo_phase,
}


def phase_flops(phase: str, work: Workload, cfg: ModelConfig) -> tuple[float, float]:
    """Return the (text, vision) FLOPs that a phase needs.

    A backward pass counts as two forward passes.
    """
    n, g, p, r = work.prompts, work.group, work.prompt, work.new
    image = 0.0
    if work.grid:
        layout = find_family(cfg).tower.frame_layout(work.grid, work.grid, cfg.vision)
        image = flops.vision_forward_flops(cfg, len(layout.order), len(layout.order))
    rollout = flops.text_forward_flops(cfg, n, p, 1) + flops.decode_flops(cfg, n, p, g, r - 1)
    rows = flops.text_forward_flops(cfg, n * g, p + r, r)
    groups = flops.group_forward_flops(cfg, n, p, g, r)
    return {
        "rollout": (rollout, n * image),
        "logp": (rows, n * g * image),
        "sft": (3 * rows, 3 * n * g * image),
        "grpo": (rollout + 4 * groups, 5 * n * image),
    }[phase]


# ---- measuring -----------------------------------------------------------------------------------


def measure_peak_flops(dtype: Any, repeat: int = 5) -> float:
    """Return the FLOPs per second of a large matrix product, all devices together.

    The sums are float32, since a CPU multiplies bfloat16 matrices faster that way.
    """
    devices = jax.devices()
    side, products = (2048, 1) if devices[0].platform == "cpu" else (8192, 10)

    @jax.jit
    def multiply(a: jax.Array) -> jax.Array:
        product = lambda _, x: jnp.dot(a, x, preferred_element_type=jnp.float32).astype(dtype)
        return jax.lax.fori_loop(0, products, product, a)

    a = jnp.full((side, side), 1 / side, dtype)
    seconds = time_calls(lambda: multiply(a), repeat + 1)
    return 2 * side**3 * products / min(seconds[1:]) * len(devices)


def time_calls(run: Callable[[], Any], times: int = 1) -> list[float]:
    """Return the seconds of each of `times` calls."""
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - start)
    return seconds


class CompilationCounter:
    """Count compilations and their seconds since the counter was created."""

    def __init__(self) -> None:
        self.count, self.seconds = 0, 0.0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, seconds: float, **_: Any) -> None:
        if event.endswith("backend_compile_duration"):
            self.count, self.seconds = self.count + 1, self.seconds + seconds


def measure_phase(
    model: BenchModel,
    phase: str,
    peer: Callable[[str], float] | None,
    compilations: CompilationCounter,
) -> dict[str, float]:
    """Warm up one phase, and time it alternately with the peer."""
    run, work = PHASE_FUNCTIONS[phase](model), model.work
    count, compile_seconds = compilations.count, compilations.seconds
    with jax.set_mesh(model.mesh), console.show_waiting(f"{phase}: compiling"):
        time_calls(run)
    metrics: dict[str, Any] = {
        f"{phase}_compilations": compilations.count - count,
        f"{phase}_compile_s": compilations.seconds - compile_seconds,
    }
    count = compilations.count
    seconds, peer_seconds = [], []
    with jax.set_mesh(model.mesh), console.show_waiting(f"{phase}: measuring"):
        if peer:
            peer(phase)
        for _ in range(work.repeat):
            seconds += time_calls(run)
            peer_seconds += [peer(phase)] if peer else []
    tokens = work.rows * (work.new if phase == "rollout" else work.prompt + work.new)
    median = statistics.median(seconds)
    metrics |= {
        f"{phase}_s": median,
        f"{phase}_tok_s": tokens / median,
        f"{phase}_compilations_after_warmup": compilations.count - count,
    }
    if peer:
        peer_median = statistics.median(peer_seconds)
        ratios = [b / a for a, b in zip(seconds, peer_seconds, strict=True)]
        metrics |= {
            f"peer_{phase}_s": peer_median,
            f"peer_{phase}_tok_s": tokens / peer_median,
            f"ratio_{phase}": statistics.median(ratios),
        }
    return metrics


def flops_utilisation(
    metrics: dict[str, float],
    phases: Sequence[str],
    work: Workload,
    cfg: ModelConfig,
    peak_flops: float,
) -> dict[str, float]:
    """Return the MFU of each phase, with and without the vision tower."""
    out = {"ceiling_tflops": peak_flops / 1e12}
    for phase in phases:
        text, vision = phase_flops(phase, work, cfg)
        seconds = metrics[f"{phase}_s"]
        out[f"{phase}_mfu"] = (text + vision) / seconds / peak_flops
        out[f"{phase}_mfu_text"] = text / seconds / peak_flops
    return out


def peak_memory_gib() -> float:
    """Return the peak memory in GiB of one accelerator, or of this process on a CPU."""
    stats = jax.devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use", process_memory(peak=True)) / 2**30


@contextlib.contextmanager
def open_peer(model: BenchModel) -> Iterator[tuple[Callable[[str], float], dict[str, Any]]]:
    """Start the peer with our weights and inputs; yield a function that calls it, and its facts.

    The peer must compute the same log-probabilities as we do; otherwise it does other work.
    """
    work = model.work
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "model"
        with console.show_waiting("peer: weights"):
            hf_checkpoint.save_hf_checkpoint(model.params, model.cfg, folder, dtype=work.dtype)
            inputs, vision = dict(model.inputs), model.cfg.vision
            if vision is not None:
                inputs["patches"] = normalise_patches(inputs["patches"], vision)
            np.savez(folder / peer_hf.INPUTS_FILE, **inputs)
        settings = dict(
            device="cpu" if model.is_cpu else "cuda",
            dtype=work.dtype,
            group=work.group,
            micro=work.micro,
            new=work.new,
        )
        with peer_hf.start_peer(folder, **settings) as call:
            with console.show_waiting("peer: starting"):
                facts = call("facts")
            with jax.set_mesh(model.mesh):
                logps = np.concatenate([np.asarray(x) for x in logp_phase(model)()])
            model.score.clear_cache()  # the phase counts its own compilations
            gap = float(np.abs(logps - np.asarray(facts.pop("logps"))).mean())
            limit = 1e-3 if work.dtype == "float32" else 0.1
            if not gap < limit:
                raise ValueError(
                    f"the peer's log-probabilities differ from ours by {gap:.2g} on average; "
                    f"expected less than {limit}: not the same work"
                )
            yield call, facts | {"peer_logp_gap": gap}


def run_benchmark(work: Workload, phases: Sequence[str], peer: str | None = None) -> dict[str, Any]:
    """Measure the phases, and return all metrics by name."""
    check_workload(work, phases)
    model_phases = [p for p in MODEL_PHASES if p in phases]
    if peer and not model_phases:
        raise ValueError(
            f"--peer={peer}: --phases={','.join(phases)} has nothing that the peer runs; expected "
            f"some of {', '.join(MODEL_PHASES)}"
        )
    metrics: dict[str, Any] = {}
    if "load" in phases:
        metrics |= checkpoint_loading.measure_loading(work)
    if "data" in phases:
        metrics |= data_pipeline.measure_data_pipeline()
    compilations = CompilationCounter()
    if not model_phases:
        return metrics
    model = BenchModel(work, training=bool({"sft", "grpo"} & set(model_phases)))
    metrics |= {
        "params": model.param_count,
        "prompt": work.prompt,
        "seqs": work.rows,
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
    }
    with contextlib.ExitStack() as stack:
        call_peer, facts = stack.enter_context(open_peer(model)) if peer else (None, {})
        peak_before = measure_peak_flops(model.dtype)
        for phase in model_phases:
            metrics |= measure_phase(model, phase, call_peer, compilations)
        peak_flops = max(peak_before, measure_peak_flops(model.dtype))
    metrics |= facts | flops_utilisation(metrics, model_phases, work, model.cfg, peak_flops)
    if {"data", "sft"} <= set(phases):
        # The rows per second of the pipeline divided by those of this model's training step.
        metrics["data_over_sft"] = metrics["data_rows_s"] / (metrics["seqs"] / metrics["sft_s"])
    return metrics | {
        "compilations": compilations.count,
        "compile_s": compilations.seconds,
        "peak_gib": peak_memory_gib(),
        "attention": model.cfg.compute.attention,
        "load_average": os.getloadavg()[0],
    }


def phase_line(phase: str, metrics: dict[str, float]) -> str:
    """Return the metrics of a phase as a line of text."""
    if phase in ("load", "data"):
        values = (
            f"{name.removeprefix(phase + '_')} {value:.4g}"
            for name, value in metrics.items()
            if name.startswith(f"{phase}_")
        )
        return f"{phase:8}" + "  ".join(values)
    seconds, speed, mfu = (metrics[f"{phase}_{name}"] for name in ("s", "tok_s", "mfu"))
    line = f"{phase:8}{seconds:9.3f} s {speed:10.0f} tokens/s  MFU {mfu:.0%}"
    if f"ratio_{phase}" not in metrics:
        return line
    return (
        f"{line}  {metrics[f'ratio_{phase}']:.2f} x the peer ({metrics[f'peer_{phase}_s']:.3f} s)"
    )
