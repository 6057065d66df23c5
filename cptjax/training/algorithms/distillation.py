"""Distillation teachers: models whose distribution the student follows.

SDFT    on the student's own responses; the teacher's prompt shows a demonstration; its weights are
        an average of the student's past weights, those of the stage's start, or the current ones
another model   on the student's own responses; the teacher sees the student's prompt, and its
        inputs have the same form: the same tokens and the same layout of images
LwF     on the training rows; the teacher has the weights of the stage's start
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from cptjax.common.compiler_options import PlatformJit
from cptjax.data.balance import Placement, move_prompts
from cptjax.data.device_batches import with_other_prompts
from cptjax.data.model_context import ModelContext
from cptjax.data.prompts import EncodedExample, demonstration_prompt
from cptjax.models import decoder, logprobs, trainable
from cptjax.models.config import ModelConfig
from cptjax.tasks.prompted_task import PromptedTask
from cptjax.types import Array, Batch, Params

TEACHERS = ("ema", "frozen", "current")


@functools.lru_cache(maxsize=16)
def make_teacher_program(
    cfg: ModelConfig, dtype: Any
) -> Callable[[Params, Batch], tuple[Array, Array]]:
    """Return a program for the teacher's predicting states and its unembedding [D V]."""

    def run(params: Params, batch: Batch) -> tuple[Array, Array]:
        params = trainable.cast_params(params, dtype)
        hidden = logprobs.predicting_states(params, batch, cfg, dtype)
        return hidden, decoder.unembedding(params["text"])

    return PlatformJit(run)


@functools.partial(jax.jit, donate_argnums=0)
def _update_average(teacher: Params, student: Params, rate: float) -> Params:
    return trainable.interpolate(teacher, student, rate)


class Teacher:
    """A teacher's weights; a teacher that follows the student shares the student's frozen weights.

    Weights that follow the student (rate > 0) are kept in float32, since bfloat16 rounds small
    changes away.
    """

    def __init__(
        self,
        model_ctx: ModelContext,
        prompted_tasks: dict[str, PromptedTask],
        rate: float,
        trained: Params,
        frozen: Params,
    ):
        self.model_ctx = model_ctx
        self.prompted_tasks = prompted_tasks
        self.rate = rate
        self.frozen = frozen
        self.trained = trained
        if rate:
            self.trained = jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), trained)

    def follow(self, student: Params) -> None:
        """Move the weights towards the student's by the factor `rate`; call it after each step."""
        if self.rate:
            self.trained = _update_average(self.trained, student, self.rate)

    def demonstration_batch(
        self, batch: Batch, items: Sequence[EncodedExample], placement: Placement | None = None
    ) -> Batch:
        """Return the batch with prompts that show the demonstrations.

        Its targets and mask are the device arrays of `batch`, and its states are in the same order.

        items: those of this process, whose responses are where `placement` says
        """
        limit = max(self.model_ctx.buckets)
        encoded = [
            self.model_ctx.processor.encode(
                demonstration_prompt(self.prompted_tasks[i.example.task], i.example),
                limit=limit,
                media=i.encoded.media,
            )
            for i in items
        ]
        prompts = self.model_ctx.place_prompts(encoded)
        prompts = move_prompts(self.model_ctx, prompts, placement)
        return with_other_prompts(self.model_ctx, batch, prompts)

    def compute_states(self, batch: Batch) -> dict[str, Array]:
        """Compute the teacher's predicting states on a batch, with its unembedding."""
        program = make_teacher_program(self.model_ctx.cfg, self.model_ctx.dtype)
        params = trainable.join_params(self.trained, self.frozen)
        hidden, unembed = program(params, batch.replace(extra={}))
        return {"teacher_hidden": hidden, "teacher_unembed": unembed}


def refuse_other_inputs(trained: ModelContext, other: ModelContext, setting: str) -> None:
    """Refuse a teacher or a reference that cannot read the trained model's tokens and images.

    setting: the name and the value of the setting that chooses the other model
    """
    if trained.processor.tokenizer.get_vocab() != other.processor.tokenizer.get_vocab():
        raise ValueError(
            f"{setting}: expected a model with the tokens of the trained one, got another "
            "vocabulary; choose a model with the same tokenizer"
        )
    layouts = [
        c.vision and (c.family, c.vision_tokens, c.vision.patch, c.vision.temporal, c.vision.merge)
        for c in (trained.cfg, other.cfg)
    ]
    if layouts[0] != layouts[1]:
        raise ValueError(
            f"{setting}: expected a model whose images have the layout of the trained one's "
            f"({trained.cfg.family}), got {other.cfg.family}; choose a model of the same family"
        )
