"""Pieces that both towers share: linear maps, RMS norm, rotary embedding, gated MLP."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from cptjax.sharding import Initializer, Param
from cptjax.types import Array, Params

zeros, ones = jax.nn.initializers.zeros, jax.nn.initializers.ones


@functools.cache
def weight_init(inputs: int) -> Initializer:
    """Weights that keep a signal's size: 0.02 at a width of 2,000, and six times that at 64, where 0.02 would learn next to nothing."""
    return jax.nn.initializers.normal(inputs**-0.5)


def linear_params(
    depth: int, inputs: dict[str, int], outputs: dict[str, int], bias: bool
) -> Params:
    """A stacked linear map from named input axes to named output axes (depth 0: not stacked)."""
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
    return Param((depth, width), ("layer", None), ones) if depth else Param((width,), (None,), ones)


def linear(p: Params, x: Array, inputs: int = 1, lora_scale: float = 1.0) -> Array:
    """x [..., *in] -> [..., *out]; low-rank adapters are added where they are present; integer weights carry a scale per output."""
    lead = x.shape[: x.ndim - inputs]
    # One row axis: with several, the weight's gradient contracts them all and the CPU compiler transposes x and y in memory for it.
    x = x.reshape(-1, *x.shape[x.ndim - inputs :])
    axes = (tuple(range(1, 1 + inputs)), tuple(range(inputs)))
    if "int8" in p:
        y = jnp.tensordot(x, p["int8"].astype(x.dtype), axes) * p["scale"].astype(x.dtype)
    else:
        y = jnp.tensordot(x, p["w"].astype(x.dtype), axes)
    if "lora_a" in p:
        low = jnp.tensordot(x, p["lora_a"].astype(x.dtype), axes)
        y = y + jnp.tensordot(low, p["lora_b"].astype(x.dtype), 1) * lora_scale
    y = y + p["b"].astype(x.dtype) if "b" in p else y
    return y.reshape(*lead, *y.shape[1:])


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """Normalised in float32, scaled in x's type."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + eps)
    return y.astype(x.dtype) * scale.astype(x.dtype)


def rotate(x: Array, rope: tuple[Array, Array]) -> Array:
    """Rotary embedding of x [..., heads, H] by the cos and sin [..., H / 2] of its angles; pair i is (x[i], x[i + H / 2])."""
    cos, sin = (y[..., None, :] for y in rope)
    a, b = jnp.split(x.astype(jnp.float32), 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


def mlp(p: Params, x: Array, lora_scale: float = 1.0) -> Array:
    """down(silu(gate(x)) * up(x))."""
    if "gate_up" in p:
        return linear(p["down"], gated_silu_pair(linear(p["gate_up"], x)))
    return linear(
        p["down"],
        gated_silu(linear(p["gate"], x, 1, lora_scale), linear(p["up"], x, 1, lora_scale)),
        1,
        lora_scale,
    )


@jax.custom_vjp
def gated_silu(gate: Array, up: Array) -> Array:
    """silu(gate) * up; for gradients the two are kept and nothing else, and both gradients are made in one pass."""
    return jax.nn.silu(gate) * up


def _gated_backward(kept: tuple[Array, Array], slope: Array) -> tuple[Array, Array]:
    gate, up = kept
    share = jax.nn.sigmoid(gate)
    return slope * up * share * (1 + gate * (1 - share)), slope * gate * share


gated_silu.defvjp(lambda gate, up: (gated_silu(gate, up), (gate, up)), _gated_backward)


@jax.custom_vjp
def gated_silu_pair(both: Array) -> Array:
    """`gated` of the two halves of [... 2F]."""
    return gated_silu(*jnp.split(both, 2, -1))


gated_silu_pair.defvjp(
    lambda both: (gated_silu_pair(both), both),
    lambda both, slope: (jnp.concatenate(_gated_backward(jnp.split(both, 2, -1), slope), -1),),
)


MLP_LINEARS = ("gate", "up", "down")


DECODER_LINEARS = ("q", "k", "v", "o", *MLP_LINEARS)


_policies = jax.checkpoint_policies


REMAT_POLICIES: dict[str, Callable | None] = {
    "none": None,  # keep everything: fastest, largest
    "dots": _policies.dots_with_no_batch_dims_saveable,  # keep products with weights; recompute attention and elementwise
    "block": _policies.nothing_saveable,  # keep each layer's input only: slowest, smallest
    "offload": _policies.offload_dot_with_no_batch_dims(
        "device", "pinned_host"
    ),  # "dots", kept in host memory
}


def check_remat(name: str) -> None:
    if name not in REMAT_POLICIES:
        raise ValueError(f"model.remat={name!r}; expected one of {', '.join(REMAT_POLICIES)}")


def apply_remat(step: Callable, name: str) -> Callable:
    """The scan body with the named policy."""
    check_remat(name)
    return (
        step
        if name == "none"
        else jax.checkpoint(step, policy=REMAT_POLICIES[name], prevent_cse=False)
    )
