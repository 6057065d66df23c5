"""Synaptic intelligence (Zenke et al. 2017, 1703.04200): importance from the path of the training.

    path = sum over the updates of a stage of -gradient * (change of the parameter)
    importance = sum over stages of max(path, 0) / ((end - start)^2 + damping)
    penalty = coef / 2 * sum importance (p - start)^2

The path of a parameter is its share of the decrease of the loss. The gradient is that of the
objective without penalties, and the change is what the optimizer did, with momentum and decay. The
end of a stage is its last update, before a merge of method.stage_end. The coefficient of the paper
is coef / 2. Its code clips the sum over stages at 0; here each stage's share is clipped.

Damping is 1e-3 in the authors' code for split CIFAR, and 0.1 for permuted MNIST.

It keeps 4 bytes for each trained parameter, and 4 more during a stage.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from cptjax.training.algorithms.continual_learning.hooks import StageEnd, float_difference
from cptjax.training.algorithms.continual_learning.importance import ImportancePenalty
from cptjax.types import Array, Params


@dataclasses.dataclass(frozen=True)
class SI(ImportancePenalty):
    """Synaptic intelligence."""

    name = "si"
    damping: float = 1e-3  # the paper's xi

    def check(self, config: ConfigDict) -> None:
        super().check(config)
        if not self.damping > 0:
            raise ValueError(f"si: damping={self.damping}: expected a number above 0")

    def begin_stage(self, trained: Params) -> Params:
        return jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), trained)

    def after_update(self, state: Any, gradient: Params, before: Params, after: Params) -> Params:
        change = float_difference(after, before)
        return jax.tree.map(lambda path, g, c: path - g * c, state, gradient, change)

    def stage_importance(self, end: StageEnd) -> Params:
        def importance(path: Array, p: Array, start: Array) -> Array:
            change = p.astype(jnp.float32) - start.astype(jnp.float32)
            return jnp.maximum(path, 0) / (jnp.square(change) + self.damping)

        return jax.tree.map(importance, end.state, end.unmerged, end.start)
