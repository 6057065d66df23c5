"""What a step learns from: gold answers, own correct answers, another run's answers, or rollouts with rewards.

    gold      row -> conversation with its target                                -> one update
    self      a window of rows -> own answers -> the correct ones                -> one update a step, cycling through them
    corpus    a rollouts/*.jsonl -> its correct answers                          -> one update
    rollouts  row -> prompt -> answers -> rewards -> advantages                  -> `updates_per_batch` updates
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from cptjax import advantages, filters, losses, multihost, runtime, sharding
from cptjax.batches import answers, groups, micro_rows, pieces, trimmed
from cptjax.batching import Encoded
from cptjax.data import Row
from cptjax.metrics import Mean
from cptjax.prompting import Course
from cptjax.runtime import Runtime, Samples, Sampling
from cptjax.types import Batch, Example, Params


@dataclasses.dataclass
class Lesson:
    """One step's learning: optimiser updates, each of some micro-batches; what to log; rows for the rollouts file."""

    updates: Iterator[list[Batch]]
    info: dict[str, float] = dataclasses.field(default_factory=dict)
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    tokens: int = 0  # generated
    rollouts: int = 0


@dataclasses.dataclass(frozen=True)
class Item:
    """A training row as it leaves the data pipeline."""

    example: Example
    encoded: Encoded
    row: int = -1  # its place in the task's training rows


@dataclasses.dataclass(frozen=True)
class Tutor:
    """All that turning rows into lessons needs, beside the parameters."""

    rt: Runtime
    courses: dict[str, Course]
    sampling: Sampling
    settings: Any  # config.method of the stage
    batch: int  # prompts or conversations of a step, over all processes
    micro: int
    pack: bool
    logps: Callable[[Params, Batch], jax.Array]  # [B A] of a batch's targets

    def written(self, items: Sequence[Item]) -> list[list[Batch]]:
        """Conversations with their answers -> the micro-batches of one update."""
        rows = micro_rows(self.rt, self.batch, self.micro)
        parts = [items[p] for p in pieces(len(items), rows)]
        return [[answers(self.rt, [i.encoded for i in part], rows=rows, pack=self.pack) for part in parts]]


def gold(tutor: Tutor, items: Sequence[Item]) -> Lesson:
    return Lesson(iter(tutor.written(items)))


# ---- rollouts ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Graded:
    """Prompts with their answers and rewards; this process's part of the batch."""

    items: list[Item]
    samples: Samples
    parts: list[dict[str, float]]  # a dict per answer
    greedy: np.ndarray | None  # [Q] rewards of the greedy answers (ReMax)

    def column(self, name: str, default: float = 0.0) -> np.ndarray:
        """[Q G]."""
        return np.array([p.get(name, default) for p in self.parts], np.float32).reshape(len(self.items), -1)

    @property
    def accuracy(self) -> np.ndarray:
        return self.column("accuracy") if "accuracy" in self.parts[0] else self.column("reward")


def grade(tutor: Tutor, items: Sequence[Item], texts: Sequence[str]) -> list[dict[str, float]]:
    """Reward parts of each answer; answer q * G + g belongs to item q."""
    group = len(texts) // len(items)
    out: list[dict[str, float]] = [{} for _ in texts]
    for name in dict.fromkeys(i.example.task for i in items):
        rows = [q * group + g for q, item in enumerate(items) if item.example.task == name for g in range(group)]
        parts = tutor.courses[name].rewards([texts[r] for r in rows], [items[r // group].example for r in rows])
        for row, part in zip(rows, parts, strict=True):
            out[row] = part
    return out


def roll(tutor: Tutor, params: Params, items: Sequence[Item], key: jax.Array, first: int) -> Graded:
    """Answers of the current policy and their rewards; `first` numbers the batch's prompts in the stage."""
    share = len(items)
    numbers = first + jax.process_index() * share + np.arange(share)
    encoded = [i.encoded for i in items]
    samples = runtime.sample(tutor.rt, params, encoded, key, numbers, tutor.sampling)
    greedy = None
    if tutor.settings.advantage == "remax":
        best = runtime.sample(tutor.rt, params, encoded, key, numbers, dataclasses.replace(tutor.sampling, group=1, temperature=0.0))
        greedy = np.array([p["reward"] for p in grade(tutor, items, best.texts)], np.float32)
    return Graded(list(items), samples, grade(tutor, items, samples.texts), greedy)


def joined(graded: Sequence[Graded], keep: Sequence[np.ndarray], count: int) -> Graded:
    """The first `count` kept groups of several drawings."""
    chosen = [(g, q) for g, mask in zip(graded, keep, strict=True) for q in np.flatnonzero(mask)][:count]
    size = len(graded[0].parts) // len(graded[0].items)
    rows = lambda g, q: range(q * size, (q + 1) * size)
    stack = lambda name: np.concatenate([getattr(g.samples, name)[list(rows(g, q))] for g, q in chosen])
    texts = [g.samples.texts[r] for g, q in chosen for r in rows(g, q)]
    samples = Samples(texts, *(stack(f.name) for f in dataclasses.fields(Samples) if f.name != "texts"))
    greedy = None if graded[0].greedy is None else np.array([g.greedy[q] for g, q in chosen], np.float32)
    return Graded([g.items[q] for g, q in chosen], samples, [g.parts[r] for g, q in chosen for r in rows(g, q)], greedy)


def filtered(
    tutor: Tutor, params: Params, stream: Iterator[list[Item]], key: jax.Array, first: int
) -> tuple[Graded, dict[str, float], int]:
    """A batch of groups with mixed rewards (DAPO): more prompts are drawn until it is full; also how many batches that took."""
    window, share = tutor.settings.online_filter, tutor.batch // jax.process_count()
    drawn: list[Graded] = []
    keep: list[np.ndarray] = []
    for turn in itertools.count():
        graded = roll(tutor, params, next(stream), jax.random.fold_in(key, turn), first)
        drawn.append(graded)
        keep.append(filters.online(graded.accuracy, window["lo"], window["hi"]))
        kept = min(multihost.gather(sum(int(k.sum()) for k in keep)))
        if kept >= share:
            info = {"filter/kept": float(np.mean(np.concatenate(keep))), "filter/draws": float(turn + 1)}
            return joined(drawn, keep, share), info, turn + 1
        if turn >= window["max_refills"]:
            raise ValueError(
                f"online filter: after {turn + 1} batches of {tutor.batch} prompts only {kept} of {share} groups have a mean accuracy "
                f"in ({window['lo']}, {window['hi']}); widen method.online_filter, raise max_refills or choose easier data"
            )
    raise AssertionError


def rollouts(
    tutor: Tutor, params: Params, graded: Graded, reference: Params | None, step: int, stage: int, teach: Callable | None = None
) -> Lesson:  # fmt: skip
    """Rewards -> advantages -> the updates on this batch."""
    s, samples, q = tutor.settings, graded.samples, len(graded.items)
    lengths, finished = samples.mask.sum(1).reshape(q, -1), samples.finished.reshape(q, -1)
    limit = tutor.sampling.max_new_tokens
    raw = graded.column("reward")
    shaped, keep = advantages.shape_rewards(raw, lengths, finished, limit=limit, truncated=s.truncated, overlong=s.overlong)
    length = trimmed(samples.mask, limit)
    rows = micro_rows(tutor.rt, tutor.batch // s.updates_per_batch, tutor.micro)
    mask = samples.mask.astype(bool) & keep.reshape(-1, 1)
    extra = {"sampler_logps": samples.policy_logps if tutor.sampling.temperature == 1 else samples.logps}
    if s.tis_cap is not None:
        extra["behaviour_logps"] = samples.logps
    batch = lambda extra: _cut(tutor, graded, mask, length, rows, extra)
    if reference is not None and s.kl_coef:
        extra["ref_logps"] = _scored(tutor, reference, batch({}), length, samples.mask.shape)
    if reference is not None and s.kl_coef and s.kl_place == "reward":
        own = _scored(tutor, params, batch({}), length, samples.mask.shape)
        shaped = np.asarray(losses.kl_in_reward(shaped.reshape(-1), own, extra.pop("ref_logps"), mask, s.kl_coef, s.kl_estimator))
        shaped = shaped.reshape(q, -1)
    if s.updates_per_batch * s.passes > 1:
        extra["old_logps"] = _scored(tutor, params, batch({}), length, samples.mask.shape)
    extra["advantages"] = _advantages(s.advantage, shaped, graded.greedy, keep).reshape(-1)
    micro = batch(extra)
    per = len(micro) // s.updates_per_batch
    updates = (micro[i : i + per] for _ in range(s.passes) for i in range(0, len(micro), per))
    if teach is not None:
        updates = ([teach(b, graded.items[p], samples) for b, p in part] for part in updates)
    else:
        updates = ([b for b, _ in part] for part in updates)
    info = told(graded, shaped, extra["advantages"], lengths, finished)
    lesson_rows = _rows(graded, extra["advantages"], step, stage)
    return Lesson(updates, info, lesson_rows, int(lengths.sum()), lengths.size)


def _cut(tutor: Tutor, graded: Graded, mask: np.ndarray, length: int, rows: int, extra: dict) -> list[tuple[Batch, slice]]:
    """Micro-batches of whole groups, each with the slice of prompts that it holds."""
    group = len(graded.parts) // len(graded.items)
    out = []
    for p in pieces(len(graded.items), rows):
        r = slice(p.start * group, p.stop * group)
        encoded = [i.encoded for i in graded.items[p]]
        here = {k: v[r] for k, v in extra.items()}
        out.append((groups(tutor.rt, encoded, graded.samples.tokens[r], mask[r], length=length, extra=here), p))
    return out


def _scored(tutor: Tutor, params: Params, batches: Sequence[tuple[Batch, slice]], length: int, shape: tuple[int, int]) -> np.ndarray:
    """Log-probabilities [B R] of the answers under `params`."""
    found = np.concatenate([sharding.local_rows(tutor.logps(params, b)) for b, _ in batches])
    out = np.zeros(shape, np.float32)
    out[:, :length] = found[:, : shape[1]]
    return out


def _advantages(name: str, rewards: np.ndarray, greedy: np.ndarray | None, keep: np.ndarray) -> np.ndarray:
    """Advantages of this process's groups; baselines over the batch see every process's rewards."""
    gathered = multihost.gather((rewards, greedy, keep))
    join = lambda i: np.concatenate([g[i] for g in gathered]) if gathered[0][i] is not None else None
    found = advantages.advantages(join(0), name, greedy=join(1), keep=join(2))
    start = sum(len(g[0]) for g in gathered[: jax.process_index()])
    return found[start : start + len(rewards)]


def told(graded: Graded, shaped: np.ndarray, advantage: np.ndarray, lengths: np.ndarray, finished: np.ndarray) -> dict[str, float]:
    """What a step logs about its rollouts."""
    names = dict.fromkeys(name for p in graded.parts for name in p if name != "reward")
    info = {"reward": float(graded.column("reward").mean()), "reward/shaped": float(shaped.mean())}
    info |= {f"reward/{name}": float(np.mean([p[name] for p in graded.parts if name in p])) for name in names}
    report = advantages.group_report(graded.accuracy)
    info |= {"frac_reward_zero_std": float((np.ptp(graded.column("reward"), 1) <= 1e-6).mean())}
    info |= {"groups/all_right": report["all_right"], "groups/all_wrong": report["all_wrong"]}
    info |= {"advantage/mean": float(advantage.mean()), "advantage/std": float(advantage.std()), "advantage/max": float(np.abs(advantage).max())}
    info |= {"response_length/mean": float(lengths.mean()), "response_length/max": float(lengths.max())}
    return info | {"truncated": float(1 - finished.mean())}


def _rows(graded: Graded, advantage: np.ndarray, step: int, stage: int) -> list[dict[str, Any]]:
    group = len(graded.parts) // len(graded.items)
    return [
        {
            "stage": stage, "step": step, "task": item.example.task, "id": item.example.id, "prompt": said(item.example),
            "row": item.row, "response": graded.samples.texts[r], "answer": item.example.answer, "reward": graded.parts[r].get("reward"),
            "rewards": graded.parts[r], "advantage": float(advantage[r]), "finished": bool(graded.samples.finished[r]),
        }
        for q, item in enumerate(graded.items)
        for r in range(q * group, (q + 1) * group)
    ]  # fmt: skip


def said(example: Example) -> str:
    """A conversation as text, pictures as placeholders."""
    flat = lambda c: c if isinstance(c, str) else "".join(p["text"] if p["type"] == "text" else f"<{p['type']}>" for p in c)
    return "\n".join(flat(m["content"]) for m in example.messages)


# ---- own and others' answers ---------------------------------------------------------------------------------------------


def correct(parts: dict[str, float]) -> bool:
    """Fully right: by accuracy where there is one, else by reward."""
    return parts.get("accuracy", parts.get("reward", 0.0)) >= 1.0


def own_answers(
    tutor: Tutor, params: Params, items: Sequence[Item], samples: int, key: jax.Array, bar: Any, unfinished: bool = False
) -> list[tuple[int, str]]:
    """(item, text) of the policy's own correct answers to these prompts; `unfinished`: also those that met the length limit."""
    share = micro_rows(tutor.rt, tutor.batch, 0)
    drawing = dataclasses.replace(tutor, sampling=dataclasses.replace(tutor.sampling, group=samples))
    found: list[tuple[int, str]] = []
    for p in pieces(len(items), share):
        here = list(items[p]) + [items[p.stop - 1]] * (share - (p.stop - p.start))
        numbers = np.arange(p.start, p.start + share)
        out = runtime.sample(tutor.rt, params, [i.encoded for i in here], key, numbers, drawing.sampling)
        parts = grade(drawing, here, out.texts)
        right = [r for r in range((p.stop - p.start) * samples) if correct(parts[r]) and (unfinished or out.finished[r])]
        found += [(p.start + r // samples, out.texts[r]) for r in right]
        bar.advance(p.stop - p.start, correct=len(found))
    return found


def corpus(rows: Sequence[dict[str, Any]], where: str) -> list[tuple[str, str]]:
    """(example id, response) of a rollouts file's correct answers, each once."""
    missing = [k for k in ("id", "response") if rows and k not in rows[0]]
    if not rows or missing:
        raise ValueError(f"method.corpus={where!r}: expected lines with id, response and rewards, got {'no lines' if not rows else rows[0].keys()}")
    right = [(r["id"], r["response"]) for r in rows if correct(r.get("rewards") or {"reward": r.get("reward") or 0.0})]
    if not right:
        raise ValueError(f"method.corpus={where!r}: none of its {len(rows)} answers is correct; there is nothing to learn from")
    return list(dict.fromkeys(right))


def spread(metrics: dict[str, Any]) -> dict[str, float]:
    """Device metrics as numbers."""
    return {k: v.value if isinstance(v, Mean) else float(v) for k, v in metrics.items()}


def unwrap(rows: Sequence[Row]) -> list[Item]:
    return [dataclasses.replace(row.value, row=row.place.index) for row in rows]
