"""Attention a few rows at a time, so that scores stay in a processor's cache; they are made again for gradients, never kept.

queries [B T N H] --cut--> tiles of r rows: [r K G*T H] x keys [r K S H] -> scores [r K G*T S] -> values
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from cptjax.types import Array

SCORES = 1 << 19  # of a tile: 2 MiB of float32, a core's second-level cache
MASKED = -1e30  # a finite minus infinity: a fully masked row stays finite


def attend_tiled(q: Array, k: Array, v: Array, mask: Array) -> Array:
    """q [B T N H], k and v [B S K H], mask [B T S] -> [B T N H]."""
    return attend_part(q, k, v, mask)[0]


def attend_part(q: Array, k: Array, v: Array, mask: Array) -> tuple[Array, Array]:
    """`attend`, and the logarithm [B T N 1] of each query's normaliser, by which parts over several sets of keys are put together."""
    b, t, n, h = q.shape
    kv, s = k.shape[2], k.shape[1]
    most = max(1, SCORES // (n * t * s))
    rows = max(r for r in range(1, min(most, b) + 1) if b % r == 0)
    turn = lambda x: (
        x.reshape(b // rows, rows, x.shape[1], kv, -1, h)
        .transpose(0, 1, 3, 4, 2, 5)
        .reshape(b // rows, rows, kv, -1, h)
    )
    back = lambda x: x.reshape(b, kv, n // kv, t, -1).transpose(0, 3, 1, 2, 4).reshape(b, t, n, -1)
    out, norm = _tiles(turn(q * h**-0.5), turn(k), turn(v), mask.reshape(b // rows, rows, t, s))
    return back(out), back(norm)


def merge_parts(parts: Sequence[tuple[Array, Array]]) -> Array:
    """Attention over all keys from `part` over some of them."""
    top = functools.reduce(jnp.maximum, [norm for _, norm in parts])
    weights = [jnp.exp(norm - top) for _, norm in parts]
    out = sum(
        out.astype(jnp.float32) * weight for (out, _), weight in zip(parts, weights, strict=True)
    )
    return (out / sum(weights)).astype(parts[0][0].dtype)


def _scores(q: Array, k: Array, mask: Array) -> Array:
    r, kv, x, _ = q.shape
    t, s = mask.shape[1:]
    scores = jnp.einsum("rkxh,rksh->rkxs", q, k, preferred_element_type=jnp.float32).reshape(
        r, kv, x // t, t, s
    )
    return (scores + jnp.where(mask, 0.0, MASKED)[:, None, None]).reshape(r, kv, x, s)


def _tile(q: Array, k: Array, v: Array, mask: Array) -> tuple[Array, Array]:
    """Mixed values, and the logarithm of each query's normaliser."""
    scores = _scores(q, k, mask)
    top = jnp.max(scores, -1, keepdims=True)
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, -1, keepdims=True)
    mixed = jnp.einsum(
        "rkxs,rksh->rkxh", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    return (mixed / total).astype(q.dtype), top + jnp.log(total)


def _tile_gradient(
    q: Array,
    k: Array,
    v: Array,
    mask: Array,
    out: Array,
    norm: Array,
    slope: Array,
    norm_slope: Array,
) -> tuple[Array, Array, Array]:
    probs = jnp.exp(_scores(q, k, mask) - norm)
    product = lambda how, a, b, like: jnp.einsum(
        how, a.astype(b.dtype), b, preferred_element_type=jnp.float32
    ).astype(like.dtype)
    dot = (
        jnp.sum(out.astype(jnp.float32) * slope.astype(jnp.float32), -1, keepdims=True) - norm_slope
    )
    back = probs * (
        jnp.einsum("rkxh,rksh->rkxs", slope, v, preferred_element_type=jnp.float32) - dot
    )
    return (
        product("rkxs,rksh->rkxh", back, k, q),
        product("rkxs,rkxh->rksh", back, q, k),
        product("rkxs,rkxh->rksh", probs, slope, v),
    )


@jax.custom_vjp
def _tiles(q: Array, k: Array, v: Array, mask: Array) -> tuple[Array, Array]:
    return jax.lax.map(lambda tile: _tile(*tile), (q, k, v, mask))


def _forward(q: Array, k: Array, v: Array, mask: Array) -> tuple[tuple[Array, Array], tuple]:
    out, norm = _tiles(q, k, v, mask)
    return (out, norm), (q, k, v, mask, out, norm)


def _backward(kept: tuple, slopes: tuple[Array, Array]) -> tuple:
    return *jax.lax.map(lambda tile: _tile_gradient(*tile), (*kept, *slopes)), None


_tiles.defvjp(_forward, _backward)
