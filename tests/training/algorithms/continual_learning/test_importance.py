"""Quadratic penalties by finite differences and by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from method_helpers import stage_end

from cptjax.training.algorithms.continual_learning.ewc import EWC
from cptjax.training.algorithms.continual_learning.hooks import (
    HookArrays,
    total_penalty,
)
from cptjax.training.algorithms.continual_learning.l2 import L2


def tree(seed):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    return {"vision": None, "text": {"w": normal(3, 2), "b": normal(2)}}


PARAMS, START = tree(0), tree(1)
KEPT = jax.tree.map(jnp.square, tree(2))


@pytest.mark.parametrize("method", [L2(1.5), EWC(1.5)], ids=["l2", "ewc"])
def test_gradients_by_finite_differences(method):
    penalty = lambda p: method.penalty(p, START, KEPT)
    grads = jax.grad(penalty)(PARAMS)
    assert grads["vision"] is None
    for name in ("w", "b"):
        for index in np.ndindex(PARAMS["text"][name].shape):
            moved = [
                {
                    "vision": None,
                    "text": PARAMS["text"] | {name: PARAMS["text"][name].at[index].add(e)},
                }
                for e in (0.1, -0.1)
            ]
            slope = (
                penalty(moved[0]) - penalty(moved[1])
            ) / 0.2  # exact for a quadratic, up to rounding
            np.testing.assert_allclose(grads["text"][name][index], slope, rtol=1e-3, atol=2e-4)


def test_values_by_hand():
    p, a = {"w": jnp.array([3.0, 1.0])}, {"w": jnp.array([1.0, 0.0])}
    f = {"w": jnp.array([0.5, 4.0])}
    assert L2(1.0).penalty(p, a, None) == 2.5
    assert EWC(2.0).penalty(p, a, f) == 6.0
    assert EWC(2.0).penalty(a, a, f) == 0


def test_penalties_of_several_methods_add_up_and_ewc_has_none_in_its_first_stage():
    methods = (L2(0.5), EWC(2.0))
    both = total_penalty(methods, PARAMS, HookArrays(START, {"ewc": KEPT}))
    parts = [L2(0.5).penalty(PARAMS, START, None), EWC(2.0).penalty(PARAMS, START, KEPT)]
    np.testing.assert_allclose(both, sum(parts), rtol=1e-6)
    assert total_penalty(methods, PARAMS, HookArrays(START)) == parts[0]
    assert total_penalty(methods[1:], PARAMS, HookArrays(START)) is None


def test_bfloat16_weights_are_compared_in_float32():
    p, a = (
        {"w": jnp.full(1000, x, jnp.bfloat16)} for x in (1.0, 0.00390625)
    )  # the difference has more digits than bfloat16
    np.testing.assert_allclose(L2(1.0).penalty(p, a, None), 500 * 0.99609375**2, rtol=1e-6)


def test_fisher_of_a_softmax_is_the_variance_of_its_score():
    """Three outcomes with equal chances, each seen once: F_j = p_j (1 - p_j) = 2/9."""
    params = {"z": jnp.zeros(3), "frozen": None}
    transform = EWC(1.0).gradient_pass(8).transform
    rows = [
        transform(jax.grad(lambda p, y=y: jax.nn.log_softmax(p["z"])[y])(params)) for y in range(3)
    ]
    mean = jax.tree.map(lambda *x: sum(x) / 3, *rows)
    np.testing.assert_allclose(mean["z"], 2 / 9, rtol=1e-6)
    _, kept = EWC(1.0).stage_end(stage_end(params, stage=1, start=params, mean=mean))
    np.testing.assert_array_equal(kept["z"], mean["z"])
    _, kept = EWC(1.0).stage_end(stage_end(params, stage=2, start=params, kept=kept, mean=mean))
    np.testing.assert_allclose(kept["z"], 4 / 9, rtol=1e-6)
