"""LoRA: declare low-rank adapters in a parameter tree, create them, merge them into weights."""

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from cptjax.models.layers import DECODER_LINEARS, zeros
from cptjax.models.trainable import (
    flatten_params,
    is_adapter,
    is_trained,
    split_params,
    unflatten_params,
)
from cptjax.sharding import Initializer, Param
from cptjax.types import Array, Params


def check_lora(freeze: Sequence[str], rank: int, vision: bool) -> None:
    """Refuse adapters (`model.lora`) that `model.freeze` would keep from being trained."""
    is_trained(freeze, rank)
    if rank and vision and "vision" in freeze:
        raise ValueError(
            "model.freeze names vision, and model.lora.vision=True adapts it; change one of them"
        )
    if rank and not vision and "language" in freeze:
        raise ValueError(
            "model.freeze names language, and model.lora.vision=False adapts nothing else; "
            "change one of them"
        )


def check_targets(targets: Sequence[str]) -> None:
    """Refuse names in `model.lora.targets` that are no weights of the decoder."""
    if not targets or not set(targets) <= set(DECODER_LINEARS):
        raise ValueError(
            f"model.lora.targets={tuple(targets)}: expected some of {', '.join(DECODER_LINEARS)}"
        )


def add_lora(
    params: Params,
    rank: int,
    targets: Sequence[str] = DECODER_LINEARS,
    vision: Mapping[str, str] | None = None,
) -> Params:
    """Declare adapters of the targeted weights: y += (x a) b * alpha / rank.

    The tree of Param gains a random `lora_a` and a zero `lora_b` next to each such `w`.
    vision: the names that the targets have in the vision tower (`ImageTower.adapters`); None = the
        tower gets no adapters.
    """
    if rank < 1 or not targets or not set(targets) <= set(DECODER_LINEARS):
        raise ValueError(
            f"model.lora: expected rank >= 1 and targets among {', '.join(DECODER_LINEARS)}, "
            f"got rank={rank} targets={tuple(targets)}"
        )
    names = {"text": set(targets)}
    if vision is not None:
        names["vision"] = {vision[name] for name in targets}
    flat = flatten_params(params)
    out = dict(flat)
    for path, p in flat.items():
        if len(path) != 4 or path[-1] != "w" or path[2] not in names.get(path[0], ()):
            continue
        i = 1 + p.inputs  # the layer axis, then the inputs
        out[*path[:3], "lora_a"] = Param(
            (*p.shape[:i], rank), (*p.axes[:i], "rank"), adapter_init(i + 1), p.inputs
        )
        out[*path[:3], "lora_b"] = Param(
            (p.shape[0], rank, *p.shape[i:]), (p.axes[0], "rank", *p.axes[i:]), zeros, 1
        )
    return unflatten_params(out)


@functools.cache  # so that equal adapters share the program that creates them
def adapter_init(ndim: int) -> Initializer:
    """Return the initializer of a `lora_a` with `ndim` axes: layer, inputs, rank."""
    return jax.nn.initializers.variance_scaling(
        1 / 3, "fan_in", "uniform", in_axis=tuple(range(1, ndim - 1)), out_axis=-1, batch_axis=0
    )


def new_adapters(like: Params, key: jax.Array) -> Params:
    """Return new adapters, which have no effect, with the shapes and shardings of others."""

    def make(key: jax.Array) -> Params:
        out = {}
        for i, (path, x) in enumerate(sorted(flatten_params(like).items())):
            init = adapter_init(x.ndim) if path[-1] == "lora_a" else zeros
            out[path] = init(jax.random.fold_in(key, i), x.shape, jnp.float32).astype(x.dtype)
        return unflatten_params(out)

    return jax.jit(make, out_shardings=jax.tree.map(lambda x: x.sharding, like))(key)


def merge_lora(params: Params, scale: float) -> Params:
    """Return the parameters with every adapter merged into its weight, in the weight's type."""
    adapters, rest = split_params(params, is_adapter)
    return merge_adapters(rest, adapters, scale)


def merge_adapters(params: Params, adapters: Params, scale: float) -> Params:
    """Return the parameters with `adapters` merged, in the types and shardings of the weights."""
    flat, out = flatten_params(adapters), flatten_params(params)
    for path, a in flat.items():
        if path[-1] == "lora_a":
            module = path[:-1]
            w = out[*module, "w"]
            merged = _merge_layers(w, a, flat[*module, "lora_b"], scale)
            out[*module, "w"] = jax.device_put(merged, w.sharding)
    return unflatten_params(out)


@jax.jit
def merge_weight(w: Array, a: Array, b: Array, scale: float) -> Array:
    """Return w [*in *out] + scale * a [*in rank] b [rank *out] of one layer, in float32."""
    delta = jnp.tensordot(a.astype(jnp.float32), b.astype(jnp.float32), 1)
    return w.astype(jnp.float32) + scale * delta


@jax.jit
def _merge_layers(w: Array, a: Array, b: Array, scale: float) -> Array:
    merged = jax.vmap(merge_weight, in_axes=(0, 0, 0, None))(w, a, b, scale)
    return merged.astype(w.dtype)
