"""The largest integers for which a condition holds, and the order of magnitudes."""

import jax.numpy as jnp
import numpy as np

from cptjax.training.algorithms.continual_learning.bisection import (
    largest_integer,
    magnitude_bits,
)


def test_each_number_has_a_limit_of_its_own():
    limits = jnp.array([[0, 1, 2**30], [12345, 2**31 - 2, 2**31 - 1]], jnp.int32)
    np.testing.assert_array_equal(largest_integer(lambda x: x <= limits, limits), limits)


def test_bits_have_the_order_of_magnitudes():
    x = np.float32([0, -1e-42, 1e-38, -1e-3, 0.5, -0.50000006, 1e30, -np.inf])
    assert (np.diff(magnitude_bits(jnp.asarray(x))) > 0).all()
    assert magnitude_bits(jnp.float32(-0.0)) == 0
