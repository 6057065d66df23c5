"""Where a run goes on. Looked for in this order:

    1. the newest readable checkpoint: inside a stage (`steps`) or at its end (`stages`)
    2. progress.json, which says how much of the evaluation after the last finished stage, or of the base model, is recorded
    3. afresh

Each says how long the growing files were; what a killed run wrote after that is cut off. progress.json is deleted before the files
are cut below what it knows, so it can never speak of lines that are gone.
"""

import dataclasses
import json
from typing import Any

import jax
import numpy as np

from cptjax.common import console, distributed, files
from cptjax.config import Stage, config_fingerprint
from cptjax.continual.checkpoint import RunRefused, abstract_tree
from cptjax.continual.open_run import Run
from cptjax.models import load, trainable
from cptjax.training import build
from cptjax.training.algorithms import distillation
from cptjax.training.stage_context import StageProgress
from cptjax.training.train_step import abstract_state
from cptjax.types import Params, TrainState


@dataclasses.dataclass
class ResumePoint:
    """Where a run goes on."""

    stage: int = 0
    state: TrainState | None = None  # inside a stage
    teacher: Params | None = None
    progress: StageProgress | None = None
    done: tuple[str, ...] = ()  # tasks of this stage's evaluation that are recorded

    def finished(self, number: int) -> bool:
        """Whether a stage's training is over."""
        return number < self.stage or (number == self.stage and self.state is None)


def resume_run(run: Run) -> ResumePoint:
    """The newest place to go on from; the logs are cut to it."""
    place, metrics = run.checkpoints.newest(lambda *at: restore_checkpoint(run, *at)) or (
        ResumePoint(),
        {"positions": {}, "spent": {}},
    )
    marks = read_eval_progress(run)
    positions = metrics["positions"]
    run.spent = dict(metrics["spent"])
    if place.state is None and marks and marks["stage"] == place.stage:
        place.done, positions = tuple(marks["done"]), marks["positions"]
    elif marks and marks["stage"] >= place.stage and distributed.is_main_process():
        eval_progress_file(run).unlink()
    distributed.gather_objects(True)
    if run.log:
        run.log.rewind(positions)
    if place.stage or place.done:
        where = (
            f"step {place.progress.step} of stage {place.stage}"
            if place.state is not None
            else f"the end of stage {place.stage}"
        )
        console.print_message(
            f"{run.workdir}: going on from {where if place.stage else 'the evaluation of the base model'}"
        )
    return place


def eval_progress_file(run: Run):
    return run.workdir / "progress.json"


def read_eval_progress(run: Run) -> dict[str, Any]:
    """How far the newest evaluation had come; {} = nothing is known."""
    path = eval_progress_file(run)
    return json.loads(path.read_text()) if path.is_file() else {}


def write_eval_progress(run: Run, number: int, done: list[str]) -> None:
    """Say that these tasks are recorded for a stage, whose checkpoint must be whole by then."""
    if len(done) == 1:
        run.checkpoints.wait()
    if run.log:
        files.write_json(
            eval_progress_file(run),
            {"stage": number, "done": done, "positions": run.positions()},
        )


def restore_checkpoint(run: Run, kind: str, number: int, step: int) -> tuple[ResumePoint, dict]:
    """What a checkpoint holds, on this run's mesh."""
    metrics = run.checkpoints.progress(kind, number, step)
    if number > len(run.stages):
        raise RunRefused(
            f"{run.workdir} has a checkpoint of stage {number}; the config has {len(run.stages)} stages"
        )
    if metrics["config"] != config_fingerprint(run.config) and not run.config.allow_change:
        raise RunRefused(
            f"{run.workdir}: the checkpoint of stage {number}, step {step} was saved under another config. "
            "Use another --workdir, or --config.allow_change=True to go on with the new one"
        )
    which = run.stages[number - 1]
    trees = run.checkpoints.restore(kind, number, step, checkpoint_structure(run, kind, which))
    trained, frozen = run.split()
    run.fisher, run.opt_state = trees.get("fisher"), trees.get("opt_state")
    if kind == "stages":
        run.params = trainable.join_params(trees["params"], frozen)
        return ResumePoint(number), metrics
    return ResumePoint(
        number, trees["state"], trees.get("teacher"), StageProgress(**metrics["progress"])
    ), metrics


def checkpoint_structure(run: Run, kind: str, which: Stage) -> dict[str, Any]:
    """The shape of a checkpoint's trees, known from the config alone."""
    trained, _ = run.split()
    out: dict[str, Any] = {}
    if has_fisher(run, which.number - (kind == "steps")):
        out["fisher"] = abstract_float32(trained)
    opt = build.optimizer_from_config(
        which.config, load.declare_model_params(run.config.model, run.model_ctx.cfg)
    )
    if kind == "stages":
        if keeps_optimizer(run, which):
            out["opt_state"] = abstract_state(opt, trained, run.model_ctx.mesh).opt_state
        return out | {"params": abstract_tree(trained)}
    if distillation.has_ema_teacher(which.config.method):
        out["teacher"] = abstract_float32(trained)
    return out | {"state": abstract_state(opt, trained, run.model_ctx.mesh)}


def abstract_float32(tree: Params) -> Params:
    """Shapes and places of a tree that is kept in float32 beside this one."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, np.float32, sharding=x.sharding), tree
    )


def has_fisher(run: Run, number: int) -> bool:
    """Whether Fisher information of EWC is there after a stage."""
    return any(s.config.method.penalty.name == "ewc" for s in run.stages[:number])


def keeps_optimizer(run: Run, which: Stage) -> bool:
    """Whether the next stage goes on with this one's optimiser state."""
    return (
        which.number < len(run.stages) and not run.stages[which.number].config.train.reset_optimizer
    )
