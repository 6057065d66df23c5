"""A stage ready to run: its rows, their order, its tutor, and the models it is compared with."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from cptjax import lessons, settings
from cptjax.data import Here, Stream
from cptjax.lessons import Item, Tutor
from cptjax.order import Order
from cptjax.prompting import Course
from cptjax.runtime import Runtime
from cptjax.teaching import Teacher
from cptjax.types import Example, Params


@dataclasses.dataclass
class Progress:
    """How far a stage has come: what a checkpoint stores beside the arrays."""

    step: int = 0  # steps taken
    drawn: int = 0  # batches taken from the stream (an online filter takes several a step)
    updates: int = 0  # optimiser updates


@dataclasses.dataclass
class Classroom:
    """A stage ready to run."""

    stage: settings.Stage
    tutor: Tutor
    order: Order
    sources: list[Sequence[Example]]
    steps: int
    seed: int
    workdir: Path
    reference: Params | None  # of the KL term
    teacher: Teacher | None
    stopping: Callable[[], bool] = bool  # whether the run is to end before long work is begun

    @property
    def config(self) -> Any:
        return self.stage.config

    def key(self, step: int) -> jax.Array:
        """Randomness is a function of (seed, stage, step)."""
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(self.seed), self.stage.number), step)

    @functools.cached_property
    def prompts(self) -> Here:
        """Prepares the prompts at some places: the answers drawn to them are learned from with the same pictures."""
        rt = self.tutor.rt
        return Here(self.sources, prepare(rt, self.tutor.courses, False, max(rt.ladder)))

    def stream(self, drawn: int) -> Stream:
        d, rt = self.config.data, self.tutor.rt
        answered = self.config.method.source == "gold"
        shard = (jax.process_index(), jax.process_count())
        build = prepare(rt, self.tutor.courses, answered, max(rt.ladder))
        more = dict(shard=shard, step=drawn, workers=d.workers, prefetch=d.prefetch)
        return Stream(self.order, self.sources, build, collate=lessons.unwrap, **more)


def prepare(rt: Runtime, courses: dict[str, Course], answered: bool, limit: int) -> Callable[[Example], Item]:
    """What turns a training example into a row: its prompt, or its prompt and gold answer; safe to send to worker processes."""
    forms = {name: dataclasses.replace(course, pool=None) for name, course in courses.items()}
    processor = rt.processor

    def run(example: Example) -> Item:
        form = forms[example.task]
        messages = form.messages(example)
        if answered:
            messages = [*messages, {"role": "assistant", "content": form.gold(example)}]
        return Item(example, processor.encode(messages, limit=limit))

    return run
