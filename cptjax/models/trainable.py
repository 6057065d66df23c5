"""Parameter trees: choose the trained leaves, split, join, cast, average and count."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from cptjax.sharding import is_param
from cptjax.types import Params

# Name in `model.freeze` -> top of the tree.
MODEL_PARTS = {"vision": "vision", "merger": "merger", "language": "text"}
ADAPTER_LEAVES = ("lora_a", "lora_b")
STACKS = ("blocks", "deepstack")  # the trees whose leaves have their layers as first axis


def flatten_params(tree: Params) -> dict[tuple[str, ...], Any]:
    return traverse_util.flatten_dict(tree, is_leaf=lambda _, x: is_param(x))


def unflatten_params(flat: dict[tuple[str, ...], Any]) -> Params:
    return traverse_util.unflatten_dict(flat)


def is_trained(freeze: Sequence[str], lora_rank: int = 0) -> Callable[[tuple[str, ...]], bool]:
    """Return a predicate on leaf paths that is True for trained leaves.

    All leaves outside the frozen parts are trained; with adapters, only the adapters among them.
    """
    unknown = set(freeze) - set(MODEL_PARTS)
    if unknown:
        raise ValueError(
            f"model.freeze={list(freeze)}: expected some of {', '.join(MODEL_PARTS)}, "
            f"got {sorted(unknown)}"
        )
    if set(freeze) == set(MODEL_PARTS):
        raise ValueError("model.freeze names every part of the model; nothing is left to train")
    frozen = {MODEL_PARTS[f] for f in freeze}
    return lambda path: path[0] not in frozen and (not lora_rank or is_adapter(path))


def is_adapter(path: tuple[str, ...]) -> bool:
    """Return whether a path is that of a leaf of a low-rank adapter."""
    return path[-1] in ADAPTER_LEAVES


def is_stacked(path: tuple[str, ...]) -> bool:
    """Return whether the first axis of a leaf is that of its layers."""
    return any(name in STACKS for name in path)


def split_params(
    params: Params, trained: Callable[[tuple[str, ...]], bool]
) -> tuple[Params, Params]:
    """Split a tree into two, (trained, rest); each leaf is in one of them."""
    flat = flatten_params(params)
    chosen = {path: leaf for path, leaf in flat.items() if trained(path)}
    rest = {path: leaf for path, leaf in flat.items() if path not in chosen}
    return unflatten_params(chosen), unflatten_params(rest)


def join_params(trained: Params, rest: Params) -> Params:
    """Undo `split_params`; a leaf that is in both trees is taken from `trained`."""
    return unflatten_params({**flatten_params(rest), **flatten_params(trained)})


def cast_params(params: Params, dtype: Any) -> Params:
    """Return the tree with its floating-point leaves cast to `dtype`; int8 weights stay int8."""

    def cast(x: Any) -> Any:
        keep = x.dtype == dtype or not jnp.issubdtype(x.dtype, jnp.floating)
        return x if keep else x.astype(dtype)

    return jax.tree.map(cast, params)


def interpolate(a: Params, b: Params, weight: float | jax.Array) -> Params:
    """Return (1 - weight) a + weight b, computed in float32, in the dtypes of a."""
    # optax.incremental_update adds in the other order, which rounds differently, and computes
    # bfloat16 leaves in bfloat16.
    average = lambda x, y: (1 - weight) * x.astype(jnp.float32) + weight * y.astype(jnp.float32)
    return jax.tree.map(lambda x, y: average(x, y).astype(x.dtype), a, b)


def count_params(params: Params) -> int:
    """Return the number of parameters in a tree of arrays or of Param."""
    return sum(math.prod(x.shape) for x in flatten_params(params).values())
