"""L2 regularization towards the parameters at the start of the stage.

penalty = coef / 2 * sum (p - start)^2
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from cptjax.training.algorithms.continual_learning.hooks import (
    ContinualMethod,
    float_difference,
    tree_sum,
)
from cptjax.training.algorithms.continual_learning.importance import check_coefficient
from cptjax.types import Array, Params


@dataclasses.dataclass(frozen=True)
class L2(ContinualMethod):
    """L2 regularization."""

    name = "l2"
    needs_start = True
    coef: float

    def check(self, config: ConfigDict) -> None:
        check_coefficient(self)

    def penalty(self, trained: Params, start: Params | None, kept: Any) -> Array:
        squares = jax.tree.map(jnp.square, float_difference(trained, start))
        return self.coef * 0.5 * tree_sum(squares)
