"""Small parameter trees and ends of stages for tests of continual-learning methods."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cptjax.training.algorithms.continual_learning.hooks import KeptLayout, StageEnd

SHAPES = {"embed": (7, 4), "blocks": {"q": (2, 5, 6), "norm1": (2, 30)}}  # of two layers


def random_tree(seed: int) -> dict[str, Any]:
    """Return normal parameters, with a frozen vision tower."""
    rng = np.random.default_rng(seed)
    normal = lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    return {"vision": None, "text": jax.tree.map(normal, SHAPES, is_leaf=_is_shape)}


def _is_shape(x: Any) -> bool:
    return isinstance(x, tuple)


def stage_end(trained: Any = None, **known: Any) -> StageEnd:
    """Return the end of a stage with what a method needs."""
    fields = dict.fromkeys(StageEnd.__dataclass_fields__)
    return StageEnd(**fields | dict(trained=trained, unmerged=trained) | known)


def tree_bytes(tree: Any) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def assert_kept_as_planned(method: Any, kept: Any, bytes_each: int) -> None:
    """The method keeps so many bytes for each parameter of `random_tree`, as it plans."""
    trained = random_tree(0)
    place = jax.tree.leaves(trained)[0].sharding
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), trained
    )
    planned = method.kept_shapes(KeptLayout(abstract, None, 1))
    layout = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert layout(kept) == layout(planned)
    assert tree_bytes(kept) == bytes_each * sum(x.size for x in jax.tree.leaves(trained))
