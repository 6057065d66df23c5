"""Dark experience replay, DER and DER++ (Buzzega et al. 2020, 2004.07211).

    gradient = gradient of the objective + gradient of the memory's loss
    loss of the memory = alpha * KL(stored distribution || policy), and with DER++
                         + beta * cross-entropy, the means over the response tokens of a batch

The stored distribution is that of the model at the end of the row's stage.

Departures from the paper: 1. It minimizes the squared difference of all logits. A vocabulary has
too many to store, so the distribution of the `top_k` likeliest tokens and of the rest as one token
is compared; its divergence is a lower bound of that of the whole vocabulary. A constant that is
added to all logits changes nothing. 2. It stores the logits of rows as they are trained on; here
they are those of the stage's end. 3. DER++ takes a second batch of the memory for the
cross-entropy; here both terms are of one batch.
"""

import dataclasses

from ml_collections import ConfigDict

from cptjax.models.logprobs import stored_kl
from cptjax.training.algorithms.continual_learning.memory import MemoryMethod, cross_entropy
from cptjax.types import Array, Batch


@dataclasses.dataclass(frozen=True)
class DER(MemoryMethod):
    """Dark experience replay."""

    name = "der"
    alpha: float = 0.5
    top_k: int = 16

    @property
    def stored_logps(self) -> int:
        return self.top_k

    def check(self, config: ConfigDict) -> None:
        if self.top_k < 1:
            raise ValueError(f"{self.name}: top_k={self.top_k}: expected at least 1 token")
        super().check(config)
        self.check_weights()

    def check_weights(self) -> None:
        """Refuse weights of the loss that make no sense."""
        if self.alpha <= 0:
            raise ValueError(f"der: alpha={self.alpha}: expected a number above 0")

    def memory_loss(self, hidden: Array, unembed: Array, batch: Batch, chunk: int) -> Array:
        return self.alpha * memory_kl(hidden, unembed, batch, chunk)


@dataclasses.dataclass(frozen=True)
class DERPP(DER):
    """DER++: with alpha = 0, its updates are those of `er` with coef = beta."""

    name = "derpp"
    beta: float = 0.5

    def check_weights(self) -> None:
        if self.alpha < 0 or self.beta <= 0:
            raise ValueError(
                f"derpp: alpha={self.alpha}, beta={self.beta}: expected alpha >= 0 and beta > 0; "
                "without beta, set name='der'"
            )

    def memory_loss(self, hidden: Array, unembed: Array, batch: Batch, chunk: int) -> Array:
        loss = self.beta * cross_entropy(hidden, unembed, batch, chunk)
        return loss + super().memory_loss(hidden, unembed, batch, chunk) if self.alpha else loss


def memory_kl(hidden: Array, unembed: Array, batch: Batch, chunk: int) -> Array:
    """Return the divergence of the policy from the stored distribution [B A]."""
    flat = lambda x: x.reshape(-1, x.shape[-1])
    ids, logps = flat(batch.extra["memory_ids"]), flat(batch.extra["memory_logps"])
    kl = stored_kl(hidden, unembed, ids, logps, chunk=chunk)
    return kl.reshape(batch.targets.shape)
