"""Rollouts with rewards, and the policy's updates on them.

    prompts -> answers -> reward parts (Graded) -> length rules -> advantages -> micro-batches of whole groups

An online filter (DAPO) draws further prompts until enough groups have mixed rewards.
"""

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from cptjax import sharding
from cptjax.common import distributed
from cptjax.data.cost import WorkCost, image_flops, sampling_cost
from cptjax.data.device_batches import batch_slices, group_batch, response_bucket, rows_per_process
from cptjax.data.prompts import EncodedExample
from cptjax.generation import generate
from cptjax.generation.generate import Samples
from cptjax.models import flops
from cptjax.tasks.task import example_text
from cptjax.training.algorithms import advantages, losses, prompt_filters
from cptjax.training.step_batch import BatchBuilder, StepBatch
from cptjax.types import Batch, Params

# ---- answers and their rewards -------------------------------------------------------------------------------------------


def grade_responses(
    builder: BatchBuilder, items: Sequence[EncodedExample], texts: Sequence[str]
) -> list[dict[str, float]]:
    """Reward parts of each answer; answer q * G + g belongs to item q."""
    group = len(texts) // len(items)
    out: list[dict[str, float]] = [{} for _ in texts]
    for name in dict.fromkeys(i.example.task for i in items):
        rows = [
            q * group + g
            for q, item in enumerate(items)
            if item.example.task == name
            for g in range(group)
        ]
        parts = builder.prompted_tasks[name].compute_rewards(
            [texts[r] for r in rows], [items[r // group].example for r in rows]
        )
        for row, part in zip(rows, parts, strict=True):
            out[row] = part
    return out


@dataclasses.dataclass(frozen=True)
class GradedRollouts:
    """Prompts with their answers and rewards; this process's part of the batch."""

    items: list[EncodedExample]
    samples: Samples
    reward_parts: list[dict[str, float]]  # a dict per response
    greedy_rewards: (
        np.ndarray | None
    )  # [Q] rewards of the greedy answers after the length rules (ReMax)
    cost: WorkCost
    seconds: dict[str, float]

    @property
    def rewards(self) -> np.ndarray:
        """[Q G]."""
        return np.array([p.get("reward", 0.0) for p in self.reward_parts], np.float32).reshape(
            len(self.items), -1
        )

    @property
    def accuracy(self) -> np.ndarray:
        """[Q G]; the reward where an answer's parts have no accuracy."""
        return np.array(
            [p.get("accuracy", p["reward"]) for p in self.reward_parts], np.float32
        ).reshape(len(self.items), -1)

    @property
    def lengths(self) -> np.ndarray:
        return self.samples.mask.sum(1).reshape(len(self.items), -1)


def sample_rollouts(
    builder: BatchBuilder,
    params: Params,
    items: Sequence[EncodedExample],
    key: jax.Array,
    first: int,
) -> GradedRollouts:
    """Answers of the current policy and their rewards; `first` numbers the batch's prompts in the stage."""
    share, began = len(items), time.perf_counter()
    numbers = first + jax.process_index() * share + np.arange(share)
    encoded = [i.encoded for i in items]
    sampling = builder.sampling
    weights = generate.prepare_weights(builder.model_ctx, params, sampling)
    draw = lambda sampling: generate.sample_responses(
        builder.model_ctx, weights, encoded, key, numbers, sampling
    )
    samples = draw(sampling)
    spent = sampling_cost(builder.model_ctx.cfg, encoded, samples.mask.sum(1).reshape(share, -1))
    best = (
        draw(dataclasses.replace(sampling, group=1, temperature=0.0))
        if builder.method.advantage == "remax"
        else None
    )
    drawn = time.perf_counter()
    greedy = None
    if best is not None:
        greedy = _shape_rewards(
            builder,
            np.array(
                [[p["reward"]] for p in grade_responses(builder, items, best.texts)], np.float32
            ),
            best,
        )[0][:, 0]
        spent += sampling_cost(builder.model_ctx.cfg, encoded, best.mask.sum(1)[:, None])
    parts = grade_responses(builder, items, samples.texts)
    seconds = {"seconds/sample": drawn - began, "seconds/reward": time.perf_counter() - drawn}
    return GradedRollouts(list(items), samples, parts, greedy, spent, seconds)


def _shape_rewards(
    builder: BatchBuilder, rewards: np.ndarray, samples: Samples
) -> tuple[np.ndarray, np.ndarray]:
    """Rewards [Q G] after the length rules, and which answers may be learned from."""
    s, limit = builder.method, builder.sampling.max_new_tokens
    lengths, finished = (
        samples.mask.sum(1).reshape(rewards.shape),
        samples.finished.reshape(rewards.shape),
    )
    return advantages.shape_rewards(
        rewards, lengths, finished, limit=limit, truncated=s.truncated, overlong=s.overlong
    )


def join_groups(
    graded: Sequence[GradedRollouts], keep: Sequence[np.ndarray], count: int
) -> GradedRollouts:
    """The first `count` kept groups of several drawings, with the cost of all."""
    chosen = [(g, q) for g, mask in zip(graded, keep, strict=True) for q in np.flatnonzero(mask)][
        :count
    ]
    size = len(graded[0].reward_parts) // len(graded[0].items)
    rows = lambda q: range(q * size, (q + 1) * size)
    stack = lambda name: np.concatenate(
        [getattr(g.samples, name)[list(rows(q))] for g, q in chosen]
    )
    texts = [g.samples.texts[r] for g, q in chosen for r in rows(q)]
    samples = Samples(
        texts, *(stack(f.name) for f in dataclasses.fields(Samples) if f.name != "texts")
    )
    greedy = (
        None
        if graded[0].greedy_rewards is None
        else np.array([g.greedy_rewards[q] for g, q in chosen], np.float32)
    )
    seconds = {k: sum(g.seconds[k] for g in graded) for k in graded[0].seconds}
    parts = [g.reward_parts[r] for g, q in chosen for r in rows(q)]
    return GradedRollouts(
        [g.items[q] for g, q in chosen],
        samples,
        parts,
        greedy,
        sum((g.cost for g in graded), WorkCost()),
        seconds,
    )


def sample_filtered_rollouts(
    builder: BatchBuilder,
    params: Params,
    stream: Iterator[list[EncodedExample]],
    key: jax.Array,
    first: int,
) -> tuple[GradedRollouts, dict[str, float], int]:
    """A batch of groups with mixed rewards (DAPO): more prompts are drawn until it is full; also how many batches that took."""
    window, share = builder.method.online_filter, builder.batch_size // jax.process_count()
    drawn: list[GradedRollouts] = []
    keep: list[np.ndarray] = []
    for turn in itertools.count():
        graded = sample_rollouts(
            builder, params, next(stream), jax.random.fold_in(key, turn), first
        )
        drawn.append(graded)
        keep.append(prompt_filters.keep_groups(graded.accuracy, window["lo"], window["hi"]))
        counts = distributed.gather_objects(sum(int(k.sum()) for k in keep))
        kept = min(counts)
        if kept >= share:
            info = {
                "filter/kept": sum(counts) / (builder.batch_size * (turn + 1)),
                "filter/batches": float(turn + 1),
            }
            return join_groups(drawn, keep, share), info, turn + 1
        if turn >= window["max_refills"]:
            raise ValueError(
                f"online filter: after {turn + 1} batches of {builder.batch_size} prompts only {kept} of {share} groups have a mean accuracy "
                f"in ({window['lo']}, {window['hi']}); widen method.online_filter, raise max_refills or choose easier data"
            )
    raise AssertionError


@dataclasses.dataclass(frozen=True)
class RolloutBatch:
    """A graded batch on its way to updates: which tokens count, and what each micro-batch carries beside them."""

    builder: BatchBuilder
    graded: GradedRollouts
    mask: np.ndarray  # [B R]
    length: int  # of the bucket that holds the longest answer
    rows: int  # prompts of a micro-batch
    extra: dict[str, np.ndarray]

    def batches(self, extra: dict[str, np.ndarray]) -> list[tuple[Batch, slice]]:
        """Micro-batches of whole groups, each with the slice of prompts that it holds."""
        samples, group = (
            self.graded.samples,
            len(self.graded.reward_parts) // len(self.graded.items),
        )
        out = []
        for p in batch_slices(len(self.graded.items), self.rows):
            r = slice(p.start * group, p.stop * group)
            encoded = [i.encoded for i in self.graded.items[p]]
            here = {k: v[r] for k, v in extra.items()}
            out.append(
                (
                    group_batch(
                        self.builder.model_ctx,
                        encoded,
                        samples.tokens[r],
                        self.mask[r],
                        length=self.length,
                        extra=here,
                    ),
                    p,
                )
            )
        return out

    def scored(self, params: Params) -> np.ndarray:
        """Log-probabilities [B R] of the answers under `params`."""
        found = np.concatenate(
            [sharding.local_rows(self.builder.score(params, b)) for b, _ in self.batches({})]
        )
        out = np.zeros(self.mask.shape, np.float32)
        out[:, : self.length] = found[:, : self.mask.shape[1]]
        return out


def rollout_step_batch(
    builder: BatchBuilder,
    params: Params,
    graded: GradedRollouts,
    reference: Params | None,
    step: int,
    stage: int,
    teach: Callable | None = None,
) -> StepBatch:
    """Rewards -> advantages -> the updates on this batch. A divergence in the reward is not taken off ReMax's baseline."""
    s = builder.method
    earned = graded.accuracy if s.advantage == "reinforce01" else graded.rewards
    shaped, keep = _shape_rewards(builder, earned, graded.samples)
    drawn = _rollout_batch(builder, graded, keep)
    began = time.perf_counter()
    shaped, info, forwards = _add_logprobs(drawn, params, reference, shaped)
    policy = s.objective == "policy"  # a distillation looks at no reward
    advantage = (
        _batch_advantages(s.advantage, shaped, graded.greedy_rewards, keep)
        if policy
        else np.zeros_like(shaped)
    )
    micro = drawn.batches(drawn.extra | {"advantages": advantage.reshape(-1)})
    info |= (
        graded.seconds
        | {"seconds/score": time.perf_counter() - began}
        | rollout_metrics(graded, shaped, advantage)
    )
    per = len(micro) // s.updates_per_batch
    parts = (micro[i : i + per] for _ in range(s.passes) for i in range(0, len(micro), per))
    attach = teach or (lambda batch, items: batch)
    ready = ([attach(b, graded.items[p]) for b, p in part] for part in parts)
    tokens = s.passes * (sum(len(i.encoded) for i in graded.items) + int(drawn.mask.sum()))
    work = WorkCost(
        flops=(3 * s.passes + forwards + (teach is not None)) * _forward_flops(drawn),
        trained=tokens,
    )
    return StepBatch(
        ready, info, rollout_rows(graded, advantage.reshape(-1), step, stage), graded.cost + work
    )


def _rollout_batch(builder: BatchBuilder, graded: GradedRollouts, keep: np.ndarray) -> RolloutBatch:
    samples, s = graded.samples, builder.method
    extra = {
        "sampler_logps": samples.policy_logps
        if builder.sampling.temperature == 1
        else samples.logps
    }
    if s.tis_cap is not None:
        extra["behaviour_logps"] = samples.logps
    rows = rows_per_process(
        builder.model_ctx, builder.batch_size // s.updates_per_batch, builder.micro_batch
    )
    mask = samples.mask.astype(bool) & keep.reshape(-1, 1)
    return RolloutBatch(
        builder,
        graded,
        mask,
        response_bucket(samples.mask, builder.sampling.max_new_tokens),
        rows,
        extra,
    )


def _add_logprobs(
    drawn: RolloutBatch, params: Params, reference: Params | None, shaped: np.ndarray
) -> tuple[np.ndarray, dict[str, float], int]:
    """Adds the log-probabilities that the loss needs; rewards less their KL, what to log, and forward passes made."""
    s, extra = drawn.builder.method, drawn.extra
    pulled = reference is not None and s.kl_coef > 0
    ref = drawn.scored(reference) if pulled else None
    several = s.updates_per_batch * s.passes > 1
    in_reward = pulled and s.kl_place == "reward"
    own = drawn.scored(params) if several or in_reward else None
    info = {}
    if in_reward:
        kl = np.asarray(losses.estimate_kl(own, ref, s.kl_estimator, None))[drawn.mask]
        total, count = np.sum(distributed.gather_objects((float(kl.sum()), kl.size)), 0)
        info["kl"] = float(total / max(count, 1))
        flat = losses.subtract_kl(shaped.reshape(-1), own, ref, drawn.mask, drawn.builder.loss)
        shaped = np.asarray(flat).reshape(shaped.shape)
    elif pulled:
        extra["ref_logps"] = ref
    if several:
        extra["old_logps"] = own
    return shaped, info, int(pulled) + int(own is not None)


def _forward_flops(drawn: RolloutBatch) -> float:
    cfg, lengths, encoded = (
        drawn.builder.model_ctx.cfg,
        drawn.graded.lengths,
        [i.encoded for i in drawn.graded.items],
    )
    prompt = sum(map(len, encoded)) / len(encoded)
    seen = sum(image_flops(cfg, e) for e in encoded)
    return seen + flops.group_forward_flops(
        cfg, len(encoded), prompt, lengths.shape[1], lengths.mean()
    )


def _batch_advantages(
    name: str, rewards: np.ndarray, greedy: np.ndarray | None, keep: np.ndarray
) -> np.ndarray:
    """Advantages of this process's groups; baselines over the batch see every process's rewards."""
    gathered = distributed.gather_objects((rewards, greedy, keep))
    join = lambda i: (
        np.concatenate([g[i] for g in gathered]) if gathered[0][i] is not None else None
    )
    found = advantages.compute_advantages(join(0), name, greedy=join(1), keep=join(2))
    start = sum(len(g[0]) for g in gathered[: jax.process_index()])
    return found[start : start + len(rewards)]


# ---- what is logged ------------------------------------------------------------------------------------------------------


def rollout_metrics(
    graded: GradedRollouts, shaped: np.ndarray, advantage: np.ndarray
) -> dict[str, float]:
    """What a step logs about its rollouts, those of all processes."""
    mine = (
        graded.rewards,
        graded.accuracy,
        graded.lengths,
        graded.samples.finished,
        shaped,
        advantage,
        graded.greedy_rewards,
    )
    arrays = [
        None if parts[0] is None else np.concatenate(parts)
        for parts in zip(*distributed.gather_objects(mine), strict=True)
    ]
    reward, accuracy, lengths, finished, shaped, advantage, greedy = arrays
    parts = distributed.concat_lists(distributed.gather_objects(graded.reward_parts))
    names = dict.fromkeys(name for p in parts for name in p if name != "reward")
    info = {"reward": float(reward.mean()), "reward/shaped": float(shaped.mean())}
    info |= {
        f"reward/{name}": float(np.mean([p[name] for p in parts if name in p])) for name in names
    }
    report = advantages.group_metrics(accuracy)
    info |= {"frac_reward_zero_std": float((np.ptp(reward, 1) <= 1e-6).mean())}
    info |= {"groups/all_right": report["all_right"], "groups/all_wrong": report["all_wrong"]}
    info |= {"advantage/mean": float(advantage.mean()), "advantage/std": float(advantage.std())}
    info |= {"advantage/min": float(advantage.min()), "advantage/max": float(advantage.max())}
    info |= {
        "response_length/mean": float(lengths.mean()),
        "response_length/max": float(lengths.max()),
    }
    if greedy is not None:
        info["reward/greedy"] = float(greedy.mean())
    return info | {"truncated": float(1 - finished.mean())}


def rollout_rows(
    graded: GradedRollouts, advantage: np.ndarray, step: int, stage: int
) -> list[dict[str, Any]]:
    """The lines of the rollouts file; `step` counts from 1, as in metrics.jsonl."""
    group = len(graded.reward_parts) // len(graded.items)
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
        for r in range(q * group, (q + 1) * group)
    ]
