"""Synaptic intelligence: the path integral, the importance, and the memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from method_helpers import assert_kept_as_planned, random_tree, stage_end, tree_bytes
from stage_fixtures import method_config, prepare_stage, train_all_stages

from cptjax.training.algorithms.continual_learning.si import SI
from cptjax.training.stage_context import StageProgress
from cptjax.training.train_loop import next_step_batch


def test_the_path_on_a_quadratic_is_the_decrease_of_the_loss():
    """The rectangles of a path with steps c differ from its integral by the sum of a c^2 / 2."""
    rng = np.random.default_rng(0)
    a, target = rng.uniform(0.5, 2, 5), rng.normal(size=5)
    weights, velocity, squares = rng.normal(size=5), np.zeros(5), np.zeros(5)
    method, first = SI(1.0), weights
    path = method.begin_stage({"w": jnp.asarray(weights)})
    loss = lambda w: 0.5 * a * (w - target) ** 2
    for _ in range(60):  # gradient descent with momentum
        gradient = a * (weights - target)
        velocity = 0.5 * velocity - 0.02 * gradient
        after = weights + velocity
        path = method.after_update(
            path, *({"w": jnp.asarray(x)} for x in (gradient, weights, after))
        )
        weights, squares = after, squares + velocity**2
    decrease = loss(first) - loss(weights)
    np.testing.assert_allclose(path["w"] - 0.5 * a * squares, decrease, rtol=1e-4)
    np.testing.assert_allclose(path["w"], decrease, rtol=0.1)


def test_importance_of_random_stages_by_hand():
    method, kept, expected = SI(1.0, damping=0.01), None, 0
    for seed in (0, 3):
        path, p, start = (random_tree(seed + i) for i in range(3))
        _, kept = method.stage_end(stage_end(p, start=start, state=path, kept=kept))
        path, p, start = (
            np.asarray(tree["text"]["embed"], np.float64) for tree in (path, p, start)
        )
        assert (path < 0).any()
        expected = expected + np.where(path > 0, path, 0) / ((p - start) ** 2 + 0.01)
    np.testing.assert_allclose(kept["text"]["embed"], expected, rtol=1e-5)
    assert_kept_as_planned(method, kept, 4)
    with pytest.raises(ValueError, match="damping=0: expected a number above 0"):
        SI(1.0, damping=0).check(None)


def test_a_merge_at_the_stages_end_does_not_change_the_importance(tmp_path):
    """The path is divided by the change that the updates made, not by what a merge leaves of it."""
    ends = []
    for merge in ({}, {"stage_end": {"name": "wise_ft", "weight": 0.9}}):
        method = merge | {"penalty": {"name": "si", "coef": 1.0, "damping": 1e-6}}
        c = method_config("sft", method=method, train=dict(lr=1e-2))
        _, end, _ = train_all_stages(c, tmp_path / str(len(ends)))
        ends.append(jax.device_get((end.kept["si"], end.params)))
    (plain, params), (merged, averaged) = ends
    jax.tree.map(np.testing.assert_array_equal, plain, merged)
    assert tree_bytes(plain) and np.any(params["text"]["embed"] != averaged["text"]["embed"])


def test_an_update_of_a_model_adds_its_gradient_times_its_change(tmp_path):
    c = method_config("sft", method=dict(penalty=dict(name="si", coef=1.0)))
    with prepare_stage(c, tmp_path) as stage, stage.ctx.open_stream(0) as stream:
        step = next_step_batch(stage.ctx, stage.params, stream, StageProgress())
        ((batch,),) = step.updates
        total = stage.programs.begin(stage.state.params, stage.frozen, batch)
        before = jax.device_get((stage.state.params, total.gradient, total.count))
        state = jax.tree.map(jnp.copy, stage.state)
        after, _ = stage.programs.finish(state, total, jnp.float32(1e-3), stage.arrays, None)
        path, params = jax.device_get((after.methods["si"], after.params))
    assert tree_bytes(path) == 4 * sum(x.size for x in jax.tree.leaves(params))
    jax.tree.map(
        lambda w, p, q, g: np.testing.assert_allclose(w, -g / before[2] * (q - p), atol=1e-9),
        path,
        before[0],
        params,
        before[1],
    )
    assert sum(x.sum() for x in jax.tree.leaves(path)) > 1e-4  # the loss falls
