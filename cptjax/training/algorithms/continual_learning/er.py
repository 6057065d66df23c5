"""Experience replay from a memory (Chaudhry et al. 2019, 1902.10486).

    gradient = gradient of the objective + coef * gradient of the memory's loss
    loss of the memory = mean cross-entropy on a batch of its rows

The paper takes one mean over a batch of the new task and an equally large batch of the memory. Two
means with coef = 1 have twice its gradient; they allow objectives other than cross-entropy.
"""

import dataclasses

from ml_collections import ConfigDict

from cptjax.training.algorithms.continual_learning.importance import check_coefficient
from cptjax.training.algorithms.continual_learning.memory import MemoryMethod, cross_entropy
from cptjax.types import Array, Batch


@dataclasses.dataclass(frozen=True)
class ER(MemoryMethod):
    """Experience replay."""

    name = "er"
    coef: float = 1.0

    def check(self, config: ConfigDict) -> None:
        super().check(config)
        check_coefficient(self)

    def memory_loss(self, hidden: Array, unembed: Array, batch: Batch, chunk: int) -> Array:
        return self.coef * cross_entropy(hidden, unembed, batch, chunk)
