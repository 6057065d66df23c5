"""Checksums of arrays: the same on every mesh, and different after any change of one element.

Each element is mixed with its position in the array by an invertible function, and the results are
added up: two sums modulo 2^32. A sum does not depend on how an array is sharded, and each device
reads only its own part. A change of one element always changes the sums; changes of several cancel
with a probability of about 2^-64.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

SEED = 0x9E3779B9  # added to the positions, so that the first is not 0


def array_checksums(tree: Any) -> dict[str, str]:
    """Return the checksum of every array in a tree, by path; all processes call it together."""
    paths, leaves = zip(*jax.tree_util.tree_leaves_with_path(tree), strict=True)
    sums = np.asarray(_sum_program(_replicated(leaves))(leaves))
    names = map(jax.tree_util.keystr, paths)
    return {name: f"{a:08x}{b:08x}" for name, (a, b) in zip(names, sums.tolist(), strict=True)}


def changed_arrays(tree: Any, checksums: Mapping[str, str]) -> list[str]:
    """Return the paths of the arrays whose checksum differs."""
    found = array_checksums(tree)
    return [path for path in found if checksums.get(path) != found[path]]


def _replicated(leaves: tuple[jax.Array | np.ndarray, ...]) -> Any:
    """Return the sharding of a result that every process reads."""
    for leaf in leaves:
        if isinstance(getattr(leaf, "sharding", None), NamedSharding):  # a host array has none
            return NamedSharding(leaf.sharding.mesh, PartitionSpec())
    return None


@functools.cache
def _sum_program(sharding: Any) -> Any:
    def checksums(leaves: tuple[jax.Array, ...]) -> jax.Array:
        return jnp.stack([_checksum(x) for x in leaves])

    return jax.jit(checksums, out_shardings=sharding)


@jax.jit  # traced once for all arrays of a shape and type
def _checksum(x: jax.Array) -> jax.Array:
    """Return two sums [2] modulo 2^32."""
    words = _as_words(x)
    position = jnp.zeros(words.shape, jnp.uint32)
    for axis in range(words.ndim):
        stride = math.prod(words.shape[axis + 1 :]) % 2**32
        position += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * np.uint32(stride)
    mixed = _mix(words ^ _mix(position + np.uint32(SEED)))
    again = (mixed ^ (mixed >> 15)) * np.uint32(0x27D4EB2F)  # not linear in `mixed`
    # Both sums in one pass: on a CPU four times as fast as two `jnp.sum`.
    zero, axes = np.uint32(0), tuple(range(words.ndim))
    add = lambda a, b: (a[0] + b[0], a[1] + b[1])
    return jnp.stack(jax.lax.reduce((mixed, again), (zero, zero), add, axes))


def _as_words(x: jax.Array) -> jax.Array:
    """Return the bits of each element as an integer of 32 bits."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    width = x.dtype.itemsize
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[width]
    return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
    """Mix the bits of each word; the function is invertible (the finaliser of MurmurHash3)."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
