"""A stage's training within a run: what it compares with, what happens after each step, and what it leaves behind."""

import dataclasses
import time
from typing import Any

import jax
import numpy as np

from cptjax import console, evaluate, ewc, exams, filtering, metrics, multihost, penalties, resume, runtime, settings, stage, teaching
from cptjax.batches import own_part
from cptjax.drafts import Stopped
from cptjax.model import trainable
from cptjax.objectives import follows
from cptjax.order import Order
from cptjax.resume import Place
from cptjax.session import Preempted, Run
from cptjax.settings import Stage
from cptjax.stage import Classroom, Progress
from cptjax.teaching import Teacher
from cptjax.train import Places, init_state, make_steps
from cptjax.types import Params, TrainState


def learn(current: Run, which: Stage, place: Place | None) -> None:
    """Train a stage from its start, or from a place inside it, and save its end."""
    current.entering = place is None
    c, rt = which.config, current.rt
    start = start_of(current, which, place)
    room = classroom(current, which, start)
    opt = stage.optimizer(c, runtime.declare(current.config.model, rt.cfg))
    trained, frozen = current.split()
    current.params = None  # the state holds them from here on
    progress, state = begin(current, which, opt, trained, place)
    if room.teacher is not None and place and place.teacher is not None:
        room.teacher.trained = place.teacher
    penalty, extra = penalty_of(current, which, start)
    steps = make_steps(rt.cfg, stage.objective(c), opt, Places.of(state), rt.dtype, penalty)
    trained = current.opt_state = None  # the steps donate them
    label = f"stage {which.number}/{len(current.stages)} {which.name} ({c.method.name})"
    with jax.set_mesh(rt.mesh), console.progress(label, total=room.steps, done=progress.step) as bar:
        now = Training(current, which, room, frozen, bar)
        if place:
            now.examine(state, progress)
        current.sigterm.waits = True
        try:
            state = stage.teach(room, state, frozen, steps, progress, extra, now.after_step)
            ended = progress.step >= room.steps and end_stage(current, which, state, frozen, start, progress)
            if progress.step and not ended:
                now.save(state, progress, current.facts())  # if it stopped between steps; else this step is saved already
        finally:
            current.sigterm.waits = False
    if current.sigterm.agreed():
        current.checkpoints.wait()
        current.sigterm.leave(f"after step {progress.step} of stage {which.number}, saved")


def begin(current: Run, which: Stage, opt: Any, trained: Params, place: Place | None) -> tuple[Progress, TrainState]:
    """The state to train from: the place's, or a fresh one that may take over the optimiser's."""
    if place:
        return place.progress, place.state
    state = init_state(opt, trained, current.rt.mesh)
    if which.config.train.reset_optimizer or which.number == 1:
        return Progress(), state
    came, own = current.opt_state, state.opt_state
    if jax.tree.structure(came) != jax.tree.structure(own):
        raise ValueError(f"stage {which.number}: train.reset_optimizer=False needs the optimiser of the stage before; it has another")
    return Progress(), state.replace(opt_state=came)


# ---- what a stage is compared with ---------------------------------------------------------------------------------------


def start_of(current: Run, which: Stage, place: Place | None) -> Params | None:
    """A copy of the model at the stage's start where something needs it; a restored run reads it back."""
    m = which.config.method
    exact = penalties.exact(m)
    fixed = teaches(which) and not follows(m)
    if not (exact or fixed or (m.kl_coef > 0 and m.kl_reference == "stage")):
        return None
    params = current.at_stage(which.number - 1) if place else current.params
    return current.compared(params, current.config.model.param_dtype if exact else "")


def teaches(which: Stage) -> bool:
    return which.config.method.objective == "distill" or which.config.method.penalty.name == "lwf"


def classroom(current: Run, which: Stage, start: Params | None) -> Classroom:
    """The stage's examples, order and helpers."""
    c, rt = which.config, current.rt
    replayed = settings.replayed(current.stages, which)
    courses = {name: current.course(name, c) for name in (*which.tasks, *replayed)}
    sources = [current.examples(name, "train", c) for name in (*which.tasks, *replayed)]
    if c.method.objective == "distill":
        for course, source in zip(courses.values(), sources, strict=True):
            teaching.demonstrated(course, source[0])  # refuses a task without gold answers
    tutor = stage.tutor(rt, courses, c)
    if c.method.source == "rollouts":
        own_part(rt, tutor.batch // c.method.updates_per_batch, tutor.micro)  # refuses what the mesh can not cut before answers are drawn
    n = len(which.tasks)
    if c.method.filter:
        sources[:n] = filtering.kept(current, which, tutor, sources[:n])
    sizes = tuple(map(len, sources))
    fraction = c.method.replay.fraction if replayed else 0.0
    order = Order(sizes[:n], c.train.batch, tuple(c.data.weights), sizes[n:], fraction, current.config.seed, which.number)
    steps = which.steps or order.steps(which.epochs)
    compared = reference_of(current, which, start), teacher_of(current, which, courses, start)
    return Classroom(which, tutor, order, sources, steps, current.config.seed, current.workdir, *compared, current.sigterm.agreed)


def teacher_of(current: Run, which: Stage, courses: dict[str, Any], start: Params | None) -> Teacher | None:
    """The stage's start, or a copy of its own that follows the student; a place inside the stage has its own."""
    if not teaches(which):
        return None
    c, d = which.config, which.config.method.distill
    rt = current.rt.longer(teaching.beyond(current.rt.processor, c.rollout.max_new_tokens))
    if follows(which.config.method):
        return Teacher(rt, courses, d.ema if d.teacher == "ema" else 1.0, *current.split())
    return Teacher(rt, courses, 0.0, *trainable.split(start, current.chosen))


def reference_of(current: Run, which: Stage, start: Params | None) -> Params | None:
    """The model of the KL term: none, the base, the stage's start, or a checkpoint folder."""
    m = which.config.method
    if not m.kl_coef or m.kl_reference in ("base", "stage"):
        return None if not m.kl_coef else current.base() if m.kl_reference == "base" else start
    other = settings.merge(current.config, {"model": {"path": m.kl_reference, "lora": {"rank": 0}}})
    return current.compared(runtime.create(other.model, current.rt, current.config.seed))


def penalty_of(current: Run, which: Stage, start: Params | None) -> tuple[Any, Any]:
    """The penalty's function and its arrays: anchor, and Fisher information for EWC (none before the second stage)."""
    p = which.config.method.penalty
    if p.name not in ("l2", "ewc") or (p.name == "ewc" and current.fisher is None):
        return None, None
    anchor, _ = trainable.split(start, current.chosen)
    arrays = {"anchor": anchor, "coef": np.float32(p.coef)}
    return (ewc.l2, arrays) if p.name == "l2" else (ewc.ewc, arrays | {"fisher": current.fisher})


# ---- during a stage ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Training:
    """What happens between the steps of a stage: log, save, evaluate a little, stop."""

    current: Run
    which: Stage
    room: Classroom
    frozen: Params
    bar: console.Bar

    def after_step(self, state: TrainState, progress: Progress, info: dict, rows: list[dict]) -> bool:
        """False = stop now; everything is saved."""
        current, last = self.current, progress.step == self.room.steps
        self.log(progress, info, rows)
        self.bar.advance(1, **{k: info[k] for k in ("reward", "loss") if k in info})
        stop = current.sigterm.agreed()
        if not last and (current.checkpoints.due(progress.step) or stop):
            self.save(state, progress, current.facts())
        if stop:
            return last
        self.examine(state, progress)
        return True

    def log(self, progress: Progress, info: dict, rows: list[dict]) -> None:
        current, c = self.current, self.which.config
        gathered = multihost.together(multihost.gather(rows)) if rows else []
        for name in metrics.COSTS:
            if name in info:
                current.spent[name] = current.spent.get(name, 0) + info[name]
        if progress.step % c.log.every == 0 or progress.step == self.room.steps:
            if current.log:
                current.log.step(self.which.number, progress.step, info | current.spent)
            current.spent = {}
        if current.log and gathered and c.log.rollouts:
            current.log.rollouts(self.which.number, pictured(gathered, self.room, c.log.gallery, progress.step))

    def save(self, state: TrainState, progress: Progress, facts: dict[str, Any]) -> None:
        current, trees = self.current, {"state": state}
        if current.fisher is not None:
            trees["fisher"] = current.fisher
        if follows(self.which.config.method):
            trees["teacher"] = self.room.teacher.trained
        current.checkpoints.save("steps", self.which.number, progress.step, trees, facts | {"progress": dataclasses.asdict(progress)})

    def examine(self, state: TrainState, progress: Progress) -> None:
        """The small evaluation that belongs to this step. Always after the step was saved: a run that goes on from there repeats it."""
        every, current = self.which.config.eval.every, self.current
        if not every or progress.step % every or progress.step >= self.room.steps or not progress.step:
            return
        facts, was = current.facts(), current.sigterm.waits
        current.sigterm.waits = False  # it may take long: SIGTERM ends it at once
        try:
            self.bar.advance(0, **exams.inside(current, self.which, state.params, self.frozen, progress.step))
        except Preempted:
            self.save(state, progress, facts)
            current.checkpoints.wait()
            raise
        finally:
            current.sigterm.waits = was


def pictured(rows: list[dict], room: Classroom, gallery: int, step: int) -> list[dict]:
    """Rows of a step, the first `gallery` prompts of the stage's first and last steps with their picture."""
    if step not in (1, room.steps):
        return rows
    seen: dict[str, str | None] = {}
    for row in rows:
        if row["id"] not in seen and len(seen) < gallery:
            source = room.sources[list(room.tutor.courses).index(row["task"])]
            seen[row["id"]] = evaluate.thumbnail(source[row["row"]])
        if seen.get(row["id"]):
            row["image"] = seen[row["id"]]
    return rows


def end_stage(current: Run, which: Stage, state: TrainState, frozen: Params, start: Params | None, progress: Progress) -> bool:
    """Averaging, the Fisher of EWC, and the stage's own checkpoint; False where SIGTERM came before that."""
    m = which.config.method
    trained = state.params
    if m.average:
        trained = penalties.interpolate(trained, trainable.split(start, current.chosen)[0], m.average)
    current.params = trainable.join(trained, frozen)
    if m.penalty.name == "ewc":
        began = time.perf_counter()
        try:
            current.fisher, cost = ewc.updated(current, which, current.fisher)
        except Stopped:
            return False
        if current.log:
            told = {"event": "fisher", **cost.logged(), "seconds": time.perf_counter() - began}
            current.log.step(which.number, progress.step, told)
    trees: dict[str, Any] = {"params": trained}
    if resume.has_fisher(current, which.number):
        trees["fisher"] = current.fisher
    if resume.keeps_optimizer(current, which):
        trees["opt_state"] = current.opt_state = state.opt_state
    with console.waiting(f"saving stage {which.number}"):
        current.checkpoints.save("stages", which.number, progress.step, trees, current.facts())
    return True
