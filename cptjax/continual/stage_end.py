"""The end of a stage: what its continual-learning methods compute, change and keep.

A method may ask for a pass over training rows of the stage, with a gradient for each row: EWC
averages the squared gradients of the log-likelihood of gold responses. The pass takes single rows,
since a sum of squares is not the square of a sum.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from cptjax import sharding
from cptjax.common import console, phases
from cptjax.common.program import Program
from cptjax.common.shuffle import permutation
from cptjax.common.signals import SamplingStopped
from cptjax.config import Stage
from cptjax.continual import stage_memory
from cptjax.continual.checkpoint import abstract_tree
from cptjax.continual.model_state import restore_stage_params, split_trained
from cptjax.continual.open_run import Run
from cptjax.data.collate import EncodedConversation
from cptjax.data.cost import WorkCost, conversation_flops
from cptjax.data.device_batches import conversation_batch
from cptjax.data.model_context import ModelContext
from cptjax.data.prompts import make_example_encoder
from cptjax.models import trainable
from cptjax.models.config import ModelConfig
from cptjax.training import build, programs, train_step
from cptjax.training.algorithms.continual_learning.hooks import (
    GradientPass,
    KeptLayout,
    StageEnd,
    overrides_hook,
)
from cptjax.training.algorithms.continual_learning.table import continual_methods
from cptjax.training.algorithms.losses import LossConfig
from cptjax.training.algorithms.objective import Objective
from cptjax.training.programs import AbstractStage
from cptjax.training.stage_context import StageProgress
from cptjax.training.train_step import ObjectiveFn, StepPrograms
from cptjax.types import Params, TrainState


@phases.phase("stage_end")
def end_methods(
    run: Run,
    stage: Stage,
    state: TrainState,
    frozen: Params,
    start: Params | None,
    kept: dict[str, Any],
    progress: StageProgress,
) -> tuple[Params, dict[str, Any]]:
    """Run the end of each method of a stage; return the trained parameters and what is kept.

    `kept` is what methods kept from earlier stages. What a method of this run keeps stays until a
    later stage with the method replaces it.
    """
    trained, kept = state.params, dict(kept)

    def stage_params(number: int) -> Params:
        params = restore_stage_params(run.config, run.model_ctx, run.files.checkpoints, number)
        return split_trained(run.config, params)[0]

    for method in continual_methods(stage.config.method):
        if not overrides_hook(method, "stage_end"):
            continue
        began, mean, memory, cost = time.perf_counter(), None, None, WorkCost()
        if a_pass := method.gradient_pass(stage.config.train.chunk):
            mean, cost = run_gradient_pass(run, stage, trained, frozen, a_pass, method.name)
        if method.memory is not None:
            params = trainable.join_params(trained, frozen)
            memory, more = stage_memory.add_stage_rows(
                run, stage, method, params, kept.get(method.name)
            )
            cost += more
        end = StageEnd(
            stage.number,
            run.config.seed,
            trained,
            state.params,
            split_trained(run.config, start)[0] if method.needs_start else None,
            state.methods.get(method.name),
            kept.get(method.name),
            mean,
            memory,
            stage_params,
            progress.carried.get(method.name),
        )
        with jax.set_mesh(run.model_ctx.mesh):
            trained, new = method.stage_end(end)
        if new is not None:
            # As a restored checkpoint has them, so that a resumed run computes the same bits.
            layout = KeptLayout(abstract_tree(trained), run.model_ctx.mesh, stage.number)
            shapes = method.kept_shapes(layout)
            new = jax.tree.map(_place_kept, new, shapes)
            kept[method.name] = new
        if run.files.log:
            metrics = {
                "event": "stage_end",
                "method": method.name,
                "kept_bytes": sum(x.nbytes for x in jax.tree.leaves(new)),
                **cost.logged(),
                "seconds": time.perf_counter() - began,
            }
            run.files.log.step(stage.number, progress.step, metrics)
    return trained, kept


def _place_kept(x: Any, shape: jax.ShapeDtypeStruct) -> Any:
    """Place what a method keeps; an array whose shape has no sharding stays on the host."""
    return np.asarray(x) if shape.sharding is None else jax.device_put(x, shape.sharding)


# ---- a pass over training rows -------------------------------------------------------------------


def make_gradient_programs(
    cfg: ModelConfig, config: ConfigDict, objective: ObjectiveFn, dtype: Any, trained: Params
) -> StepPrograms:
    """Return step programs for the gradient of an objective; only their `begin` is used.

    Each gradient has the sharding of its parameter in `trained`.
    """
    return train_step.make_step_programs(
        train_step.StepFunctions(
            cfg,
            objective,
            build.optimizer_from_config(config, {}),
            train_step.StateShardings.of(TrainState(None, trained, None, None)),
            dtype,
        )
    )


def make_example_gradient(
    model_ctx: ModelContext, config: ConfigDict, objective: ObjectiveFn | None = None
) -> Callable[[Params, Params, EncodedConversation], Params]:
    """Build f(trained, frozen, conversation) -> gradient of an objective, summed over its tokens.

    objective: None = the negative log-likelihood of the response
    """
    objective = objective or Objective(LossConfig.plain("sft", config.train.chunk))

    def example_gradient(trained: Params, frozen: Params, encoded: EncodedConversation) -> Params:
        steps = make_gradient_programs(model_ctx.cfg, config, objective, model_ctx.dtype, trained)
        batch = conversation_batch(model_ctx, [encoded], rows=model_ctx.shards)
        return steps.begin(trained, frozen, batch).gradient

    return example_gradient


def _transform_row(
    gradient: Params, transform: Callable[[Params], Params], processes: int
) -> Params:
    """Return what is averaged of the gradient of a row.

    Every process has the row in its batch, so the gradient is divided by `processes`.
    """
    return transform(jax.tree.map(lambda g: g.astype(jnp.float32) / processes, gradient))


@functools.partial(jax.jit, static_argnames=("transform", "rows", "processes"), donate_argnums=0)
def _add_row(
    total: Any, gradient: Params, transform: Callable[[Params], Params], rows: int, processes: int
) -> Any:
    """Add the share of one of `rows` rows to their mean."""
    new = _transform_row(gradient, transform, processes)
    return jax.tree.map(lambda t, x: t + x / rows, total, new)


def stage_end_programs(stage: AbstractStage) -> list[Program]:
    """Return the programs of the end of a stage with abstract arguments.

    They run once, after the last step of the stage.
    """
    trained, listed = stage.state.params, []
    for method in continual_methods(stage.config.method):
        a_pass = method.gradient_pass(stage.config.train.chunk)
        if a_pass is None:
            continue
        steps = make_gradient_programs(
            stage.cfg, stage.config, a_pass.objective, stage.dtype, trained
        )
        batch = programs.abstract_conversations(stage, stage.shards, stage.longest_prompt)
        gradient = programs.abstract_gradient_sum(steps.begin, stage, batch).gradient
        total = abstract_mean(gradient, a_pass)
        add_args = (total, gradient, a_pass.transform, a_pass.samples, 1)
        add = Program(f"{method.name}: sum", _add_row, add_args, calls=0.0, flops=0.0)
        begin_args = (trained, stage.frozen, batch)
        kept = (add.name,)
        name = f"{method.name}: gradient"
        listed += [add, Program(name, steps.begin, begin_args, 0.0, 0.0, kept=kept)]
    return [*listed, *stage_memory.stage_memory_programs(stage)]


def abstract_mean(gradient: Params, a_pass: GradientPass) -> Any:
    """Return the shapes of the mean of a pass.

    An array of the shape of its parameter has the parameter's sharding; others are replicated.
    """
    transform = functools.partial(_transform_row, transform=a_pass.transform, processes=1)
    shapes = jax.eval_shape(transform, gradient)
    mesh = jax.tree.leaves(gradient)[0].sharding.mesh
    replicated = lambda x: sharding.abstract_array(x.shape, x.dtype, mesh)
    if jax.tree.structure(shapes) != jax.tree.structure(gradient):
        return jax.tree.map(replicated, shapes)
    same = lambda x, g: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=g.sharding)
    return jax.tree.map(
        lambda x, g: same(x, g) if x.shape == g.shape else replicated(x), shapes, gradient
    )


def run_gradient_pass(
    run: Run, stage: Stage, trained: Params, frozen: Params, a_pass: GradientPass, name: str
) -> tuple[Any, WorkCost]:
    """Return the mean of a gradient pass over training rows of a stage, and its cost."""
    model_ctx, c, tasks = run.model_ctx, stage.config, stage.tasks
    prompted_tasks = {task: run.datasets.prompted_task(task, c) for task in tasks}
    encode = make_example_encoder(model_ctx, prompted_tasks, True, max(model_ctx.buckets))
    examples, share = [], -(-a_pass.samples // len(tasks))
    for i, task in enumerate(tasks):
        source = run.datasets.examples(task, "train", c)
        order = permutation(len(source), (run.config.seed, stage.number, i))
        examples += [source[row] for row in order[:share].tolist()]
    example_gradient = make_example_gradient(model_ctx, c, a_pass.objective)
    mean, cost = None, WorkCost()
    with (
        jax.set_mesh(model_ctx.mesh),
        console.progress_bar(f"rows for {name}", total=len(examples)) as bar,
    ):
        for example in examples:
            if run.stop_signals.agreed():
                raise SamplingStopped
            encoded = encode(example).encoded
            gradient = example_gradient(trained, frozen, encoded)
            if mean is None:
                mean = _zeros(abstract_mean(gradient, a_pass))
            mean = _add_row(mean, gradient, a_pass.transform, len(examples), jax.process_count())
            work = conversation_flops(model_ctx.cfg, encoded, model_ctx.pass_costs)
            cost += WorkCost(flops=work)
            bar.advance()
    return mean, cost


def _zeros(shapes: Any) -> Any:
    """Return zeros on the devices of abstract arrays."""
    where = jax.tree.map(lambda x: x.sharding, shapes)
    make = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.jit(make, out_shardings=where)()
