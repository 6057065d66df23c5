"""Task arithmetic (Ilharco et al. 2022, 2212.04089) over stage checkpoints.

    mixture = mean of the task vectors t_1, ..., t_k

The paper adds the vectors and scales the sum by a tuned factor; `weight` times the mean is the sum
with the factor weight / k. Kept: the sum of the vectors, 4 bytes a trained parameter.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from cptjax.training.algorithms.continual_learning.hooks import KeptLayout
from cptjax.training.algorithms.continual_learning.merging import Merge
from cptjax.types import Array, Params


@dataclasses.dataclass(frozen=True)
class TaskArithmetic(Merge):
    """The mean of the task vectors."""

    name = "task_arithmetic"

    def kept_shapes(self, layout: KeptLayout) -> Any:
        count = jax.ShapeDtypeStruct(
            (), jnp.float32, sharding=NamedSharding(layout.mesh, PartitionSpec())
        )
        return {"sum": layout.like_trained(), "count": count}

    def add(self, kept: Any, vector: Params, key: Array) -> Any:
        if kept is None:
            return {"sum": vector, "count": jnp.float32(1)}
        total = jax.tree.map(jnp.add, kept["sum"], vector)
        return {"sum": total, "count": kept["count"] + 1}

    def mixture(self, kept: Any) -> Params:
        return jax.tree.map(lambda x: x / kept["count"], kept["sum"])
