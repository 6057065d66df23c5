"""Text layers outside a loop: weights as a tuple of layers with fused products, faster where a loop copies them (CPU, GPU)."""

import jax
import jax.numpy as jnp

from cptjax.models.config import ModelConfig
from cptjax.models.layers import DECODER_LINEARS
from cptjax.types import Array, Params


def materialise(x: Array) -> Array:
    """x, by way of a product with one: a compiler that sees sines made from positions makes them again in every layer and head."""
    one = jnp.eye(x.shape[-1], dtype=x.dtype)
    return jnp.dot(x.reshape(-1, x.shape[-1]), one, precision="highest").reshape(x.shape)


def fuse_linears(layer: Params) -> Params:
    """A layer with one map to q, k and v and one to gate and up: a few wide products instead of many narrow ones."""
    if any(
        layer[name].keys() - {"w", "b"} for name in DECODER_LINEARS
    ):  # adapters, or integers with their scales
        return layer
    qkv = jax.tree.map(lambda *x: jnp.concatenate(x, -2), *(layer[name] for name in "qkv"))
    both = {"w": jnp.concatenate([layer["gate"]["w"], layer["up"]["w"]], -1)}
    return {k: v for k, v in layer.items() if k not in ("q", "k", "v", "gate", "up")} | {
        "qkv": qkv,
        "gate_up": both,
    }


def unstack_layers(p: Params, cfg: ModelConfig) -> Params:
    """The text blocks as a tuple of layers where `cfg.unroll` asks for it: a loop over stacked weights copies each layer's before use."""
    blocks = p["text"]["blocks"]
    if not cfg.unroll or isinstance(blocks, tuple):
        return p
    mesh = jax.sharding.get_abstract_mesh()
    cut = (
        not mesh.empty and mesh.shape["model"] > 1
    )  # q, k and v are then cut each by its own heads
    layers = (jax.tree.map(lambda x: x[i], blocks) for i in range(cfg.text.depth))
    layers = tuple(layer if cut else fuse_linears(layer) for layer in layers)
    return p | {"text": p["text"] | {"blocks": layers}}


def unstack_for_forward(p: Params, cfg: ModelConfig) -> Params:
    """`unstack`, but not under remat="block": a CPU's compiler orders what is not in a loop for speed, and keeps every layer's arrays."""
    return p if cfg.remat == "block" else unstack_layers(p, cfg)
