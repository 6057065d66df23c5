"""A stage's training within a run: what it compares with, what happens after each step, and what it leaves behind."""

import time
from typing import Any

import jax

from cptjax.common import console
from cptjax.common.signals import SamplingStopped
from cptjax.config import Stage, replayed_tasks
from cptjax.continual import fisher, offline_filter, resume
from cptjax.continual.open_run import Run
from cptjax.continual.reference_models import (
    load_reference,
    load_stage_start,
    make_penalty,
    make_teacher,
)
from cptjax.continual.resume import ResumePoint
from cptjax.continual.stage_callbacks import StageCallbacks
from cptjax.data import prompts
from cptjax.data.device_batches import rows_per_process
from cptjax.data.mixture import Mixture
from cptjax.models import load, trainable
from cptjax.training import build, train_loop
from cptjax.training.algorithms import regularizers
from cptjax.training.stage_context import StageContext, StageProgress
from cptjax.training.train_step import StateShardings, init_state, make_step_programs
from cptjax.types import Params, TrainState


def train_stage(run: Run, stage: Stage, place: ResumePoint | None) -> None:
    """Train a stage from its start, or from a place inside it, and save its end."""
    run.entering = place is None
    c, model_ctx = stage.config, run.model_ctx
    start = load_stage_start(run, stage, place)
    ctx = make_stage_context(run, stage, start)
    opt = build.optimizer_from_config(c, load.declare_model_params(run.config.model, model_ctx.cfg))
    trained, frozen = run.split()
    run.params = None  # the state holds them from here on
    progress, state = begin_state(run, stage, opt, trained, place)
    if ctx.teacher is not None and place and place.teacher is not None:
        ctx.teacher.trained = place.teacher
    penalty, extra = make_penalty(run, stage, start)
    steps = make_step_programs(
        model_ctx.cfg,
        build.objective_from_config(c),
        opt,
        StateShardings.of(state),
        model_ctx.dtype,
        penalty,
    )
    trained = run.opt_state = None  # the steps donate them
    label = f"stage {stage.number}/{len(run.stages)} {stage.name} ({c.method.name})"
    with (
        jax.set_mesh(model_ctx.mesh),
        console.progress_bar(label, total=ctx.steps, done=progress.step) as bar,
    ):
        now = StageCallbacks(run, stage, ctx, frozen, bar)
        if place:
            now.examine(state, progress)
        run.sigterm.waits = True
        try:
            state = train_loop.train_loop(
                ctx, state, frozen, steps, progress, extra, now.after_step
            )
            ended = progress.step >= ctx.steps and finish_stage(
                run, stage, state, frozen, start, progress
            )
            if progress.step and not ended:
                now.save(
                    state, progress, run.facts()
                )  # if it stopped between steps; else this step is saved already
        finally:
            run.sigterm.waits = False
    if run.sigterm.agreed():
        run.checkpoints.wait()
        run.sigterm.leave(f"after step {progress.step} of stage {stage.number}, saved")


def begin_state(
    run: Run, stage: Stage, opt: Any, trained: Params, place: ResumePoint | None
) -> tuple[StageProgress, TrainState]:
    """The state to train from: the place's, or a fresh one that may take over the optimiser's."""
    if place:
        return place.progress, place.state
    state = init_state(opt, trained, run.model_ctx.mesh)
    if stage.config.train.reset_optimizer or stage.number == 1:
        return StageProgress(), state
    came, own = run.opt_state, state.opt_state
    if jax.tree.structure(came) != jax.tree.structure(own):
        raise ValueError(
            f"stage {stage.number}: train.reset_optimizer=False needs the optimiser of the stage before; it has another"
        )
    return StageProgress(), state.replace(opt_state=came)


def make_stage_context(run: Run, stage: Stage, start: Params | None) -> StageContext:
    """The stage's examples, order and helpers."""
    c, model_ctx = stage.config, run.model_ctx
    replayed = replayed_tasks(run.stages, stage)
    prompted_tasks = {name: run.prompted(name, c) for name in (*stage.tasks, *replayed)}
    sources = [run.examples(name, "train", c) for name in (*stage.tasks, *replayed)]
    if c.method.objective == "distill":
        for prompted, source in zip(prompted_tasks.values(), sources, strict=True):
            prompts.demonstration_prompt(prompted, source[0])  # refuses a task without gold answers
    builder = build.batch_builder_from_config(model_ctx, prompted_tasks, c)
    if c.method.source == "rollouts":
        rows_per_process(
            model_ctx, builder.batch_size // c.method.updates_per_batch, builder.micro_batch
        )  # refuses what the mesh can not cut before answers are drawn
    n = len(stage.tasks)
    if c.method.filter:
        sources[:n] = offline_filter.filter_prompts(run, stage, builder, sources[:n])
    sizes = tuple(map(len, sources))
    fraction = c.method.replay.fraction if replayed else 0.0
    order = Mixture(
        sizes[:n],
        c.train.batch,
        tuple(c.data.weights),
        sizes[n:],
        fraction,
        run.config.seed,
        stage.number,
    )
    steps = stage.steps or order.steps(stage.epochs)
    compared = load_reference(run, stage, start), make_teacher(run, stage, prompted_tasks, start)
    return StageContext(
        stage,
        builder,
        order,
        sources,
        steps,
        run.config.seed,
        run.workdir,
        *compared,
        run.sigterm.agreed,
    )


def finish_stage(
    run: Run,
    stage: Stage,
    state: TrainState,
    frozen: Params,
    start: Params | None,
    progress: StageProgress,
) -> bool:
    """Averaging, the Fisher of EWC, and the stage's own checkpoint; False where SIGTERM came before that."""
    m = stage.config.method
    trained = state.params
    if m.average:
        trained = regularizers.interpolate(
            trained, trainable.split_params(start, run.chosen)[0], m.average
        )
    run.params = trainable.join_params(trained, frozen)
    if m.penalty.name == "ewc":
        began = time.perf_counter()
        try:
            run.fisher, cost = fisher.update_fisher(run, stage, run.fisher)
        except SamplingStopped:
            return False
        if run.log:
            metrics = {"event": "fisher", **cost.logged(), "seconds": time.perf_counter() - began}
            run.log.step(stage.number, progress.step, metrics)
    trees: dict[str, Any] = {"params": trained}
    if resume.has_fisher(run, stage.number):
        trees["fisher"] = run.fisher
    if resume.keeps_optimizer(run, stage):
        trees["opt_state"] = run.opt_state = state.opt_state
    with console.show_waiting(f"saving stage {stage.number}"):
        run.checkpoints.save("stages", stage.number, progress.step, trees, run.facts())
    return True
