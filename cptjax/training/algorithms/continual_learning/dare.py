"""DARE (Yu et al. 2023, 2311.03099): drop and rescale the task vectors, then average them.

    d_k     = t_k with each value kept with probability `density` and divided by it, else 0
    mixture = mean of d_1, ..., d_k

The choice is a function of the run's seed and the stage. Kept: the sum of the vectors, 4 bytes a
trained parameter.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from cptjax.training.algorithms.continual_learning.merging import check_density
from cptjax.training.algorithms.continual_learning.task_arithmetic import TaskArithmetic
from cptjax.types import Array, Params


@dataclasses.dataclass(frozen=True)
class DARE(TaskArithmetic):
    """The mean of the task vectors after random drops."""

    name = "dare"
    density: float = 0.1  # probability that a value is kept

    def check(self, config: ConfigDict) -> None:
        super().check(config)
        check_density(self)

    def add(self, kept: Any, vector: Params, key: Array) -> Any:
        return super().add(kept, drop_and_rescale(vector, self.density, key), key)


def drop_and_rescale(vector: Params, density: float, key: Array) -> Params:
    """Keep each value with probability `density`, divided by it; set the others to 0."""
    leaves, tree = jax.tree.flatten(vector)
    keys = jax.random.split(key, len(leaves))
    return tree.unflatten(
        jnp.where(jax.random.bernoulli(k, density, x.shape), x / density, 0.0)
        for k, x in zip(keys, leaves, strict=True)
    )
