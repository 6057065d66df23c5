"""Advantages against the literals of the module's docstring and other numpy code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cptjax.training.algorithms import advantages

REWARDS = np.array([[1, 0, 0], [1, 1, 0]], np.float32)
GREEDY = np.array([0, 1], np.float32)
LITERALS = {
    "reinforce": [[1, 0, 0], [1, 1, 0]],
    "reinforce01": [[1, 0, 0], [1, 1, 0]],
    "remax": [[1, 0, 0], [0, 0, -1]],
    "dr_grpo": [[2 / 3, -1 / 3, -1 / 3], [1 / 3, 1 / 3, -2 / 3]],
    "rloo": [[1, -1 / 2, -1 / 2], [1 / 2, 1 / 2, -1]],
    "grpo": [[1.1547, -0.57735, -0.57735], [0.57735, 0.57735, -1.1547]],
    "batch": [[1.2172, -0.60858, -0.60858], [0.60858, 0.60858, -1.2172]],
    "reinforce++": [[0.91287, -0.91287, -0.91287], [0.91287, 0.91287, -0.91287]],
}
pytestmark = pytest.mark.usefixtures("no_broadcast")


def compute(rewards, name, keep=None, greedy=GREEDY):
    return advantages.compute_advantages(
        rewards, name, greedy=greedy if name == "remax" else None, keep=keep
    )


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
@pytest.mark.parametrize("name", advantages.ADVANTAGES)
def test_the_literals_of_the_docstring(name, array):
    got = compute(array(REWARDS), name, greedy=array(GREEDY))
    assert got.dtype == np.float32 and isinstance(got, np.ndarray) == (array is np.asarray)
    np.testing.assert_allclose(got, LITERALS[name], atol=1e-4)


def by_hand(rewards, name, keep, greedy):
    """Python loops and the statistics module, on float64."""
    import statistics as st

    out = np.zeros(rewards.shape)
    everyone = [float(r) for r, k in zip(rewards.ravel(), keep.ravel(), strict=True) if k]
    for q, g in np.argwhere(keep):
        r, mine = (
            float(rewards[q, g]),
            [float(x) for x, k in zip(rewards[q], keep[q], strict=True) if k],
        )
        others = [
            float(x)
            for h, (x, k) in enumerate(zip(rewards[q], keep[q], strict=True))
            if k and h != g
        ]
        spread = lambda xs: st.stdev(xs) + 1e-6 if len(xs) > 1 else 1e-6
        out[q, g] = {
            "reinforce": lambda: r,
            "reinforce01": lambda: float(r > 0.5),
            "remax": lambda: r - float(greedy[q]),
            "dr_grpo": lambda: r - st.fmean(mine),
            "rloo": lambda: r - st.fmean(others) if others else 0.0,
            "grpo": lambda: (r - st.fmean(mine)) / spread(mine),
            "batch": lambda: (r - st.fmean(mine)) / spread(everyone),
            "reinforce++": lambda: (r - st.fmean(everyone)) / spread(everyone),
        }[name]()
    return out


@pytest.mark.parametrize("excluded", [0.0, 0.3])
@pytest.mark.parametrize("name", advantages.ADVANTAGES)
def test_random_rewards_against_loops(name, excluded):
    rng = np.random.default_rng(0)
    for _ in range(20):
        rewards, greedy = rng.random((5, 4)).astype(np.float32), rng.random(5).astype(np.float32)
        keep = rng.random((5, 4)) >= excluded
        np.testing.assert_allclose(
            compute(rewards, name, keep, greedy),
            by_hand(rewards, name, keep, greedy),
            rtol=1e-3,
            atol=1e-5,
        )


@pytest.mark.parametrize("name", advantages.GROUP_ADVANTAGES)
def test_a_group_of_equal_rewards_gets_exactly_zero(name):
    rng = np.random.default_rng(1)
    rewards = np.repeat(rng.random((200, 1)).astype(np.float32), 7, 1)
    assert (
        np.abs(rewards.mean(1) - rewards[:, 0]).max() > 0
    )  # plain means would leave rounding noise to divide by 1e-6
    assert not np.any(compute(rewards, name))
    keep = rng.random(rewards.shape) > 0.4
    assert not np.any(compute(np.where(keep, rewards, 9), name, keep))


def test_remax_pushes_an_all_equal_group_when_greedy_differs():
    np.testing.assert_array_equal(
        compute(np.ones((1, 3), np.float32), "remax", greedy=np.zeros(1, np.float32)),
        np.ones((1, 3)),
    )


@pytest.mark.parametrize("name", advantages.ADVANTAGES)
def test_the_order_of_groups_and_of_responses_changes_nothing(name):
    rng = np.random.default_rng(2)
    rewards, greedy, q, g = (
        rng.random((6, 4)).astype(np.float32),
        rng.random(6).astype(np.float32),
        rng.permutation(6),
        rng.permutation(4),
    )
    whole = compute(rewards, name, greedy=greedy)
    np.testing.assert_allclose(
        compute(rewards[q][:, g], name, greedy=greedy[q]), whole[q][:, g], rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("name", advantages.ADVANTAGES)
def test_an_excluded_reward_is_never_used(name):
    keep = np.array([[True, True, False], [True, True, True]])
    values = [
        compute(np.where(keep, REWARDS, other).astype(np.float32), name, keep)
        for other in (0, 100, np.nan)
    ]
    for v in values[1:]:
        np.testing.assert_array_equal(v, values[0])
    assert values[0][0, 2] == 0


def test_under_jit():
    np.testing.assert_allclose(
        jax.jit(lambda r: advantages.compute_advantages(r, "grpo"))(REWARDS),
        LITERALS["grpo"],
        atol=1e-4,
    )


def test_dapo_length_penalty_counts_tokens():
    lengths = np.array([[10, 80, 90, 99, 100]])
    np.testing.assert_allclose(
        advantages.overlong_penalty(lengths, 100, 20), [[0, 0, -0.5, -0.95, -1]], atol=1e-6
    )
    assert not np.any(advantages.overlong_penalty(lengths, 100, 0))


def test_truncated_responses():
    rewards, lengths, finished = (
        np.ones((1, 2), np.float32),
        np.array([[3, 8]]),
        np.array([[True, False]]),
    )
    shaped = {
        how: advantages.shape_rewards(
            rewards, lengths, finished, limit=8, truncated=how, overlong=0
        )
        for how in advantages.TRUNCATION_RULES
    }
    np.testing.assert_array_equal(
        [shaped[how][0][0] for how in advantages.TRUNCATION_RULES], [[1, 1], [1, 0], [1, 1]]
    )
    np.testing.assert_array_equal(
        [shaped[how][1][0] for how in advantages.TRUNCATION_RULES], [[1, 1], [1, 1], [1, 0]]
    )
    np.testing.assert_allclose(
        advantages.shape_rewards(
            rewards, lengths, finished, limit=8, truncated="score", overlong=4
        )[0],
        [[1, 0]],
    )


def test_shares_of_groups_without_signal():
    report = advantages.group_metrics(np.array([[1, 1], [0, 0], [0, 1], [0, 0]]))
    assert report == {"all_right": 0.25, "all_wrong": 0.5}


def check(name, group, truncated="score", overlong=0):
    advantages.check_advantage(
        name, group, truncated=truncated, overlong=overlong, max_new_tokens=64
    )


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: check("ppo", 8), "grpo, dr_grpo, rloo"),
        (lambda: check("rloo", 1), "rollout.group >= 2"),
        (lambda: check("reinforce", 0), "at least 1"),
        (lambda: check("grpo", 8, truncated="drop"), "score, zero, mask"),
        (
            lambda: check("grpo", 8, overlong=65),
            "max_new_tokens=64",
        ),
        (lambda: advantages.compute_advantages(REWARDS, "remax"), "needs greedy"),
        (lambda: advantages.compute_advantages(REWARDS, "grpo", greedy=GREEDY), "takes no greedy"),
    ],
)
def test_bad_settings_are_one_clear_line(call, words):
    with pytest.raises(ValueError, match=words) as error:
        call()
    assert "\n" not in str(error.value)
