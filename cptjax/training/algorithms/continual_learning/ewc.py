"""Elastic weight consolidation (Kirkpatrick et al. 2017, 1612.00796).

    penalty = coef / 2 * sum F (p - start)^2
    F = sum over stages of the mean over rows of (gradient of log p(gold response | prompt))^2

F is the diagonal of the empirical Fisher information.
"""

import dataclasses

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from cptjax.training.algorithms.continual_learning.hooks import GradientPass, StageEnd
from cptjax.training.algorithms.continual_learning.importance import (
    ImportancePenalty,
    check_samples,
)
from cptjax.training.algorithms.losses import LossConfig
from cptjax.training.algorithms.objective import Objective
from cptjax.types import Params


def square(gradient: Params) -> Params:
    """Return the square of each number."""
    return jax.tree.map(jnp.square, gradient)


@dataclasses.dataclass(frozen=True)
class EWC(ImportancePenalty):
    """Elastic weight consolidation."""

    name = "ewc"
    samples: int = 64  # rows of the estimate of F

    def check(self, config: ConfigDict) -> None:
        super().check(config)
        check_samples(self)

    def gradient_pass(self, chunk: int) -> GradientPass:
        return GradientPass(Objective(LossConfig.plain("sft", chunk)), square, self.samples)

    def stage_importance(self, end: StageEnd) -> Params:
        return end.mean
