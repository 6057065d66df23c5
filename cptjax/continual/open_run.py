"""A run while it is alive: its workdir, its model, and what is remembered between its stages and evaluations."""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from cptjax.common import console, distributed, files, run_log, trackers
from cptjax.common.signals import SigtermHandler
from cptjax.config import Stage, config_fingerprint, config_to_dict, recorded_config, resolve_stages
from cptjax.continual import workdir
from cptjax.continual.checkpoint import Checkpoints, abstract_tree
from cptjax.data import model_context, row_checks
from cptjax.data.collate import length_buckets
from cptjax.data.model_context import ModelContext
from cptjax.models import load, trainable
from cptjax.tasks import prompted_task, registry
from cptjax.tasks.bad_rows import BadRow, drop_bad_rows
from cptjax.tasks.prompted_task import PromptedTask
from cptjax.tasks.scoring.sandbox import SandboxPool
from cptjax.tasks.task import Examples
from cptjax.types import Example, Params

SANDBOX_MEMORY = (
    16 << 30
)  # bytes of address space, which a user's large libraries take much of: an end for runaway algebra


@dataclasses.dataclass
class Run:
    """One workdir and what is alive in it."""

    config: ConfigDict
    workdir: Path
    stages: list[Stage]
    model_ctx: ModelContext
    params: (
        Params | None
    )  # of the current model, all leaves; None while a stage trains, whose state holds them
    checkpoints: Checkpoints | None  # None where a run is only looked at that has none
    log: run_log.RunLog | None  # of the first process
    pool: SandboxPool
    sigterm: SigtermHandler
    fisher: Params | None = None
    opt_state: Any = None  # kept over a stage's end where the next stage goes on with it
    spent: dict[str, float] = dataclasses.field(
        default_factory=dict
    )  # since the last line of metrics.jsonl
    entering: bool = False  # a stage is being begun, not gone on with
    _cache: dict[Any, Any] = dataclasses.field(default_factory=dict)

    @property
    def chosen(self):
        return trainable.is_trained(self.config.model.freeze, self.config.model.lora.rank)

    def split(self) -> tuple[Params, Params]:
        return trainable.split_params(self.params, self.chosen)

    def cached(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` made when it was first asked for."""
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]

    def prompted(self, name: str, config: ConfigDict, template: str = "") -> PromptedTask:
        """A task under a stage's, or the evaluation's, template and reward weights."""
        template = template or config.data.template
        make = lambda: prompted_task.make_prompted_task(
            registry.resolve_task(name, config.tasks.to_dict()), template, config.rewards, self.pool
        )
        return self.cached(("course", name, template, tuple(config.rewards.items())), make)

    def examples(
        self, name: str, split: str, config: ConfigDict, template: str = ""
    ) -> Sequence[Example]:
        """A task's rows, the bad ones told and left out as far as the config allows: those that launch/check.py finds."""
        reading = row_checks.split_spec(config, name, split, template)
        return self.cached(
            reading, lambda: self._load(reading, self.prompted(name, config, template))
        )

    def _load(self, reading: row_checks.SplitSpec, prompted: PromptedTask) -> Sequence[Example]:
        found = row_checks.load_examples(self.config, reading)
        if not len(found) and not getattr(found, "bad", ()):
            raise ValueError(f"task {reading.task}: its {reading.split} split has no rows")
        look = lambda: row_checks.find_bad_rows(
            found, prompted, self.model_ctx.processor, reading, max(self.model_ctx.buckets)
        )
        # A user's files may change between two starts; public ones do not, and reading them all takes long.
        bad = self._once(reading, look) if isinstance(found, Examples) else look()
        return drop_bad_rows(found, bad, reading.allowed, console.print_message)

    def _once(
        self, reading: row_checks.SplitSpec, look: Callable[[], list[BadRow]]
    ) -> list[BadRow]:
        """The bad rows that an earlier start of this run has found, or those found now."""
        key = repr(row_checks.split_key(self.config, dataclasses.replace(reading, allowed=0)))
        path = (
            self.workdir
            / "rows"
            / f"{reading.task}_{reading.split}_{hashlib.sha256(key.encode()).hexdigest()[:8]}.json"
        )
        if distributed.gather_objects(path.is_file())[0]:
            return [BadRow(*row) for row in json.loads(path.read_text())]
        bad = look()
        if self.log:
            files.write_json(path, [dataclasses.astuple(row) for row in bad])
        return bad

    def _create_params(self) -> Params:
        ctx = self.model_ctx
        return load.create_params(self.config.model, ctx.cfg, ctx.mesh, ctx.dtype, self.config.seed)

    def base(self) -> Params:
        """The base model, in the type of the arithmetic; loaded when first needed."""
        return self.cached(
            "base",
            lambda: self.compared(self._create_params()),
        )

    def at_stage(self, number: int) -> Params:
        """The model that a stage left behind, as the run itself holds it; 0 = base."""
        params = self._create_params()
        if number == 0:
            return params
        if not self.checkpoints:
            raise ValueError(
                f"{self.workdir} has no checkpoints, so no stage {number}; expected the --workdir of launch/train.py"
            )
        trained, frozen = trainable.split_params(params, self.chosen)
        like = {"params": abstract_tree(trained)}
        return trainable.join_params(
            self.checkpoints.restore("stages", number, self.checkpoints.stage_end(number), like)[
                "params"
            ],
            frozen,
        )

    def compared(self, params: Params, dtype: str = "") -> Params:
        """A copy to compare with; it outlives the state that it was made from."""
        return load.copy_params(params, dtype or self.config.model.compute_dtype)

    def positions(self) -> dict[str, int]:
        return self.log.positions() if self.log else {}

    def facts(self) -> dict[str, Any]:
        """What every checkpoint says of itself: a score means nothing without its pixel limits and template."""
        c = self.config
        about = {
            "pixels": model_context.describe_pixel_limits(self.model_ctx),
            "template": c.data.template,
            "model": load.describe_model_source(c.model),
        }
        return {
            "positions": self.positions(),
            "spent": dict(self.spent),
            "config": config_fingerprint(c),
            **about,
        }

    def close(self) -> None:
        try:
            if self.checkpoints:
                self.checkpoints.close()
        finally:
            self.pool.close()
            if self.log:
                self.log.close()


def open_run(config: ConfigDict, folder: Path, sigterm: SigtermHandler | None = None) -> Run:
    """The model, the folder and everything around them; refuses a folder that another config started."""
    folder.mkdir(parents=True, exist_ok=True)
    workdir.refuse_changed_config(config, folder)
    model_ctx, params = _load_model(config)
    log = None
    if distributed.is_main_process():
        log = run_log.RunLog(folder, trackers.open_trackers(folder, config_to_dict(config)))
    c = config.checkpoint
    saved = Checkpoints(folder / "checkpoints", c.every, c.minutes, c.keep, c.async_save, tidy=True)
    return Run(
        config,
        folder,
        resolve_stages(config),
        model_ctx,
        params,
        saved,
        log,
        _open_sandbox(config),
        sigterm or SigtermHandler(),
    )


def write_run_files(current: Run) -> None:
    """Say what the run is; only once nothing can refuse the workdir any more."""
    if current.log:
        files.write_json(
            current.workdir / "config.json", recorded_config(current.config, current.workdir)
        )
        files.write_json(
            current.workdir / "versions.json", workdir.software_versions(current.model_ctx)
        )


@contextlib.contextmanager
def open_run_readonly(config: ConfigDict, folder: Path) -> Iterator[Run]:
    """A run to look at: nothing of it is written, and it may be running elsewhere."""
    model_ctx, params = _load_model(config)
    saved = (
        Checkpoints(folder / "checkpoints", async_save=False)
        if (folder / "checkpoints").is_dir()
        else None
    )
    run = Run(
        config,
        folder,
        resolve_stages(config),
        model_ctx,
        params,
        saved,
        None,
        _open_sandbox(config),
        SigtermHandler(),
    )
    with contextlib.closing(run):
        yield run


def _load_model(config: ConfigDict) -> tuple[ModelContext, Params]:
    lengths = tuple(config.data.buckets) or length_buckets(config.data.prompt_limit)
    with console.show_waiting(f"loading the model ({load.describe_model_source(config.model)})"):
        return model_context.load_model(config.model, config.mesh, config.seed, lengths)


def _open_sandbox(config: ConfigDict) -> SandboxPool:
    return SandboxPool(
        processes=config.rewards.processes, timeout=config.rewards.timeout, memory=SANDBOX_MEMORY
    )
