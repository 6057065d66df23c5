"""Learning without forgetting (Li and Hoiem 2016, 1606.09282) on response tokens.

    loss = coef * KL(model at the stage's start || policy), summed over the vocabulary

The loss is computed on the rows of the new task. The paper compares the outputs of old heads; a
language model has one output.
"""

import dataclasses

from ml_collections import ConfigDict

from cptjax.training.algorithms.continual_learning.hooks import ContinualMethod
from cptjax.training.algorithms.continual_learning.importance import check_coefficient
from cptjax.training.algorithms.losses import teacher_kl
from cptjax.types import Array, Batch


@dataclasses.dataclass(frozen=True)
class LwF(ContinualMethod):
    """Learning without forgetting."""

    name = "lwf"
    needs_teacher = True
    coef: float

    def check(self, config: ConfigDict) -> None:
        check_coefficient(self)
        if config.method.objective == "distill":
            raise ValueError(
                "method.loss.name='lwf' and method.objective='distill' both need the teacher; "
                "choose one"
            )

    def token_loss(self, hidden: Array, unembed: Array, batch: Batch, chunk: int) -> Array:
        return self.coef * teacher_kl(hidden, unembed, batch, "forward", 0, chunk)
