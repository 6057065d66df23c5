"""A-GEM: averaged gradient episodic memory (Chaudhry et al. 2018, 1812.00420).

    m = gradient of the mean cross-entropy on a batch of the memory
    gradient = g                        if g . m >= 0
               g - (g . m) / (m . m) m  otherwise

The products are over all trained parameters. g includes the gradients of penalties. The optimizer
comes after the projection, so with Adam an update itself may have a negative product with m, as in
any method that projects gradients.

Departure from the paper: its memory has equally many rows of every task; here they are a uniform
sample of the rows of all tasks.
"""

import dataclasses

import jax
import jax.numpy as jnp

from cptjax.training.algorithms.continual_learning.hooks import tree_sum
from cptjax.training.algorithms.continual_learning.memory import MemoryMethod, cross_entropy
from cptjax.types import Array, Batch, Mean, Params


@dataclasses.dataclass(frozen=True)
class AGEM(MemoryMethod):
    """Averaged gradient episodic memory."""

    name = "agem"

    def memory_loss(self, hidden: Array, unembed: Array, batch: Batch, chunk: int) -> Array:
        return cross_entropy(hidden, unembed, batch, chunk)

    def combine_gradients(
        self, gradient: Params, of_memory: Params
    ) -> tuple[Params, dict[str, Mean]]:
        dot = lambda a, b: tree_sum(jax.tree.map(jnp.multiply, a, b))
        product, norm = dot(gradient, of_memory), dot(of_memory, of_memory)
        conflicts = product < 0
        scale = jnp.where(conflicts, product / jnp.where(conflicts, norm, 1), 0)
        projected = jax.tree.map(lambda g, m: g - scale * m, gradient, of_memory)
        both = jnp.sqrt(dot(gradient, gradient) * norm)
        cosine = product / jnp.maximum(both, jnp.finfo(both.dtype).tiny)
        one = jnp.ones(())
        return projected, {
            "agem/projected": Mean(conflicts.astype(jnp.float32), one),
            "agem/cosine": Mean(cosine, one),
        }
