"""Find and restore the state from which a stopped or killed run continues.

The state is the newest of these that can be read:

    1. a checkpoint: inside a stage (kind `steps`) or at the end of a stage (kind `stages`)
    2. nothing: the base model, before the first stage

After the end of a stage, or with the base model, progress.json says which tasks of the following
evaluation are already recorded.

Checkpoints and progress.json both record the lengths of the append-only files; lines that a killed
run wrote after that are cut off. progress.json is deleted before the files are cut below the
lengths that it records, so it never describes missing lines.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cptjax.common import console, distributed, files
from cptjax.config import Stage, config_fingerprint
from cptjax.continual.checkpoint import RunRefused, abstract_tree
from cptjax.continual.model_state import ModelState, restore_stage_params, split_trained
from cptjax.continual.open_run import Run
from cptjax.data import model_context
from cptjax.models import load, trainable
from cptjax.training import build
from cptjax.training.method_needs import method_needs
from cptjax.training.stage_context import StageProgress
from cptjax.training.train_step import abstract_state
from cptjax.types import Params, TrainState


@dataclasses.dataclass(frozen=True)
class UnfinishedStage:
    """The state inside a stage, as stored in a checkpoint of kind `steps`."""

    state: TrainState
    progress: StageProgress
    teacher: Params | None  # trained leaves of a teacher that follows the student


@dataclasses.dataclass(frozen=True)
class ResumePoint:
    """Where a run continues."""

    stage: int = 0  # the newest stage that has a checkpoint; 0 = none
    unfinished: UnfinishedStage | None = None  # None = the stage is trained to its end
    evaluated: tuple[str, ...] = ()  # tasks whose evaluation after the stage is recorded

    def is_trained(self, number: int) -> bool:
        """Return whether a stage is trained to its end."""
        return number < self.stage or (number == self.stage and self.unfinished is None)

    def __str__(self) -> str:
        if self.unfinished is not None:
            return f"step {self.unfinished.progress.step} of stage {self.stage}"
        return (
            f"the end of stage {self.stage}" if self.stage else "the evaluation of the base model"
        )


def resume_run(run: Run) -> tuple[ResumePoint, ModelState]:
    """Restore the newest state of a run and cut its append-only files back to it."""
    with console.show_waiting("loading the weights"):
        base = restore_stage_params(run.config, run.model_ctx, None, 0)
    point, model_state, record = run.files.checkpoints.newest(
        lambda kind, stage, step: restore_checkpoint(run, base, kind, stage, step)
    ) or (ResumePoint(), ModelState(base), {"positions": {}, "spent": {}})
    run.files.unlogged_cost = dict(record["spent"])
    positions, evaluation = record["positions"], read_eval_progress(run)
    if evaluation and point.unfinished is None and evaluation["stage"] == point.stage:
        point = dataclasses.replace(point, evaluated=tuple(evaluation["done"]))
        positions = evaluation["positions"]
    elif evaluation and evaluation["stage"] >= point.stage and distributed.is_main_process():
        eval_progress_file(run).unlink()
    distributed.gather_objects(True)  # progress.json is deleted before any file is cut
    if run.files.log:
        run.files.log.rewind(positions)
    if point.stage or point.evaluated:
        console.print_message(f"{run.files.workdir}: continuing from {point}")
    return point, model_state


# ---- progress of an evaluation -------------------------------------------------------------------


def eval_progress_file(run: Run) -> Path:
    return run.files.workdir / "progress.json"


def read_eval_progress(run: Run) -> dict[str, Any]:
    """Read which part of the newest evaluation is recorded; {} = none."""
    path = eval_progress_file(run)
    return json.loads(path.read_text()) if path.is_file() else {}


def write_eval_progress(run: Run, stage: int, done: list[str]) -> None:
    """Record that these tasks are evaluated after a stage.

    The first call after a stage waits until its checkpoint is on disk.
    """
    if len(done) == 1:
        run.files.checkpoints.wait()
    if run.files.log:
        progress = {"stage": stage, "done": done, "positions": run.files.positions()}
        files.write_json(eval_progress_file(run), progress)


# ---- what a checkpoint holds ---------------------------------------------------------------------


def checkpoint_record(run: Run) -> dict[str, Any]:
    """Return the record that every checkpoint stores in addition to its arrays.

    It includes pixel limits and template, without which scores cannot be compared.
    """
    return {
        "positions": run.files.positions(),
        "spent": dict(run.files.unlogged_cost),
        "config": config_fingerprint(run.config),
        "pixels": model_context.describe_pixel_limits(run.model_ctx),
        "template": run.config.data.template,
        "model": load.describe_model_source(run.config.model),
    }


def restore_checkpoint(
    run: Run, base: Params, kind: str, number: int, step: int
) -> tuple[ResumePoint, ModelState, dict[str, Any]]:
    """Load a checkpoint onto the mesh of this run.

    Frozen leaves, which no checkpoint stores, are those of `base`.
    """
    workdir, record = run.files.workdir, run.files.checkpoints.progress(kind, number, step)
    if number > len(run.stages):
        raise RunRefused(
            f"{workdir} has a checkpoint of stage {number}; the config has {len(run.stages)} stages"
        )
    if record["config"] != config_fingerprint(run.config) and not run.config.allow_change:
        raise RunRefused(
            f"{workdir}: the checkpoint of stage {number}, step {step} was saved with another "
            "config. Use another --workdir, or --config.allow_change=True to continue with this "
            "config"
        )
    trained, frozen = split_trained(run.config, base)
    structure = checkpoint_structure(run, kind, run.stages[number - 1], trained)
    trees = run.files.checkpoints.restore(kind, number, step, structure)
    unfinished = None
    if kind == "steps":
        progress = StageProgress(**record["progress"])
        unfinished = UnfinishedStage(trees["state"], progress, trees.get("teacher"))
    trained = trees["state"].params if unfinished else trees["params"]
    params = trainable.join_params(trained, frozen)
    model_state = ModelState(params, trees.get("opt_state"), trees.get("fisher"))
    return ResumePoint(number, unfinished), model_state, record


def checkpoint_structure(run: Run, kind: str, stage: Stage, trained: Params) -> dict[str, Any]:
    """Return the shapes, dtypes and shardings of a checkpoint's trees, which the config decides."""
    structure: dict[str, Any] = {}
    # A run has Fisher information from the end of its first stage with EWC on.
    ended = run.stages[: stage.number if kind == "stages" else stage.number - 1]
    if any(s.config.method.penalty.name == "ewc" for s in ended):
        structure["fisher"] = abstract_float32(trained)
    declared = load.declare_model_params(run.config.model, run.model_ctx.cfg)
    state = abstract_state(
        build.optimizer_from_config(stage.config, declared), trained, run.model_ctx.mesh
    )
    if kind == "stages":
        structure["params"] = abstract_tree(trained)
        if keeps_optimizer(run, stage):
            structure["opt_state"] = state.opt_state
        return structure
    structure["state"] = state
    if method_needs(stage.config.method).teacher == "follower":
        structure["teacher"] = abstract_float32(trained)
    return structure


def abstract_float32(tree: Params) -> Params:
    """Return the shapes and shardings of a float32 copy of a tree."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, np.float32, sharding=x.sharding), tree
    )


def keeps_optimizer(run: Run, stage: Stage) -> bool:
    """Return whether the next stage continues with the optimizer state of this one."""
    if stage.number == len(run.stages):
        return False
    following = run.stages[stage.number]  # stages are numbered from 1
    return not following.config.train.reset_optimizer
