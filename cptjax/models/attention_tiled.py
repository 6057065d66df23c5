"""Attention for CPUs: a few rows at a time, so that the scores of a tile stay in the cache.

The backward pass computes the scores again instead of keeping them.

    queries [B T N H] -> tiles of r rows [r K G*T H] x keys [r K S H] -> scores [r K G*T S]
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from cptjax.models.layers import ATTENTION_RESULTS
from cptjax.types import Array

SCORES = 1 << 19  # scores of a tile: 2 MiB of float32, the second-level cache of a core
MASKED = -1e30  # a finite minus infinity: a fully masked row stays finite


def attend_tiled(q: Array, k: Array, v: Array, mask: Array) -> Array:
    """Return the attention [B T N H] of q [B T N H], k and v [B S K H] and mask [B T S]."""
    return attend_part(q, k, v, mask)[0]


def attend_group_tiled(
    q: Array, prompt_k: Array, prompt_v: Array, own_k: Array, own_v: Array, segments: Array
) -> Array:
    """Compute `attention.attend_shared` in two parts, and merge them.

    In the first, all responses of a group attend to the prompt as one row of queries. In the
    second, each response attends to its own past.
    """
    nq, g, r, n, h = q.shape

    def rows(x):
        return x.reshape(nq * g, *x.shape[2:])

    queries = q.reshape(nq, g * r, n, h)
    prompt_mask = jnp.broadcast_to((segments > 0)[:, None], (nq, g * r, segments.shape[1]))
    shared = attend_part(queries, prompt_k, prompt_v, prompt_mask)
    causal = jnp.broadcast_to(jnp.tril(jnp.ones((r, r), bool)), (nq * g, r, r))
    own = attend_part(rows(q), rows(own_k), rows(own_v), causal)
    return merge_parts([[x.reshape(nq, g, r, n, -1) for x in part] for part in (shared, own)])


def attend_part(q: Array, k: Array, v: Array, mask: Array) -> tuple[Array, Array]:
    """Return the mixed values [B T N H] and the logarithm [B T N 1] of each query's normaliser.

    `merge_parts` uses the normalisers to join the results of several sets of keys.
    """
    b, t, n, h = q.shape
    kv, s = k.shape[2], k.shape[1]
    most = max(1, SCORES // (n * t * s))
    rows = max(r for r in range(1, min(most, b) + 1) if b % r == 0)

    def to_tiles(x):  # [B T N H] -> [tiles r K G*T H]
        x = x.reshape(b // rows, rows, x.shape[1], kv, -1, h)
        return x.transpose(0, 1, 3, 4, 2, 5).reshape(b // rows, rows, kv, -1, h)

    def from_tiles(x):
        x = x.reshape(b, kv, n // kv, t, -1)
        return x.transpose(0, 3, 1, 2, 4).reshape(b, t, n, -1)

    tiles = to_tiles(q * h**-0.5), to_tiles(k), to_tiles(v)
    out, norm = _tiles(*tiles, mask.reshape(b // rows, rows, t, s))
    return from_tiles(out), from_tiles(norm)


def merge_parts(parts: Sequence[tuple[Array, Array]]) -> Array:
    """Join the results of `attend_part` over several sets of keys."""
    top = functools.reduce(jnp.maximum, [norm for _, norm in parts])
    weights = [jnp.exp(norm - top) for _, norm in parts]
    pairs = zip(parts, weights, strict=True)
    mixed = sum(out.astype(jnp.float32) * weight for (out, _), weight in pairs)
    return (mixed / sum(weights)).astype(parts[0][0].dtype)


_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _scores(q: Array, k: Array, mask: Array) -> Array:
    r, kv, x, _ = q.shape
    t, s = mask.shape[1:]
    scores = _product("rkxh,rksh->rkxs", q, k).reshape(r, kv, x // t, t, s)
    return (scores + jnp.where(mask, 0.0, MASKED)[:, None, None]).reshape(r, kv, x, s)


def _tile(q: Array, k: Array, v: Array, mask: Array) -> tuple[Array, Array]:
    """Return the mixed values of a tile and the logarithm of each query's normaliser."""
    scores = _scores(q, k, mask)
    top = jnp.max(scores, -1, keepdims=True)
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, -1, keepdims=True)
    mixed = _product("rkxs,rksh->rkxh", weights.astype(v.dtype), v)
    return mixed / total, top + jnp.log(total)


def _tile_gradient(
    q: Array, k: Array, v: Array, mask: Array, norm: Array, slope: Array, shift: Array
) -> tuple[Array, Array, Array]:
    """Return the gradients with respect to queries, keys and values.

    shift: [r K X 1] what the softmax subtracts from the gradients of a query's scores
    """
    probs = jnp.exp(_scores(q, k, mask) - norm)
    score_slope = probs * (_product("rkxh,rksh->rkxs", slope, v) - shift)
    return (
        _product("rkxs,rksh->rkxh", score_slope.astype(k.dtype), k),
        _sum_over_queries(score_slope.astype(q.dtype), q),
        _sum_over_queries(probs.astype(slope.dtype), slope),
    )


def _sum_over_queries(weights: Array, rows: Array) -> Array:
    """Return the sums [r K S H] of rows [r K X H] over the queries X, with weights [r K X S].

    For bfloat16 the weights are transposed in memory (see bfloat16_products.py).
    """
    if rows.dtype != jnp.bfloat16:
        return _product("rkxs,rkxh->rksh", weights, rows)
    weights = jax.lax.optimization_barrier(jnp.swapaxes(weights, -1, -2))
    return _product("rksx,rkxh->rksh", weights, rows)


@jax.custom_vjp
def _tiles(q: Array, k: Array, v: Array, mask: Array) -> tuple[Array, Array]:
    # XLA:CPU writes a slice of a bfloat16 array by converting the whole array twice, so tiles give
    # float32.
    out, norm = jax.lax.map(lambda tile: _tile(*tile), (q, k, v, mask))
    return out.astype(q.dtype), norm


def _forward(q: Array, k: Array, v: Array, mask: Array) -> tuple[tuple[Array, Array], tuple]:
    out, norm = checkpoint_name(_tiles(q, k, v, mask), ATTENTION_RESULTS)
    return (out, norm), (q, k, v, mask, out, norm)


def _backward(kept: tuple, slopes: tuple[Array, Array]) -> tuple:
    q, k, v, mask, out, norm = kept
    slope, norm_slope = slopes
    shift = _product("irkxh,irkxh->irkx", out, slope)[..., None] - norm_slope
    tiles = (q, k, v, mask, norm, slope, shift)
    gradients = jax.lax.map(lambda tile: _tile_gradient(*tile), tiles)
    return *(g.astype(x.dtype) for g, x in zip(gradients, (q, k, v), strict=True)), None


_tiles.defvjp(_forward, _backward)
