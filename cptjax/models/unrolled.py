"""Run the decoder's layers without a loop and with fused products, which is faster on CPUs.

A loop over stacked weights copies the weights of each layer before it uses them, and many narrow
products are slower than a few wide ones (when decoding, also on GPUs). `ComputeConfig.unroll`, or
`unroll_sampling` for sampling only, selects another form of the same weights:

    stacked    blocks = {"q": {"w": [L D N H]}, ...}, run by jax.lax.scan
    unrolled   blocks = ({"qkv": {"w": [D N+2K H]}, "gate_up": {"w": [D 2F]}, ...}, ...), L layers

Only this module knows the second form. The decoder calls `scan_layers` for its loop, `fused_heads`
and `fused_mlp` for fused layers, `read_layer`, `key_axis` and `write_column` for caches.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from cptjax import sharding
from cptjax.models.config import ModelConfig
from cptjax.models.layers import (
    DECODER_LINEARS,
    gated_silu,
    gated_silu_gradients,
    linear,
)
from cptjax.types import Array, Params

Blocks = Params | tuple[Params, ...]  # stacked | unrolled
LayerArrays = Array | tuple[Array, ...]  # [L ...] | L x [...]


def unstack_layers(p: Params, cfg: ModelConfig) -> Params:
    """Return the parameters for sampling, with unrolled text blocks if the config says so."""
    blocks = p["text"]["blocks"]
    if not cfg.compute.samples_unrolled or isinstance(blocks, tuple):
        return p
    # Tensor parallelism shards q, k and v by their own heads, so they stay separate.
    separate = sharding.decoder_shards() > 1
    layers = (jax.tree.map(lambda x: x[i], blocks) for i in range(cfg.text.depth))
    layers = tuple(layer if separate else _fuse_linears(layer) for layer in layers)
    return p | {"text": p["text"] | {"blocks": layers}}


def unstack_for_forward(p: Params, cfg: ModelConfig) -> Params:
    """Return the parameters for a forward pass, unrolled if `unroll` is set and remat not "block".

    XLA:CPU schedules unrolled layers for speed and would keep the arrays of all of them in memory.
    """
    unroll = cfg.compute.unroll and cfg.compute.remat != "block"
    return unstack_layers(p, cfg) if unroll else p


def _fuse_linears(layer: Params) -> Params:
    """Return the layer with one map to q, k and v, and one map to gate and up."""
    if any(layer[name].keys() - {"w", "b"} for name in DECODER_LINEARS):
        return layer  # it has adapters, or int8 weights with scales
    qkv = jax.tree.map(lambda *x: jnp.concatenate(x, -2), *(layer[name] for name in "qkv"))
    gate_up = {"w": jnp.concatenate([layer["gate"]["w"], layer["up"]["w"]], -1)}
    separate = ("q", "k", "v", "gate", "up")
    rest = {name: p for name, p in layer.items() if name not in separate}
    return rest | {"qkv": qkv, "gate_up": gate_up}


def is_fused(layer: Params) -> bool:
    """Return whether the maps of a layer are fused."""
    return "qkv" in layer


def fused_heads(p: Params, y: Array, cfg: ModelConfig) -> tuple[Array, Array, Array]:
    """Return what `decoder.project_heads` returns, with one product."""
    n, k = cfg.text.heads, cfg.text.kv_heads
    return tuple(jnp.split(linear(p["qkv"], y), (n, n + k), -2))


def fused_mlp(p: Params, x: Array) -> Array:
    """Return what `layers.mlp` returns, with two products instead of three."""
    return linear(p["down"], _gated_silu_of_halves(linear(p["gate_up"], x)))


@jax.custom_vjp
def _gated_silu_of_halves(both: Array) -> Array:
    """Return `gated_silu` of the two halves of [... 2F]; its gradient is one array [... 2F]."""
    return gated_silu(*jnp.split(both, 2, -1))


def _gradient_of_halves(both: Array, slope: Array) -> tuple[Array]:
    gate, up = jnp.split(both, 2, -1)
    return (jnp.concatenate(gated_silu_gradients(gate, up, slope), -1),)


_gated_silu_of_halves.defvjp(lambda both: (_gated_silu_of_halves(both), both), _gradient_of_halves)


def scan_layers(step: Callable, carry: Any, *layers: Any) -> tuple[Any, Any]:
    """Scan `step(carry, *layer)` over stacked layers, or loop over unrolled ones in Python.

    Each output of the Python loop is a tuple of one array per layer.
    """
    if not isinstance(layers[0], tuple):
        return jax.lax.scan(lambda carry, layer: step(carry, *layer), carry, layers)
    outputs = []
    for layer in zip(*layers, strict=True):
        carry, output = step(carry, *layer)
        outputs.append(output)
    return carry, jax.tree.map(lambda *x: x, *outputs)


def layer_numbers(blocks: Blocks, depth: int) -> Any:
    """Return the numbers of the layers, for `scan_layers` to scan with the blocks."""
    return range(depth) if isinstance(blocks, tuple) else jnp.arange(depth)


def read_layer(cache: LayerArrays, layer: Any) -> Array:
    """Return a layer's part of a cache."""
    if isinstance(cache, tuple):
        return cache[layer]
    return jax.lax.dynamic_index_in_dim(cache, layer, keepdims=False)


def key_axis(cache: LayerArrays) -> int:
    """Return the axis of the columns of cached keys: -2 of [W H] if stacked, else -1 of [H W].

    A TPU writes a column of [W H] in whole tiles. XLA:CPU multiplies faster by [H W].
    """
    return -1 if isinstance(cache, tuple) else -2


def write_column(cache: LayerArrays, layer: Any, new: Array, column: Array, axis: int) -> Any:
    """Write new [Q G K H] into a layer of a cache, at `column` of `axis`, a negative number."""
    unrolled = isinstance(cache, tuple)
    old = cache[layer] if unrolled else cache
    new = jnp.expand_dims(new, axis).astype(old.dtype)
    start = [0] * old.ndim
    start[axis] = column
    if unrolled:
        written = jax.lax.dynamic_update_slice(old, new, start)
        return (*cache[:layer], written, *cache[layer + 1 :])
    start[0] = layer
    return jax.lax.dynamic_update_slice(old, new[None], start)


def compute_rope_once(rope: tuple[Array, Array], blocks: Blocks) -> tuple[Array, Array]:
    """Return cos and sin, multiplied by the identity matrix if the layers are unrolled.

    XLA:CPU would compute the sines again in every layer and head; it does not recompute a matrix
    product.
    """
    if not isinstance(blocks, tuple):
        return rope

    def times_identity(x: Array) -> Array:
        one = jnp.eye(x.shape[-1], dtype=x.dtype)
        return jnp.dot(x.reshape(-1, x.shape[-1]), one, precision="highest").reshape(x.shape)

    return jax.tree.map(times_identity, rope)
