"""Risks of gradients against risks computed by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from cptjax.analysis import gradient_risk


@pytest.mark.parametrize(
    "p, ratio",
    [(0.01, 0.99), (0.1, 0.90), (0.25, 0.78), (0.5, 1.0), (0.75, 7), (0.9, 73), (0.99, 9703)],
)
def test_the_claim_fails_where_most_responses_are_correct(p, ratio):
    """A softmax of two outcomes, F = I: -log p(a) has the gradient p - onehot(a)."""
    slope = {"right": np.array([p - 1, 1 - p]), "wrong": np.array([p, -p])}
    gradient = lambda name: {"z": jnp.asarray(slope[name], jnp.float32)}
    answers = [("right", 1.0)] * round(100 * p) + [("wrong", 0.0)] * round(100 * (1 - p))
    found = gradient_risk.prompt_risk("x", 2 * (1 - p) ** 2, answers, {"z": jnp.ones(2)}, gradient)
    assert found.ratio == pytest.approx(ratio, rel=0.01)
    assert (found.mean, found.variance) == pytest.approx((p, p * (1 - p)))
    assert found.group == pytest.approx(
        2 * (p * (1 - p)) ** 2, rel=1e-4
    )  # the policy gradient p (1 - p) (1, -1)


def test_equal_rewards_have_no_risk_and_need_no_gradient():
    found = gradient_risk.prompt_risk(
        "x", 1.0, [("a", 1.0), ("b", 1.0)], {"z": jnp.ones(2)}, lambda name: pytest.fail("asked")
    )
    assert (found.rft, found.group, found.ratio) == (0, 0, None)
