"""One stage: its data, its programs, and the one training loop."""

import concurrent.futures
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cptjax import console, corpus, lessons, multihost, optim, recipe, rollouts, sampler, sharding, train
from cptjax.classroom import Classroom, Progress
from cptjax.data import Stream
from cptjax.drafts import Stopped
from cptjax.lessons import Lesson, Spent, Tutor
from cptjax.metrics import Mean
from cptjax.model import text
from cptjax.objectives import Objective, token_logps
from cptjax.prompting import Course
from cptjax.runtime import DTYPES, Runtime, Sampling
from cptjax.types import Batch, Params, TrainState

MISMATCH = {"float32": 1e-3, "bfloat16": 0.05}  # nats a token, between sampler and trainer, that rounding explains
check = recipe.check  # a stage that it lets pass can be run


def objective(config: Any) -> Objective:
    """The loss of a stage."""
    m, d = config.method, config.method.distill
    policy = m.objective == "policy"
    return Objective(
        kind=m.objective, chunk=config.train.chunk, ratio=m.ratio, clip_low=m.clip_low, clip_high=m.clip_high, clip_dual=m.clip_dual,
        normalise=m.normalise, fixed_length=config.rollout.max_new_tokens, kl_coef=m.kl_coef if m.kl_place == "loss" else 0.0,
        kl_estimator=m.kl_estimator, kl_limit=m.kl_limit, tis_cap=m.tis_cap, entropy_coef=m.entropy_coef,
        temperature=config.rollout.temperature if policy else 1.0, direction=d.direction, top_k=d.top_k, skip_tokens=d.skip_tokens,
        lwf=m.penalty.coef if m.penalty.name == "lwf" else 0.0,
    )  # fmt: skip


def sampling(config: Any) -> Sampling:
    r = config.rollout
    return Sampling(r.group, r.temperature, r.top_p, r.top_k, r.min_p, r.max_new_tokens, r.slots, r.check_every, r.gather, r.dtype)


def optimizer(config: Any, declared: Params) -> optim.Optimizer:
    t = config.train
    return optim.make(
        optimizer=t.optimizer, b1=t.b1, b2=t.b2, eps=t.eps, weight_decay=t.weight_decay, clip=t.clip, moments_dtype=t.moments_dtype,
        declared=declared,
    )  # fmt: skip


@functools.lru_cache(maxsize=32)
def scorer(cfg: Any, dtype: Any, chunk: int, temperature: float) -> Callable[[Params, Batch], jax.Array]:
    """A program for the log-probabilities [B A] of a batch's targets."""

    def run(params: Params, batch: Batch) -> jax.Array:
        params = train.cast(params, dtype)
        hidden = train.predicting_states(params, batch, cfg, dtype)
        return token_logps(hidden, text.unembedding(params["text"]), batch, chunk, temperature)

    return jax.jit(run)


def tutor(rt: Runtime, courses: dict[str, Course], config: Any) -> Tutor:
    r = config.rollout
    sampler.check(r.group, r.max_new_tokens, r.check_every, r.slots, sharding.batch_shards(rt.mesh))
    temperature = config.rollout.temperature if config.method.objective == "policy" else 1.0
    logps = scorer(rt.cfg, rt.dtype, config.train.chunk, temperature)
    pack = config.data.pack and config.method.objective in ("sft", "eaft")
    return Tutor(rt, courses, sampling(config), config.method, config.train.batch, config.train.micro_batch, pack, logps)


def lesson(room: Classroom, params: Params | None, stream: Stream | None, progress: Progress) -> Lesson:
    """What the next step learns from; takes its batches from the stream. Answers that are there need no parameters."""
    t, m = room.tutor, room.config.method
    began, waited = time.perf_counter(), stream.waited if stream else 0.0
    if m.source == "rollouts":
        found = _rolled(room, params, stream, progress)
    else:
        items, spent = (next(stream), Spent()) if stream is not None else corpus.own_items(room, params, progress.step)
        found = lessons.gold(t, items, int(room.reference is not None) + int(room.teacher is not None))
        found.spent += spent
    if m.penalty.name == "lwf":
        found.updates = ([room.teacher.previous(b) for b in update] for update in found.updates)
    if room.reference is not None and m.source != "rollouts":
        found.updates = ([_referenced(t, room.reference, b) for b in update] for update in found.updates)
    samples = m.source == "rollouts" or corpus.draws(room, progress.step)
    found.info["seconds/data"] = (stream.waited if stream else 0.0) - waited if samples else time.perf_counter() - began
    return found


def _rolled(room: Classroom, params: Params, stream: Stream, progress: Progress) -> Lesson:
    t, step = room.tutor, progress.step
    if room.config.method.online_filter:
        graded, info, turns = rollouts.filtered(t, params, stream, room.key(step), progress.drawn * t.batch)
    else:
        graded, info, turns = rollouts.roll(t, params, next(stream), room.key(step), progress.drawn * t.batch), {}, 1
    attach = room.teacher.attach if room.config.method.objective == "distill" else None
    found = rollouts.updates(t, params, graded, room.reference, step + 1, room.stage.number, attach)
    found.info |= info
    found.batches = turns
    return found


def _referenced(t: Tutor, reference: Params, batch: Batch) -> Batch:
    return batch.replace(extra=batch.extra | {"ref_logps": t.logps(reference, batch)})


def teach(
    room: Classroom, state: TrainState, frozen: Params, steps: train.Steps, progress: Progress, extra: Any, on_step: Callable[..., bool]
) -> TrainState:  # fmt: skip
    """The one training loop; `on_step` logs, saves, and says whether to go on. It ends early where drawing answers was stopped."""
    c = room.config
    stream = None if c.method.source in ("self", "corpus") else room.stream(progress.drawn)
    watcher = concurrent.futures.ThreadPoolExecutor(1)
    ahead: Lesson | None = None
    try:
        while progress.step < room.steps:
            began, first = time.perf_counter(), not progress.updates
            try:
                found = ahead or lesson(room, train.trainable.join(state.params, frozen), stream, progress)
            except Stopped:
                break
            progress.drawn += found.batches
            learning = time.perf_counter()
            state, numbers = _update(room, state, frozen, steps, progress, extra, found)
            progress.step += 1
            known = progress.step < room.steps and c.method.source != "rollouts" and not corpus.draws(room, progress.step)
            ahead = None
            if known:
                finished = watcher.submit(ended_at, numbers)
                ahead = lesson(room, None, stream, progress)  # made while the device works
                made = time.perf_counter()
                ahead.info["seconds/data"] = max(0.0, made - finished.result())  # as long as the device waited for it
            told = read(numbers)
            if room.teacher is not None:
                room.teacher.follow(state.params)
            if first and c.method.objective == "policy":
                check_mismatch(told[0], room)
            guard(state, c.train.max_skipped)
            ended = time.perf_counter()
            seconds = {"seconds": ended - began, "seconds/lesson": learning - began, "seconds/update": ended - learning}
            info = found.info | over_updates(told) | seconds | spent(found.spent, ended - began)
            if not on_step(state, progress, info, found.rows):
                break
    finally:
        watcher.shutdown(wait=False)
        if stream is not None:
            stream.close()
    return state


def _update(
    room: Classroom, state: TrainState, frozen: Params, steps: train.Steps, progress: Progress, extra: Any, found: Lesson
) -> tuple[TrainState, list[dict[str, Any]]]:  # fmt: skip
    """All optimiser updates of a lesson, and the numbers of each; they are on their way, nothing is waited for."""
    t, m = room.config.train, room.config.method
    total = room.steps * m.updates_per_batch * m.passes
    told: list[dict] = []
    for update in found.updates:
        lr = optim.learning_rate(progress.updates, lr=t.lr, steps=total, schedule=t.schedule, warmup=t.warmup)
        state, numbers = steps.run(state, frozen, update, lr, extra)
        told.append(numbers)
        progress.updates += 1
    return state, told


def read(told: list[dict[str, Any]]) -> list[dict[str, float]]:
    """The numbers of updates, once they are there; a mean over nothing is left out."""
    return [{k: v.value if isinstance(v, Mean) else float(v) for k, v in n.items() if not isinstance(v, Mean) or v.count}
            for n in jax.device_get(told)]  # fmt: skip


def ended_at(told: list[dict[str, Any]]) -> float:
    """Waits until the device has made these numbers, and tells when that was."""
    jax.block_until_ready(told)
    return time.perf_counter()


def over_updates(told: Sequence[dict[str, float]]) -> dict[str, float]:
    """Numbers of a step's updates as one: the extreme of what is named _min or _max, the mean of all else."""
    pick = {"_min": min, "_max": max}
    names = dict.fromkeys(k for n in told for k in n)
    return {k: float(pick.get(k[-4:], np.mean)([n[k] for n in told if k in n])) for k in names}


def spent(cost: lessons.Spent, seconds: float) -> dict[str, float]:
    """What a step cost, over all processes."""
    total = sum(multihost.gather(cost), lessons.Spent())
    return total.logged() | {"perf/tokens_per_second": total.seen / seconds, "perf/flops_per_second": total.flops / seconds}


def check_mismatch(told: dict[str, float], room: Classroom) -> None:
    """Warn where the sampler's log-probabilities are not the trainer's before anything was learned: the ratio must then be 1."""
    s, limit = room.tutor.sampling, MISMATCH[jnp.dtype(room.tutor.rt.dtype).name]
    cut = s.temperature != 1 and (s.top_p < 1 or s.top_k or s.min_p)  # the sampler then knows no log-probability of all tokens
    if s.dtype not in ("", room.config.model.compute_dtype) or cut or told.get("mismatch", 0.0) <= limit:
        return
    console.warn(
        f"stage {room.stage.number}: before its first update the trainer's log-probabilities differ from the sampler's by "
        f"{told['mismatch']:.2g} a token on average (at most {told['mismatch_max']:.2g}; expected below {limit}), so answers are not "
        "quite the policy's own: set method.tis_cap=2.0, or compare model.attention=xla and model.compute_dtype=float32"
    )


def guard(state: TrainState, most: int) -> None:
    """Stop when updates were skipped too often in a row."""
    skipped = int(state.skipped)
    if skipped >= most:
        raise ValueError(
            f"{skipped} steps in a row had a gradient or loss that is not finite or no token to learn from (train.max_skipped={most}); "
            "nothing was learned from them. Lower train.lr, set train.clip, keep a KL term, raise rollout.max_new_tokens where "
            "method.truncated='mask' leaves every answer out, or look at the last rows of rollouts/"
        )


def frozen_copy(params: Params, dtype: str) -> Params:
    """Parameters to compare with, in the type of the arithmetic; they outlive the state that they were copied from."""
    return jax.tree.map(lambda x: jnp.array(x, DTYPES[dtype], copy=True), params)
