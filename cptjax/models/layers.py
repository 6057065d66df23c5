"""Layers that both towers share: linear maps, RMS norm, rotary embedding, gated MLP, remat."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from cptjax.models import bfloat16_products
from cptjax.sharding import Initializer, Param
from cptjax.types import Array, Params

zeros, ones = jax.nn.initializers.zeros, jax.nn.initializers.ones

MLP_LINEARS = ("gate", "up", "down")
DECODER_LINEARS = ("q", "k", "v", "o", *MLP_LINEARS)

_policies = jax.checkpoint_policies

# The name that the attention kernels give to the results that their backward pass needs.
ATTENTION_RESULTS = "attention results"


def keep_products_and_attention(primitive: Any, *args: Any, **params: Any) -> bool:
    """Keep products with weights, and results of attention kernels, which take long to repeat."""
    return (
        _policies.dots_with_no_batch_dims_saveable(primitive, *args, **params)
        or _policies.save_only_these_names(ATTENTION_RESULTS)(primitive, *args, **params)
        or primitive.name == "dot_product_attention_fwd_wrapper"  # cuDNN's kernel names nothing
    )


# What is kept in memory for the backward pass, by the name in `model.remat`.
REMAT_POLICIES: dict[str, Callable | None] = {
    # Keep everything: fastest, largest.
    "none": None,
    # Keep the products with weights and the results of attention; recompute elementwise functions.
    "dots": keep_products_and_attention,
    # Keep the input of each layer only: slowest, smallest.
    "block": _policies.nothing_saveable,
    # Keep the products with weights, in host memory; recompute the rest.
    "offload": _policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
}


@functools.cache
def weight_init(inputs: int) -> Initializer:
    """Return a normal initializer of standard deviation inputs ** -0.5, which preserves variance.

    At a width of 2,000 it is about 0.02. At a width of 64 it is six times as large; with 0.02 a
    model of that width would hardly learn.
    """
    return jax.nn.initializers.normal(inputs**-0.5)


def linear_params(
    depth: int, inputs: dict[str, int], outputs: dict[str, int], bias: bool
) -> Params:
    """Declare a linear map from named input axes to named output axes, stacked `depth` times.

    Depth 0 declares one map without a layer axis. The axis name "'" has no sharding rule.
    """
    layer, axis = ((depth,), ("layer",)) if depth else ((), ())
    axes = tuple(name.rstrip("'") or None for name in (*inputs, *outputs))
    w = Param(
        (*layer, *inputs.values(), *outputs.values()),
        (*axis, *axes),
        weight_init(math.prod(inputs.values())),
        len(inputs),
    )
    b = Param((*layer, *outputs.values()), (*axis, *axes[len(inputs) :]), zeros)
    return {"w": w, "b": b} if bias else {"w": w}


def norm_params(depth: int, width: int) -> Param:
    """Declare the scales of an RMS norm, stacked `depth` times (0: not stacked)."""
    return Param((depth, width), ("layer", None), ones) if depth else Param((width,), (None,), ones)


def layer_norm_params(depth: int, width: int) -> Params:
    """Declare the scales and offsets of a layer norm, stacked `depth` times (0: not stacked)."""
    scales = norm_params(depth, width)
    return {"w": scales, "b": dataclasses.replace(scales, init=zeros)}


def linear(p: Params, x: Array, inputs: int = 1, lora_scale: float = 1.0) -> Array:
    """Map x [..., *in] to [..., *out].

    Low-rank adapters are applied if present; int8 weights have one scale per output.
    """
    lead = x.shape[: x.ndim - inputs]
    # Merge the row axes: with several, the gradient of the weight contracts them all, for which
    # XLA:CPU transposes x and y in memory.
    x = x.reshape(-1, *x.shape[x.ndim - inputs :])
    if "int8" in p:
        y = _product(x, p["int8"], inputs) * p["scale"].astype(x.dtype)
    else:
        y = _product(x, p["w"], inputs)
    if "lora_a" in p:
        low = _product(x, p["lora_a"], inputs)
        y = y + _product(low, p["lora_b"], 1) * lora_scale
    if "b" in p:
        y = _in_float32(jnp.add, y, p["b"].astype(x.dtype))
    return y.reshape(*lead, *y.shape[1:])


def _in_float32(f: Callable, *arrays: Array) -> Array:
    """Return f(*arrays), computed in float32, in the dtype of the arrays.

    The gradient of an array that is broadcast is then summed in float32, too.
    """
    return f(*(x.astype(jnp.float32) for x in arrays)).astype(arrays[0].dtype)


def _product(x: Array, w: Array, inputs: int) -> Array:
    """Return the product [M *out] of x [M *in] and w [*in *out]."""
    w = w.astype(x.dtype)
    if bfloat16_products.are_faster(x):
        flat = w.reshape(math.prod(w.shape[:inputs]), -1)
        y = bfloat16_products.multiply(x.reshape(len(x), -1), flat)
        return y.reshape(-1, *w.shape[inputs:])
    return jnp.tensordot(x, w, (tuple(range(1, 1 + inputs)), tuple(range(inputs))))


def _without_ones(x: Array) -> Array:
    """Return x without row axes of size 1.

    With such an axis, XLA:CPU sums products over rows or columns up to twenty times more slowly.
    """
    return x.reshape(*(n for n in x.shape[:-1] if n > 1), x.shape[-1])


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """Normalise in float32, and scale the result in the dtype of x."""
    y = _without_ones(x).astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + eps)
    y = _in_float32(jnp.multiply, y.astype(x.dtype), scale.astype(x.dtype))
    return y.reshape(x.shape)


def layer_norm(p: Params, x: Array, eps: float) -> Array:
    """Subtract the mean, normalise, scale and shift, all in float32."""
    y = _without_ones(x).astype(jnp.float32)
    y = y - jnp.mean(y, -1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + eps)
    y = y * p["w"].astype(jnp.float32) + p["b"].astype(jnp.float32)
    return y.astype(x.dtype).reshape(x.shape)


def rotate(x: Array, rope: tuple[Array, Array]) -> Array:
    """Rotate x [..., heads, H] by the cos and sin [..., H / 2] of its angles.

    Pair i is (x[i], x[i + H / 2]).
    """
    cos, sin = (y[..., None, :] for y in rope)
    a, b = jnp.split(x.astype(jnp.float32), 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


def mlp(p: Params, x: Array, lora_scale: float = 1.0) -> Array:
    """Return down(silu(gate(x)) * up(x))."""
    gate = linear(p["gate"], x, 1, lora_scale)
    up = linear(p["up"], x, 1, lora_scale)
    return linear(p["down"], gated_silu(gate, up), 1, lora_scale)


@jax.custom_vjp
def gated_silu(gate: Array, up: Array) -> Array:
    """Return silu(gate) * up, computed in float32.

    Only `gate` and `up` are kept for the backward pass.
    """
    return _in_float32(lambda gate, up: jax.nn.silu(gate) * up, gate, up)


def gated_silu_gradients(gate: Array, up: Array, slope: Array) -> tuple[Array, Array]:
    """Return the gradients with respect to `gate` and `up`, given `slope`, that of the output."""
    dtype = gate.dtype
    gate, up, slope = (x.astype(jnp.float32) for x in (gate, up, slope))
    share = jax.nn.sigmoid(gate)
    of_gate = slope * up * share * (1 + gate * (1 - share))
    return of_gate.astype(dtype), (slope * gate * share).astype(dtype)


gated_silu.defvjp(
    lambda gate, up: (gated_silu(gate, up), (gate, up)),
    lambda kept, slope: gated_silu_gradients(kept[0], kept[1], slope),
)


def check_remat(name: str) -> None:
    """Refuse an unknown `model.remat`."""
    if name not in REMAT_POLICIES:
        raise ValueError(f"model.remat={name!r}; expected one of {', '.join(REMAT_POLICIES)}")


def apply_remat(step: Callable, name: str) -> Callable:
    """Wrap a layer in `jax.checkpoint` with the named policy."""
    check_remat(name)
    if name == "none":
        return step
    return jax.checkpoint(step, policy=REMAT_POLICIES[name], prevent_cse=False)
