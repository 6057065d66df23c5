"""Parameter trees: choose the trained leaves, split, join, cast and count."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from cptjax.sharding import Param, is_param
from cptjax.types import Params

MODEL_PARTS = {
    "vision": "vision",
    "merger": "merger",
    "language": "text",
}  # config name -> top of the tree
ADAPTER_LEAVES = ("lora_a", "lora_b")


def flatten_params(tree: Params) -> dict[tuple[str, ...], Any]:
    return traverse_util.flatten_dict(tree, is_leaf=lambda _, x: is_param(x))


def unflatten_params(flat: dict[tuple[str, ...], Any]) -> Params:
    return traverse_util.unflatten_dict(flat)


def is_trained(freeze: Sequence[str], lora_rank: int = 0) -> Callable[[tuple[str, ...]], bool]:
    """Which leaf paths are trained: all but the frozen parts; with adapters, the adapters alone."""
    unknown = set(freeze) - set(MODEL_PARTS)
    if unknown:
        raise ValueError(
            f"model.freeze names {sorted(unknown)}; expected some of {', '.join(MODEL_PARTS)}"
        )
    if set(freeze) == set(MODEL_PARTS):
        raise ValueError("model.freeze names every part of the model; nothing is left to train")
    frozen = {MODEL_PARTS[f] for f in freeze}
    return lambda path: path[0] not in frozen and (not lora_rank or path[-1] in ADAPTER_LEAVES)


def split_params(
    params: Params, trained: Callable[[tuple[str, ...]], bool]
) -> tuple[Params, Params]:
    """(trained, rest): two trees that hold each leaf once; `join` puts them together."""
    flat = flatten_params(params)
    pick = lambda keep: unflatten_params(
        {path: leaf for path, leaf in flat.items() if trained(path) == keep}
    )
    return pick(True), pick(False)


def join_params(trained: Params, rest: Params) -> Params:
    return unflatten_params({**flatten_params(rest), **flatten_params(trained)})


def cast_params(params: Params, dtype: Any) -> Params:
    """Return the tree with its floating-point leaves in `dtype`; integer leaves (int8 weights) stay."""

    def cast(x: Any) -> Any:
        keep = x.dtype == dtype or not jnp.issubdtype(x.dtype, jnp.floating)
        return x if keep else x.astype(dtype)

    return jax.tree.map(cast, params)


def count_params(params: Params) -> int:
    return sum(
        int(x.size) if hasattr(x, "size") else _size(x) for x in flatten_params(params).values()
    )


def _size(p: Param) -> int:
    n = 1
    for d in p.shape:
        n *= d
    return n
