"""The weights as rollouts want them, by one jitted pass: in their own type, gathered over `fsdp`, or as eight-bit integers."""

import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from cptjax.models import unrolled
from cptjax.models.config import ModelConfig
from cptjax.models.layers import DECODER_LINEARS
from cptjax.types import Array, Params


def prepare_rollout_weights(
    params: Params,
    cfg: ModelConfig,
    *,
    dtype: Any = jnp.bfloat16,
    gather: bool = False,
    int8: bool = False,
) -> Params:
    """Weights for `sampler.sample`: cast; `gather` copies them to every member of `fsdp`; `int8` rounds the text blocks."""
    if int8 and importlib.util.find_spec("qwix") is None:
        raise ValueError(
            "rollout.dtype='int8' needs the package qwix; install it with: pip install 'cptjax[int8]'"
        )
    leaves, tree = jax.tree.flatten(params)
    where = tuple(without_fsdp(x.sharding) if gather else None for x in leaves)
    return layout_program(cfg, jnp.dtype(dtype), int8, tree, where)(params)


@functools.lru_cache(maxsize=32)
def layout_program(cfg: ModelConfig, dtype: Any, int8: bool, tree: Any, where: tuple) -> Any:
    """One compiled layout change per kind of tree."""
    place = lambda x, s: x if s is None else jax.lax.with_sharding_constraint(x, s)

    def run(params: Params) -> Params:
        params = tree.unflatten(
            [place(x.astype(dtype), s) for x, s in zip(jax.tree.leaves(params), where, strict=True)]
        )
        return unrolled.unstack_layers(_quantise(params) if int8 else params, cfg)

    return jax.jit(run)


def without_fsdp(old: Any) -> Any:
    """A leaf's sharding without its `fsdp` axis."""
    if not isinstance(old, NamedSharding):
        return None
    keep = lambda axis: (
        tuple(a for a in axis if a != "fsdp") or None
        if isinstance(axis, tuple)
        else None
        if axis == "fsdp"
        else axis
    )
    return NamedSharding(old.mesh, PartitionSpec(*map(keep, old.spec)))


def _quantise(params: Params) -> Params:
    """The linear maps of the text blocks as {int8, scale}: one scale per layer and output, so that it multiplies the product."""
    blocks = {
        name: _quantise_linear(p, 2 if name == "o" else 1) if name in DECODER_LINEARS else p
        for name, p in params["text"]["blocks"].items()
    }
    return params | {"text": params["text"] | {"blocks": blocks}}


def _quantise_linear(linear: dict[str, Array], inputs: int) -> dict[str, Array]:
    import qwix

    w = linear["w"]
    q = qwix.quantize(w, "int8", channelwise_axes=(0, *range(1 + inputs, w.ndim)))
    rest = {name: x for name, x in linear.items() if name != "w"}
    return rest | {"int8": q.qvalue, "scale": q.scale.reshape(w.shape[0], *w.shape[1 + inputs :])}
