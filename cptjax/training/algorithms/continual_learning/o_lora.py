"""O-LoRA (Wang et al. 2023, 2310.14152): new adapters, orthogonal to those of earlier stages.

    penalty = coef * sum over earlier stages i and adapted weights of |A_i^T A|^2

A [inputs, rank] spans the inputs to which a stage responds. The adapters of earlier stages are
frozen and merged, see `merged_lora`. The coefficient is the paper's. Its released code sums
absolute values instead of squares, and can add the norms of A and B to the loss.
"""

import dataclasses

import jax.numpy as jnp
from ml_collections import ConfigDict

from cptjax.models.trainable import flatten_params
from cptjax.training.algorithms.continual_learning.importance import check_coefficient
from cptjax.training.algorithms.continual_learning.merged_lora import MergedLora
from cptjax.types import Array, Params


@dataclasses.dataclass(frozen=True)
class OLoRA(MergedLora):
    """New adapters in each stage, with a penalty on their overlap with earlier ones."""

    name = "o_lora"
    coef: float = 0.5

    def check(self, config: ConfigDict) -> None:
        super().check(config)
        check_coefficient(self)

    def penalty(self, trained: Params, start: Params | None, kept: Params | None) -> Array | None:
        if kept is None:
            return None
        earlier = flatten_params(kept)
        return self.coef * sum(
            overlap(earlier[path], a)
            for path, a in flatten_params(trained).items()
            if path[-1] == "lora_a"
        )


def overlap(a: Array, b: Array) -> Array:
    """Return the sum of |a^T b|^2 over layers; a, b [L, *inputs, rank]."""
    a, b = (x.astype(jnp.float32).reshape(len(x), -1, x.shape[-1]) for x in (a, b))
    return jnp.sum(jnp.square(jnp.einsum("lir,lis->lrs", a, b)))
