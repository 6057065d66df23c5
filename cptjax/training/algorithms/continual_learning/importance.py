"""Penalties on the movement of parameters, weighted by an importance from earlier stages.

    penalty = coef / 2 * sum importance (p - start)^2

The methods differ in how a stage's importance is estimated, and in how it is added to that of the
stages before.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from cptjax.training.algorithms.continual_learning.hooks import (
    ContinualMethod,
    KeptLayout,
    StageEnd,
    float_difference,
    tree_sum,
)
from cptjax.types import Array, Params


@dataclasses.dataclass(frozen=True)
class ImportancePenalty(ContinualMethod):
    """A quadratic penalty with an importance for each parameter."""

    coef: float
    needs_start = True

    def check(self, config: ConfigDict) -> None:
        check_coefficient(self)

    def penalty(self, trained: Params, start: Params | None, kept: Any) -> Array | None:
        if kept is None:
            return None
        moved = jax.tree.map(jnp.square, float_difference(trained, start))
        return self.coef * 0.5 * tree_sum(jax.tree.map(jnp.multiply, kept, moved))

    def kept_shapes(self, layout: KeptLayout) -> Any:
        return layout.like_trained()

    def stage_end(self, end: StageEnd) -> tuple[Params, Any]:
        new = self.stage_importance(end)
        return end.trained, new if end.kept is None else self.add_importance(end.kept, new)

    def stage_importance(self, end: StageEnd) -> Params:
        """Return the importance of the parameters for the stage that has ended."""
        raise NotImplementedError

    def add_importance(self, before: Params, new: Params) -> Params:
        """Return the importance for all stages so far: by default, the sum."""
        return jax.tree.map(jnp.add, before, new)


def check_coefficient(method: Any) -> None:
    """Refuse a coefficient that is negative, or 0, with which a method has no effect."""
    if method.coef < 0:
        raise ValueError(f"{method.name}: coef={method.coef}: expected a number above 0")
    if method.coef == 0:
        raise ValueError(f"{method.name}: coef=0 does nothing; set coef, or name='none'")


def check_samples(method: Any) -> None:
    """Refuse an estimate from no rows."""
    if method.samples < 1:
        raise ValueError(
            f"{method.name}: samples={method.samples}: expected at least 1 row for its estimate"
        )
