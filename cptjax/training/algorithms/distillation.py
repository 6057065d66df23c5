"""Teachers: the same network, or its past, whose distribution the student follows on its own answers.

SDFT    teacher = the network that has seen a demonstration, its weights an average of the student's past, its start, or now
LwF     teacher = the network at the stage's start, on the very same rows
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from cptjax import sharding
from cptjax.data.device_batches import group_batch
from cptjax.data.model_context import ModelContext
from cptjax.data.prompts import demonstration_prompt
from cptjax.models import decoder, logprobs, trainable
from cptjax.tasks.prompted_task import PromptedTask
from cptjax.training.algorithms import regularizers
from cptjax.types import Batch, Params


def has_ema_teacher(method: Any) -> bool:
    """Whether the teacher has weights of its own, which follow the student's."""
    return method.objective == "distill" and method.distill.teacher != "frozen"


def needs_teacher(method: Any) -> bool:
    """Return whether a stage compares the student with a teacher."""
    return method.objective == "distill" or method.penalty.name == "lwf"


TEACHERS = ("ema", "frozen", "current")


@functools.lru_cache(maxsize=16)
def make_teacher_program(cfg: Any, dtype: Any) -> Callable:
    """A program for the teacher's predicting states [B A D] and its unembedding [D V]."""

    def run(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        params = trainable.cast_params(params, dtype)
        return logprobs.predicting_states(params, batch, cfg, dtype), decoder.unembedding(
            params["text"]
        )

    return jax.jit(run)


@functools.partial(jax.jit, donate_argnums=0)
def _update_average(teacher: Params, student: Params, rate: float) -> Params:
    return regularizers.interpolate(teacher, student, rate)


class Teacher:
    """Trained leaves of the teacher; frozen leaves are the student's. One that follows is kept in float32: bfloat16 loses small moves."""

    def __init__(
        self,
        model_ctx: ModelContext,
        prompted_tasks: dict[str, PromptedTask],
        rate: float,
        trained: Params,
        frozen: Params,
    ):
        self.model_ctx, self.prompted_tasks, self.rate, self.frozen = (
            model_ctx,
            prompted_tasks,
            rate,
            frozen,
        )
        self.trained = (
            jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), trained)
            if rate
            else trained
        )

    def follow(self, student: Params) -> None:
        """After each step: move by `rate` of the way to the student."""
        if self.rate:
            self.trained = _update_average(self.trained, student, self.rate)

    def _see(self, batch: Batch) -> dict[str, jax.Array]:
        hidden, unembed = make_teacher_program(self.model_ctx.cfg, self.model_ctx.dtype)(
            trainable.join_params(self.trained, self.frozen), batch
        )
        return {"teacher_hidden": hidden, "teacher_unembed": unembed}

    def attach(self, batch: Batch, items: Sequence[Any]) -> Batch:
        """The batch with the states of the teacher that has seen the demonstrations."""
        encode = lambda item: self.model_ctx.processor.encode(
            demonstration_prompt(self.prompted_tasks[item.example.task], item.example),
            limit=max(self.model_ctx.buckets),
            media=item.encoded.media,
        )
        tokens, mask = sharding.local_rows(batch.targets), sharding.local_rows(batch.mask)
        shown = group_batch(
            self.model_ctx,
            [encode(item) for item in items],
            tokens,
            mask,
            length=tokens.shape[1],
            extra={},
        )
        return batch.replace(extra=batch.extra | self._see(shown))

    def previous(self, batch: Batch) -> Batch:
        """The batch with the teacher's states on the same rows."""
        return batch.replace(extra=batch.extra | self._see(batch))
