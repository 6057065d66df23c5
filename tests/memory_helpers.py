"""A random batch of a memory, and a stage whose memory has rows of the stage before."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from stage_fixtures import PreparedStage, prepare_stage

from cptjax.continual import stage_memory
from cptjax.training import build
from cptjax.types import Batch


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def random_batch(seed: int, **extra: Any) -> tuple[np.ndarray, np.ndarray, Batch]:
    """Random states [B A D], unembedding [D V] and a batch with masked tokens."""
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(2, 5, 4)).astype(np.float32)
    unembed = rng.normal(size=(4, 11)).astype(np.float32)
    mask = np.arange(5) < np.array([[3], [5]])
    targets = rng.integers(0, 11, mask.shape)
    return hidden, unembed, Batch(None, jnp.asarray(targets), jnp.asarray(mask), extra=extra)


@contextlib.contextmanager
def stage_with_memory(config: ConfigDict, workdir: Path) -> Iterator[PreparedStage]:
    """Prepare stage 2 with the memory that stage 1 would leave without a step."""
    with prepare_stage(config, workdir, number=2) as prepared:
        run, method = prepared.run, build.memory_objective_from_config(config).method
        memory, _ = stage_memory.add_stage_rows(run, run.stages[0], method, prepared.params, None)
        prepared.ctx.memory = stage_memory.open_memory(run, run.stages[1], {method.name: memory})
        yield prepared
