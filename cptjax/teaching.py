"""Teachers: the same network, or its past, whose distribution the student follows on its own answers.

SDFT    teacher = the network that has seen a demonstration, its weights an average of the student's past, its start, or now
LwF     teacher = the network at the stage's start, on the very same rows
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from cptjax import penalties, sharding, train
from cptjax.batches import groups
from cptjax.model import text
from cptjax.processor import Processor
from cptjax.prompting import Course
from cptjax.runtime import Runtime
from cptjax.types import Batch, Example, Params

TEACHERS = ("ema", "frozen", "current")
HINT = ("\n\nHere is how someone answered this well:\n", "\n\nNow answer in your own words.")  # around the demonstration


def demonstrated(course: Course, example: Example) -> list[dict[str, Any]]:
    """The question with a demonstration behind it, and the request for an answer of one's own."""
    if not example.target:
        raise ValueError(f"{example.id}: task {course.name} has no gold answers to demonstrate, which method.objective='distill' needs")
    *before, last = course.messages(example)
    content = [{"type": "text", "text": last["content"]}] if isinstance(last["content"], str) else list(last["content"])
    return [*before, {**last, "content": [*content, {"type": "text", "text": course.gold(example).join(HINT)}]}]


def beyond(processor: Processor, max_new_tokens: int) -> int:
    """Tokens by which a demonstrated question may be longer than the question: an answer, and the words around it."""
    return max_new_tokens + sum(len(processor.ids(part)) for part in HINT)


@functools.lru_cache(maxsize=16)
def _states(cfg: Any, dtype: Any) -> Callable:
    """A program for the teacher's predicting states [B A D] and its unembedding [D V]."""

    def run(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        params = train.cast(params, dtype)
        return train.predicting_states(params, batch, cfg, dtype), text.unembedding(params["text"])

    return jax.jit(run)


@functools.partial(jax.jit, donate_argnums=0)
def _average(teacher: Params, student: Params, rate: float) -> Params:
    return penalties.interpolate(teacher, student, rate)


class Teacher:
    """Trained leaves of the teacher; frozen leaves are the student's. One that follows is kept in float32: bfloat16 loses small moves."""

    def __init__(self, rt: Runtime, courses: dict[str, Course], rate: float, trained: Params, frozen: Params):
        self.rt, self.courses, self.rate, self.frozen = rt, courses, rate, frozen
        self.trained = jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), trained) if rate else trained

    def follow(self, student: Params) -> None:
        """After each step: move by `rate` of the way to the student."""
        if self.rate:
            self.trained = _average(self.trained, student, self.rate)

    def _see(self, batch: Batch) -> dict[str, jax.Array]:
        hidden, unembed = _states(self.rt.cfg, self.rt.dtype)(train.trainable.join(self.trained, self.frozen), batch)
        return {"teacher_hidden": hidden, "teacher_unembed": unembed}

    def attach(self, batch: Batch, items: Sequence[Any]) -> Batch:
        """The batch with the states of the teacher that has seen the demonstrations."""
        encode = lambda e: self.rt.processor.encode(demonstrated(self.courses[e.task], e), limit=max(self.rt.ladder))
        tokens, mask = sharding.local_rows(batch.targets), sharding.local_rows(batch.mask)
        shown = groups(self.rt, [encode(i.example) for i in items], tokens, mask, length=tokens.shape[1], extra={})
        return batch.replace(extra=batch.extra | self._see(shown))

    def previous(self, batch: Batch) -> Batch:
        """The batch with the teacher's states on the same rows."""
        return batch.replace(extra=batch.extra | self._see(batch))
