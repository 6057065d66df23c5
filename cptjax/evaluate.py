"""One task, one model -> scored answers: the same decoding for every method, never teacher-forced."""

import base64
import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from cptjax import console, metrics, multihost, runtime, scorers
from cptjax.batching import Encoded
from cptjax.data import Shelf
from cptjax.images import open_image
from cptjax.lessons import Spent, sampled
from cptjax.prompting import Course
from cptjax.runtime import Runtime, Sampling
from cptjax.types import Example, Params


@dataclasses.dataclass(frozen=True)
class Exam:
    """The answers of a model to one task's test rows."""

    course: Course
    records: list[scorers.Record]
    forced: list[scorers.Record]  # after the forced prefix; empty where that was not asked for
    texts: list[str]
    spent: Spent  # by all processes, the forced answers included
    also: dict[str, list[scorers.Record]] = dataclasses.field(default_factory=dict)  # by the task's further scorers, by their names


def answer(
    rt: Runtime, params: Params, encoded: Sequence[Encoded], sampling: Sampling, batch: int, key: jax.Array, bar: console.Bar
) -> tuple[list[str], Spent]:
    """Texts of all prompts in their order; long prompts first, so that one batch holds similar lengths and memory peaks at once."""
    order = sorted(range(len(encoded)), key=lambda i: (-len(encoded[i].tokens), i))
    batch = max(rt.shards, batch // jax.process_count() // rt.shards * rt.shards)
    found: list[str] = [""] * len(encoded)
    spent = Spent()
    for start in range(0, len(order), batch):
        mine = order[start : start + batch]
        filled = mine + [mine[-1]] * (batch - len(mine))  # a full batch has the compiled shape
        limits = np.where(np.arange(batch) < len(mine), sampling.max_new_tokens, 0)
        out = runtime.sample(rt, params, [encoded[i] for i in filled], key, np.asarray(filled), sampling, limits=limits)
        for i, text in zip(mine, out.texts, strict=False):
            found[i] = text
        spent += sampled(rt.cfg, [encoded[i] for i in mine], out.mask[: len(mine)].sum(1)[:, None])
        bar.advance(len(mine))
    return found, spent


def begun(encoded: Encoded, ids: Sequence[int]) -> Encoded:
    """A prompt whose answer begins with these tokens."""
    n, start = len(ids), int(encoded.positions.max()) + 1
    text = np.broadcast_to(np.arange(start, start + n, dtype=encoded.positions.dtype), (3, n))
    more = dict(tokens=np.asarray(ids), types=np.zeros(n), loss_mask=np.zeros(n, bool))
    joined = {k: np.concatenate([getattr(encoded, k), v.astype(getattr(encoded, k).dtype)]) for k, v in more.items()}
    return dataclasses.replace(encoded, positions=np.concatenate([encoded.positions, text], 1), **joined)


def own_rows(n: int) -> list[int]:
    """The rows that this process answers; the last is answered again where the processes' shares would differ."""
    count, index = jax.process_count(), jax.process_index()
    share = -(-n // count)
    return [min(i, n - 1) for i in range(index * share, (index + 1) * share)]


def take(
    rt: Runtime, params: Params, course: Course, examples: Sequence[Example], *, sampling: Sampling, batch: int, key: jax.Array,
    forced: bool = False, title: str = "", shelf: Shelf | None = None,
) -> Exam:  # fmt: skip
    """All examples answered and scored; `shelf` keeps encoded prompts from one evaluation to the next."""
    shelf = Shelf(len(examples)) if shelf is None else shelf
    rows = own_rows(len(examples))
    params, sampling = runtime.prepared(rt, params, sampling)
    mine = [examples[i] for i in rows]
    with console.progress(title or f"evaluate {course.name}", total=len(mine) * (1 + forced)) as bar:
        make = lambda e: lambda: rt.processor.encode(course.messages(e), generation=True)
        encoded = [shelf.get(e.id, make(e)) for e in mine]
        texts, spent = answer(rt, params, encoded, sampling, batch, key, bar)
        again: list[str] = []
        if forced:
            prefix = rt.processor.opening(course.forced_prefix)
            prefixed = [begun(e, prefix) for e in encoded]
            again, more = answer(rt, params, prefixed, sampling, batch, key, bar)
            spent += more
    records = course.score(texts, mine)
    further = {name: dataclasses.replace(course, scorer=scorers.find(name)).score(texts, mine) for name in course.task.also}
    after = course.score(again, mine, forced=True) if forced else []
    parts = multihost.gather([(i, r, t) for i, r, t in zip(rows, records, texts, strict=True)])
    parts_after = multihost.gather(list(zip(rows, after, strict=False)))
    also = {name: _in_order(rows, found, len(examples)) for name, found in further.items()}
    by_row = {i: (r, t) for i, r, t in multihost.together(parts)}
    forced_by_row = dict(multihost.together(parts_after))
    picked = [by_row[i] for i in range(len(examples))]
    return Exam(
        course, [r for r, _ in picked], [forced_by_row[i] for i in sorted(forced_by_row)], [t for _, t in picked],
        sum(multihost.gather(spent), Spent()), also,
    )  # fmt: skip


def _in_order(rows: Sequence[int], found: Sequence[Any], n: int) -> list[Any]:
    """Everyone's records by row."""
    by_row = dict(multihost.together(multihost.gather(list(zip(rows, found, strict=True)))))
    return [by_row[i] for i in range(n)]


def stderr(values: Sequence[float]) -> float:
    """Standard error of a mean; the range of a single value is unknown."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def rows(exam: Exam, common: Mapping[str, Any], mini: bool = False) -> list[dict[str, Any]]:
    """The lines of evals.csv."""
    summary = scorers.summarise(exam.course.scorer, exam.records)
    own = {"task": exam.course.name, "scorer": exam.course.scorer.id, "template": exam.course.template.name, **common}
    line = lambda name, value, records, error=None: {**own, "metric": name, "value": value, "n": len(records), "stderr": error}
    accuracy = metrics.MINI if mini else metrics.ACCURACY
    out = [line(accuracy, summary.pop("accuracy"), exam.records, stderr([r.score for r in exam.records]))]
    if mini:
        return out
    out += [line(name, value, exam.records) for name, value in summary.items()]
    for name, records in exam.also.items():
        scorer = scorers.find(name)
        value = scorers.summarise(scorer, records)["accuracy"]
        out.append(line(f"{accuracy}_{name}", value, records, stderr([r.score for r in records])) | {"scorer": scorer.id})
    if exam.forced:
        scores = [r.score for r in exam.forced]
        out.append(line(metrics.FORCED, float(np.mean(scores)), exam.forced, stderr(scores)))
    return out


def thumbnail(example: Example, side: int = 160) -> str | None:
    """The first picture of an example as a data URI; None without one."""
    found = [p["image"] for m in example.messages if not isinstance(m["content"], str) for p in m["content"] if p["type"] == "image"]
    if not found:
        return None
    image = open_image(found[0])
    image.thumbnail((side, side))
    out = io.BytesIO()
    image.save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def predictions(exam: Exam, step: int) -> list[dict[str, Any]]:
    """The lines of predictions/stage{K}.jsonl."""
    return [
        {
            "task": exam.course.name,
            "step": step,
            "id": r.id,
            "score": r.score,
            "prediction": r.prediction,
            "response": t,
            "answer": r.answer,
        }
        for r, t in zip(exam.records, exam.texts, strict=True)
    ]
