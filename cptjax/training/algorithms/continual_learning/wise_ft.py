"""WiSE-FT (Wortsman et al. 2021, 2109.01903): average the weights of a stage's start and end.

p = (1 - weight) * end + weight * start
"""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from cptjax.models.trainable import interpolate
from cptjax.training.algorithms.continual_learning.hooks import ContinualMethod, StageEnd
from cptjax.training.algorithms.continual_learning.merging import check_trained_weights
from cptjax.types import Params


@dataclasses.dataclass(frozen=True)
class WiseFT(ContinualMethod):
    """An average of the weights at the start and at the end of a stage."""

    name = "wise_ft"
    needs_start = True
    weight: float  # of the stage's start

    def check(self, config: ConfigDict) -> None:
        if not 0 < self.weight < 1:
            raise ValueError(
                f"wise_ft: weight={self.weight}: expected the weight of the stage's start, "
                "0 < weight < 1"
            )
        check_trained_weights(self, config)

    def stage_end(self, end: StageEnd) -> tuple[Params, Any]:
        return interpolate(end.trained, end.start, self.weight), end.kept
