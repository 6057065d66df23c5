"""Train one stage: build what it needs, run its steps, save its end."""

import dataclasses
from typing import Any

import jax

from cptjax.common import console
from cptjax.common.signals import SamplingStopped
from cptjax.config import Stage, replayed_tasks
from cptjax.continual import offline_filter, resume
from cptjax.continual.checkpoint import STEPS_PER_STAGE
from cptjax.continual.model_state import (
    ModelState,
    frozen_after,
    frozen_weights_methods,
    restore_stage_params,
    split_trained,
)
from cptjax.continual.open_run import Run
from cptjax.continual.reference_models import (
    hook_arrays,
    load_reference,
    load_stage_start,
    make_teacher,
)
from cptjax.continual.resume import UnfinishedStage
from cptjax.continual.stage_callbacks import StageCallbacks
from cptjax.continual.stage_end import end_methods
from cptjax.continual.stage_memory import open_memory
from cptjax.data import prompts
from cptjax.models import load, trainable
from cptjax.training import build, self_training, train_loop
from cptjax.training.algorithms.continual_learning.hooks import HookArrays
from cptjax.training.algorithms.continual_learning.table import continual_methods
from cptjax.training.algorithms.optimizers import Optimizer
from cptjax.training.method_needs import method_needs
from cptjax.training.stage_context import StageContext, StageProgress
from cptjax.training.train_step import (
    StateShardings,
    StepFunctions,
    StepPrograms,
    init_state,
    make_step_programs,
)
from cptjax.types import Params, TrainState


@dataclasses.dataclass
class PreparedStage:
    """What the training loop of a stage takes."""

    ctx: StageContext
    state: TrainState
    frozen: Params
    programs: StepPrograms
    progress: StageProgress
    arrays: HookArrays


def train_stage(
    run: Run, stage: Stage, model_state: ModelState, unfinished: UnfinishedStage | None = None
) -> ModelState:
    """Train a stage from its start or from `unfinished`, save its end, and return its model.

    The arrays of `model_state` are donated; only the returned value may be used afterwards.
    """
    resumed, model_ctx = unfinished is not None, run.model_ctx
    start = load_stage_start(run, stage, model_state.params, resumed)
    prepared = prepare_stage(run, stage, model_state, start, unfinished)
    ctx, frozen, progress = prepared.ctx, prepared.frozen, prepared.progress
    label = f"stage {stage.number}/{len(run.stages)} {stage.name} ({stage.config.method.name})"
    with (
        jax.set_mesh(model_ctx.mesh),
        console.progress_bar(label, total=ctx.steps, done=progress.step) as bar,
    ):
        callbacks = StageCallbacks(run, stage, ctx, frozen, model_state.kept, bar)
        if resumed:
            callbacks.evaluate_if_due(prepared.state, progress)
        if run.files.profiler:
            run.files.profiler.advance(stage.number, progress.step)
        with run.stop_signals.deferred():
            state = train_loop.train_loop(
                ctx,
                prepared.state,
                frozen,
                prepared.programs,
                progress,
                prepared.arrays,
                callbacks.after_step,
            )
            end = None
            if progress.step >= ctx.steps:
                end = finish_stage(run, stage, state, frozen, start, model_state.kept, progress)
            # A stage that stopped between steps is not saved yet; a step that is saved is skipped.
            if progress.step and end is None:
                callbacks.save(state, progress, resume.checkpoint_record(run))
            stopped = end is None or run.stop_signals.agreed()
    if stopped:
        run.files.checkpoints.wait()
        run.stop_signals.leave(f"after step {progress.step} of stage {stage.number}, saved")
    return end


def prepare_stage(
    run: Run,
    stage: Stage,
    model_state: ModelState,
    start: Params | None,
    unfinished: UnfinishedStage | None = None,
) -> PreparedStage:
    """Build what a stage trains with, from its start or from `unfinished`.

    start: the model at the start of the stage, of `load_stage_start`
    """
    c, model_ctx, resumed = stage.config, run.model_ctx, unfinished is not None
    ctx = make_stage_context(run, stage, model_state.params, start, resumed)
    if ctx.steps >= STEPS_PER_STAGE:
        raise ValueError(
            f"stage {stage.number} has {ctx.steps} steps; expected fewer than {STEPS_PER_STAGE}: "
            "divide it into several stages"
        )
    if ctx.teacher is not None and unfinished and unfinished.teacher is not None:
        ctx.teacher.trained = unfinished.teacher
    opt = build.optimizer_from_config(c, load.declare_model_params(run.config.model, model_ctx.cfg))
    trained, frozen = split_trained(run.config, model_state.params)
    if unfinished:
        progress, state = unfinished.progress, unfinished.state
        ctx.saved_rollouts = unfinished.rollouts
    else:
        methods = continual_methods(c.method)
        carried = {m.name: m.begin_rewards(model_state.kept.get(m.name)) for m in methods}
        progress = StageProgress(carried={k: v for k, v in carried.items() if v is not None})
        state = init_stage(run, stage, opt, trained, model_state)
    ctx.memory = open_memory(run, stage, model_state.kept)
    arrays = hook_arrays(run, stage, start, model_state.kept)
    programs = make_step_programs(
        StepFunctions(
            model_ctx.cfg,
            build.objective_from_config(c),
            opt,
            StateShardings.of(state),
            model_ctx.dtype,
            build.step_methods_from_config(c),
            build.memory_objective_from_config(c),
            c.log.changed_weights,
        )
    )
    return PreparedStage(ctx, state, frozen, programs, progress, arrays)


def init_stage(
    run: Run, stage: Stage, opt: Optimizer, trained: Params, model_state: ModelState
) -> TrainState:
    """Return a new training state, with the previous optimizer state if the config keeps it."""
    methods = build.step_methods_from_config(stage.config)
    state = init_state(opt, trained, run.model_ctx.mesh, methods)
    if stage.config.train.reset_optimizer or stage.number == 1:
        return state
    kept = model_state.opt_state
    if jax.tree.structure(kept) != jax.tree.structure(state.opt_state):
        raise ValueError(
            f"stage {stage.number}: train.reset_optimizer=False: expected the optimizer of the "
            "stage before, got another; use the same train.optimizer, or reset it"
        )
    return state.replace(opt_state=kept)


def make_stage_context(
    run: Run, stage: Stage, params: Params, start: Params | None, resumed: bool = False
) -> StageContext:
    """Build what a stage trains with: rows, their order, batches, reference and teacher."""
    c, model_ctx, datasets = stage.config, run.model_ctx, run.datasets
    replayed = replayed_tasks(run.stages, stage)
    names = (*stage.tasks, *replayed)
    prompted_tasks = {name: datasets.prompted_task(name, c) for name in names}
    sources = [datasets.examples(name, "train", c) for name in names]
    if c.method.objective == "distill":
        for prompted, source in zip(prompted_tasks.values(), sources, strict=True):
            prompts.demonstration_prompt(prompted, source[0])  # refuses a task without gold answers
    builder = build.batch_builder_from_config(model_ctx, prompted_tasks, c, params)
    _ = builder.layout  # refuses a batch that cannot be cut, before anything is sampled
    n = len(stage.tasks)
    if c.method.filter:
        sources[:n] = offline_filter.filter_prompts(
            run, stage, builder, sources[:n], params, resumed
        )
    order = build.stage_mixture(stage, list(map(len, sources)), run.config.seed)
    corpus_tasks = None
    if c.method.corpus_template:
        corpus_tasks = {
            name: datasets.prompted_task(name, c, c.method.corpus_template) for name in names
        }
    reference_ctx, reference = load_reference(run, stage, start)
    score = build.scoring_program_from_config(reference_ctx.cfg, reference_ctx.dtype, c)
    builder = dataclasses.replace(builder, score_reference=score, reference_cfg=reference_ctx.cfg)
    ctx = StageContext(
        stage,
        builder,
        order,
        sources,
        stage.steps or order.steps(stage.epochs),
        run.config.seed,
        run.files.workdir,
        reference,
        make_teacher(run, stage, prompted_tasks, params, start),
        start if method_needs(c.method).drift and stage.number > 1 else None,
        corpus_tasks,
        run.stop_signals.agreed,
    )
    if stage.epochs and c.method.epoch_unit == "responses":
        ctx.steps = self_training.steps_over_responses(ctx, params, stage.epochs)
    return ctx


def finish_stage(
    run: Run,
    stage: Stage,
    state: TrainState,
    frozen: Params,
    start: Params | None,
    kept: dict[str, Any],
    progress: StageProgress,
) -> ModelState | None:
    """Run the end of each continual-learning method, and save the stage.

    Return None if a signal stopped it.
    """
    try:
        trained, kept = end_methods(run, stage, state, frozen, start, kept, progress)
    except SamplingStopped:
        return None
    opt_state = state.opt_state if resume.keeps_optimizer(run, stage) else None
    trees: dict[str, Any] = {"params": trained, "kept": kept or None, "opt_state": opt_state}
    with console.show_waiting(f"saving stage {stage.number}"):
        run.files.checkpoints.save(
            "stages",
            stage.number,
            progress.step,
            {name: tree for name, tree in trees.items() if tree is not None},
            resume.checkpoint_record(run),
        )
    if frozen_weights_methods([stage]):
        # Before new weights are made, since the memory may not hold three copies of them.
        jax.tree.map(lambda x: x.delete(), frozen)
        base = restore_stage_params(run.config, run.model_ctx, None, 0)
        ended = run.stages[: stage.number]
        frozen = frozen_after(ended, split_trained(run.config, base)[1], kept)
    return ModelState(trainable.join_params(trained, frozen), opt_state, kept)
