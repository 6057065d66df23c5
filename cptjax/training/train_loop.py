"""One stage: its data, its programs, and the one training loop."""

import concurrent.futures
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cptjax.common import console, distributed
from cptjax.common.signals import SamplingStopped
from cptjax.data import cost
from cptjax.data.cost import WorkCost
from cptjax.data.loader import BatchStream
from cptjax.models import trainable
from cptjax.training import rollouts, self_training, step_batch, train_step
from cptjax.training.algorithms import optimizers
from cptjax.training.algorithms.optimizers import ScheduleConfig
from cptjax.training.stage_context import StageContext, StageProgress
from cptjax.training.step_batch import BatchBuilder, StepBatch
from cptjax.types import Batch, Mean, Params, TrainState

MAX_MISMATCH = {
    "float32": 1e-3,
    "bfloat16": 0.05,
}  # nats a token, between sampler and trainer, that rounding explains


def next_step_batch(
    ctx: StageContext, params: Params | None, stream: BatchStream | None, progress: StageProgress
) -> StepBatch:
    """What the next step learns from; takes its batches from the stream. Answers that are there need no parameters."""
    t, m = ctx.builder, ctx.config.method
    began, waited = time.perf_counter(), stream.waited if stream else 0.0
    if m.source == "rollouts":
        found = _next_rollout_batch(ctx, params, stream, progress)
    else:
        items, spent = (
            (next(stream), WorkCost())
            if stream is not None
            else self_training.response_examples(ctx, params, progress.step)
        )
        found = step_batch.sft_batch(
            t, items, int(ctx.reference is not None) + int(ctx.teacher is not None)
        )
        found.cost += spent
    if m.penalty.name == "lwf":
        found.updates = ([ctx.teacher.previous(b) for b in update] for update in found.updates)
    if ctx.reference is not None and m.source != "rollouts":
        found.updates = (
            [_add_reference_logps(t, ctx.reference, b) for b in update] for update in found.updates
        )
    samples = m.source == "rollouts" or self_training.needs_sampling(ctx, progress.step)
    found.metrics["seconds/data"] = (
        (stream.waited if stream else 0.0) - waited if samples else time.perf_counter() - began
    )
    return found


def _next_rollout_batch(
    ctx: StageContext, params: Params, stream: BatchStream, progress: StageProgress
) -> StepBatch:
    t, step = ctx.builder, progress.step
    if ctx.config.method.online_filter:
        graded, info, turns = rollouts.sample_filtered_rollouts(
            t, params, stream, ctx.step_key(step), progress.batches_taken * t.batch_size
        )
    else:
        graded, info, turns = (
            rollouts.sample_rollouts(
                t, params, next(stream), ctx.step_key(step), progress.batches_taken * t.batch_size
            ),
            {},
            1,
        )
    attach = ctx.teacher.attach if ctx.config.method.objective == "distill" else None
    found = rollouts.rollout_step_batch(
        t, params, graded, ctx.reference, step + 1, ctx.stage.number, attach
    )
    found.metrics |= info
    found.batches_taken = turns
    return found


def _add_reference_logps(t: BatchBuilder, reference: Params, batch: Batch) -> Batch:
    return batch.replace(extra=batch.extra | {"ref_logps": t.score(reference, batch)})


def train_loop(
    ctx: StageContext,
    state: TrainState,
    frozen: Params,
    steps: train_step.StepPrograms,
    progress: StageProgress,
    extra: Any,
    on_step: Callable[..., bool],
) -> TrainState:
    """The one training loop; `on_step` logs, saves, and says whether to go on. It ends early where drawing answers was stopped."""
    c = ctx.config
    stream = (
        None if c.method.source in ("self", "corpus") else ctx.open_stream(progress.batches_taken)
    )
    watcher = concurrent.futures.ThreadPoolExecutor(1)
    ahead: StepBatch | None = None
    try:
        while progress.step < ctx.steps:
            began, first = time.perf_counter(), not progress.updates
            try:
                found = ahead or next_step_batch(
                    ctx, trainable.join_params(state.params, frozen), stream, progress
                )
            except SamplingStopped:
                break
            progress.batches_taken += found.batches_taken
            learning = time.perf_counter()
            state, numbers = _run_updates(ctx, state, frozen, steps, progress, extra, found)
            progress.step += 1
            known = (
                progress.step < ctx.steps
                and c.method.source != "rollouts"
                and not self_training.needs_sampling(ctx, progress.step)
            )
            ahead = None
            if known:
                finished = watcher.submit(wait_until_ready, numbers)
                ahead = next_step_batch(ctx, None, stream, progress)  # made while the device works
                made = time.perf_counter()
                ahead.metrics["seconds/data"] = max(
                    0.0, made - finished.result()
                )  # as long as the device waited for it
            metrics = fetch_metrics(numbers)
            if ctx.teacher is not None:
                ctx.teacher.follow(state.params)
            if first and c.method.objective == "policy":
                warn_of_mismatch(metrics[0], ctx)
            check_skipped_steps(state, c.train.max_skipped)
            ended = time.perf_counter()
            seconds = {
                "seconds": ended - began,
                "seconds/batch": learning - began,
                "seconds/update": ended - learning,
            }
            info = (
                found.metrics
                | merge_update_metrics(metrics)
                | seconds
                | cost_metrics(found.cost, ended - began)
            )
            if not on_step(state, progress, info, found.rollout_rows):
                break
    finally:
        watcher.shutdown(wait=False)
        if stream is not None:
            stream.close()
    return state


def _run_updates(
    ctx: StageContext,
    state: TrainState,
    frozen: Params,
    steps: train_step.StepPrograms,
    progress: StageProgress,
    extra: Any,
    found: StepBatch,
) -> tuple[TrainState, list[dict[str, Any]]]:
    """All optimiser updates of a lesson, and the numbers of each; they are on their way, nothing is waited for."""
    t, m = ctx.config.train, ctx.config.method
    rates = optimizers.learning_rates(
        ScheduleConfig.from_config(t), ctx.steps * m.updates_per_batch * m.passes
    )
    metrics: list[dict] = []
    for update in found.updates:
        state, numbers = steps.run(state, frozen, update, rates[progress.updates], extra)
        metrics.append(numbers)
        progress.updates += 1
    return state, metrics


def fetch_metrics(metrics: list[dict[str, Any]]) -> list[dict[str, float]]:
    """The numbers of updates, once they are there; a mean over nothing is left out."""
    return [
        {
            k: v.value if isinstance(v, Mean) else float(v)
            for k, v in n.items()
            if not isinstance(v, Mean) or v.count
        }
        for n in jax.device_get(metrics)
    ]


def wait_until_ready(metrics: list[dict[str, Any]]) -> float:
    """Waits until the device has made these numbers, and tells when that was."""
    jax.block_until_ready(metrics)
    return time.perf_counter()


def merge_update_metrics(metrics: Sequence[dict[str, float]]) -> dict[str, float]:
    """Numbers of a step's updates as one: the extreme of what is named _min or _max, the mean of all else."""
    pick = {"_min": min, "_max": max}
    names = dict.fromkeys(k for n in metrics for k in n)
    return {k: float(pick.get(k[-4:], np.mean)([n[k] for n in metrics if k in n])) for k in names}


def cost_metrics(cost: cost.WorkCost, seconds: float) -> dict[str, float]:
    """What a step cost, over all processes."""
    total = sum(distributed.gather_objects(cost), WorkCost())
    return total.logged() | {
        "perf/tokens_per_second": total.seen / seconds,
        "perf/flops_per_second": total.flops / seconds,
    }


def warn_of_mismatch(metrics: dict[str, float], ctx: StageContext) -> None:
    """Warn where the sampler's log-probabilities are not the trainer's before anything was learned: the ratio must then be 1."""
    s, limit = ctx.builder.sampling, MAX_MISMATCH[jnp.dtype(ctx.builder.model_ctx.dtype).name]
    cut = s.temperature != 1 and (
        s.top_p < 1 or s.top_k or s.min_p
    )  # the sampler then knows no log-probability of all tokens
    if (
        s.dtype not in ("", ctx.config.model.compute_dtype)
        or cut
        or metrics.get("mismatch", 0.0) <= limit
    ):
        return
    console.print_warning(
        f"stage {ctx.stage.number}: before its first update the trainer's log-probabilities differ from the sampler's by "
        f"{metrics['mismatch']:.2g} a token on average (at most {metrics['mismatch_max']:.2g}; expected below {limit}), so answers are not "
        "quite the policy's own: set method.tis_cap=2.0, or compare model.attention=xla and model.compute_dtype=float32"
    )


def check_skipped_steps(state: TrainState, most: int) -> None:
    """Stop when updates were skipped too often in a row."""
    skipped = int(state.skipped)
    if skipped >= most:
        raise ValueError(
            f"{skipped} steps in a row had a gradient or loss that is not finite or no token to learn from (train.max_skipped={most}); "
            "nothing was learned from them. Lower train.lr, set train.clip, keep a KL term, raise rollout.max_new_tokens where "
            "method.truncated='mask' leaves every answer out, or look at the last rows of rollouts/"
        )
