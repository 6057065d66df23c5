"""Influence of training on one response: the parts that need no run."""

import jax.numpy as jnp
import numpy as np

from cptjax.analysis import influence
from cptjax.models import logprobs


def test_steepness_is_the_squared_gradient_in_the_logits():
    rng = np.random.default_rng(0)
    hidden, unembed, targets = (
        rng.normal(size=(7, 4)),
        rng.normal(size=(4, 9)),
        rng.integers(0, 9, 7),
    )
    arrays = (
        jnp.asarray(hidden, jnp.float32),
        jnp.asarray(unembed, jnp.float32),
        jnp.asarray(targets),
    )
    z = hidden @ unembed
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    expected = np.square(np.eye(9)[targets] - p).sum(1)
    for chunk in (3, 100):
        assert np.allclose(logprobs.logit_gradient_norm(*arrays, chunk=chunk), expected, rtol=1e-5)


def test_asymmetry_is_relative():
    assert influence.asymmetry(np.array([[1.0, -2.0]]), np.array([[1.0, -2.0]])) == 0
    assert influence.asymmetry(np.array([[1.0, 1.0]]), np.array([[-1.0, -1.0]])) == 2
