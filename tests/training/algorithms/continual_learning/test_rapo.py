"""RaPO: the reward for retention, one scale over the stages, and the rewards of a real step."""

import dataclasses

import jax
import numpy as np
import pytest
import stage_fixtures
from method_helpers import stage_end, tree_bytes
from stage_fixtures import method_config, prepare_stage

from cptjax.config import merge_config
from cptjax.training import rollouts
from cptjax.training.algorithms.advantages import compute_advantages
from cptjax.training.algorithms.continual_learning.rapo import RaPO
from cptjax.training.algorithms.continual_learning.table import check_methods

METHOD = RaPO(weight=0.5, alpha=20.0, decay=0.9)


def random_batch(seed: int):
    rng = np.random.default_rng(seed)
    rewards = rng.integers(0, 2, (6, 4)).astype(np.float32)
    keep, drift = rng.random((6, 4)) < 0.8, rng.normal(0, 0.05, (6, 4))
    return rewards, keep, drift


def test_advantages_of_random_batches_by_hand():
    """Three batches: the first one is of the first stage, without drift."""
    carried = average = None
    for seed in range(3):
        rewards, keep, drift = random_batch(seed)
        drift = drift if seed else None
        shaped, carried = METHOD.shape_rewards(rewards, keep, drift, carried)
        found = compute_advantages(shaped, "dr_grpo", keep=keep)

        total = rewards.astype(np.float64)
        if drift is not None:
            total += 0.5 * np.exp(-20 * np.where(drift > 0, drift, 0))
        deviation = total[keep].std(ddof=1)
        average = deviation if average is None else 0.9 * average + 0.1 * deviation
        for q in range(6):
            mean = total[q][keep[q]].mean()
            expected = np.where(keep[q], (total[q] - mean) / average, 0)
            np.testing.assert_allclose(found[q], expected, atol=2e-6)


def test_of_equally_right_responses_the_one_that_drifts_least_is_reinforced():
    drift = np.array([[-0.1, 0.0, 0.01, 0.1]])
    ones = np.ones((1, 4), np.float32)
    shaped, _ = METHOD.shape_rewards(ones, ones > 0, drift, 1.0)
    first, second, third, fourth = compute_advantages(shaped, "dr_grpo")[0]
    assert first == second > third > 0 > fourth


def test_the_scale_goes_on_in_the_next_stage_and_takes_4_bytes():
    _, carried = METHOD.shape_rewards(*random_batch(0), None)
    _, kept = METHOD.stage_end(stage_end(carried=carried))
    assert METHOD.begin_rewards(kept) == pytest.approx(carried, rel=1e-6)
    assert tree_bytes(kept) == 4
    # As long as all rewards are equal, there is no scale.
    rewards = np.ones((2, 3), np.float32)
    shaped, carried = METHOD.shape_rewards(rewards, rewards > 0, None, METHOD.begin_rewards(None))
    np.testing.assert_array_equal(shaped, rewards)
    assert carried is None
    assert METHOD.begin_rewards(METHOD.stage_end(stage_end())[1]) is None


def test_the_rewards_of_a_step_have_the_drift_from_the_start_of_the_stage(tmp_path):
    c = method_config(
        "grpo", method=dict(advantage="dr_grpo", kl_coef=0.0, reward=dict(name="rapo"))
    )
    with prepare_stage(c, tmp_path) as prepared:
        assert prepared.ctx.start is None  # in the first stage
        builder, params = prepared.ctx.builder, prepared.params
        with prepared.ctx.open_stream(0) as stream:
            key = prepared.ctx.step_key(0)
            graded = rollouts.sample_rollouts(builder, params, next(stream), key, 0)
        # In half of the groups one response is right.
        parts = [dict(p, reward=float(i % 4 == 0)) for i, p in enumerate(graded.reward_parts)]
        graded = dataclasses.replace(graded, reward_parts=parts)
        start = jax.tree.map(lambda x: x * 1.01, params)
        step = lambda **more: stage_fixtures.rollout_step_batch(
            builder, params, graded, None, 1, 2, **more
        )
        found = step(start=start, carried={"rapo": 2.0})
        (batch,) = next(found.updates)
        own, other = (np.asarray(builder.score(p, batch)) for p in (params, start))
        mask = np.asarray(batch.mask)
        drift = np.array([(a - b)[m].mean() for a, b, m in zip(own, other, mask, strict=True)])
        assert found.metrics["drift"] == pytest.approx(drift.mean(), abs=1e-6)
        total = graded.rewards + 0.5 * np.exp(-20 * np.maximum(drift, 0)).reshape(-1, 2)
        scale = 0.999 * 2 + 0.001 * total.std(ddof=1)
        assert found.carried == {"rapo": pytest.approx(scale, rel=1e-6)}
        expected = (total - total.mean(1, keepdims=True)) / scale
        np.testing.assert_allclose(
            np.asarray(batch.extra["advantages"]), expected.reshape(-1), atol=1e-6
        )
        same = step(start=params)  # without drift, all get the same reward for retention
        plain = step()
        a, b = (np.asarray(next(s.updates)[0].extra["advantages"]) for s in (same, plain))
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_the_metric_of_the_drift_is_that_of_the_responses_that_are_trained_on():
    method = method_config("dr_grpo", method=dict(reward=dict(name="rapo"))).method
    drift, rewards = np.array([[0.5, 0.0], [0.1, 0.0]]), np.array([[1.0, 0.0], [0.0, 1.0]])
    for keep, metrics in ((drift > 0, {"drift": pytest.approx(0.3)}), (drift < 0, {})):
        assert rollouts._shape_by_methods(method, rewards, keep, drift, {})[2] == metrics


@pytest.mark.parametrize(
    ("method", "changes", "words"),
    [
        ("grpo", {}, "advantage='dr_grpo', got .*advantage='grpo'"),
        ("sft", {}, "expected objective='policy'"),
        ("dr_grpo", dict(decay=1.0), "decay=1.0: expected .* 0 <= decay < 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(method, changes, words):
    c = method_config(method)
    with pytest.raises(ValueError, match=words):
        check_methods(merge_config(c, dict(method=dict(reward=dict(name="rapo", **changes)))))
