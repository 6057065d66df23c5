"""A-GEM: the projected gradient never opposes that of the memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from memory_helpers import stage_with_memory
from stage_fixtures import method_config

from cptjax.training.algorithms.continual_learning.agem import AGEM

METHOD = AGEM(rows=1)
project = jax.jit(METHOD.combine_gradients)


def random_gradient(rng):
    scale = 10.0 ** rng.integers(-6, 4)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape) * scale, jnp.float32)
    return {"vision": None, "text": {"w": normal(3, 2), "b": normal(2)}}


def vector(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]).astype(np.float64)


def test_the_product_with_the_memory_is_never_negative():
    rng, projected = np.random.default_rng(0), 0
    for _ in range(200):
        gradient, of_memory = random_gradient(rng), random_gradient(rng)
        result, metrics = project(gradient, of_memory)
        g, m, got = vector(gradient), vector(of_memory), vector(result)
        both = np.linalg.norm(g) * np.linalg.norm(m)
        assert got @ m > -1e-6 * both  # 0 up to rounding
        assert metrics["agem/cosine"].value == pytest.approx(g @ m / both, abs=1e-5)
        conflict = g @ m < 0
        assert metrics["agem/projected"].value == conflict
        projected += conflict
        expected = g - (g @ m) / (m @ m) * m if conflict else g
        np.testing.assert_allclose(got, expected, atol=1e-6 * np.linalg.norm(g))
        assert conflict or np.array_equal(got, g)
    assert 60 < projected < 140


def test_a_memory_without_a_gradient_changes_nothing():
    gradient = random_gradient(np.random.default_rng(1))
    result, metrics = project(gradient, jax.tree.map(jnp.zeros_like, gradient))
    assert np.array_equal(vector(result), vector(gradient)) and metrics["agem/cosine"].value == 0


def test_an_update_takes_the_projection_of_its_gradient(tmp_path):
    """Without clipping, the norm that an update logs is that of the gradient that it takes."""
    memory = dict(name="agem", rows=6, tokens=8, batch=4)
    c = method_config("sft", stages=2, method=dict(gradient=memory), train=dict(clip=None))
    with stage_with_memory(c, tmp_path) as prepared, jax.set_mesh(prepared.run.model_ctx.mesh):
        ctx, steps, frozen = prepared.ctx, prepared.programs, prepared.frozen
        (memory_batch,), _ = ctx.memory.batches([0])
        with ctx.open_stream(0) as stream:
            (batch,) = ctx.builder.conversation_batches(next(stream))
        total = steps.begin(prepared.state.params, frozen, batch)
        of_memory = steps.memory_gradient(prepared.state.params, frozen, memory_batch)
        g, m = (vector(x.gradient) / float(x.count) for x in (total, of_memory))
        for sign in (1, -1):
            signed = total.replace(gradient=jax.tree.map(lambda x: sign * x, total.gradient))  # noqa: B023
            state = jax.tree.map(jnp.copy, prepared.state)
            _, metrics = steps.finish(state, signed, jnp.float32(0), prepared.arrays, of_memory)
            cosine = sign * g @ m / np.linalg.norm(g) / np.linalg.norm(m)
            assert metrics["agem/cosine"].value == pytest.approx(cosine, abs=1e-4)
            assert metrics["agem/projected"].value == (cosine < 0)
            expected = sign * g - min(sign * g @ m, 0) / (m @ m) * m
            assert metrics["grad_norm"].value == pytest.approx(np.linalg.norm(expected), rel=1e-4)
            loss = float(of_memory.loss / of_memory.count)
            assert metrics["memory/loss"].value == pytest.approx(loss, rel=1e-6)
        assert abs(cosine) > 0.1
