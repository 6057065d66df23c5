"""Products of bfloat16 matrices on a CPU, several times faster than XLA's default.

CPUs with AMX instructions multiply bfloat16 numbers and add up in float32. XLA:CPU uses these
instructions for x @ w and for products of rows with rows, if the result is float32. For all other
products of bfloat16 it converts the inputs to float32 first. Of a linear map y = x @ w it converts
all three, so they are computed differently here:

    y        x @ w         float32, then rounded
    of x     slope @ w.T   rows with rows, float32, then rounded
    of w     x.T @ slope   x or slope transposed in memory; float32, then rounded

An embedding that is also the unembedding is transposed in memory once per program. On other
platforms XLA's own products are fast.
"""

import jax
import jax.numpy as jnp

from cptjax.sharding import on_cpu
from cptjax.types import Array


def are_faster(x: Array) -> bool:
    """Return whether to use this module for products with x.

    On several devices the transposition would move rows between them.
    """
    devices = jax.sharding.get_abstract_mesh().size
    return x.dtype == jnp.bfloat16 and on_cpu() and devices <= 1


@jax.custom_vjp
def multiply(x: Array, w: Array) -> Array:
    """Return x [M K] @ w [K N] in bfloat16, with sums in float32."""
    return _product(x, w).astype(x.dtype)


def input_gradient(w: Array, slope: Array) -> Array:
    """Return the gradient [M K] of x, given w [K N] and `slope` [M N], that of x @ w."""
    columns = (((1,), (1,)), ((), ()))
    y = jax.lax.dot_general(slope, w, columns, preferred_element_type=jnp.float32)
    return y.astype(w.dtype)


def weight_gradient(x: Array, slope: Array) -> Array:
    """Return the gradient [K N] of w, given x [M K] and `slope` [M N], that of x @ w."""
    if x.shape[1] > slope.shape[1]:  # transpose the narrower matrix
        return _product(transposed(slope), x).astype(x.dtype).T
    return _product(transposed(x), slope).astype(x.dtype)


def _product(x: Array, w: Array) -> Array:
    return jnp.dot(x, w, preferred_element_type=jnp.float32)


@jax.custom_vjp
def transposed(x: Array) -> Array:
    """Return x.T in memory of its own, as two halves.

    XLA would make a plain transposition a part of the product that uses it.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint16)
    halves = jnp.split(bits, [len(x) // 2])
    return jax.lax.bitcast_convert_type(jnp.concatenate([y.T for y in halves], 1), x.dtype)


transposed.defvjp(lambda x: (transposed(x), None), lambda _, slope: (slope.T,))
multiply.defvjp(
    lambda x, w: (multiply(x, w), (x, w)),
    lambda kept, slope: (input_gradient(kept[1], slope), weight_gradient(kept[0], slope)),
)
