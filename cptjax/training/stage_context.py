"""A stage ready to run: its rows, their order, its tutor, and the models it is compared with."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from cptjax.config import Stage
from cptjax.data.loader import BatchStream, LocalReader
from cptjax.data.mixture import Mixture
from cptjax.data.prompts import make_example_encoder
from cptjax.training.algorithms.distillation import Teacher
from cptjax.training.step_batch import BatchBuilder
from cptjax.types import Example, Params


@dataclasses.dataclass
class StageProgress:
    """How far a stage has come: what a checkpoint stores beside the arrays."""

    step: int = 0  # steps taken
    batches_taken: int = 0  # from the stream; an online filter takes several a step
    updates: int = 0  # optimiser updates


@dataclasses.dataclass
class StageContext:
    """A stage ready to run."""

    stage: Stage
    builder: BatchBuilder
    mixture: Mixture
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

    def step_key(self, step: int) -> jax.Array:
        """Randomness is a function of (seed, stage, step)."""
        return jax.random.fold_in(
            jax.random.fold_in(jax.random.key(self.seed), self.stage.number), step
        )

    @functools.cached_property
    def prompt_reader(self) -> LocalReader:
        """Prepares the prompts at some places: the answers drawn to them are learned from with the same pictures."""
        model_ctx = self.builder.model_ctx
        return LocalReader(
            self.sources,
            make_example_encoder(
                model_ctx, self.builder.prompted_tasks, False, max(model_ctx.buckets)
            ),
        )

    def open_stream(self, batches_taken: int) -> BatchStream:
        d, model_ctx = self.config.data, self.builder.model_ctx
        answered = self.config.method.source == "gold"
        shard = (jax.process_index(), jax.process_count())
        build = make_example_encoder(
            model_ctx, self.builder.prompted_tasks, answered, max(model_ctx.buckets)
        )
        more = dict(shard=shard, step=batches_taken, workers=d.workers, prefetch=d.prefetch)
        return BatchStream(self.mixture, self.sources, build, **more)
