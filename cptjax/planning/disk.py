"""Estimate the disk use of a run: checkpoints by their arrays, responses by their longest text."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from cptjax.common import images
from cptjax.config import Stage
from cptjax.continual import resume, stage_evaluation
from cptjax.continual.open_run import Run
from cptjax.models import causal_lm, load, trainable
from cptjax.models.config import ModelConfig
from cptjax.planning import memory
from cptjax.training.programs import abstract_stage

STAGE_ENDS, STAGE_STEPS = "ends of stages", "steps inside a stage"
TOKEN_BYTES = 4  # of text
ROW_BYTES = 400  # names, numbers and the answer of a line of rollouts or predictions
PROMPT_BYTES = 1000  # of text in a line of rollouts
THUMBNAIL_BYTES = 4 * images.THUMBNAIL_SIDE**2  # 3 bytes per pixel in base64


@dataclasses.dataclass(frozen=True)
class _RunShapes:
    """The parts of a run that the shapes of its checkpoints depend on."""

    config: ConfigDict
    stages: Sequence[Stage]
    model_ctx: "_MeshShapes"


@dataclasses.dataclass(frozen=True)
class _MeshShapes:
    cfg: ModelConfig
    mesh: Mesh


def disk_bytes(
    config: ConfigDict, stages: Sequence[Stage], steps: Sequence[int], test_rows: int
) -> dict[str, float]:
    """Return the bytes that a run is expected to need on disk, by kind of file.

    `steps` is the length of each stage, `test_rows` the number of rows of one evaluation.
    """
    rollouts = sum(rollout_bytes(stage, n) for stage, n in zip(stages, steps, strict=True))
    predictions = prediction_bytes(config, len(stages), test_rows)
    return checkpoint_bytes(config, stages) | {"rollouts": rollouts, "predictions": predictions}


def add_runs(runs: Sequence[dict[str, float]], settings: ConfigDict) -> dict[str, float]:
    """Return the bytes of all runs together, which train one after the other.

    `settings` are `config.checkpoint`. After a stage its checkpoints inside are deleted, unless
    `keep` keeps more than resuming needs; after a run the ends of its stages, if not `keep_stages`.
    """
    names = dict.fromkeys(name for sizes in runs for name in sizes)
    total = {name: sum(sizes.get(name, 0.0) for sizes in runs) for name in names}
    if not settings.keep_stages:
        total[STAGE_ENDS] = max(sizes[STAGE_ENDS] for sizes in runs)
    if settings.keep <= stage_evaluation.KEPT_TO_RESUME:
        total[STAGE_STEPS] = max(sizes[STAGE_STEPS] for sizes in runs)
    return total


def checkpoint_bytes(config: ConfigDict, stages: Sequence[Stage]) -> dict[str, float]:
    """Return the bytes of the ends of all stages, and of the newest checkpoints inside one.

    While a checkpoint inside a stage is written, `checkpoint.keep` older ones are still there.
    """
    cfg = load.find_model_config(config.model)
    (devices, *_) = memory.possible_device_counts(config.mesh, (1,), config.train.batch)
    mesh = memory.mesh_of_size(config.mesh, devices)
    shapes = cast(Run, _RunShapes(config, stages, _MeshShapes(cfg, mesh)))

    def size(kind: str, stage: Stage) -> float:
        trained = abstract_stage(stage.config, cfg, mesh).state.params
        return array_bytes(resume.checkpoint_structure(shapes, kind, stage, trained))

    every = config.checkpoint.every or config.checkpoint.minutes
    kept = config.checkpoint.keep + 1 if every else 1  # a signal saves one
    return {
        STAGE_ENDS: sum(size("stages", stage) for stage in stages),
        STAGE_STEPS: kept * max(size("steps", stage) for stage in stages),
    }


def array_bytes(tree: Any) -> float:
    """Return the bytes of all arrays of a tree, however they are sharded."""
    return float(sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree)))


def exported_model_bytes(config: ConfigDict) -> float:
    """Return the bytes of the Hugging Face folder that a pre-stage makes."""
    cfg = load.find_model_config(config.model)
    count = trainable.count_params(causal_lm.declare_params(cfg))
    return float(count * jnp.dtype(load.MODEL_DTYPES[config.model.param_dtype]).itemsize)


def rollout_bytes(stage: Stage, steps: int) -> float:
    """Return the most bytes of the responses that a stage samples and writes."""
    c, response = stage.config, TOKEN_BYTES * stage.config.rollout.max_new_tokens
    if c.method.source == "self":
        return steps * c.train.batch * c.method.self_samples * (response + ROW_BYTES)
    if c.method.source != "rollouts" or not c.log.rollouts:
        return 0.0
    rows = steps * c.train.batch * c.rollout.group * (response + PROMPT_BYTES + ROW_BYTES)
    # In its first and last step: the first image in each row, all images in one row.
    prompts = 2 * min(c.log.gallery, c.train.batch)
    return rows + prompts * (c.rollout.group + images.MOST_THUMBNAILS) * THUMBNAIL_BYTES


def prediction_bytes(config: ConfigDict, stages: int, test_rows: int) -> float:
    """Return the most bytes of the responses of all evaluations."""
    e = config.eval
    response = TOKEN_BYTES * e.max_new_tokens + ROW_BYTES
    return (stages + bool(e.before)) * test_rows * e.samples * response
