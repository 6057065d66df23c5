"""Fisher information for EWC: squared gradients of the log-likelihood of gold responses."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from cptjax.common import console
from cptjax.common.program import Program
from cptjax.common.shuffle import permutation
from cptjax.common.signals import SamplingStopped
from cptjax.config import Stage
from cptjax.continual.open_run import Run
from cptjax.data.collate import EncodedConversation
from cptjax.data.cost import WorkCost, conversation_flops
from cptjax.data.device_batches import conversation_batch
from cptjax.data.model_context import ModelContext
from cptjax.data.prompts import make_example_encoder
from cptjax.models.config import ModelConfig
from cptjax.training import build, programs, train_step
from cptjax.training.algorithms import weight_penalties
from cptjax.training.algorithms.losses import LossConfig
from cptjax.training.algorithms.objective import Objective
from cptjax.training.programs import AbstractStage
from cptjax.training.train_step import StepPrograms
from cptjax.types import Params


def make_likelihood_programs(cfg: ModelConfig, config: ConfigDict, dtype: Any) -> StepPrograms:
    """Return step programs for the gradient of the negative log-likelihood.

    Only their `begin` is used.
    """
    return train_step.make_step_programs(
        cfg,
        Objective(LossConfig.plain("sft", config.train.chunk)),
        build.optimizer_from_config(config, {}),
        train_step.StateShardings(None, ()),
        dtype,
    )


def make_example_gradient(
    model_ctx: ModelContext, config: ConfigDict
) -> Callable[[Params, Params, EncodedConversation], Params]:
    """Build f(trained, frozen, conversation) -> gradient of its negative log-likelihood.

    The log-likelihood is summed over the response tokens.
    """
    begin = make_likelihood_programs(model_ctx.cfg, config, model_ctx.dtype).begin

    def example_gradient(trained: Params, frozen: Params, encoded: EncodedConversation) -> Params:
        batch = conversation_batch(model_ctx, [encoded], rows=model_ctx.shards)
        return begin(trained, frozen, batch).gradient

    return example_gradient


@functools.partial(jax.jit, static_argnames=("rows", "processes"), donate_argnums=0)
def _add_example(fisher: Params, gradient: Params, rows: int, processes: int) -> Params:
    """Add the squared gradient of one of `rows` examples.

    Every process has the example in its batch, so the gradient is divided by `processes`.
    """
    gradient = jax.tree.map(lambda g: g / processes, gradient)
    return weight_penalties.add_fisher(fisher, gradient, rows)


def fisher_programs(stage: AbstractStage) -> list[Program]:
    """Return the programs of `update_fisher` with abstract arguments.

    They run once, after a stage with EWC.
    """
    penalty, trained = stage.config.method.penalty, stage.state.params
    if penalty.name != "ewc":
        return []
    steps = make_likelihood_programs(stage.cfg, stage.config, stage.dtype)
    batch = programs.abstract_conversations(stage, stage.shards, stage.longest_prompt)
    gradient = programs.abstract_gradient_sum(steps, stage, batch).gradient
    squares = jax.tree.map(
        lambda p: jax.ShapeDtypeStruct(p.shape, jnp.float32, sharding=p.sharding), trained
    )
    add_args = (squares, gradient, penalty.samples, 1)
    add = Program("Fisher: sum", _add_example, add_args, calls=0.0, flops=0.0)
    begin_args = (trained, stage.frozen, batch)
    begin = Program("Fisher: gradient", steps.begin, begin_args, 0.0, 0.0, kept=(add.name,))
    return [add, begin]


def update_fisher(
    run: Run, stage: Stage, trained: Params, frozen: Params, before: Params | None
) -> tuple[Params, WorkCost]:
    """Return the Fisher information of all stages up to this one, and the cost of the estimate.

    Each example needs its own device pass, since a sum of squares is not the square of a sum.
    """
    model_ctx, c, tasks = run.model_ctx, stage.config, stage.tasks
    prompted_tasks = {name: run.datasets.prompted_task(name, c) for name in tasks}
    encode = make_example_encoder(model_ctx, prompted_tasks, True, max(model_ctx.buckets))
    examples, share = [], -(-c.method.penalty.samples // len(tasks))
    for i, name in enumerate(tasks):
        source = run.datasets.examples(name, "train", c)
        order = permutation(len(source), (run.config.seed, stage.number, i))
        examples += [source[row] for row in order[:share].tolist()]
    example_gradient = make_example_gradient(model_ctx, c)
    fisher, cost = weight_penalties.zero_fisher(trained), WorkCost()
    with (
        jax.set_mesh(model_ctx.mesh),
        console.progress_bar("Fisher information", total=len(examples)) as bar,
    ):
        for example in examples:
            if run.stop_signals.agreed():
                raise SamplingStopped
            encoded = encode(example).encoded
            gradient = example_gradient(trained, frozen, encoded)
            fisher = _add_example(fisher, gradient, len(examples), jax.process_count())
            cost += WorkCost(flops=3 * conversation_flops(model_ctx.cfg, encoded))
            bar.advance()
    return fisher if before is None else weight_penalties.merge_fisher(before, fisher), cost
