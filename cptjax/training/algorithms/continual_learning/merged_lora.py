"""New low-rank adapters in each stage, merged into the weights at its end.

    weights after stage k = W + scale * sum over stages i <= k of A_i B_i

Each stage starts with a random A and B = 0, so it starts at the model of the stage before. The
method keeps the adapters of all finished stages, which is less than the weights; what they add is
computed and added to the weights of the base model in float32, and rounded once to the type of
frozen weights. With model.compute_dtype="bfloat16" the model after a stage therefore differs from
that of its last step by at most one rounding of each weight.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from cptjax.models.lora import merge_adapters, new_adapters
from cptjax.sharding import canonical_sharding
from cptjax.training.algorithms.continual_learning.hooks import (
    ContinualMethod,
    KeptLayout,
    StageEnd,
)
from cptjax.types import Array, Params


@dataclasses.dataclass(frozen=True)
class MergedLora(ContinualMethod):
    """New adapters in each stage."""

    name = "merge_lora"

    def check(self, config: ConfigDict) -> None:
        where, method = f"method.parameters.name={self.name!r}", config.method
        if not config.model.lora.rank:
            raise ValueError(f"{where} needs adapters: set model.lora.rank")
        if not config.train.reset_optimizer:
            raise ValueError(
                f"{where} with train.reset_optimizer=False: new adapters have no moments; set it "
                "to True"
            )
        for hook in ("penalty", "stage_end"):
            if method[hook].name != "none":
                raise ValueError(
                    f"{where} with method.{hook}.name={method[hook].name!r}, which compares the "
                    "adapters of two stages; each stage has new ones: choose one of the two"
                )

    def kept_shapes(self, layout: KeptLayout) -> Params:
        """Return the shapes of the adapters of all stages: their rank is that of all together."""
        return map_adapters(
            lambda x, axis: jax.ShapeDtypeStruct(
                (*x.shape[:axis], x.shape[axis] * layout.stage, *x.shape[axis + 1 :]),
                x.dtype,
                sharding=canonical_sharding(x.sharding),
            ),
            layout.trained,
        )

    def stage_end(self, end: StageEnd) -> tuple[Params, Params]:
        key = jax.random.fold_in(jax.random.key(end.seed), end.stage)
        return new_adapters(end.trained, key), append_adapters(end.kept, end.trained, end.stage)

    def frozen_weights(self, frozen: Params, kept: Params, scale: float) -> Params:
        return merge_adapters(frozen, kept, scale)


def append_adapters(kept: Params | None, adapters: Params, stage: int) -> Params:
    """Return kept adapters with those of a stage, joined along the rank.

    Stages without the method have adapters of zeros.
    """

    def append(new: Array, axis: int, before: Array | None = None) -> Array:
        width = new.shape[axis] * stage
        parts = [] if before is None else [before]
        missing = width - new.shape[axis] - sum(x.shape[axis] for x in parts)
        padding = jnp.zeros((*new.shape[:axis], missing, *new.shape[axis + 1 :]), new.dtype)
        return jnp.concatenate([*parts, padding, new], axis)

    return map_adapters(append, adapters, *([] if kept is None else [kept]))


def map_adapters(function: Any, adapters: Params, *more: Params) -> Params:
    """Call function(leaf, axis of the rank, ...) on each leaf of a tree of adapters."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x, *rest: function(x, 1 if path[-1].key == "lora_b" else x.ndim - 1, *rest),
        adapters,
        *more,
    )
