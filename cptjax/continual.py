"""The driver: for each stage train -> checkpoint -> evaluate every task -> record; and how a run starts again.

A run may start in four ways, looked for in this order:
    1. the newest readable checkpoint inside a stage      checkpoints/steps
    2. the newest finished stage                          checkpoints/stages; progress.json says which of its tasks were evaluated
    3. an evaluation of the base model that was cut off   progress.json
    4. afresh
Each stores how long the growing files were, and what a killed run wrote after that is cut off.
"""

import dataclasses
import signal
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from cptjax import console, drift, evaluate, filtering, metrics, multihost, ewc, penalties, prompting, report, runtime, settings, stage, summary
from cptjax import tasks as task_list
from cptjax.batching import ladder
from cptjax.checkpoint import Checkpoints, Refused
from cptjax.data import Shelf
from cptjax.model import trainable
from cptjax.order import Order
from cptjax.prompting import Course
from cptjax.runtime import Runtime
from cptjax.settings import Stage
from cptjax.stage import Classroom, Progress
from cptjax.tasks.validate import Chosen
from cptjax.tasks.validate import check as check_rows
from cptjax.teaching import Teacher
from cptjax.train import Places, make_steps
from cptjax.types import Example, Params, TrainState
from cptjax.verify import Pool

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "datasets", "grain", "ml-collections", "numpy", "cptjax")


class Preempted(SystemExit):
    """SIGTERM came; everything is saved."""

    def __init__(self) -> None:
        super().__init__(0)


def run(config: ConfigDict, workdir: str | Path) -> np.ndarray:
    """Every run that the config describes, each from where it stands; the accuracy matrix, row 0 = base model (stacked over several)."""
    workdir = Path(workdir)
    if len(config.prestage):
        config = with_base(config, workdir)
    found = settings.variants(config)
    for _, single in found:
        for each in settings.stages(single):
            stage.check(each)
    matrices = [one(single, workdir / sub) for sub, single in found]
    if len(found) > 1 and multihost.first():
        report.write([workdir], workdir / "report.html")
    return matrices[0] if len(matrices) == 1 else np.stack(matrices) if len({m.shape for m in matrices}) == 1 else matrices[0]


def with_base(config: ConfigDict, workdir: Path) -> ConfigDict:
    """The config on top of the base model that its pre-stage makes; one base per seed, made once, kept in `base/`."""
    changes = config.prestage.to_dict()
    plain = settings.merge(config, {"prestage": {}, "arms": {}, "seeds": (), "orders": ()})
    if config.seeds:
        raise ValueError("config.prestage with config.seeds: run one seed a workdir, since each seed makes its own base model")
    base = settings.merge(plain, changes, "config.prestage")
    folder = workdir / "base"
    if not (folder / "hf" / "config.json").is_file():
        one(base, folder, export=folder / "hf")
    return settings.merge(config, {"prestage": {}, "model": {"path": str(folder / "hf")}})


# ---- one run -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Run:
    """One workdir and what is alive in it."""

    config: ConfigDict
    workdir: Path
    stages: list[Stage]
    rt: Runtime
    params: Params  # of the current model, all leaves
    checkpoints: Checkpoints
    log: metrics.Log | None  # of the first process
    pool: Pool
    fisher: Params | None = None
    opt_state: Any = None  # kept over a stage's end where the optimiser is not reset
    terminated: bool = False  # SIGTERM came during training
    training: bool = False
    _cache: dict[Any, Any] = dataclasses.field(default_factory=dict)

    @property
    def chosen(self):
        return trainable.chosen(self.config.model.freeze, self.config.model.lora.rank)

    def split(self) -> tuple[Params, Params]:
        return trainable.split(self.params, self.chosen)

    def course(self, name: str, config: ConfigDict, template: str = "") -> Course:
        key = ("course", name, template or config.data.template, tuple(config.rewards.items()))
        if key not in self._cache:
            task = task_list.resolve(name, config.tasks.to_dict())
            self._cache[key] = prompting.course(task, template or config.data.template, config.rewards, self.pool)
        return self._cache[key]

    def examples(self, name: str, split: str, config: ConfigDict) -> Sequence[Example]:
        limit = config.data.limit if split == "train" else config.eval.limit
        key = ("examples", name, split, limit, config.data.root)
        if key not in self._cache:
            task = task_list.resolve(name, config.tasks.to_dict())
            found = task.load(split, root=config.data.root, limit=limit, seed=self.config.seed)
            if hasattr(found, "where"):
                found = check_rows(found, config.data.bad_rows, console.say)
            if not len(found):
                raise ValueError(f"task {name}: its {split} split has no rows")
            self._cache[key] = found
        return self._cache[key]

    def base(self) -> Params:
        """The base model, in the type of the arithmetic; loaded when first needed."""
        if "base" not in self._cache:
            self._cache["base"] = self._frozen(runtime.create(self.config.model, self.rt, self.config.seed))
        return self._cache["base"]

    def at_stage(self, number: int) -> Params:
        """The model that a stage left behind; 0 = base."""
        if number == 0:
            return self.base()
        params = runtime.create(self.config.model, self.rt, self.config.seed)
        trained, frozen = trainable.split(params, self.chosen)
        tree = self.checkpoints.restore("stages", number, self.checkpoints.stage_end(number), {"params": abstract(trained)})
        return self._frozen(trainable.join(tree["params"], frozen))

    def _frozen(self, params: Params) -> Params:
        return stage.frozen_copy(params, self.config.model.compute_dtype)

    def cached(self, key: Any, make: Any) -> Any:
        """What `make` made when it was first asked for."""
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]

    def positions(self) -> dict[str, int]:
        return self.log.positions() if self.log else {}


def abstract(tree: Any) -> Any:
    """Shapes, types and places of a tree of arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def one(config: ConfigDict, workdir: Path, export: Path | None = None) -> np.ndarray:
    """One run to its end."""
    current = open_run(config, workdir)
    before = signal.signal(signal.SIGTERM, lambda *_: terminate(current))
    try:
        place = resume(current)
        for number in range(place.stage, len(current.stages) + 1):
            if number and not place.finished(number):
                learn(current, current.stages[number - 1], place if place.stage == number else None)
            if number or config.eval.before:
                examine(current, number, place)
        current.checkpoints.wait()
        if export is not None:
            from cptjax.model import convert

            convert.save(current.params, current.rt.cfg, export, current.rt.processor, config.model.param_dtype)
        return finish(current)
    finally:
        signal.signal(signal.SIGTERM, before)
        current.checkpoints.close()
        current.pool.close()
        if current.log:
            current.log.close()


def open_run(config: ConfigDict, workdir: Path) -> Run:
    """The model, the folder and everything around them; refuses a folder that another config started."""
    workdir.mkdir(parents=True, exist_ok=True)
    refuse_change(config, workdir)
    limit = config.data.prompt_limit
    lengths = tuple(config.data.buckets) or ladder(limit)
    with console.waiting(f"loading the model ({runtime.source(config.model)})"):
        rt, params = runtime.load(config.model, config.mesh, config.seed, lengths)
    log = None
    if multihost.first():
        metrics.write_json(workdir / "config.json", settings.plain(config))
        metrics.write_json(workdir / "versions.json", versions(rt))
        log = metrics.Log(workdir, config.log.tensorboard, config.log.wandb, config.name, settings.plain(config))
    c = config.checkpoint
    saved = Checkpoints(workdir / "checkpoints", c.every, c.minutes, c.keep, c.async_save)
    pool = Pool(processes=config.rewards.processes, timeout=config.rewards.timeout)
    return Run(config, workdir, settings.stages(config), rt, params, saved, log, pool)


def refuse_change(config: ConfigDict, workdir: Path) -> None:
    path = workdir / "config.json"
    if not path.is_file() or config.allow_change:
        return
    changed = settings.difference(metrics.json.loads(path.read_text()), settings.plain(config))
    if changed:
        raise Refused(
            f"{workdir} was started with another config: {'; '.join(changed[:8])}{' ...' if len(changed) > 8 else ''}. "
            "Use another --workdir, or --config.allow_change=True to go on with the new one"
        )


def versions(rt: Runtime) -> dict[str, Any]:
    """Packages, commit and devices: what a number needs to be made again."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    asked = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    devices = [d.device_kind for d in rt.mesh.devices.flat]
    return {
        "python": sys.version.split()[0], "packages": found, "commit": asked.stdout.strip() or None,
        "devices": {kind: devices.count(kind) for kind in dict.fromkeys(devices)}, "mesh": dict(rt.mesh.shape),
        "processes": jax.process_count(), "attention": rt.cfg.attention,
    }  # fmt: skip


def terminate(current: Run) -> None:
    """SIGTERM: training saves at the end of its step; anything else is safe to leave at once."""
    if current.training:
        current.terminated = True
        return
    console.say("stopped by SIGTERM; run the same command again to go on")
    raise Preempted


# ---- starting again ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Place:
    """Where a run goes on."""

    stage: int = 0
    state: TrainState | None = None  # inside a stage
    teacher: Params | None = None
    progress: Progress | None = None
    done: tuple[str, ...] = ()  # tasks of this stage's evaluation that are recorded

    def finished(self, number: int) -> bool:
        """Whether a stage's training is over."""
        return number < self.stage or (number == self.stage and self.state is None)


def resume(current: Run) -> Place:
    """The newest place to go on from; the logs are cut to it."""
    place, told = current.checkpoints.newest(lambda *at: restored(current, *at)) or (Place(), {"positions": {}})
    marks = metrics.json.loads(p.read_text()) if (p := current.workdir / "progress.json").is_file() else {}
    positions = told["positions"]
    if place.state is None and marks.get("stage") == place.stage:
        place.done, positions = tuple(marks["done"]), marks["positions"]
    if current.log:
        current.log.rewind(positions)
    if place.stage or place.done:
        where = f"step {place.progress.step} of stage {place.stage}" if place.state is not None else f"the end of stage {place.stage}"
        console.say(f"{current.workdir}: going on from {where}")
    return place


def restored(current: Run, kind: str, number: int, step: int) -> tuple[Place, dict]:
    """What a checkpoint holds, on this run's mesh."""
    told = current.checkpoints.progress(kind, number, step)
    if number > len(current.stages):
        raise Refused(f"{current.workdir} has a checkpoint of stage {number}; the config has {len(current.stages)} stages")
    like = tree_like(current, kind, current.stages[number - 1])
    tree = current.checkpoints.restore(kind, number, step, like)
    trained, frozen = current.split()
    current.fisher = tree.get("fisher")
    if kind == "stages":
        current.params = trainable.join(tree["params"], frozen)
        return Place(number), told
    current.params = trainable.join(trained, frozen)
    return Place(number, tree["state"], tree.get("teacher"), Progress(**told["progress"])), told


def tree_like(current: Run, kind: str, which: Stage) -> dict[str, Any]:
    """The shape of a checkpoint's tree, known from the config alone."""
    trained, _ = current.split()
    like: dict[str, Any] = {}
    earlier = current.stages[: which.number - (kind == "steps")]
    if any(s.config.method.penalty.name == "ewc" for s in earlier):
        like["fisher"] = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, np.float32, sharding=x.sharding), trained)
    if kind == "stages":
        return like | {"params": abstract(trained)}
    if teaches(which) and which.config.method.objective == "distill":
        like["teacher"] = abstract(trained)
    opt = stage.optimizer(which.config, runtime.declare(current.config.model, current.rt.cfg))
    return like | {"state": abstract(stage.start_state(current.rt, opt, trained))}


# ---- a stage's training --------------------------------------------------------------------------------------------------


def teaches(which: Stage) -> bool:
    return which.config.method.objective == "distill" or which.config.method.penalty.name == "lwf"


def learn(current: Run, which: Stage, place: Place | None) -> None:
    """Train a stage from its start, or from a place inside it, and save its end."""
    c, rt = which.config, current.rt
    trained, frozen = current.split()
    start = None  # the model at the stage's start: a restored run reads it back
    if needs_start(which):
        start = current.at_stage(which.number - 1) if place else current._frozen(current.params)
    room = classroom(current, which, start, frozen)
    opt = stage.optimizer(c, runtime.declare(current.config.model, rt.cfg))
    progress = place.progress if place else Progress()
    state = place.state if place else stage.start_state(rt, opt, trained)
    if current.opt_state is not None and not place and not c.train.reset_optimizer:
        state = state.replace(opt_state=current.opt_state)
    if room.teacher is not None and place and place.teacher is not None:
        room.teacher.trained = place.teacher
    penalty, extra = penalty_of(current, which, start)
    steps = make_steps(rt.cfg, stage.objective(c), opt, Places.of(state), rt.dtype, penalty)
    label = f"stage {which.number}/{len(current.stages)} {which.name} ({c.method.name})"
    current.training = True
    try:
        with jax.set_mesh(rt.mesh), console.progress(label, total=room.steps, done=progress.step) as bar:

            def on_step(state: TrainState, progress: Progress, info: dict, rows: list[dict]) -> bool:
                return after_step(current, which, room, state, frozen, progress, info, rows, bar)

            state = stage.teach(room, state, frozen, steps, progress, extra, on_step)
    finally:
        current.training = False
    if progress.step < room.steps:
        console.say(f"stopped by SIGTERM after step {progress.step} of stage {which.number}, saved; run the same command again to go on")
        raise Preempted
    end_stage(current, which, state, frozen, start, progress)


def needs_start(which: Stage) -> bool:
    m = which.config.method
    kl = m.kl_coef > 0 and m.kl_reference == "stage"
    return bool(kl or m.average or teaches(which) or m.penalty.name in ("l2", "ewc"))


def classroom(current: Run, which: Stage, start: Params | None, frozen: Params) -> Classroom:
    """The stage's examples, order and helpers."""
    c, rt = which.config, current.rt
    earlier = [t for s in current.stages[: which.number - 1] for t in s.tasks]
    replayed = list(dict.fromkeys(t for t in earlier if t not in which.tasks)) if c.method.replay.fraction else []
    courses = {name: current.course(name, c) for name in (*which.tasks, *replayed)}
    sources = [current.examples(name, "train", c) for name in (*which.tasks, *replayed)]
    tutor = stage.tutor(rt, courses, c)
    if c.method.filter:
        own = sources[: len(which.tasks)]
        sources[: len(which.tasks)] = filtering.kept(current, which, tutor, own)
    sizes = tuple(map(len, sources))
    n = len(which.tasks)
    order = Order(
        sizes[:n], c.train.batch, tuple(c.data.weights), sizes[n:], c.method.replay.fraction if replayed else 0.0, current.config.seed,
        which.number,
    )  # fmt: skip
    steps = which.steps or order.steps(which.epochs)
    teacher = None
    if teaches(which):
        d = c.method.distill
        kind, rate = (d.teacher, d.ema) if c.method.objective == "distill" else ("frozen", 1.0)
        teacher = Teacher(rt, courses, kind, rate, trainable.split(start, current.chosen)[0], frozen)
    reference = reference_of(current, which, start)
    return Classroom(which, tutor, order, sources, steps, current.config.seed, current.workdir, reference, teacher)


def reference_of(current: Run, which: Stage, start: Params | None) -> Params | None:
    """The model of the KL term: none, the base, the stage's start, or a checkpoint folder."""
    m = which.config.method
    if not m.kl_coef or m.kl_reference in ("base", "stage"):
        return None if not m.kl_coef else current.base() if m.kl_reference == "base" else start
    other = settings.merge(current.config, {"model": {"path": m.kl_reference, "lora": {"rank": 0}}})
    return current._frozen(runtime.create(other.model, current.rt, current.config.seed))


def penalty_of(current: Run, which: Stage, start: Params | None) -> tuple[Any, Any]:
    """The penalty's function and its arrays: anchor, and Fisher information for EWC (none before the second stage)."""
    p = which.config.method.penalty
    if p.name not in ("l2", "ewc") or (p.name == "ewc" and current.fisher is None):
        return None, None
    anchor, _ = trainable.split(start, current.chosen)
    arrays = {"anchor": anchor, "coef": np.float32(p.coef)}
    return (ewc.l2, arrays) if p.name == "l2" else (ewc.ewc, arrays | {"fisher": current.fisher})


def after_step(
    current: Run, which: Stage, room: Classroom, state: TrainState, frozen: Params, progress: Progress, info: dict, rows: list[dict],
    bar: console.Bar,
) -> bool:  # fmt: skip
    """Log, evaluate inside the stage, save; False = stop now."""
    c = which.config
    gathered = multihost.together(multihost.gather(rows)) if rows else []
    if current.log:
        if progress.step % c.log.every == 0 or progress.step == room.steps:
            current.log.step(which.number, progress.step, info)
        if gathered and c.log.rollouts:
            current.log.rollouts(which.number, pictured(gathered, room, c.log.gallery, progress.step))
    shown = {k: info[k] for k in ("reward", "loss") if k in info}
    bar.advance(1, **shown)
    if c.eval.every and progress.step % c.eval.every == 0 and progress.step < room.steps:
        current.params = trainable.join(state.params, frozen)
        for name in eval_tasks(current)[0]:
            small_exam(current, which, name, progress.step)
    stop = any(multihost.gather(current.terminated))
    last = progress.step == room.steps
    if stop or (current.checkpoints.due(progress.step) and not last) or (last and not c.train.reset_optimizer):
        save_step(current, which, room, state, progress)
        if stop:
            current.checkpoints.wait()
    return not stop or last


def save_step(current: Run, which: Stage, room: Classroom, state: TrainState, progress: Progress) -> None:
    tree: dict[str, Any] = {"state": state}
    if current.fisher is not None:
        tree["fisher"] = current.fisher
    if room.teacher is not None and which.config.method.objective == "distill":
        tree["teacher"] = room.teacher.trained
    current.checkpoints.save("steps", which.number, progress.step, tree, facts(current) | {"progress": dataclasses.asdict(progress)})


def facts(current: Run) -> dict[str, Any]:
    """What every checkpoint says of itself: a score means nothing without its pixel limits and template."""
    rt, c = current.rt, current.config
    return {
        "positions": current.positions(), "config": settings.fingerprint(c), "pixels": runtime.pixels(rt),
        "template": c.data.template, "model": runtime.source(c.model),
    }  # fmt: skip


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


def end_stage(current: Run, which: Stage, state: TrainState, frozen: Params, start: Params | None, progress: Progress) -> None:
    """Averaging, the Fisher of EWC, and the stage's own checkpoint."""
    m = which.config.method
    trained = state.params
    if m.average:
        trained = penalties.interpolate(trained, trainable.split(start, current.chosen)[0], m.average)
    current.params = trainable.join(trained, frozen)
    if m.penalty.name == "ewc":
        current.fisher = ewc.updated(current, which, current.fisher)
    current.opt_state = None if which.config.train.reset_optimizer else state.opt_state
    tree: dict[str, Any] = {"params": trained}
    if current.fisher is not None:
        tree["fisher"] = current.fisher
    with console.waiting(f"saving stage {which.number}"):
        current.checkpoints.save("stages", which.number, progress.step, tree, facts(current))


# ---- evaluation ----------------------------------------------------------------------------------------------------------


def eval_tasks(current: Run) -> tuple[list[str], list[str]]:
    """(tasks of the stages, general tasks), each once."""
    c = current.config.eval
    own = [t for s in current.stages for t in s.tasks] if c.tasks == "all" else list(c.tasks)
    own = list(dict.fromkeys(own))
    return own, [t for t in dict.fromkeys(c.general) if t not in own]


def decoding(config: ConfigDict) -> runtime.Sampling:
    e = config.eval
    return runtime.Sampling(1, e.temperature, max_new_tokens=e.max_new_tokens, check_every=config.rollout.check_every)


def examine(current: Run, number: int, place: Place) -> None:
    """Evaluate all tasks after a stage and record its row; tasks recorded before a kill are left out."""
    c = current.config
    done = list(place.done) if place.stage == number else []
    own, general = eval_tasks(current)
    step = current.checkpoints.stage_end(number) if number else 0
    name = current.stages[number - 1].name if number else "base"
    for task in [t for t in (*own, *general) if t not in done]:
        templates = c.eval.templates or ("",)
        for i, template in enumerate(templates):
            exam = take(current, number, task, template, c.eval.limit, forced=c.eval.forced_prefix)
            if current.log:
                current.log.evals(evaluate.rows(exam, common(current, number, name, step)))
                if i == 0:
                    current.log.predictions(number, evaluate.predictions(exam, step))
        if c.eval.drift:
            told = drift.rows(current, number, task, common(current, number, name, step))
            if current.log:
                current.log.evals(told)
        done.append(task)
        if current.log:
            mark = {"stage": number, "done": done, "positions": current.positions()}
            metrics.write_json(current.workdir / "progress.json", mark)
    if current.log:
        summary.write(current.workdir)
        report.write([current.workdir])


def take(current: Run, number: int, task: str, template: str, limit: int | None, forced: bool, title: str = "") -> evaluate.Exam:
    c = current.config
    examples = current.examples(task, "test", c)
    examples = examples if limit is None else Chosen(examples, range(min(limit, len(examples))))
    key = jax.random.fold_in(jax.random.key(c.seed), 10_000 + number)
    title = title or f"evaluate {task} after {'stage ' + str(number) if number else 'nothing (base)'}"
    shelf = current._cache.setdefault(("shelf", task, template), Shelf(len(examples)))
    return evaluate.take(
        current.rt, current.params, current.course(task, c, template), examples, sampling=decoding(c), batch=c.eval.batch, key=key,
        forced=forced, title=title, shelf=shelf,
    )  # fmt: skip


def small_exam(current: Run, which: Stage, task: str, step: int) -> None:
    exam = take(current, which.number, task, "", current.config.eval.mini, False, f"evaluate {task} at step {step}")
    if current.log:
        current.log.evals(evaluate.rows(exam, common(current, which.number, which.name, step), mini=True))


def common(current: Run, number: int, name: str, step: int) -> dict[str, Any]:
    e = current.config.eval
    said = f"{'greedy' if e.temperature == 0 else f'T={e.temperature}'}, {e.max_new_tokens} tokens"
    return {"stage": number, "stage_name": name, "step": step, "pixels": runtime.pixels(current.rt), "decoding": said}


def finish(current: Run) -> np.ndarray:
    """Summary, report and the matrix."""
    if current.log:
        summary.write(current.workdir)
        path = report.write([current.workdir])
        console.say(f"done: {path}")
    multihost.gather(True)
    return summary.load(current.workdir)[1].array()
