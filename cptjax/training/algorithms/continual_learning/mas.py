"""Memory aware synapses (Aljundi et al. 2018, 1711.09601): importance from the model's outputs.

    importance = sum over stages of the mean over rows of |gradient of N(row)|
    N(row) = mean over the response tokens of the squared L2 norm of their logits
    penalty = coef / 2 * sum importance (p - start)^2

The outputs of a language model are its logits at the response tokens. N is their mean, so long
responses do not count more; the code of MLLM-CTBench (2508.08275) takes the mean too. The
coefficient of the paper is coef / 2.

The logits are computed for `train.chunk` tokens at a time. |h U|^2 = h (U U^T) h would need none of
them, but the product of U with itself costs as much as the logits of D tokens, and a row has fewer
response tokens than the model is wide.

It keeps 4 bytes for each trained parameter.
"""

import dataclasses

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from cptjax.models.logprobs import logit_square_norm
from cptjax.models.packed_groups import by_target
from cptjax.training.algorithms.continual_learning.hooks import GradientPass, StageEnd
from cptjax.training.algorithms.continual_learning.importance import (
    ImportancePenalty,
    check_samples,
)
from cptjax.training.algorithms.losses import Loss
from cptjax.types import Array, Batch, Params


@dataclasses.dataclass(frozen=True)
class OutputNorm:
    """N of each row, summed over the rows."""

    chunk: int

    def __call__(self, hidden: Array, unembed: Array, batch: Batch) -> Loss:
        flat = hidden.reshape(-1, hidden.shape[-1])
        norms = by_target(batch, logit_square_norm(flat, unembed, chunk=self.chunk))
        tokens = jnp.maximum(batch.mask.sum(1), 1)
        means = jnp.where(batch.mask, norms, 0).sum(1) / tokens
        return Loss(means.sum(), batch.mask.any(1).sum(dtype=jnp.float32), {})


def magnitude(gradient: Params) -> Params:
    """Return the absolute value of each number."""
    return jax.tree.map(jnp.abs, gradient)


@dataclasses.dataclass(frozen=True)
class MAS(ImportancePenalty):
    """Memory aware synapses."""

    name = "mas"
    samples: int = 64  # rows of the estimate of the importance

    def check(self, config: ConfigDict) -> None:
        super().check(config)
        check_samples(self)

    def gradient_pass(self, chunk: int) -> GradientPass:
        return GradientPass(OutputNorm(chunk), magnitude, self.samples)

    def stage_importance(self, end: StageEnd) -> Params:
        return end.mean
