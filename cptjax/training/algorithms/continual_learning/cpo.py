"""Continual policy optimization ("RL Forgets!", 2607.04364): weights that moved most stay.

    mask = union over stages of the top share of |end - start| in each tensor
    penalty = coef * sum over tensors of the mean over the mask of |p - start|

This follows the released code: the importance of a parameter is how far a stage moved it, each
tensor has its own threshold, and a parameter that has not moved is not protected. A tensor is one
array of one layer. The release adds the penalty to GSPO, with lambda (coef) 100 and a share of
10 %. It compares the weights of its bfloat16 checkpoints; here they are compared as trained.

The threshold of a tensor is found by bisection, so sharded weights stay where they are.

It keeps 1 byte for each trained parameter.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from ml_collections import ConfigDict

from cptjax.models.trainable import is_stacked
from cptjax.training.algorithms.continual_learning.bisection import (
    largest_integer,
    magnitude_bits,
)
from cptjax.training.algorithms.continual_learning.hooks import (
    ContinualMethod,
    KeptLayout,
    StageEnd,
    float_difference,
    tree_sum,
)
from cptjax.training.algorithms.continual_learning.importance import check_coefficient
from cptjax.training.algorithms.optimizers import parameter_path
from cptjax.types import Array, Params


@dataclasses.dataclass(frozen=True)
class CPO(ContinualMethod):
    """Masked L1 movement."""

    name = "cpo"
    needs_start = True
    coef: float = 100.0
    share: float = 0.1  # of each tensor that a stage protects

    def check(self, config: ConfigDict) -> None:
        check_coefficient(self)
        if not 0 < self.share <= 1:
            raise ValueError(
                f"cpo: share={self.share}: expected the share of protected parameters, "
                "0 < share <= 1"
            )

    def penalty(self, trained: Params, start: Params | None, kept: Any) -> Array | None:
        if kept is None:
            return None

        def means(path: tuple, mask: Array, moved: Array) -> Array:
            axes = tensor_axes(path, mask)
            count = jnp.maximum(mask.sum(axes, dtype=jnp.int32), 1)
            return jnp.where(mask, jnp.abs(moved), 0).sum(axes) / count

        moved = float_difference(trained, start)
        return self.coef * tree_sum(jax.tree_util.tree_map_with_path(means, kept, moved))

    def kept_shapes(self, layout: KeptLayout) -> Any:
        return layout.like_trained(jnp.bool_)

    def stage_end(self, end: StageEnd) -> tuple[Params, Any]:
        mask = jax.tree_util.tree_map_with_path(
            lambda path, p, start: moved_most(p, start, self.share, tensor_axes(path, p)),
            end.trained,
            end.start,
        )
        if end.kept is not None:
            mask = jax.tree.map(jnp.logical_or, mask, end.kept)
        return end.trained, mask


def tensor_axes(path: tuple, x: Array) -> tuple[int, ...]:
    """Return the axes of one tensor: all but that of the layers."""
    return tuple(range(1 if is_stacked(parameter_path(path)) else 0, x.ndim))


@functools.partial(jax.jit, static_argnames=("share", "axes"))
def moved_most(p: Array, start: Array, share: float, axes: tuple[int, ...]) -> Array:
    """Return a mask of the `share` of parameters that moved most, in each slice over `axes`.

    Exactly floor(share * size) are chosen, less those that have not moved. Among equal values, the
    first ones are chosen.
    """
    count = math.floor(math.prod(p.shape[axis] for axis in axes) * share)
    bits = magnitude_bits(p.astype(jnp.float32) - start.astype(jnp.float32))
    total = lambda chosen: chosen.sum(axes, keepdims=True, dtype=jnp.int32)
    threshold = largest_integer(lambda bound: total(bits >= bound) >= count, total(bits))
    above, equal = bits > threshold, bits == threshold
    room, place = count - total(above), _places(p.shape, axes)
    end = largest_integer(lambda bound: total(equal & (place < bound)) <= room, room)
    return (above | (equal & (place < end))) & (bits > 0)


def _places(shape: tuple[int, ...], axes: tuple[int, ...]) -> Array:
    """Return the number of each value in its slice over `axes`."""
    places, stride = jnp.zeros(shape, jnp.int32), 1
    for axis in reversed(axes):
        places += lax.broadcasted_iota(jnp.int32, shape, axis) * stride
        stride *= shape[axis]
    return places
