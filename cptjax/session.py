"""A run while it is alive: its workdir, its model, and what is remembered between its stages and evaluations."""

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from cptjax import console, metrics, multihost, prompting, runtime, settings, stage, survey, trackers, workdir
from cptjax import tasks as task_list
from cptjax.batching import ladder
from cptjax.checkpoint import Checkpoints
from cptjax.model import trainable
from cptjax.prompting import Course
from cptjax.runtime import Runtime
from cptjax.settings import Stage
from cptjax.tasks import BadRow
from cptjax.tasks.task import Examples
from cptjax.tasks.validate import without
from cptjax.types import Example, Params
from cptjax.verify import Pool

WORKER_MEMORY = 16 << 30  # bytes of address space, which a user's large libraries take much of: an end for runaway algebra


class Preempted(SystemExit):
    """SIGTERM came; everything is saved."""

    def __init__(self) -> None:
        super().__init__(0)


@dataclasses.dataclass
class Sigterm:
    """Whether SIGTERM came, and whether it must wait: a training step ends and saves first."""

    came: bool = False
    waits: bool = False

    def __call__(self, *_: object) -> None:
        self.came = True
        if not self.waits:
            self.leave("outside of training")

    def agreed(self) -> bool:
        """Whether it came to any process; all ask at the same place."""
        return any(multihost.gather(self.came))

    def leave(self, where: str) -> None:
        console.say(f"stopped by SIGTERM {where}; run the same command again to go on")
        raise Preempted


@dataclasses.dataclass
class Run:
    """One workdir and what is alive in it."""

    config: ConfigDict
    workdir: Path
    stages: list[Stage]
    rt: Runtime
    params: Params | None  # of the current model, all leaves; None while a stage trains, whose state holds them
    checkpoints: Checkpoints | None  # None where a run is only looked at that has none
    log: metrics.Log | None  # of the first process
    pool: Pool
    sigterm: Sigterm
    fisher: Params | None = None
    opt_state: Any = None  # kept over a stage's end where the next stage goes on with it
    spent: dict[str, float] = dataclasses.field(default_factory=dict)  # since the last line of metrics.jsonl
    entering: bool = False  # a stage is being begun, not gone on with
    _cache: dict[Any, Any] = dataclasses.field(default_factory=dict)

    @property
    def chosen(self):
        return trainable.chosen(self.config.model.freeze, self.config.model.lora.rank)

    def split(self) -> tuple[Params, Params]:
        return trainable.split(self.params, self.chosen)

    def cached(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` made when it was first asked for."""
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]

    def course(self, name: str, config: ConfigDict, template: str = "") -> Course:
        """A task under a stage's, or the evaluation's, template and reward weights."""
        template = template or config.data.template
        make = lambda: prompting.course(task_list.resolve(name, config.tasks.to_dict()), template, config.rewards, self.pool)
        return self.cached(("course", name, template, tuple(config.rewards.items())), make)

    def examples(self, name: str, split: str, config: ConfigDict, template: str = "") -> Sequence[Example]:
        """A task's rows, the bad ones told and left out as far as the config allows: those that launch/check.py finds."""
        reading = survey.reading(config, name, split, template)
        return self.cached(reading, lambda: self._load(reading, self.course(name, config, template)))

    def _load(self, reading: survey.Reading, course: Course) -> Sequence[Example]:
        found = survey.load(self.config, reading)
        if not len(found) and not getattr(found, "bad", ()):
            raise ValueError(f"task {reading.task}: its {reading.split} split has no rows")
        look = lambda: survey.bad_rows(found, course, self.rt.processor, reading, max(self.rt.ladder))
        # A user's files may change between two starts; public ones do not, and reading them all takes long.
        bad = self._once(reading, look) if isinstance(found, Examples) else look()
        return without(found, bad, reading.allowed, console.say)

    def _once(self, reading: survey.Reading, look: Callable[[], list[BadRow]]) -> list[BadRow]:
        """The bad rows that an earlier start of this run has found, or those found now."""
        key = repr(survey.key(self.config, dataclasses.replace(reading, allowed=0)))
        path = self.workdir / "rows" / f"{reading.task}_{reading.split}_{hashlib.sha256(key.encode()).hexdigest()[:8]}.json"
        if multihost.gather(path.is_file())[0]:
            return [BadRow(*row) for row in metrics.json.loads(path.read_text())]
        bad = look()
        if self.log:
            metrics.write_json(path, [dataclasses.astuple(row) for row in bad])
        return bad

    def base(self) -> Params:
        """The base model, in the type of the arithmetic; loaded when first needed."""
        return self.cached("base", lambda: self.compared(runtime.create(self.config.model, self.rt, self.config.seed)))

    def at_stage(self, number: int) -> Params:
        """The model that a stage left behind, as the run itself holds it; 0 = base."""
        params = runtime.create(self.config.model, self.rt, self.config.seed)
        if number == 0:
            return params
        if not self.checkpoints:
            raise ValueError(f"{self.workdir} has no checkpoints, so no stage {number}; expected the --workdir of launch/train.py")
        trained, frozen = trainable.split(params, self.chosen)
        like = {"params": abstract(trained)}
        return trainable.join(self.checkpoints.restore("stages", number, self.checkpoints.stage_end(number), like)["params"], frozen)

    def compared(self, params: Params, dtype: str = "") -> Params:
        """A copy to compare with; it outlives the state that it was made from."""
        return stage.frozen_copy(params, dtype or self.config.model.compute_dtype)

    def positions(self) -> dict[str, int]:
        return self.log.positions() if self.log else {}

    def facts(self) -> dict[str, Any]:
        """What every checkpoint says of itself: a score means nothing without its pixel limits and template."""
        c = self.config
        about = {"pixels": runtime.pixels(self.rt), "template": c.data.template, "model": runtime.source(c.model)}
        return {"positions": self.positions(), "spent": dict(self.spent), "config": settings.fingerprint(c), **about}

    def close(self) -> None:
        try:
            if self.checkpoints:
                self.checkpoints.close()
        finally:
            self.pool.close()
            if self.log:
                self.log.close()


def abstract(tree: Any) -> Any:
    """Shapes, types and places of a tree of arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def open_run(config: ConfigDict, folder: Path, sigterm: Sigterm | None = None) -> Run:
    """The model, the folder and everything around them; refuses a folder that another config started."""
    folder.mkdir(parents=True, exist_ok=True)
    workdir.refuse_change(config, folder)
    rt, params = _model(config)
    log = None
    if multihost.first():
        log = metrics.Log(folder, trackers.asked(folder, settings.plain(config)))
    c = config.checkpoint
    saved = Checkpoints(folder / "checkpoints", c.every, c.minutes, c.keep, c.async_save, tidy=True)
    return Run(config, folder, settings.stages(config), rt, params, saved, log, _workers(config), sigterm or Sigterm())


def sign(current: Run) -> None:
    """Say what the run is; only once nothing can refuse the workdir any more."""
    if current.log:
        metrics.write_json(current.workdir / "config.json", settings.recorded(current.config, current.workdir))
        metrics.write_json(current.workdir / "versions.json", workdir.versions(current.rt))


@contextlib.contextmanager
def visit(config: ConfigDict, folder: Path) -> Iterator[Run]:
    """A run to look at: nothing of it is written, and it may be running elsewhere."""
    rt, params = _model(config)
    saved = Checkpoints(folder / "checkpoints", async_save=False) if (folder / "checkpoints").is_dir() else None
    run = Run(config, folder, settings.stages(config), rt, params, saved, None, _workers(config), Sigterm())
    with contextlib.closing(run):
        yield run


def _model(config: ConfigDict) -> tuple[Runtime, Params]:
    lengths = tuple(config.data.buckets) or ladder(config.data.prompt_limit)
    with console.waiting(f"loading the model ({runtime.source(config.model)})"):
        return runtime.load(config.model, config.mesh, config.seed, lengths)


def _workers(config: ConfigDict) -> Pool:
    return Pool(processes=config.rewards.processes, timeout=config.rewards.timeout, memory=WORKER_MEMORY)
