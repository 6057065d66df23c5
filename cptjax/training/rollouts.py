"""Rollouts of an RL step: sampling, rewards, advantages, and the updates on them.

    prompts -> responses -> reward parts (GradedRollouts) -> length rules -> advantages ->
    device passes of whole groups

A thread computes the rewards: those of a finished group while the device decodes other groups
(rollout.slots), the last ones while it computes the log-probabilities.

An online filter (DAPO) samples further prompts until enough groups have mixed rewards.

Prompts and images are collated and uploaded once, as micro-batches; on the device they are joined
for the sampler, and where their rows are short for the updates (`device_passes`). The reference,
the policy before the updates and the teacher score the device passes, and their results stay on the
device; only a KL term in the reward, or the drift in it, transfers log-probabilities to the host.
"""

import concurrent.futures
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from cptjax import sharding
from cptjax.common import distributed, phases
from cptjax.data.balance import to_places, to_prompts
from cptjax.data.cost import WorkCost, image_flops, sampling_cost
from cptjax.data.device_batches import join_prompts
from cptjax.data.prompts import EncodedExample
from cptjax.generation import generate
from cptjax.generation.generate import Samples
from cptjax.generation.sampling_config import SamplingConfig
from cptjax.models import flops
from cptjax.models.config import ModelConfig
from cptjax.tasks.prompted_task import PromptedTask
from cptjax.tasks.task import example_text
from cptjax.training.algorithms import advantages, losses, prompt_filters
from cptjax.training.algorithms.continual_learning.hooks import overrides_hook
from cptjax.training.algorithms.continual_learning.table import continual_methods
from cptjax.training.algorithms.distillation import Teacher
from cptjax.training.device_passes import GroupPass, build_passes
from cptjax.training.method_needs import method_needs
from cptjax.training.step_batch import BatchBuilder, StepBatch, attach_arrays, iterate_updates
from cptjax.training.tower_states import for_other_tower
from cptjax.types import Array, Batch, Params, Prompts

# The arrays of sampled responses [B R] (finished: [B]) in a checkpoint.
SAMPLE_ARRAYS = {
    "tokens": np.int32,
    "mask": bool,
    "logps": np.float32,
    "policy_logps": np.float32,
    "finished": bool,
}

# ---- responses and their rewards -----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class GradedRollouts:
    """The prompts of this process with their responses and rewards.

    The rewards may still be computed; `wait` returns the rollouts with them.
    """

    items: list[EncodedExample]
    samples: Samples
    reward_parts: list[dict[str, float]]  # a dict per response; none before `wait`
    greedy_rewards: np.ndarray | None  # [Q] of the greedy responses after the length rules (ReMax)
    cost: WorkCost
    seconds: dict[str, float]
    # The micro-batches on the device; None = groups of several batches.
    prompts: list[Prompts] | None = None
    # Waits for (reward_parts, greedy_rewards); None = they are here.
    grading: Callable[[], tuple[list[dict[str, float]], np.ndarray | None]] | None = None

    def wait(self) -> "GradedRollouts":
        """Return the rollouts with their rewards."""
        if self.grading is None:
            return self
        began = time.perf_counter()
        with phases.phase("rewards"):
            parts, greedy = self.grading()
        seconds = self.seconds | {"seconds/reward": time.perf_counter() - began}
        return dataclasses.replace(
            self, reward_parts=parts, greedy_rewards=greedy, seconds=seconds, grading=None
        )

    @property
    def rewards(self) -> np.ndarray:
        """The reward [Q G] of each response."""
        rewards = [parts.get("reward", 0.0) for parts in self.reward_parts]
        return np.array(rewards, np.float32).reshape(len(self.items), -1)

    @property
    def accuracy(self) -> np.ndarray:
        """The accuracy [Q G] of each response, or its reward if it has no accuracy."""
        accuracy = [parts.get("accuracy", parts["reward"]) for parts in self.reward_parts]
        return np.array(accuracy, np.float32).reshape(len(self.items), -1)

    @property
    def lengths(self) -> np.ndarray:
        """The number of tokens [Q G] of each response."""
        return self.samples.mask.sum(1).reshape(len(self.items), -1)

    @property
    def group(self) -> int:
        """The number of responses to each prompt."""
        return len(self.samples.texts) // len(self.items)


def sample_rollouts(
    builder: BatchBuilder,
    params: Params,
    items: Sequence[EncodedExample],
    key: jax.Array,
    first: int,
) -> GradedRollouts:
    """Sample responses of the current policy and grade them.

    `first` is the number of the batch's first prompt in the stage.
    """
    return start_rollouts(builder, params, items, key, first).wait()


def start_rollouts(
    builder: BatchBuilder,
    params: Params,
    items: Sequence[EncodedExample],
    key: jax.Array,
    first: int,
) -> GradedRollouts:
    """Do what `sample_rollouts` does, but do not wait for the rewards."""
    began = time.perf_counter()
    model_ctx, sampling, count = builder.model_ctx, builder.sampling, len(items)
    numbers = first + jax.process_index() * count + np.arange(count)
    encoded = [i.encoded for i in items]
    prompts = builder.place_prompts(encoded)
    joined, order = join_prompts(model_ctx, prompts)
    weights = generate.prepare_weights(model_ctx, params, sampling)

    def sample(sampling: SamplingConfig) -> tuple[Samples, WorkCost, GroupGrader]:
        grader = GroupGrader(builder.prompted_tasks, items, order)
        samples = generate.sample_from_prompts(
            model_ctx, weights, joined, key, numbers[order], sampling, on_texts=grader.add
        ).restore_order(order)
        lengths = samples.mask.sum(1).reshape(count, -1)
        return samples, sampling_cost(model_ctx.cfg, encoded, lengths), grader

    greedy = None
    with phases.phase("rollout"):
        samples, cost, grader = sample(sampling)
        if builder.needs.greedy_samples:
            greedy, greedy_cost, greedy_grader = sample(sampling.greedy())
            cost += greedy_cost

    def grading() -> tuple[list[dict[str, float]], np.ndarray | None]:
        parts = grader.wait()
        if greedy is None:
            return parts, None
        rewards = np.array([[p["reward"]] for p in greedy_grader.wait()], np.float32)
        return parts, _apply_length_rules(builder, rewards, greedy)[0][:, 0]

    seconds = {"seconds/sample": time.perf_counter() - began}
    return GradedRollouts(list(items), samples, [], None, cost, seconds, prompts, grading)


class GroupGrader:
    """Computes the rewards of groups in a thread, in the order in which they are added."""

    def __init__(
        self,
        prompted_tasks: Mapping[str, PromptedTask],
        items: Sequence[EncodedExample],
        order: np.ndarray,
    ):
        """Group i responds to item `order[i]`."""
        self.prompted_tasks, self.items, self.order = prompted_tasks, items, order
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self._graded: list[tuple[list[int], concurrent.futures.Future]] = []

    def add(self, groups: Sequence[int], texts: Sequence[Sequence[str]]) -> None:
        """Start to grade the responses to some prompts."""
        chosen = [int(self.order[i]) for i in groups]
        responses = [text for group in texts for text in group]
        items = [self.items[q] for q in chosen]
        future = self._thread.submit(grade_responses, self.prompted_tasks, items, responses)
        self._graded.append((chosen, future))

    def wait(self) -> list[dict[str, float]]:
        """Return the reward parts of all responses, in the order of the items."""
        parts: dict[int, list[dict[str, float]]] = {}
        try:
            for chosen, future in self._graded:
                found = future.result()
                size = len(found) // len(chosen)
                parts |= {q: found[i * size : (i + 1) * size] for i, q in enumerate(chosen)}
        finally:
            self._thread.shutdown(wait=False, cancel_futures=True)
        return [part for q in range(len(self.items)) for part in parts[q]]


def grade_responses(
    prompted_tasks: Mapping[str, PromptedTask],
    items: Sequence[EncodedExample],
    texts: Sequence[str],
) -> list[dict[str, float]]:
    """Compute the reward parts of each response; response q * G + g belongs to item q."""
    group = len(texts) // len(items)
    out: list[dict[str, float]] = [{} for _ in texts]
    for name in dict.fromkeys(i.example.task for i in items):
        of_task = [q for q, item in enumerate(items) if item.example.task == name]
        rows = [q * group + g for q in of_task for g in range(group)]
        parts = prompted_tasks[name].compute_rewards(
            [texts[r] for r in rows], [items[r // group].example for r in rows]
        )
        for row, part in zip(rows, parts, strict=True):
            out[row] = part
    return out


def _apply_length_rules(
    builder: BatchBuilder, rewards: np.ndarray, samples: Samples
) -> tuple[np.ndarray, np.ndarray]:
    """Return rewards [Q G] after the length rules, and a mask [Q G] of responses to train on."""
    return advantages.shape_rewards(
        rewards,
        samples.mask.sum(1).reshape(rewards.shape),
        samples.finished.reshape(rewards.shape),
        limit=builder.sampling.max_new_tokens,
        truncated=builder.method.truncated,
        overlong=builder.method.overlong,
    )


def sample_filtered_rollouts(
    builder: BatchBuilder,
    params: Params,
    stream: Iterator[list[EncodedExample]],
    key: jax.Array,
    first: int,
) -> tuple[GradedRollouts, dict[str, float], int]:
    """Sample batches until enough groups have mixed rewards (DAPO).

    Return these groups, metrics and the number of batches.
    """
    window, share = builder.method.online_filter, builder.batch_size // jax.process_count()
    sampled: list[GradedRollouts] = []
    keep: list[np.ndarray] = []
    for turn in itertools.count():
        graded = sample_rollouts(
            builder, params, next(stream), jax.random.fold_in(key, turn), first
        )
        # Groups of several batches are collated once more: these device prompts are not used again.
        sampled.append(dataclasses.replace(graded, prompts=None))
        keep.append(prompt_filters.keep_groups(graded.accuracy, window["lo"], window["hi"]))
        counts = distributed.gather_objects(sum(int(k.sum()) for k in keep))
        kept = min(counts)
        if kept >= share:
            metrics = {
                "filter/kept": sum(counts) / (builder.batch_size * (turn + 1)),
                "filter/batches": float(turn + 1),
            }
            return join_groups(sampled, keep, share), metrics, turn + 1
        if turn >= window["max_refills"]:
            raise ValueError(
                f"online filter: after {turn + 1} batches of {builder.batch_size} prompts only "
                f"{kept} of {share} groups have a mean accuracy in "
                f"({window['lo']}, {window['hi']}); widen method.online_filter, raise "
                "max_refills or choose easier data"
            )
    raise AssertionError


def join_groups(
    graded: Sequence[GradedRollouts], keep: Sequence[np.ndarray], count: int
) -> GradedRollouts:
    """Return the first `count` kept groups of several batches, with the cost of all batches."""
    group = graded[0].group
    kept = [(g, q) for g, mask in zip(graded, keep, strict=True) for q in np.flatnonzero(mask)]
    chosen = [(g, q, slice(q * group, (q + 1) * group)) for g, q in kept[:count]]
    arrays = {
        f.name: np.concatenate([getattr(g.samples, f.name)[rows] for g, _, rows in chosen])
        for f in dataclasses.fields(Samples)
        if f.name != "texts"
    }
    texts = [text for g, _, rows in chosen for text in g.samples.texts[rows]]
    greedy_rewards = None
    if graded[0].greedy_rewards is not None:
        greedy_rewards = np.array([g.greedy_rewards[q] for g, q, _ in chosen], np.float32)
    return GradedRollouts(
        [g.items[q] for g, q, _ in chosen],
        Samples(texts, **arrays),
        [parts for g, _, rows in chosen for parts in g.reward_parts[rows]],
        greedy_rewards,
        sum((g.cost for g in graded), WorkCost()),
        {name: sum(g.seconds[name] for g in graded) for name in graded[0].seconds},
    )


@dataclasses.dataclass(frozen=True)
class ScoredRollouts:
    """The device passes of a step's rollouts, with what does not depend on their rewards."""

    graded: GradedRollouts
    keep: np.ndarray  # [Q G] responses to train on
    passes: list[GroupPass]
    parts: list[slice]  # of the passes; an update is on one part
    # Log-probabilities [B A] of each batch's targets, on the device; [] = not needed. Those of the
    # policy may be unknown (NaN) in the batches of the first update.
    ref_logps: list[Array]
    old_logps: list[Array]
    seconds: float


def score_rollouts(
    builder: BatchBuilder,
    params: Params,
    graded: GradedRollouts,
    reference: Params | None,
    old_logps: np.ndarray | None = None,
) -> ScoredRollouts:
    """Build the device passes of whole groups, and compute their log-probabilities.

    The rewards may still be computed. `old_logps` [B R] replace those under `params`.
    """
    began, needs = time.perf_counter(), builder.needs
    finished = graded.samples.finished.reshape(len(graded.items), -1)
    keep = advantages.trained_responses(finished, builder.method.truncated)
    passes, parts = _build_passes(builder, graded, keep)
    batches = [p.batch for p in passes]
    with phases.phase("logps"):
        ref_logps = []
        if needs.reference:
            ref_logps = builder.score_batches("reference", reference, batches)
        if not needs.policy_logps:
            old = []
        elif old_logps is None:
            first = 0 if needs.first_policy_logps else parts[0].stop
            old = [_unknown_logps(builder, batch) for batch in batches[:first]]
            old += builder.score_batches("policy", params, batches[first:])
        else:
            old = _place_logps(builder, old_logps, passes)
    seconds = time.perf_counter() - began
    # The passes have prompts of their own where they join some.
    graded = dataclasses.replace(graded, prompts=None)
    return ScoredRollouts(graded, keep, passes, parts, ref_logps, old, seconds)


# ---- rollouts in a checkpoint --------------------------------------------------------------------


def rollouts_to_arrays(builder: BatchBuilder, scored: ScoredRollouts) -> dict[str, Array]:
    """Return as arrays on the mesh what only the weights that sampled can give."""
    samples, width = scored.graded.samples, builder.sampling.max_new_tokens
    arrays = {name: getattr(samples, name) for name in SAMPLE_ARRAYS}
    if scored.old_logps:
        logps = _fetch_rows(scored.old_logps, scored.passes)
        arrays["old_logps"] = np.pad(logps, ((0, 0), (0, width - logps.shape[1])))
    return sharding.place_rows(arrays, builder.model_ctx.mesh)


def abstract_rollouts(config: Any, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes of the arrays of `rollouts_to_arrays`."""
    rows, width = config.train.batch * config.rollout.group, config.rollout.max_new_tokens
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {
        name: ((rows,) if name == "finished" else (rows, width), dtype)
        for name, dtype in SAMPLE_ARRAYS.items()
    }
    if method_needs(config.method, config.rollout.ahead).policy_logps:
        shapes["old_logps"] = (rows, width), np.float32
    arrays = {name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()}
    return sharding.place_rows(arrays, mesh)


def restore_rollouts(
    builder: BatchBuilder,
    params: Params,
    items: Sequence[EncodedExample],
    reference: Params | None,
    saved: Mapping[str, Array],
) -> ScoredRollouts:
    """Return the rollouts of a checkpoint, on the prompts of `items`; they are graded again."""
    began, model_ctx, count = time.perf_counter(), builder.model_ctx, len(items)
    local = {name: sharding.local_rows(x) for name, x in saved.items()}
    old_logps, lengths = local.pop("old_logps", None), local["mask"].sum(1)
    texts = generate.decode_responses(model_ctx, local["tokens"], lengths)
    group, encoded = len(texts) // count, [i.encoded for i in items]
    grader = GroupGrader(builder.prompted_tasks, items, np.arange(count))
    grader.add(range(count), [texts[q * group : (q + 1) * group] for q in range(count)])
    cost = sampling_cost(model_ctx.cfg, encoded, lengths.reshape(count, group))
    seconds = {"seconds/sample": time.perf_counter() - began}
    samples, wait = Samples(texts, **local), lambda: (grader.wait(), None)
    graded = GradedRollouts(list(items), samples, [], None, cost, seconds, grading=wait)
    return score_rollouts(builder, params, graded, reference, old_logps)


def _unknown_logps(builder: BatchBuilder, batch: Batch) -> Array:
    """Return NaN for each target: the update itself computes these log-probabilities."""
    rows, width = batch.targets.shape
    nans = np.full((rows // jax.process_count(), width), np.nan, np.float32)
    return sharding.place_rows(nans, builder.model_ctx.mesh)


def _place_logps(
    builder: BatchBuilder, logps: np.ndarray, passes: Sequence[GroupPass]
) -> list[Array]:
    """Cut this process's rows [B R] into those of device passes, as wide as their targets."""
    parts = [to_places(p.placement, logps[p.rows, : p.batch.targets.shape[1]]) for p in passes]
    return sharding.place_rows(parts, builder.model_ctx.mesh)


# ---- updates -------------------------------------------------------------------------------------


def scored_step_batch(
    builder: BatchBuilder,
    scored: ScoredRollouts,
    reference: Params | None,
    step: int,
    stage: int,
    teacher: Teacher | None = None,
    start: Params | None = None,
    carried: Mapping[str, Any] = MappingProxyType({}),
) -> StepBatch:
    """Build the updates on a batch of rollouts: rewards -> advantages -> device passes.

    It waits for the rewards, which may be computed while the device computes log-probabilities. A
    KL term in the reward does not change ReMax's baseline.

    start: the model at the stage's start; None = no method needs the drift from it
    carried: what continual-learning methods returned in the step before, by name
    """
    method, needs, layout = builder.method, builder.needs, builder.layout
    keep, passes, batches = scored.keep, scored.passes, [p.batch for p in scored.passes]
    ref_logps, old_logps = scored.ref_logps, scored.old_logps
    graded, metrics = scored.graded.wait(), {}
    began = time.perf_counter()
    rewards = graded.accuracy if method.advantage == "reinforce01" else graded.rewards
    shaped, _ = _apply_length_rules(builder, rewards, graded.samples)
    if needs.kl_in_reward:
        shaped, metrics["kl"] = _subtract_kl(builder, shaped, passes, old_logps, ref_logps)
    drift, start_logps = None, []
    if start is not None:
        if start is not reference:
            start_logps = builder.score_batches("start", start, batches)
        drift = _drift(passes, old_logps, start_logps or ref_logps)
        drift = drift.reshape(shaped.shape)
    shaped, new, more = _shape_by_methods(method, shaped, keep, drift, carried)
    metrics |= more
    scores = {"ref_logps": ref_logps, "old_logps": old_logps}
    batches = attach_arrays(batches, **{k: v for k, v in scores.items() if k in needs.arrays})

    advantage = np.zeros_like(shaped)  # a distillation does not use rewards
    if method.objective == "policy":
        advantage = _batch_advantages(method.advantage, shaped, graded.greedy_rewards, keep)
    rows = [to_places(p.placement, advantage.reshape(-1)[p.rows]) for p in passes]
    rows = sharding.place_rows(rows, builder.model_ctx.mesh)
    batches = attach_arrays(batches, advantages=rows)

    seen = batches
    if teacher is not None and needs.demonstrations:
        seen = [
            teacher.demonstration_batch(batch, [graded.items[i] for i in p.items], p.placement)
            for batch, p in zip(batches, passes, strict=True)
        ]
    elif needs.teacher == "model":
        seen = [for_other_tower(batch) for batch in batches]
    cuts = scored.parts * layout.passes
    updates = iterate_updates([batches[c] for c in cuts], teacher, [seen[c] for c in cuts])

    metrics |= graded.seconds | {"seconds/score": scored.seconds + time.perf_counter() - began}
    metrics |= rollout_metrics(graded, shaped, advantage)
    trained = sum(len(i.encoded) for i in graded.items) + int(
        (graded.samples.mask.astype(bool) & keep.reshape(-1, 1)).sum()
    )
    policies = bool(old_logps) + bool(start_logps)
    if old_logps and not needs.first_policy_logps:
        policies -= 1 / layout.parts
    scorers = builder.scorers(reference if ref_logps else None, teacher)
    work = _step_flops(builder, graded, policies, scorers)
    cost = WorkCost(flops=work, trained=method.passes * trained)
    rows = rollout_rows(graded, advantage.reshape(-1), step, stage)
    return StepBatch(updates, metrics, rows, graded.cost + cost, carried=new)


def _build_passes(
    builder: BatchBuilder, graded: GradedRollouts, keep: np.ndarray
) -> tuple[list[GroupPass], list[slice]]:
    """Build the device passes of a step, see `build_passes`.

    Groups of several batches have no common arrays on the device: their prompts are collated and
    uploaded once more.
    """
    samples, encoded = graded.samples, [i.encoded for i in graded.items]
    untempered = builder.loss.temperature == 1
    arrays = {
        "sampler_logps": samples.policy_logps if untempered else samples.logps,
        "behaviour_logps": samples.logps,
    }
    return build_passes(
        builder,
        graded.prompts or builder.place_prompts(encoded),
        np.array([len(e) for e in encoded]),
        samples.tokens,
        samples.mask.astype(bool) & keep.reshape(-1, 1),
        {name: x for name, x in arrays.items() if name in builder.needs.arrays},
    )


def _subtract_kl(
    builder: BatchBuilder,
    rewards: np.ndarray,
    passes: Sequence[GroupPass],
    logps: Sequence[Array],
    ref_logps: Sequence[Array],
) -> tuple[np.ndarray, float]:
    """Return the rewards [Q G] minus the KL term, and the mean KL per token of all processes."""
    logps, ref_logps = _fetch_rows(logps, passes), _fetch_rows(ref_logps, passes)
    mask = _fetch_rows([p.batch.mask for p in passes], passes)
    kl = np.asarray(losses.estimate_kl(logps, ref_logps, builder.loss.kl_estimator, None))[mask]
    total, count = np.sum(distributed.gather_objects((float(kl.sum()), kl.size)), 0)
    reduced = losses.subtract_kl(rewards.reshape(-1), logps, ref_logps, mask, builder.loss)
    return np.asarray(reduced).reshape(rewards.shape), float(total / max(count, 1))


def _fetch_rows(arrays: Sequence[Array], passes: Sequence[GroupPass]) -> np.ndarray:
    """Return [B A] of this process's responses from the arrays of passes, as wide as the widest."""
    rows = [
        to_prompts(p.placement, sharding.local_rows(x)) for x, p in zip(arrays, passes, strict=True)
    ]
    shape = sum(map(len, rows)), max(x.shape[1] for x in rows)
    out = np.zeros(shape, rows[0].dtype)
    for x, p in zip(rows, passes, strict=True):
        out[p.rows, : x.shape[1]] = x
    return out


def _drift(
    passes: Sequence[GroupPass], logps: Sequence[Array], start_logps: Sequence[Array]
) -> np.ndarray:
    """Return the mean of logps - start_logps over the tokens of each response [B]."""
    mask = _fetch_rows([p.batch.mask for p in passes], passes)
    moved = _fetch_rows(logps, passes) - _fetch_rows(start_logps, passes)
    moved = np.where(mask, moved, 0)
    return moved.sum(1) / np.maximum(mask.sum(1), 1)


def _shape_by_methods(
    method: Any,
    rewards: np.ndarray,
    keep: np.ndarray,
    drift: np.ndarray | None,
    carried: Mapping[str, Any],
) -> tuple[np.ndarray, dict[str, Any], dict[str, float]]:
    """Apply the continual-learning methods to the rewards [Q G] of this process.

    Return the rewards, what the methods carry to the next step, and metrics.
    """
    methods = [m for m in continual_methods(method) if overrides_hook(m, "shape_rewards")]
    if not methods:
        return rewards, {}, {}
    gathered = distributed.gather_objects((rewards, keep, drift))
    everywhere, all_keep, all_drift = (
        None if parts[0] is None else np.concatenate(parts) for parts in zip(*gathered, strict=True)
    )
    new = {}
    for m in methods:
        everywhere, new[m.name] = m.shape_rewards(
            everywhere, all_keep, all_drift, carried.get(m.name)
        )
    metrics = {}
    if drift is not None and all_keep.any():  # a response that is left out has no drift
        metrics["drift"] = float(all_drift[all_keep].mean())
    first = sum(len(parts[0]) for parts in gathered[: jax.process_index()])
    return everywhere[first : first + len(rewards)], new, metrics


def _batch_advantages(
    name: str, rewards: np.ndarray, greedy: np.ndarray | None, keep: np.ndarray
) -> np.ndarray:
    """Compute the advantages of this process's groups; batch baselines use all rewards."""
    gathered = distributed.gather_objects((rewards, greedy, keep))
    all_rewards, all_greedy, all_keep = (
        None if parts[0] is None else np.concatenate(parts) for parts in zip(*gathered, strict=True)
    )
    out = advantages.compute_advantages(all_rewards, name, greedy=all_greedy, keep=all_keep)
    start = sum(len(g[0]) for g in gathered[: jax.process_index()])
    return out[start : start + len(rewards)]


def _step_flops(
    builder: BatchBuilder,
    graded: GradedRollouts,
    policies: float,
    scorers: Sequence[tuple[ModelConfig, bool]],
) -> float:
    """Count the FLOPs of the updates and of the log-probabilities before them.

    A tower that the models of a step share runs once, which `sampling_cost` counts.

    policies: how often the policy computes the log-probabilities of the groups
    scorers: the other models, see `BatchBuilder.scorers`
    """
    cfg, costs = builder.model_ctx.cfg, builder.model_ctx.pass_costs
    shared, passes = builder.tower is not None, builder.method.passes
    work = (policies + passes * costs.text) * _text_flops(cfg, graded)
    if not shared:
        work += (policies + passes * costs.vision) * _vision_flops(cfg, graded)
    for scorer, own_tower in scorers:
        work += _text_flops(scorer, graded) + own_tower * _vision_flops(scorer, graded)
    return work


def _text_flops(cfg: ModelConfig, graded: GradedRollouts) -> float:
    """Count the FLOPs of one forward pass of the text model over all groups."""
    prompt = sum(len(i.encoded) for i in graded.items) / len(graded.items)
    group, response = graded.lengths.shape[1], graded.lengths.mean()
    return flops.group_forward_flops(cfg, len(graded.items), prompt, group, response)


def _vision_flops(cfg: ModelConfig, graded: GradedRollouts) -> float:
    return sum(image_flops(cfg, i.encoded) for i in graded.items)


# ---- logging -------------------------------------------------------------------------------------


def rollout_metrics(
    graded: GradedRollouts, shaped: np.ndarray, advantage: np.ndarray
) -> dict[str, float]:
    """Compute the metrics of a step's rollouts over all processes."""
    local = (
        graded.rewards,
        graded.accuracy,
        graded.lengths,
        graded.samples.finished,
        shaped,
        advantage,
        np.array([len(i.encoded) for i in graded.items]),
        graded.greedy_rewards,
    )
    gathered = distributed.gather_objects((local, graded.reward_parts))
    reward, accuracy, lengths, finished, shaped, advantage, prompts, greedy = (
        None if arrays[0] is None else np.concatenate(arrays)
        for arrays in zip(*(arrays for arrays, _ in gathered), strict=True)
    )
    parts = distributed.concat_lists([parts for _, parts in gathered])
    names = dict.fromkeys(name for p in parts for name in p if name != "reward")
    groups = advantages.group_metrics(accuracy)
    metrics = {
        "reward": float(reward.mean()),
        "reward/shaped": float(shaped.mean()),
        **{
            f"reward/{name}": float(np.mean([p[name] for p in parts if name in p]))
            for name in names
        },
        "frac_reward_zero_std": float((np.ptp(reward, 1) <= 1e-6).mean()),
        "groups/all_right": groups["all_right"],
        "groups/all_wrong": groups["all_wrong"],
        "advantage/mean": float(advantage.mean()),
        "advantage/std": float(advantage.std()),
        "advantage/min": float(advantage.min()),
        "advantage/max": float(advantage.max()),
        "response_length/mean": float(lengths.mean()),
        "response_length/max": float(lengths.max()),
        "prompt_length/mean": float(prompts.mean()),
        # A prompt counts for each of its responses.
        "row_tokens": float(lengths.sum() + graded.group * prompts.sum()),
        "truncated": float(1 - finished.mean()),
    }
    if greedy is not None:
        metrics["reward/greedy"] = float(greedy.mean())
    return metrics


def rollout_rows(
    graded: GradedRollouts, advantage: np.ndarray, step: int, stage: int
) -> list[dict[str, Any]]:
    """Return the lines of the rollouts file; `step` counts from 1, as in metrics.jsonl."""
    return [
        {
            "stage": stage,
            "step": step,
            "task": item.example.task,
            "id": item.example.id,
            "prompt": example_text(item.example),
            "row": item.row,
            "response": graded.samples.texts[r],
            "answer": item.example.answer,
            "reward": graded.reward_parts[r].get("reward"),
            "rewards": graded.reward_parts[r],
            "advantage": float(advantage[r]),
            "finished": bool(graded.samples.finished[r]),
        }
        for q, item in enumerate(graded.items)
        for r in range(q * graded.group, (q + 1) * graded.group)
    ]
