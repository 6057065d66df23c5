"""Find and restore the state from which a stopped or killed run continues.

The state is the newest of these that can be read:

    1. a checkpoint: inside a stage (kind `steps`) or at the end of a stage (kind `stages`)
    2. nothing: the base model, before the first stage

After the end of a stage, or with the base model, progress.json says which tasks of the following
evaluation are already recorded.

Checkpoints and progress.json both record the lengths and hashes of the append-only files; lines
that a killed run wrote after that are cut off. Nothing is cut or moved before all of it is checked:

    a checkpoint that progress.json or the results show to have existed is missing,
    the end of a finished stage is damaged,                     -> refused; with `start_over`, the
    metrics.jsonl, evals.csv or the stage's samples changed        records are copied to old/ first
    another file of results is lost or changed                  -> a warning, recorded as an event
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from cptjax.common import console, run_log
from cptjax.config import Stage, config_fingerprint
from cptjax.continual import progress, records
from cptjax.continual.checkpoint import RunRefused, StateLost, abstract_tree
from cptjax.continual.model_state import (
    ModelState,
    frozen_after,
    frozen_weights_methods,
    kept_shapes,
    restore_stage_params,
    split_trained,
)
from cptjax.continual.open_run import Run
from cptjax.data import model_context
from cptjax.models import load, trainable
from cptjax.training import build, rollouts
from cptjax.training.method_needs import method_needs
from cptjax.training.stage_context import StageProgress
from cptjax.training.train_step import abstract_state
from cptjax.types import Array, Params, TrainState


@dataclasses.dataclass(frozen=True)
class UnfinishedStage:
    """The state inside a stage, as stored in a checkpoint of kind `steps`."""

    state: TrainState
    progress: StageProgress
    teacher: Params | None  # trained leaves of a teacher that follows the student
    rollouts: dict[str, Array] | None  # of the next step, with rollout.ahead


@dataclasses.dataclass(frozen=True)
class ResumePoint:
    """Where a run continues."""

    stage: int = 0  # the newest stage that has a checkpoint; 0 = none
    unfinished: UnfinishedStage | None = None  # None = the stage is trained to its end
    evaluated: tuple[str, ...] = ()  # tasks whose evaluation after the stage is recorded

    def is_trained(self, number: int) -> bool:
        """Return whether a stage is trained to its end."""
        return number < self.stage or (number == self.stage and self.unfinished is None)

    @property
    def unfinished_stage(self) -> int:
        """The stage that continues in its middle; 0 = none."""
        return self.stage if self.unfinished else 0

    def __str__(self) -> str:
        if self.unfinished is not None:
            return f"step {self.unfinished.progress.step} of stage {self.stage}"
        return (
            f"the end of stage {self.stage}" if self.stage else "the evaluation of the base model"
        )


@dataclasses.dataclass(frozen=True)
class Restored:
    """A state that a run can continue from, before any file is cut."""

    point: ResumePoint
    model_state: ModelState
    positions: run_log.Positions
    spent: dict[str, float]


def resume_run(run: Run, start_over: bool = False) -> tuple[ResumePoint, ModelState]:
    """Restore the newest state of a run and cut its append-only files back to it.

    If that state is lost, refuse; with `start_over`, continue from an earlier one, after the
    records are copied to old/.
    """
    with console.show_waiting("loading the weights"):
        base = restore_stage_params(run.config, run.model_ctx, None, 0)
    if not frozen_weights_methods(run.stages):
        run.frozen.update(split_trained(run.config, base)[1])
    workdir = run.files.workdir
    try:
        restored = find_state(run, base)
    except StateLost as error:
        if not start_over:
            raise RunRefused(
                f"{workdir}: {error}. Bring back what is missing; or --start_over continues from "
                "the newest state that can be read, and first copies the records to old/"
            ) from error
        restored = find_earlier_state(run, base, str(error))
    point = restored.point
    run.files.unlogged_cost = dict(restored.spent)
    progress.forget_evaluation(workdir, point.stage, point.unfinished is not None)
    if run.files.log:
        run.files.log.rewind(restored.positions, point.unfinished_stage)
    if point.stage or point.evaluated:
        console.print_message(f"{workdir}: continuing from {point}")
    return point, restored.model_state


def find_state(run: Run, base: Params) -> Restored:
    """Return the newest state of a run; raise StateLost if it was lost."""
    records.refuse_lost_checkpoint(run.files.workdir, run.files.checkpoints)
    restored = _restore_newest(run, base)
    point, positions = restored.point, restored.positions
    records.refuse_lost_evaluation(run.files.workdir, point.stage, positions)
    records.refuse_changed_records(run.files.workdir, positions, point.unfinished_stage)
    return restored


def find_earlier_state(run: Run, base: Params, problem: str) -> Restored:
    """Return the newest state that can still be read, after the records are copied to old/."""
    workdir = run.files.workdir
    old = records.copy_records(workdir)
    progress.clear(workdir)
    console.print_warning(f"{workdir}: {problem}; starting over, the records so far are in {old}")
    restored = _restore_newest(run, base, repeat_stages=True)
    try:
        stage = restored.point.unfinished_stage
        records.refuse_changed_records(workdir, restored.positions, stage)
    except StateLost as error:
        console.print_warning(f"{error}; starting over from the base model")
        run.files.checkpoints.move_all(old / "checkpoints")
        return Restored(ResumePoint(), ModelState(base), {}, {})
    return restored


def _restore_newest(run: Run, base: Params, repeat_stages: bool = False) -> Restored:
    """Return the newest readable state, with the part of its evaluation that is recorded."""
    restored = run.files.checkpoints.newest(
        lambda kind, stage, step: restore_checkpoint(run, base, kind, stage, step), repeat_stages
    ) or Restored(ResumePoint(), ModelState(base), {}, {})
    point, evaluation = restored.point, progress.read_evaluation(run.files.workdir)
    if evaluation and point.unfinished is None and evaluation["stage"] == point.stage:
        point = dataclasses.replace(point, evaluated=tuple(evaluation["done"]))
        return dataclasses.replace(restored, point=point, positions=evaluation["positions"])
    return restored


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


def restore_checkpoint(run: Run, base: Params, kind: str, number: int, step: int) -> Restored:
    """Load a checkpoint onto the mesh of this run.

    Frozen leaves, which no checkpoint stores, follow from those of `base` and from what methods
    kept.
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
    if "rollouts" not in record["trees"]:  # after the last step of a stage
        structure.pop("rollouts", None)
    trees = run.files.checkpoints.restore(kind, number, step, structure)
    unfinished = None
    if kind == "steps":
        stage_progress = StageProgress(**record["progress"])
        unfinished = UnfinishedStage(
            trees["state"], stage_progress, trees.get("teacher"), trees.get("rollouts")
        )
    trained, kept = trees["state"].params if unfinished else trees["params"], trees.get("kept", {})
    frozen = frozen_after(ended_stages(run, kind, number), frozen, kept)
    model_state = ModelState(trainable.join_params(trained, frozen), trees.get("opt_state"), kept)
    positions = {  # an older version stored only the length
        name: p if isinstance(p, dict) else {"bytes": p} for name, p in record["positions"].items()
    }
    return Restored(ResumePoint(number, unfinished), model_state, positions, record["spent"])


def ended_stages(run: Run, kind: str, number: int) -> list[Stage]:
    """Return the stages whose end a checkpoint in or after stage `number` has."""
    return run.stages[: number if kind == "stages" else number - 1]


def checkpoint_structure(run: Run, kind: str, stage: Stage, trained: Params) -> dict[str, Any]:
    """Return the shapes, dtypes and shardings of a checkpoint's trees, which the config decides."""
    structure: dict[str, Any] = {}
    ended = ended_stages(run, kind, stage.number)
    if kept := kept_shapes(ended, trained, run.model_ctx.mesh):
        structure["kept"] = kept
    declared = load.declare_model_params(run.config.model, run.model_ctx.cfg)
    state = abstract_state(
        build.optimizer_from_config(stage.config, declared),
        trained,
        run.model_ctx.mesh,
        build.step_methods_from_config(stage.config),
    )
    if kind == "stages":
        structure["params"] = abstract_tree(trained)
        if keeps_optimizer(run, stage):
            structure["opt_state"] = state.opt_state
        return structure
    structure["state"] = state
    if method_needs(stage.config.method).teacher == "follower":
        structure["teacher"] = abstract_float32(trained)
    if stage.config.rollout.ahead and stage.config.method.source == "rollouts":
        structure["rollouts"] = rollouts.abstract_rollouts(stage.config, run.model_ctx.mesh)
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
