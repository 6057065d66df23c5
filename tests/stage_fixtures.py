"""Tiny versions of any config: a one-layer model, synthetic text tasks, a random scorer."""

import contextlib
import dataclasses
import functools
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import run_helpers
from ml_collections import ConfigDict

from configs import base
from cptjax import sharding
from cptjax.common.files import read_jsonl
from cptjax.config import resolve_stages
from cptjax.continual import open_run, train_stage
from cptjax.continual.model_state import ModelState, restore_stage_params
from cptjax.continual.open_run import Run
from cptjax.models import trainable
from cptjax.models.families import PRESETS
from cptjax.training import rollouts, step_batch, train_step, validate_config
from cptjax.training.algorithms.continual_learning.hooks import HookArrays
from cptjax.types import Params, TrainState

MAKE_MESH, INIT_PARAMS = sharding.make_mesh, sharding.init_params
EOS = (2, 0, *range(40, 320, 4))  # so that a random model often ends its response
SMALL_TEXT = dataclasses.replace(run_helpers.SMALL_TEXT, eos=EOS)
SMALL = dataclasses.replace(run_helpers.SMALL, eos=EOS)
MODELS = {"tiny": SMALL, "tiny_qwen2": SMALL_TEXT}  # the presets of runs with these fixtures


def coin(prediction: str, answer: Any, meta: Any = None) -> float:
    """A score that a random model reaches half of the time."""
    return float(zlib.crc32(prediction.encode()) % 2)


class UnsavedCheckpoints:
    """Checkpoints that are never written."""

    def __init__(self, *_: Any, **__: Any):
        self.kept: list[tuple] = []

    def due(self, step: int) -> bool:
        return False

    def save(self, *what: Any) -> None:
        self.kept.append(what)

    def wait(self) -> None:
        """Nothing is being saved."""

    close = wait


def tiny(
    config: ConfigDict,
    steps: int = 1,
    stages: int = 1,
    batch: int = 4,
    family: str = "arithmetic",
    **tasks: Any,
) -> ConfigDict:
    """Return the config with everything small and its method unchanged.

    The model reads images only if the tasks have any, because a tower takes time to compile.
    """
    c = ConfigDict(config.to_dict())
    with c.unlocked(), c.ignore_type():
        names = dict.fromkeys(
            t for s in c.stages for t in ((s["task"],) if isinstance(s["task"], str) else s["task"])
        )
        c.tasks = ConfigDict(
            {n: dict(task="synthetic", family=family, scorer=coin) | tasks for n in names}
        )
        c.stages = tuple(
            {k: v for k, v in s.items() if k != "epochs"} | {"steps": steps}
            for s in c.stages[:stages]
        )
        c.model.update(
            path="",
            preset="tiny_qwen2" if family == "arithmetic" else "tiny",
            compute_dtype="float32",
            remat="none",
            min_pixels=1024,
            max_pixels=1024,
        )
        c.model.lora.rank = min(c.model.lora.rank, 2)
        c.data.update(prompt_limit=32, buckets=(32,), limit=8, workers=0)
        c.train.update(batch=batch, micro_batch=0)
        c.rollout.update(group=2, max_new_tokens=4, check_every=4)
        c.eval.update(
            general=(), before=False, limit=8, batch=8, max_new_tokens=4, every=None, drift=0
        )
        c.method.update(overlong=min(c.method.overlong, 2), self_samples=8)
        if c.method.filter:
            # Of one response each, some are wrong; of three, none of all would be.
            samples = 1 if c.method.filter["name"] == "unsolvable" else 3
            c.method.filter = dict(c.method.filter, samples=samples) | (
                {"hi": 3} if "hi" in c.method.filter else {}
            )
        if c.method.penalty.samples:
            c.method.penalty.samples = 2
        c.method.updates_per_batch = min(c.method.updates_per_batch, 2)
    return c


def method_config(
    name: str, steps: int = 2, stages: int = 1, batch: int = 4, **sections: dict[str, Any]
) -> ConfigDict:
    """Return a tiny config of a method on two text tasks, with changed settings by section."""
    c = base.get_config()
    c.stages = tuple(dict(task=task, steps=steps) for task in ("first", "second")[:stages])
    c.method.update(base.METHODS[name])
    c = tiny(c, steps=steps, stages=stages, batch=batch)
    for section, values in sections.items():
        c[section].update(values)
    return c


def init_params(declared: Any, key: Any, dtype: Any, mesh: Any, rules: dict) -> Params:
    """Return the values of `sharding.init_params`, from one program for all meshes."""
    values = jax.device_get(INIT_PARAMS(declared, key, dtype))
    return jax.device_put(values, sharding.param_shardings(declared, mesh, rules))


@contextlib.contextmanager
def open_tiny_run(
    config: ConfigDict, workdir: Path, model: Any = None, saved: bool = False
) -> Iterator[tuple[Run, ModelState]]:
    """Open a run with its base model, on the devices of the mesh; without `saved`, it has no
    checkpoints.

    `model` replaces the small model of the config's preset.
    """
    with contextlib.ExitStack() as stack:
        models = MODELS if model is None else {config.model.preset: model}
        sizes = [max(config.mesh[axis], 1) for axis in sharding.AXES]
        some = functools.partial(MAKE_MESH, *sizes, jax.devices()[: math.prod(sizes)])
        stack.enter_context(mock.patch.object(sharding, "make_mesh", lambda **_: some()))
        stack.enter_context(mock.patch.object(sharding, "init_params", init_params))
        if not saved:
            stack.enter_context(mock.patch.object(open_run, "Checkpoints", UnsavedCheckpoints))
        stack.enter_context(mock.patch.dict(PRESETS, models))
        run = open_run.open_run(config, workdir)
        run.files.report.seconds = 0  # the workdir has no config.json, which a report reads
        stack.callback(run.sandbox.close)
        stack.callback(run.files.log.close)
        yield run, ModelState(restore_stage_params(config, run.model_ctx, None, 0))


def train_all_stages(config: ConfigDict, workdir: Path) -> tuple[Run, ModelState, list[dict]]:
    """Train every stage in turn; return the run, the last model, and the lines of metrics.jsonl."""
    for stage in resolve_stages(config):
        validate_config.validate_stage(stage)
    with open_tiny_run(config, workdir) as (run, model_state):
        for stage in run.stages:
            model_state = train_stage.train_stage(run, stage, model_state)
    return run, model_state, read_jsonl(workdir / "metrics.jsonl")


@dataclasses.dataclass
class PreparedStage:
    """A stage with everything that `train_stage` builds before its loop."""

    run: Run
    ctx: Any  # a StageContext; tests use its optional parts
    state: TrainState
    frozen: Params
    programs: train_step.StepPrograms
    arrays: HookArrays

    @property
    def params(self) -> Params:
        return trainable.join_params(self.state.params, self.frozen)

    def update(self, batches: list, lr: float = 1e-3) -> tuple[TrainState, dict[str, float]]:
        """Take one update on copies; the state of the stage does not change."""
        with jax.set_mesh(self.run.model_ctx.mesh):
            state, metrics = self.programs.run(
                jax.tree.map(jnp.copy, self.state), self.frozen, batches, lr, self.arrays
            )
        return state, {k: v.value for k, v in jax.device_get(metrics).items()}


@contextlib.contextmanager
def prepare_stage(
    config: ConfigDict, workdir: Path, number: int = 1, model: Any = None
) -> Iterator[PreparedStage]:
    """Prepare stage `number` of a tiny config for its first step."""
    with open_tiny_run(config, workdir, model) as (run, model_state):
        stage = run.stages[number - 1]
        validate_config.validate_stage(stage)
        start = run.copy_for_comparison(model_state.params)
        ready = train_stage.prepare_stage(run, stage, model_state, start)
        yield PreparedStage(run, ready.ctx, ready.state, ready.frozen, ready.programs, ready.arrays)


def rollout_step_batch(
    builder: step_batch.BatchBuilder,
    params: Params,
    graded: rollouts.GradedRollouts,
    reference: Params | None,
    *settings: Any,
    **more: Any,
) -> step_batch.StepBatch:
    """Build the updates of a step on rollouts, as the training loop does."""
    scored = rollouts.score_rollouts(builder, params, graded, reference)
    return rollouts.scored_step_batch(builder, scored, reference, *settings, **more)
