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


def train_stage(current: Run, which: Stage, place: ResumePoint | None) -> None:
    """Train a stage from its start, or from a place inside it, and save its end."""
    current.entering = place is None
    c, rt = which.config, current.rt
    start = load_stage_start(current, which, place)
    room = make_stage_context(current, which, start)
    opt = build.optimizer_from_config(c, load.declare_model_params(current.config.model, rt.cfg))
    trained, frozen = current.split()
    current.params = None  # the state holds them from here on
    progress, state = begin_state(current, which, opt, trained, place)
    if room.teacher is not None and place and place.teacher is not None:
        room.teacher.trained = place.teacher
    penalty, extra = make_penalty(current, which, start)
    steps = make_step_programs(
        rt.cfg, build.objective_from_config(c), opt, StateShardings.of(state), rt.dtype, penalty
    )
    trained = current.opt_state = None  # the steps donate them
    label = f"stage {which.number}/{len(current.stages)} {which.name} ({c.method.name})"
    with (
        jax.set_mesh(rt.mesh),
        console.progress_bar(label, total=room.steps, done=progress.step) as bar,
    ):
        now = StageCallbacks(current, which, room, frozen, bar)
        if place:
            now.examine(state, progress)
        current.sigterm.waits = True
        try:
            state = train_loop.train_loop(
                room, state, frozen, steps, progress, extra, now.after_step
            )
            ended = progress.step >= room.steps and finish_stage(
                current, which, state, frozen, start, progress
            )
            if progress.step and not ended:
                now.save(
                    state, progress, current.facts()
                )  # if it stopped between steps; else this step is saved already
        finally:
            current.sigterm.waits = False
    if current.sigterm.agreed():
        current.checkpoints.wait()
        current.sigterm.leave(f"after step {progress.step} of stage {which.number}, saved")


def begin_state(
    current: Run, which: Stage, opt: Any, trained: Params, place: ResumePoint | None
) -> tuple[StageProgress, TrainState]:
    """The state to train from: the place's, or a fresh one that may take over the optimiser's."""
    if place:
        return place.progress, place.state
    state = init_state(opt, trained, current.rt.mesh)
    if which.config.train.reset_optimizer or which.number == 1:
        return StageProgress(), state
    came, own = current.opt_state, state.opt_state
    if jax.tree.structure(came) != jax.tree.structure(own):
        raise ValueError(
            f"stage {which.number}: train.reset_optimizer=False needs the optimiser of the stage before; it has another"
        )
    return StageProgress(), state.replace(opt_state=came)


def make_stage_context(current: Run, which: Stage, start: Params | None) -> StageContext:
    """The stage's examples, order and helpers."""
    c, rt = which.config, current.rt
    replayed = replayed_tasks(current.stages, which)
    courses = {name: current.course(name, c) for name in (*which.tasks, *replayed)}
    sources = [current.examples(name, "train", c) for name in (*which.tasks, *replayed)]
    if c.method.objective == "distill":
        for course, source in zip(courses.values(), sources, strict=True):
            prompts.demonstration_prompt(course, source[0])  # refuses a task without gold answers
    tutor = build.batch_builder_from_config(rt, courses, c)
    if c.method.source == "rollouts":
        rows_per_process(
            rt, tutor.batch // c.method.updates_per_batch, tutor.micro
        )  # refuses what the mesh can not cut before answers are drawn
    n = len(which.tasks)
    if c.method.filter:
        sources[:n] = offline_filter.filter_prompts(current, which, tutor, sources[:n])
    sizes = tuple(map(len, sources))
    fraction = c.method.replay.fraction if replayed else 0.0
    order = Mixture(
        sizes[:n],
        c.train.batch,
        tuple(c.data.weights),
        sizes[n:],
        fraction,
        current.config.seed,
        which.number,
    )
    steps = which.steps or order.steps(which.epochs)
    compared = load_reference(current, which, start), make_teacher(current, which, courses, start)
    return StageContext(
        which,
        tutor,
        order,
        sources,
        steps,
        current.config.seed,
        current.workdir,
        *compared,
        current.sigterm.agreed,
    )


def finish_stage(
    current: Run,
    which: Stage,
    state: TrainState,
    frozen: Params,
    start: Params | None,
    progress: StageProgress,
) -> bool:
    """Averaging, the Fisher of EWC, and the stage's own checkpoint; False where SIGTERM came before that."""
    m = which.config.method
    trained = state.params
    if m.average:
        trained = regularizers.interpolate(
            trained, trainable.split_params(start, current.chosen)[0], m.average
        )
    current.params = trainable.join_params(trained, frozen)
    if m.penalty.name == "ewc":
        began = time.perf_counter()
        try:
            current.fisher, cost = fisher.update_fisher(current, which, current.fisher)
        except SamplingStopped:
            return False
        if current.log:
            told = {"event": "fisher", **cost.logged(), "seconds": time.perf_counter() - began}
            current.log.step(which.number, progress.step, told)
    trees: dict[str, Any] = {"params": trained}
    if resume.has_fisher(current, which.number):
        trees["fisher"] = current.fisher
    if resume.keeps_optimizer(current, which):
        trees["opt_state"] = current.opt_state = state.opt_state
    with console.show_waiting(f"saving stage {which.number}"):
        current.checkpoints.save("stages", which.number, progress.step, trees, current.facts())
    return True
