"""Penalties by finite differences and by hand; averages of weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cptjax.training.algorithms import weight_penalties


def tree(seed):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    return {"vision": None, "text": {"w": normal(3, 2), "b": normal(2)}}


PARAMS, ANCHOR = tree(0), tree(1)
FISHER = jax.tree.map(jnp.square, tree(2))


@pytest.mark.parametrize(
    "penalty",
    [
        lambda p: weight_penalties.l2_distance(p, ANCHOR),
        lambda p: weight_penalties.fisher_distance(p, ANCHOR, FISHER),
    ],
    ids=["l2", "ewc"],
)
def test_gradients_by_finite_differences(penalty):
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
            np.testing.assert_allclose(grads["text"][name][index], slope, rtol=1e-3, atol=1e-4)


def test_values_by_hand():
    p, a = {"w": jnp.array([3.0, 1.0])}, {"w": jnp.array([1.0, 0.0])}
    assert weight_penalties.l2_distance(p, a) == 2.5
    assert weight_penalties.fisher_distance(p, a, {"w": jnp.array([0.5, 4.0])}) == 3.0
    assert weight_penalties.fisher_distance(a, a, {"w": jnp.array([0.5, 4.0])}) == 0


def test_bfloat16_weights_are_compared_in_float32():
    p, a = (
        {"w": jnp.full(1000, x, jnp.bfloat16)} for x in (1.0, 0.00390625)
    )  # the difference has more digits than bfloat16
    np.testing.assert_allclose(weight_penalties.l2_distance(p, a), 500 * 0.99609375**2, rtol=1e-6)


def test_fisher_of_a_softmax_is_the_variance_of_its_score():
    """Three outcomes with equal chances, each seen once: F_j = p_j (1 - p_j) = 2/9."""
    params, fisher = {"z": jnp.zeros(3), "frozen": None}, None
    fisher = weight_penalties.zero_fisher(params)
    for outcome in range(3):
        fisher = weight_penalties.add_fisher(
            fisher, jax.grad(lambda p, y=outcome: jax.nn.log_softmax(p["z"])[y])(params), 3
        )
    np.testing.assert_allclose(fisher["z"], 2 / 9, rtol=1e-6)
    np.testing.assert_allclose(weight_penalties.merge_fisher(fisher, fisher)["z"], 4 / 9, rtol=1e-6)


def test_interpolation():
    half = weight_penalties.interpolate(PARAMS, ANCHOR, 0.25)
    np.testing.assert_allclose(
        half["text"]["b"], 0.75 * PARAMS["text"]["b"] + 0.25 * ANCHOR["text"]["b"], rtol=1e-6
    )
    jax.tree.map(
        np.testing.assert_array_equal, weight_penalties.interpolate(PARAMS, ANCHOR, 0.0), PARAMS
    )
    assert (
        weight_penalties.interpolate({"w": jnp.ones(1, jnp.bfloat16)}, {"w": jnp.zeros(1)}, 0.5)[
            "w"
        ].dtype
        == jnp.bfloat16
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("mas",), "none, ewc, l2, lwf"),
        (("l2", -1.0), "0 or more"),
        (("l2", 0.0), "does nothing"),
        (("ewc", 1.0, 0), "at least 1 example"),
        (("none", 0.0, 1, 1.0), "0 <= average < 1"),
    ],
)
def test_bad_settings_are_one_clear_line(settings, words):
    with pytest.raises(ValueError, match=words) as error:
        weight_penalties.check_penalty(*settings)
    assert "\n" not in str(error.value)
