"""Online EWC (Schwarz et al. 2018, 1805.06370): EWC that forgets old importance by a factor.

    penalty = coef / 2 * sum F (p - start)^2
    F after a stage = decay * (F before it) + the stage's own F, as in EWC

With decay=1 it is EWC. It keeps 4 bytes for each trained parameter.
"""

import dataclasses

import jax
from ml_collections import ConfigDict

from cptjax.training.algorithms.continual_learning.ewc import EWC
from cptjax.types import Params


@dataclasses.dataclass(frozen=True)
class OnlineEWC(EWC):
    """Elastic weight consolidation with decay."""

    name = "online_ewc"
    decay: float = 0.9  # of the importance of earlier stages, for each stage; the value is ours

    def check(self, config: ConfigDict) -> None:
        super().check(config)
        if not 0 < self.decay <= 1:
            raise ValueError(f"online_ewc: decay={self.decay}: expected 0 < decay <= 1")

    def add_importance(self, before: Params, new: Params) -> Params:
        return jax.tree.map(lambda b, n: self.decay * b + n, before, new)
