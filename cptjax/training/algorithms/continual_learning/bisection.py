"""Bisection for the largest values of sharded arrays: steps only count, nothing is gathered."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax

from cptjax.types import Array


def magnitude_bits(x: Array) -> Array:
    """Return the bits of |x| as float32, int32 numbers that have the order of |x|."""
    return lax.bitcast_convert_type(jnp.abs(x.astype(jnp.float32)), jnp.int32)


def largest_integer(holds: Callable[[Array], Array], like: Array) -> Array:
    """Return the largest numbers from 0 to 2^31 - 1 for which a condition holds.

    The condition takes int32 numbers of the shape of `like`. It holds for 0, and for all numbers
    below one for which it holds.
    """

    def halve(i: Array, low: Array) -> Array:
        raised = low | (jnp.int32(1) << (30 - i).astype(jnp.int32))
        return jnp.where(holds(raised), raised, low)

    return lax.fori_loop(0, 31, halve, jnp.zeros(jnp.shape(like), jnp.int32))
