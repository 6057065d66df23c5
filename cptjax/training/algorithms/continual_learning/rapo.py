"""Retention-aware policy optimization (2605.09640): rewards for responses that change little.

    drift = max(0, mean over tokens of log p(policy) - log p(model at the stage's start))
    reward = task reward + weight * exp(-alpha * drift)          from the second stage on
    advantage = (reward - mean of the group) / D
    D after a batch = decay * D + (1 - decay) * standard deviation of the batch's rewards

D goes on over the stages ("cross-task advantage normalization"). The rewards are divided by it, and
`method.advantage` has to be dr_grpo, which subtracts the mean of the group.

The defaults, and the least D of 1e-3, are those of the authors' code. In addition to these
equations of the paper, the code restarts D at each task from the batch before, raises the decay
from 0.9 in a task's first two batches, and falls back to the deviation of the group where an
advantage exceeds 5.

It keeps 4 bytes.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from cptjax.training.algorithms.continual_learning.hooks import (
    ContinualMethod,
    KeptLayout,
    StageEnd,
)
from cptjax.types import Params

MIN_DEVIATION = 1e-3


@dataclasses.dataclass(frozen=True)
class RaPO(ContinualMethod):
    """A reward for retention, and advantages with one scale over all stages."""

    name = "rapo"
    needs_drift = True
    weight: float = 0.5  # of the reward for retention
    alpha: float = 20.0
    decay: float = 0.999

    def check(self, config: ConfigDict) -> None:
        if not (self.weight > 0 and self.alpha > 0 and 0 <= self.decay < 1):
            raise ValueError(
                f"rapo: weight={self.weight}, alpha={self.alpha}, decay={self.decay}: expected "
                "weight and alpha above 0 and 0 <= decay < 1"
            )
        method = config.method
        if method.objective != "policy" or method.advantage != "dr_grpo":
            raise ValueError(
                "method.reward.name='rapo' scales the rewards itself: expected "
                "objective='policy' and advantage='dr_grpo', got "
                f"objective={method.objective!r} and advantage={method.advantage!r}"
            )

    def begin_rewards(self, kept: Any) -> float | None:
        return float(kept) or None if kept is not None else None

    def shape_rewards(
        self, rewards: np.ndarray, keep: np.ndarray, drift: np.ndarray | None, carried: float | None
    ) -> tuple[np.ndarray, float | None]:
        if drift is not None:
            rewards = rewards + self.weight * np.exp(-self.alpha * np.maximum(drift, 0))
        chosen = rewards[keep].astype(np.float64)
        deviation = float(chosen.std(ddof=1)) if chosen.size > 1 else 0.0
        if carried is not None:
            deviation = self.decay * carried + (1 - self.decay) * deviation
        elif deviation == 0:
            return rewards, None  # all rewards are equal, and all advantages 0
        return (rewards / max(deviation, MIN_DEVIATION)).astype(np.float32), deviation

    def kept_shapes(self, layout: KeptLayout) -> Any:
        place = NamedSharding(layout.mesh, PartitionSpec())
        return jax.ShapeDtypeStruct((), jnp.float32, sharding=place)

    def stage_end(self, end: StageEnd) -> tuple[Params, Any]:
        return end.trained, jnp.float32(end.carried or 0.0)
