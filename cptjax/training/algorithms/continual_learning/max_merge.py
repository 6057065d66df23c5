"""Merge by maximum magnitude (MagMax, Marczak et al. 2024, 2407.06322).

    mixture = for each parameter, the value with the largest magnitude among t_1, ..., t_k

Kept: these values, 4 bytes a trained parameter.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from cptjax.training.algorithms.continual_learning.hooks import KeptLayout
from cptjax.training.algorithms.continual_learning.merging import Merge
from cptjax.types import Array, Params


@dataclasses.dataclass(frozen=True)
class MaxMerge(Merge):
    """The largest value of each parameter's task vectors."""

    name = "max_merge"

    def kept_shapes(self, layout: KeptLayout) -> Any:
        return layout.like_trained()

    def add(self, kept: Any, vector: Params, key: Array) -> Any:
        if kept is None:
            return vector
        larger = lambda a, b: jnp.where(jnp.abs(b) > jnp.abs(a), b, a)
        return jax.tree.map(larger, kept, vector)

    def mixture(self, kept: Any) -> Params:
        return kept
