"""How fast the programs of a run are on this machine, phase by phase, and beside what a user would take instead.

    rollout   N prompts x G samples of exactly `new` tokens, temperature 1
    logp      log-probabilities of the `new` tokens of N * G unrelated rows, each with an image of its own
    sft       forward, backward and AdamW on the same rows
    grpo      rollout, logp and update of N groups, prompts shared

tok_s counts prompt + new tokens of every row (rollout: the new ones), whether or not rows share a prompt. MFU counts the arithmetic
that the phase needs by hand (`flops`), over the matrix products per second that this machine was seen to do in the same call.
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
    BENCH_SIZES,
    MODEL_PHASES,
    Workload,
    check_workload,
    equal_rows,
    random_inputs,
)
from cptjax.common import console
from cptjax.generation import sampler
from cptjax.generation.sampling_config import SamplingConfig
from cptjax.models import (
    attention,
    flops,
    hf_checkpoint,
    logprobs,
    positions,
    qwen2_5_vl,
    trainable,
)
from cptjax.models.config import ModelConfig
from cptjax.training import train_step
from cptjax.training.algorithms.losses import LossConfig
from cptjax.training.algorithms.objective import Objective
from cptjax.training.algorithms.optimizers import OptimizerConfig, make_optimizer
from cptjax.types import Batch

BENCH_OPTIMIZER = OptimizerConfig("adamw", 0.9, 0.999, 1e-8, 0.0, 1.0, "float32")


class BenchModel:
    """A model with its training state, and the inputs of every phase on the mesh."""

    def __init__(self, work: Workload, training: bool):
        self.work, self.mesh = work, sharding.make_mesh()
        self.dtype = BENCH_DTYPES[work.dtype]
        cpu = self.mesh.devices.flat[0].platform == "cpu"
        backend = attention.choose_backend(self.mesh, BENCH_SIZES[work.size], self.dtype)
        self.cfg = dataclasses.replace(
            BENCH_SIZES[work.size], remat=work.remat, attention=backend, unroll=cpu
        )
        shards = sharding.batch_shards(self.mesh)
        if work.prompts % shards:
            raise ValueError(
                f"--prompts={work.prompts}: expected a multiple of the {shards} devices that share a batch"
            )
        declared = qwen2_5_vl.declare_params(self.cfg)
        self.count = trainable.count_params(declared)
        rules = sharding.rules_for(self.cfg.text.kv_heads, self.mesh)
        weights = sharding.init_params(declared, jax.random.key(0), self.dtype, self.mesh, rules)
        self.optimizer = make_optimizer(BENCH_OPTIMIZER)
        self.state = train_step.init_state(self.optimizer, weights, self.mesh) if training else None
        self.weights = None if training else weights  # the state has taken them over
        self.inputs = random_inputs(work, self.cfg)
        place = functools.partial(sharding.place_batch, mesh=self.mesh)
        self.prompts = sharding.place_prompts(
            equal_rows(self.inputs["prompts"], self.inputs["patches"], self.cfg, shards), self.mesh
        )
        self.unrelated = [place(self._rows(some, shards)) for some in self._cuts()]
        self.key = jax.random.key(1)

    @property
    def params(self) -> Any:
        return self.weights if self.state is None else self.state.params

    def _cuts(self) -> list[slice]:
        size = self.work.micro or self.work.rows
        return [slice(i, i + size) for i in range(0, self.work.rows, size)]

    def _rows(self, some: slice, shards: int) -> Batch:
        """Rows that share nothing: prompt, answer and image of each."""
        copies = lambda x: np.repeat(x, self.work.group, 0)[some]
        answers = self.inputs["answers"][some].astype(np.int32)
        tokens = np.concatenate([copies(self.inputs["prompts"]), answers], 1)
        where = np.broadcast_to(
            np.arange(self.work.prompt - 1, tokens.shape[1] - 1, dtype=np.int32), answers.shape
        )
        prompts = equal_rows(tokens, copies(self.inputs["patches"]), self.cfg, shards)
        return Batch(prompts, answers, np.ones(answers.shape, bool), where)

    @functools.cached_property
    def scorer(self) -> Callable:
        return logprobs.make_scoring_program(self.cfg, self.dtype, self.work.chunk, 1.0)

    def steps(self, kind: str, **settings: Any) -> train_step.StepPrograms:
        objective = Objective(
            dataclasses.replace(LossConfig.plain(kind, self.work.chunk), **settings)
        )
        return train_step.make_step_programs(
            self.cfg,
            objective,
            self.optimizer,
            train_step.StateShardings.of(self.state),
            self.dtype,
        )


def rollout_phase(s: BenchModel) -> Callable[[], Any]:
    """Every row runs to its last token: none may end it."""
    sampling = SamplingConfig(
        group=s.work.group, max_new_tokens=s.work.new, temperature=1.0, check_every=16
    )
    return lambda: sampler.generate_rollouts(
        s.params, s.prompts, s.key, s.cfg, sampling, dtype=s.dtype, stop=(-1,)
    )


def logp_phase(s: BenchModel) -> Callable[[], Any]:
    return lambda: [s.scorer(s.params, batch) for batch in s.unrelated]


def sft_phase(s: BenchModel) -> Callable[[], Any]:
    steps = s.steps("sft")

    def run() -> Any:
        s.state, metrics = steps.run(s.state, {}, s.unrelated, 1e-6)
        return s.state, metrics

    return run


def grpo_phase(s: BenchModel) -> Callable[[], Any]:
    """One step of a run, as `lessons` and `train` make it: what the sampler drew is scored and learned from where it lies."""
    draw, steps, rows = (
        rollout_phase(s),
        s.steps("policy", ratio="token", clip_low=0.2, clip_high=0.3, clip_dual=3.0),
        s.work.rows,
    )
    advantages = sharding.place_rows(
        np.random.default_rng(2).standard_normal(rows, np.float32), s.mesh
    )

    def run() -> Any:
        out = draw()
        batch = Batch(
            s.prompts,
            out.tokens,
            out.mask,
            None,
            {"advantages": advantages, "sampler_logps": out.logps},
        )
        old = s.scorer(s.params, batch)
        s.state, metrics = steps.run(
            s.state, {}, [batch.replace(extra=batch.extra | {"old_logps": old})], 1e-6
        )
        return s.state, metrics

    return run


PHASE_FUNCTIONS = {
    "rollout": rollout_phase,
    "logp": logp_phase,
    "sft": sft_phase,
    "grpo": grpo_phase,
}


def phase_flops(phase: str, work: Workload, cfg: ModelConfig) -> tuple[float, float]:
    """What a phase needs: (text, vision) operations; a backward pass is two forward passes."""
    n, g, p, r = work.prompts, work.group, work.prompt, work.new
    slots = len(positions.frame_layout(work.grid, work.grid, cfg.vision).order)
    see = lambda images: flops.vision_forward_flops(cfg, images * slots, slots)
    drawing = flops.text_forward_flops(cfg, n, p, 1) + flops.decode_flops(cfg, n, p, g, r - 1)
    plain, shared = (
        flops.text_forward_flops(cfg, n * g, p + r, r),
        flops.group_forward_flops(cfg, n, p, g, r),
    )
    return {
        "rollout": (drawing, see(n)),
        "logp": (plain, see(n * g)),
        "sft": (3 * plain, 3 * see(n * g)),
        "grpo": (drawing + 4 * shared, 5 * see(n)),
    }[phase]


def measure_peak_flops(dtype: Any, repeat: int = 5) -> float:
    """Operations per second of a large matrix product, all devices together: the best of a few."""
    devices = jax.devices()
    side, cpu = (2048, True) if devices[0].platform == "cpu" else (8192, False)
    product = jax.jit(lambda a: jax.lax.fori_loop(0, 1 if cpu else 10, lambda _, x: a @ x, a))
    a = jnp.full((side, side), 1 / side, jnp.float32 if cpu else dtype)
    seconds = time_calls(lambda: product(a), repeat + 1)
    return 2 * side**3 * (1 if cpu else 10) / min(seconds[1:]) * len(devices)


def time_calls(run: Callable[[], Any], times: int = 1) -> list[float]:
    out = []
    for _ in range(times):
        start = time.perf_counter()
        jax.block_until_ready(run())
        out.append(time.perf_counter() - start)
    return out


class CompilationCounter:
    """Counts what the compiler does from here on."""

    def __init__(self) -> None:
        self.count, self.seconds = 0, 0.0
        jax.monitoring.register_event_duration_secs_listener(self._hear)

    def _hear(self, event: str, seconds: float, **_: Any) -> None:
        if event.endswith("backend_compile_duration"):
            self.count, self.seconds = self.count + 1, self.seconds + seconds


def measure_phase(
    session: BenchModel, phase: str, peer: Callable[[str], float] | None, heard: CompilationCounter
) -> dict[str, float]:
    """One phase: warmed up, then timed in turns with the peer."""
    run, work = PHASE_FUNCTIONS[phase](session), session.work
    before = heard.count, heard.seconds
    with jax.set_mesh(session.mesh), console.show_waiting(f"{phase}: compiling"):
        time_calls(run)
    found: dict[str, Any] = {
        f"{phase}_compilations": heard.count - before[0],
        f"{phase}_compile_s": heard.seconds - before[1],
    }
    ours, theirs, again = [], [], heard.count
    with jax.set_mesh(session.mesh), console.show_waiting(f"{phase}: measuring"):
        if peer:
            peer(phase)
        for _ in range(work.repeat):
            ours += time_calls(run)
            theirs += [peer(phase)] if peer else []
    tokens = work.rows * (work.new if phase == "rollout" else work.prompt + work.new)
    took = statistics.median(ours)
    found |= {
        f"{phase}_s": took,
        f"{phase}_tok_s": tokens / took,
        f"{phase}_compilations_after_warmup": heard.count - again,
    }
    if theirs:
        found[f"peer_{phase}_s"], found[f"peer_{phase}_tok_s"] = (
            statistics.median(theirs),
            tokens / statistics.median(theirs),
        )
        found[f"ratio_{phase}"] = statistics.median(
            b / a for a, b in zip(ours, theirs, strict=True)
        )
    return found


def flops_utilisation(
    found: dict[str, float], phases: Sequence[str], work: Workload, cfg: ModelConfig, most: float
) -> dict[str, float]:
    """MFU of each phase, with the vision tower and without."""
    out = {"ceiling_tflops": most / 1e12}
    for phase in phases:
        text, vision = phase_flops(phase, work, cfg)
        out |= {
            f"{phase}_mfu": (text + vision) / found[f"{phase}_s"] / most,
            f"{phase}_mfu_text": text / found[f"{phase}_s"] / most,
        }
    return out


def peak_memory_gib() -> float:
    """GiB at most so far: of one accelerator, or of this process on a CPU."""
    stats = jax.devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use", process_memory(peak=True)) / 2**30


@contextlib.contextmanager
def open_peer(session: BenchModel) -> Iterator[tuple[Callable[[str], float], dict[str, Any]]]:
    """The peer on our weights and inputs, with its facts; it must find the log-probabilities that we find."""
    work = session.work
    cpu = session.mesh.devices.flat[0].platform == "cpu"
    with tempfile.TemporaryDirectory() as folder:
        with console.show_waiting("peer: weights"):
            hf_checkpoint.save_hf_checkpoint(
                session.params, session.cfg, Path(folder) / "model", dtype=work.dtype
            )
            np.savez(Path(folder) / "model" / peer_hf.INPUTS_FILE, **session.inputs)
        settings = dict(
            device="cpu" if cpu else "cuda",
            dtype=work.dtype,
            group=work.group,
            micro=work.micro,
            new=work.new,
        )
        with peer_hf.start_peer(Path(folder) / "model", **settings) as ask:
            with console.show_waiting("peer: starting"):
                facts = ask("facts")
            with jax.set_mesh(session.mesh):
                ours = np.concatenate([np.asarray(x) for x in logp_phase(session)()])
            session.scorer.clear_cache()  # the phase counts its own compilations
            gap = float(np.abs(ours - np.asarray(facts.pop("logps"))).mean())
            if not gap < (1e-3 if work.dtype == "float32" else 0.1):
                raise ValueError(
                    f"the peer's log-probabilities differ from ours by {gap:.2g} on average: not the same work"
                )
            yield ask, facts | {"peer_logp_gap": gap}


def run_benchmark(work: Workload, phases: Sequence[str], peer: str | None = None) -> dict[str, Any]:
    """All that is asked for, by name."""
    check_workload(work, phases)
    found: dict[str, Any] = checkpoint_loading.measure_loading(work) if "load" in phases else {}
    found |= data_pipeline.measure_data_pipeline() if "data" in phases else {}
    wanted, heard = [p for p in MODEL_PHASES if p in phases], CompilationCounter()
    if not wanted:
        return found
    session = BenchModel(work, training=bool({"sft", "grpo"} & set(wanted)))
    device = jax.devices()[0]
    found |= {"params": session.count, "prompt": work.prompt, "seqs": work.rows}
    found |= {"device": device.device_kind, "devices": jax.device_count()}
    with contextlib.ExitStack() as stack:
        ask, facts = stack.enter_context(open_peer(session)) if peer else (None, {})
        first = measure_peak_flops(session.dtype)
        for phase in wanted:
            found |= measure_phase(session, phase, ask, heard)
        most = max(first, measure_peak_flops(session.dtype))
    found |= facts | flops_utilisation(found, wanted, work, session.cfg, most)
    if {"data", "sft"} <= set(
        phases
    ):  # how much faster rows come than this model's training step takes them
        found["data_over_sft"] = found["data_rows_s"] / (found["seqs"] / found["sft_s"])
    total = {"compilations": heard.count, "compile_s": heard.seconds, "peak_gib": peak_memory_gib()}
    return found | total | {"attention": session.cfg.attention, "load_average": os.getloadavg()[0]}


def phase_line(phase: str, found: dict[str, Any]) -> str:
    """A phase's numbers as a line for people."""
    if phase in ("load", "data"):
        return f"{phase:8}" + "  ".join(
            f"{k.removeprefix(phase + '_')} {v:.4g}"
            for k, v in found.items()
            if k.startswith(f"{phase}_")
        )
    line = f"{phase:8}{found[f'{phase}_s']:9.3f} s {found[f'{phase}_tok_s']:10.0f} tokens/s  MFU {found[f'{phase}_mfu']:.0%}"
    ratio = found.get(f"ratio_{phase}")
    return line + (f"  {ratio:.2f} x the peer ({found[f'peer_{phase}_s']:.3f} s)" if ratio else "")
