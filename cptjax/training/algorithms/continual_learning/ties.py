"""TIES (Yadav et al. 2023, 2306.01708): trim, elect a sign, average what agrees with it.

    trim    each task vector keeps the largest `density` of its values, by magnitude
    elect   the sign of a parameter is that of the sum of the trimmed vectors
    merge   mixture = mean of the trimmed values that are not 0 and have the elected sign

Kept: the sums and the counts of positive and of negative values, 10 bytes a trained parameter.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from cptjax.training.algorithms.continual_learning.hooks import KeptLayout
from cptjax.training.algorithms.continual_learning.merging import (
    Merge,
    check_density,
    largest_share,
)
from cptjax.types import Array, Params

SIGNS = {"positive": 1.0, "negative": -1.0}


@dataclasses.dataclass(frozen=True)
class TIES(Merge):
    """A mean of the task vectors' largest values with an elected sign."""

    name = "ties"
    density: float = 0.2  # share of the values of a task vector that is kept

    def check(self, config: ConfigDict) -> None:
        super().check(config)
        check_density(self)
        if len(config.stages) > 127:
            raise ValueError(
                f"ties: expected at most 127 stages, which its counts hold; got "
                f"{len(config.stages)}"
            )

    def kept_shapes(self, layout: KeptLayout) -> Any:
        return {
            name: {"sum": layout.like_trained(), "count": layout.like_trained(jnp.int8)}
            for name in SIGNS
        }

    def add(self, kept: Any, vector: Params, key: Array) -> Any:
        trimmed = largest_share(vector, self.density)
        new = {name: _with_sign(trimmed, sign) for name, sign in SIGNS.items()}
        return new if kept is None else jax.tree.map(jnp.add, kept, new)

    def mixture(self, kept: Any) -> Params:
        def elect(plus: Array, n_plus: Array, minus: Array, n_minus: Array) -> Array:
            means = (s / jnp.maximum(n, 1) for s, n in ((plus, n_plus), (minus, n_minus)))
            mean_plus, mean_minus = means
            total = plus + minus
            return jnp.where(total > 0, mean_plus, jnp.where(total < 0, mean_minus, 0.0))

        positive, negative = kept["positive"], kept["negative"]
        return jax.tree.map(
            elect, positive["sum"], positive["count"], negative["sum"], negative["count"]
        )


def _with_sign(vector: Params, sign: float) -> Any:
    """Return the values of a sign, with 1 where there is one."""
    has = jax.tree.map(lambda x: sign * x > 0, vector)
    return {
        "sum": jax.tree.map(lambda x, h: jnp.where(h, x, 0.0), vector, has),
        "count": jax.tree.map(lambda h: h.astype(jnp.int8), has),
    }
