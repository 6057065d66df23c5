"""Merges of stage checkpoints: the base model plus a mixture of the stages' task vectors.

    t_k = weights at the end of stage k - base model
    weights after stage k = base model + weight * mixture(t_1, ..., t_k)

The papers merge models that are all trained from the base model, or one after the other. Here, a
stage starts from the merged model of the stages before it. A mixture is computed from sums that are
kept between the stages, so its memory does not grow with the number of stages.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from cptjax.training.algorithms.continual_learning.bisection import (
    largest_integer,
    magnitude_bits,
)
from cptjax.training.algorithms.continual_learning.hooks import (
    ContinualMethod,
    StageEnd,
    float_difference,
)
from cptjax.types import Array, Params


@dataclasses.dataclass(frozen=True)
class Merge(ContinualMethod):
    """A merge of the checkpoints of all stages so far."""

    weight: float = 1.0  # of the mixture

    def check(self, config: ConfigDict) -> None:
        if not self.weight > 0:
            raise ValueError(f"{self.name}: weight={self.weight}: expected a number above 0")
        check_trained_weights(self, config)

    def stage_end(self, end: StageEnd) -> tuple[Params, Any]:
        key = jax.random.fold_in(jax.random.key(end.seed), end.stage)
        base = end.stage_params(0)
        return _merge(self, end.trained, base, end.kept, key)

    def add(self, kept: Any, vector: Params, key: Array) -> Any:
        """Return the kept sums with the task vector of one more stage; `kept` None = the first."""
        raise NotImplementedError

    def mixture(self, kept: Any) -> Params:
        """Return the mixture of the task vectors so far."""
        raise NotImplementedError


@functools.partial(jax.jit, static_argnums=0)
def _merge(method: Merge, trained: Params, base: Params, kept: Any, key: Array) -> Any:
    kept = method.add(kept, float_difference(trained, base), key)
    merged = jax.tree.map(
        lambda b, t, x: (b.astype(jnp.float32) + method.weight * t).astype(x.dtype),
        base,
        method.mixture(kept),
        trained,
    )
    return merged, kept


def check_trained_weights(method: ContinualMethod, config: ConfigDict) -> None:
    """Refuse adapters that go on from stage to stage.

    A mean of the factors A and of the factors B is not that of the products A B, which are what the
    adapters add to the weights. Methods that make new adapters in each stage refuse a merge
    themselves.
    """
    rank = config.model.lora.rank
    if rank and config.method.parameters.name == "none":
        raise ValueError(
            f"method.stage_end.name={method.name!r} with model.lora.rank={rank}: expected trained "
            "weights, got the two factors of adapters, whose merge is not that of their products; "
            "set model.lora.rank=0, or method.parameters.name='merge_lora' without stage_end"
        )


def check_density(method: Any) -> None:
    """Refuse a share of a task vector outside (0, 1]."""
    if not 0 < method.density <= 1:
        raise ValueError(
            f"{method.name}: density={method.density}: expected the share of a task vector that is "
            "used, 0 < density <= 1"
        )


def _count(bits: list[Array], limit: Array) -> Array:
    """Count the values at or above the limit, in integers by row and in float32 beyond."""
    rows = [x.reshape(x.shape[:1] + (-1,)) for x in bits]
    counts = [jnp.sum(r >= limit, axis=1, dtype=jnp.uint32) for r in rows]
    return sum(jnp.sum(c.astype(jnp.float32)) for c in counts)


def largest_share(vector: Params, share: float) -> Params:
    """Return the vector with all but the largest share of its values, by magnitude, set to 0.

    The share is counted over the whole tree. Equal magnitudes at the limit are all kept.
    """
    leaves = jax.tree.leaves(vector)
    count = max(round(share * sum(x.size for x in leaves)), 1)
    bits = [magnitude_bits(x) for x in leaves]
    limit = largest_integer(lambda bound: _count(bits, bound) >= count, jnp.int32(0))
    return jax.tree.map(lambda x: jnp.where(magnitude_bits(x) >= limit, x, 0.0), vector)
