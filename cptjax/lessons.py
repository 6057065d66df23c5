"""What a step learns from: gold answers, own correct answers, another run's answers, or rollouts with rewards (`rollouts`).

gold      row -> conversation with its target                                -> one update
self      a window of rows -> own answers -> the correct ones                -> one update a step, cycling through them
corpus    a rollouts/*.jsonl -> its correct answers                          -> one update
rollouts  row -> prompt -> answers -> rewards -> advantages                  -> `updates_per_batch` updates
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cptjax import flops, metrics, runtime
from cptjax.batches import answers, own_part, pieces
from cptjax.batching import Encoded
from cptjax.data import Row
from cptjax.model.config import Config
from cptjax.prompting import Course
from cptjax.runtime import Runtime, Sampling
from cptjax.types import Batch, Example, Params


@dataclasses.dataclass(frozen=True)
class Spent:
    """What a step cost beside its seconds: generated tokens, answers, arithmetic; tokens it went through in all, and learned from."""

    tokens: int = 0
    rollouts: int = 0
    flops: float = 0.0
    seen: int = 0
    trained: int = 0  # of prompts and answers, without padding; a prompt counts once however many answers it has

    def __add__(self, other: "Spent") -> "Spent":
        return Spent(*(getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(self)))

    def logged(self) -> dict[str, float]:
        """What of it goes into metrics.jsonl."""
        return {"tokens": self.tokens, "trained": self.trained, "rollouts": self.rollouts, "flops": self.flops}


def write_cost(path: Path, spent: Spent, mark: str, seconds: float = 0.0) -> None:
    """Puts the cost of drawn answers, and the mark of the settings they follow from, beside their file, before the file is written."""
    metrics.write_json(path.with_suffix(".cost.json"), {**dataclasses.asdict(spent), "seconds": seconds, "mark": mark})


def cost_file(path: Path) -> dict[str, Any]:
    """What stands beside the file of drawn answers."""
    return metrics.json.loads(path.with_suffix(".cost.json").read_text())


def read_cost(path: Path) -> tuple[Spent, float]:
    """Returns the cost of drawn answers, and the seconds it took."""
    kept = cost_file(path)
    return Spent(**{f.name: kept[f.name] for f in dataclasses.fields(Spent)}), kept["seconds"]


@dataclasses.dataclass
class Lesson:
    """One step's learning: optimiser updates, each of some micro-batches; what to log; rows for the rollouts file."""

    updates: Iterator[list[Batch]]
    info: dict[str, float] = dataclasses.field(default_factory=dict)
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    spent: Spent = Spent()
    batches: int = 1  # taken from the stream


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

    @property
    def learned(self) -> Runtime:
        """The runtime of rows to learn from."""
        return self.rt.longer(beyond(self.settings, self.sampling.max_new_tokens))

    def written(self, items: Sequence[Item]) -> list[list[Batch]]:
        """Conversations with their answers -> the micro-batches of one update."""
        rows = own_part(self.rt, self.batch, self.micro, fill=True)
        parts = [items[p] for p in pieces(len(items), -(-(self.micro or self.batch) // jax.process_count()))]
        return [[answers(self.learned, [i.encoded for i in part], rows=rows, pack=self.pack) for part in parts]]


def beyond(method: Any, max_new_tokens: int) -> int:
    """Tokens by which a row to learn from may be longer than a prompt: a drawn answer and the end of its line."""
    return max_new_tokens + 1 if method.source in ("self", "corpus") else 0


def gold(tutor: Tutor, items: Sequence[Item], forwards: int = 0) -> Lesson:
    """Conversations to imitate; `forwards` further models score them."""
    work = sum(reading(tutor.rt.cfg, i.encoded) for i in items)
    tokens = sum(len(i.encoded) for i in items)
    return Lesson(iter(tutor.written(items)), spent=Spent(flops=(3 + forwards) * work, seen=tokens, trained=tokens))


def reading(cfg: Config, encoded: Encoded) -> float:
    """Arithmetic of one conversation's forward pass; its gradient costs twice as much again."""
    learned = int(encoded.loss_mask.sum())
    return flops.text_forward(cfg, 1, len(encoded), learned) + looking(cfg, encoded)


def looking(cfg: Config, encoded: Encoded) -> float:
    """Arithmetic of a conversation's pictures."""
    return sum(flops.vision_forward(cfg, len(m.patches), len(m.patches) // m.grid[0]) for m in encoded.media)


def sampled(cfg: Config, encoded: Sequence[Encoded], lengths: np.ndarray) -> Spent:
    """What answers of these lengths [Q G] to these prompts cost."""
    q, group = lengths.shape
    mean = sum(map(len, encoded)) / q
    work = sum(looking(cfg, e) for e in encoded) + flops.text_forward(cfg, q, mean, 1) + flops.decode(cfg, q, mean, group, lengths.mean())
    return Spent(int(lengths.sum()), lengths.size, work, sum(map(len, encoded)) + int(lengths.sum()))


# ---- answers and their rewards -------------------------------------------------------------------------------------------


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


def correct(parts: dict[str, float]) -> bool:
    """Fully right: by accuracy where there is one, else by reward."""
    return parts.get("accuracy", parts.get("reward", 0.0)) >= 1.0


def own_answers(
    tutor: Tutor, params: Params, items: Sequence[Item], samples: int, key: jax.Array, bar: Any, drafts: Any, unfinished: bool = False
) -> tuple[list[tuple[int, str]], Spent]:
    """(item, text) of the policy's own correct answers to these prompts, each device pass kept in `drafts`.

    unfinished: also those that met the length limit.
    """
    share = own_part(tutor.rt, tutor.batch, 0, fill=True)
    params, sampling = runtime.prepared(tutor.rt, params, dataclasses.replace(tutor.sampling, group=samples))
    found: list[tuple[int, str]] = []
    spent = Spent()

    def draw(p: slice) -> tuple[list[tuple[int, str]], Spent]:
        here = list(items[p]) + [items[p.stop - 1]] * (share - (p.stop - p.start))
        numbers = np.arange(p.start, p.start + share)
        encoded = [i.encoded for i in here]
        out = runtime.sample(tutor.rt, params, encoded, key, numbers, sampling)
        parts = grade(tutor, here, out.texts)
        right = [r for r in range((p.stop - p.start) * samples) if correct(parts[r]) and (unfinished or out.finished[r])]
        cost = sampled(tutor.rt.cfg, encoded, out.mask.sum(1).reshape(-1, samples))
        return [(p.start + r // samples, out.texts[r]) for r in right], cost

    for p in pieces(len(items), share):
        right, cost = drafts.piece(lambda p=p: draw(p))
        found += [(i, text) for i, text in right]
        spent += cost
        bar.advance(p.stop - p.start, correct=len(found))
    return found, spent


def unwrap(rows: Sequence[Row]) -> list[Item]:
    return [dataclasses.replace(row.value, row=row.place.index) for row in rows]
