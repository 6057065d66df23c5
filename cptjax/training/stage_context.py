"""What a stage needs to train: batch builder, data and their order, reference model, teacher."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from cptjax.config import Stage
from cptjax.data.data_config import DataConfig
from cptjax.data.loader import BatchStream, LocalReader
from cptjax.data.mixture import Mixture
from cptjax.data.prompts import make_example_encoder
from cptjax.tasks.prompted_task import PromptedTask
from cptjax.training.algorithms.distillation import Teacher
from cptjax.training.memory_batches import MemoryBatches
from cptjax.training.rollouts import ScoredRollouts
from cptjax.training.step_batch import BatchBuilder
from cptjax.types import Array, Example, Params


@dataclasses.dataclass
class StageProgress:
    """How much of a stage is done; a checkpoint stores it together with the arrays."""

    step: int = 0
    batches_taken: int = 0  # from the stream; an online filter takes several per step
    updates: int = 0  # of the optimizer
    # What continual-learning methods carry from step to step, by name.
    carried: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class StageContext:
    """Everything that a stage trains with, except the weights."""

    stage: Stage
    builder: BatchBuilder
    mixture: Mixture
    sources: list[Sequence[Example]]
    steps: int
    seed: int
    workdir: Path
    reference: Params | None  # of the KL term
    teacher: Teacher | None
    start: Params | None = None  # the model at the stage's start, if the drift from it is needed
    # The tasks with method.corpus_template; None = the template of the gold answers.
    corpus_tasks: dict[str, PromptedTask] | None = None
    stopping: Callable[[], bool] = bool  # returns True if the run must end before long work
    memory: MemoryBatches | None = None  # of a continual-learning method, from earlier stages
    ahead: ScoredRollouts | None = None  # of the next step, with rollout.ahead
    saved_rollouts: dict[str, Array] | None = None  # of the next step, from a checkpoint

    @property
    def config(self) -> ConfigDict:
        return self.stage.config

    def step_key(self, step: int) -> jax.Array:
        """Return the random key of a step, which depends on (seed, stage, step)."""
        key = jax.random.fold_in(jax.random.key(self.seed), self.stage.number)
        return jax.random.fold_in(key, step)

    @functools.cached_property
    def prompt_reader(self) -> LocalReader:
        """The reader of the prompts of given rows."""
        return self._make_reader(self.builder.prompted_tasks)

    @functools.cached_property
    def corpus_reader(self) -> LocalReader:
        """The reader of the prompts of a corpus' rows, with their own template."""
        return self._make_reader(self.corpus_tasks) if self.corpus_tasks else self.prompt_reader

    def _make_reader(self, prompted_tasks: dict[str, PromptedTask]) -> LocalReader:
        model_ctx = self.builder.model_ctx
        limit = max(model_ctx.buckets)
        encode = make_example_encoder(model_ctx, prompted_tasks, False, limit)
        return LocalReader(self.sources, encode)

    def open_stream(self, batches_taken: int) -> BatchStream:
        """Open the stream of the stage's batches after those already taken."""
        data, builder = DataConfig.from_config(self.config.data), self.builder
        with_gold = self.config.method.source == "gold"
        limit = max(builder.model_ctx.buckets)
        encode = make_example_encoder(builder.model_ctx, builder.prompted_tasks, with_gold, limit)
        return BatchStream(
            self.mixture,
            self.sources,
            encode,
            shard=(jax.process_index(), jax.process_count()),
            step=batches_taken,
            workers=data.workers,
            prefetch=data.prefetch,
        )
