"""The training loop of a stage: build a step's batches, run its optimizer updates, report.

SFT, corpus    next_step_batch -> sft_step_batch (`step_batch`) -> StepPrograms.run (`train_step`)
self           the same, on the policy's own responses (`self_training`)
RL             next_step_batch -> start_rollouts -> score_rollouts -> scored_step_batch (`rollouts`)
               -> StepPrograms.run for each update
"""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from cptjax.common import console, device_time, distributed, phases, run_log
from cptjax.common.signals import SamplingStopped
from cptjax.config import Stage
from cptjax.data.cost import WorkCost
from cptjax.data.loader import BatchStream
from cptjax.models import trainable
from cptjax.training import rollouts, self_training, step_batch
from cptjax.training.algorithms.continual_learning.hooks import HookArrays
from cptjax.training.algorithms.optimizers import ScheduleConfig, learning_rates
from cptjax.training.rollouts import ScoredRollouts
from cptjax.training.stage_context import StageContext, StageProgress
from cptjax.training.step_batch import StepBatch
from cptjax.training.train_step import StepPrograms
from cptjax.types import Mean, Params, TrainState

# The difference between sampler and trainer that rounding explains, in nats per token.
MAX_MISMATCH = {"float32": 1e-3, "bfloat16": 0.05}


def train_loop(
    ctx: StageContext,
    state: TrainState,
    frozen: Params,
    programs: StepPrograms,
    progress: StageProgress,
    arrays: HookArrays,
    on_step: Callable[[TrainState, StageProgress, dict[str, float], list[dict[str, Any]]], bool],
) -> TrainState:
    """Train from `progress` to the last step.

    `on_step` logs, saves, and returns whether to continue. The loop ends early if sampling was
    stopped. A batch that needs no sampling is built while the device runs the step before it. With
    rollout.ahead, the next responses are sampled before the update, and `ctx` keeps them.
    """
    config = ctx.config
    method = config.method
    updates = ctx.steps * ctx.builder.layout.updates
    rates = learning_rates(ScheduleConfig.from_config(config.train), updates)
    stream = None
    if method.source in ("gold", "rollouts"):
        stream = ctx.open_stream(progress.batches_taken)
    devices = device_time.start()
    ahead: StepBatch | None = None
    try:
        while progress.step < ctx.steps:
            began, is_first = time.perf_counter(), progress.updates == 0
            with jax.profiler.StepTraceAnnotation("step", step_num=progress.step + 1):
                batch = ahead
                if batch is None:
                    params = trainable.join_params(state.params, frozen)
                    try:
                        with phases.phase("batch"):
                            batch = next_step_batch(ctx, params, stream, progress)
                    except SamplingStopped:
                        break
                progress.batches_taken += batch.batches_taken
                progress.carried |= batch.carried

                updating = time.perf_counter()
                with phases.phase("update"):
                    state, pending, processed = run_updates(
                        programs, state, frozen, batch, rates, progress, arrays
                    )
                    progress.step += 1
                    finished = devices.watch("update", updating, pending)

                    ahead = None
                    if progress.step < ctx.steps and not needs_sampling(ctx, progress.step):
                        ahead = next_step_batch(ctx, None, stream, progress)
                        # The time that the device waited for this batch.
                        idle = max(0.0, time.perf_counter() - finished.result())
                        ahead.metrics["seconds/data"] = idle
                        phases.count_idle_time(idle)
                    fetched = fetch_metrics(pending)
            if ctx.teacher is not None:
                ctx.teacher.follow(state.params)
            if is_first and method.objective == "policy":
                warn_of_mismatch(fetched[0], ctx.stage)
            check_skipped_steps(state, config.train.max_skipped)

            ended = time.perf_counter()
            metrics = (
                batch.metrics
                | merge_update_metrics(fetched)
                | cost_metrics(batch.cost, processed, ended - began)
                | device_metrics(
                    devices.between(began, ended), batch.metrics, ctx.builder.model_ctx.mesh.size
                )
                | {
                    "seconds": ended - began,
                    "seconds/batch": updating - began,
                    "seconds/update": ended - updating,
                }
            )
            if progress.step == ctx.steps:
                metrics |= memory_metrics()
            if not on_step(state, progress, metrics, batch.rollout_rows):
                break
    finally:
        device_time.stop()
        if stream is not None:
            stream.close()
    return state


def run_updates(
    programs: StepPrograms,
    state: TrainState,
    frozen: Params,
    batch: StepBatch,
    rates: np.ndarray,
    progress: StageProgress,
    arrays: HookArrays,
) -> tuple[TrainState, list[dict[str, Any]], int]:
    """Start the optimizer updates of a step, without waiting for the device.

    Return the state, the metrics of each update on the device, and the number of tokens with
    padding.
    """
    metrics, processed = [], 0
    for i, micro_batches in enumerate(batch.updates):
        rate = rates[progress.updates]
        memory_batch = batch.memory[i] if batch.memory else None
        state, of_update = programs.run(state, frozen, micro_batches, rate, arrays, memory_batch)
        metrics.append(of_update)
        trained = [*micro_batches, *([memory_batch] if memory_batch else [])]
        processed += sum(b.tokens_with_padding for b in trained)
        progress.updates += 1
    return state, metrics, processed


def next_step_batch(
    ctx: StageContext, params: Params | None, stream: BatchStream | None, progress: StageProgress
) -> StepBatch:
    """Build the batch of the next step; `params` may be None where no sampling is needed."""
    builder, method, step = ctx.builder, ctx.config.method, progress.step
    began, waited = time.perf_counter(), stream.waited if stream else 0.0
    if method.source == "rollouts":
        key, first = ctx.step_key(step), progress.batches_taken * builder.batch_size
        filter_metrics, batches_taken = {}, 1
        if method.online_filter:
            graded, filter_metrics, batches_taken = rollouts.sample_filtered_rollouts(
                builder, params, stream, key, first
            )
            scored = rollouts.score_rollouts(builder, params, graded, ctx.reference)
        else:
            scored = step_rollouts(ctx, params, stream, progress)
        batch = rollouts.scored_step_batch(
            builder,
            scored,
            ctx.reference,
            step + 1,
            ctx.stage.number,
            ctx.teacher,
            ctx.start,
            progress.carried,
        )
        batch.metrics |= filter_metrics
        batch.batches_taken = batches_taken
    else:
        if method.source == "gold":
            items, cost = next(stream), WorkCost()
        else:
            items, cost = self_training.response_examples(ctx, params, step)
        batch = step_batch.sft_step_batch(builder, items, ctx.reference, ctx.teacher)
        batch.cost += cost
    if ctx.memory is not None:
        first = progress.updates
        batch.memory, cost = ctx.memory.batches(range(first, first + builder.layout.updates))
        batch.cost += cost
    if needs_sampling(ctx, step):
        batch.metrics["seconds/data"] = (stream.waited if stream else 0.0) - waited
    else:
        batch.metrics["seconds/data"] = time.perf_counter() - began
    return batch


def step_rollouts(
    ctx: StageContext, params: Params, stream: BatchStream, progress: StageProgress
) -> ScoredRollouts:
    """Return the rollouts of this step; with rollout.ahead, sample those of the next step too.

    The rewards of this step are computed meanwhile.
    """
    builder, reference = ctx.builder, ctx.reference

    def sample(later: int) -> ScoredRollouts:
        key = ctx.step_key(progress.step + later)
        first = (progress.batches_taken + later) * builder.batch_size
        graded = rollouts.start_rollouts(builder, params, next(stream), key, first)
        return rollouts.score_rollouts(builder, params, graded, reference)

    scored, saved = ctx.ahead, ctx.saved_rollouts
    ctx.ahead = ctx.saved_rollouts = None
    if saved is not None:
        scored = rollouts.restore_rollouts(builder, params, next(stream), reference, saved)
    elif scored is None:
        scored = sample(0)
    if builder.sampling.ahead and progress.step + 1 < ctx.steps:
        ctx.ahead = sample(1)
    return scored


def needs_sampling(ctx: StageContext, step: int) -> bool:
    """Return whether the batch of a step is sampled from the policy after the previous step."""
    return ctx.config.method.source == "rollouts" or self_training.starts_window(ctx, step)


def fetch_metrics(metrics: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Fetch the metrics of each update; drop means whose count is 0."""
    return [
        {
            name: x.value if isinstance(x, Mean) else float(x)
            for name, x in update.items()
            if not isinstance(x, Mean) or x.count
        }
        for update in jax.device_get(metrics)
    ]


def merge_update_metrics(metrics: Sequence[dict[str, float]]) -> dict[str, float]:
    """Merge the metrics of a step's updates: extremes for _min and _max, means otherwise."""
    pick = {"_min": min, "_max": max}
    names = dict.fromkeys(name for update in metrics for name in update)
    return {
        name: float(pick.get(name[-4:], np.mean)([u[name] for u in metrics if name in u]))
        for name in names
    }


def cost_metrics(cost: WorkCost, processed: int, seconds: float) -> dict[str, float]:
    """Return the cost of a step over all processes, and its tokens and FLOPs per second.

    perf/padding: the tokens that the updates processed, with padding, for each real token;
        below 1 where little is padded, since the last token of a response is not an input
    """
    total = sum(distributed.gather_objects(cost), WorkCost())
    return total.logged() | {
        "perf/tokens_per_second": total.seen / seconds,
        "perf/padding": processed / max(total.trained, 1),
        "perf/flops_per_second": total.flops / seconds,
    }


def device_metrics(
    seconds: dict[str, float], metrics: dict[str, float], devices: int
) -> dict[str, float]:
    """Return what the devices of this process did in a step, and their throughput.

    seconds/device/...: their work by kind, and `idle`, when they wait; together the step's seconds
    perf/throughput: tokens of prompts and responses per second and device, as EasyR1 defines it: a
        prompt counts for each of its responses
    """
    out = {f"seconds/device/{work}": value for work, value in seconds.items()}
    if "row_tokens" in metrics:
        out["perf/throughput"] = metrics["row_tokens"] / devices / sum(seconds.values())
    return out


def memory_metrics() -> dict[str, float]:
    """Return the bytes on the fullest device of this process.

    perf/array_bytes: of the arrays that exist between two steps
    perf/device_bytes: the peak since the start of the process, where the device reports it
    """
    sizes: dict[jax.Device, int] = dict.fromkeys(jax.local_devices(), 0)
    for x in jax.live_arrays():
        if not x.is_deleted():
            size = math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
            for device in x.sharding.addressable_devices:
                sizes[device] += size
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
    reported = {run_log.DEVICE_BYTES: float(max(peaks))} if peaks else {}
    return {run_log.ARRAY_BYTES: float(max(sizes.values()))} | reported


def warn_of_mismatch(metrics: dict[str, float], stage: Stage) -> None:
    """Warn if sampler and trainer differ before the first update, when the ratio must be 1."""
    rollout, compute_dtype = stage.config.rollout, stage.config.model.compute_dtype
    limit = MAX_MISMATCH[compute_dtype]
    # A sampler that cuts a tempered distribution does not return log-probabilities over the whole
    # vocabulary, so there is nothing to compare.
    is_cut = rollout.top_p < 1 or rollout.top_k or rollout.min_p
    tempered = stage.config.method.tempered and rollout.temperature != 1
    if rollout.dtype not in ("", compute_dtype) or (tempered and is_cut):
        return
    if metrics.get("mismatch", 0.0) > limit:
        console.print_warning(
            f"stage {stage.number}: before the first update the trainer's log-probabilities differ "
            f"from the sampler's by {metrics['mismatch']:.2g} per token on average "
            f"(at most {metrics['mismatch_max']:.2g}; expected below {limit}): responses are not "
            "exactly the policy's own. Set method.tis_cap=2.0, or compare with "
            "model.attention=xla and model.compute_dtype=float32"
        )


def check_skipped_steps(state: TrainState, most: int) -> None:
    """Stop when too many updates in a row were skipped."""
    skipped = int(state.skipped)
    if skipped >= most:
        raise ValueError(
            f"{skipped} updates in a row had a gradient or loss that is not finite, or no token to "
            f"train on, and were skipped (train.max_skipped={most}). Lower train.lr, set "
            "train.clip, keep a KL term, raise rollout.max_new_tokens if method.truncated='mask' "
            "leaves out every response, or read the last rows of rollouts/"
        )
