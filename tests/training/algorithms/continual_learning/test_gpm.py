"""Gradient projection: directions by numpy, updates orthogonal to them, and their budget."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import stage_fixtures
from method_helpers import stage_end
from stage_fixtures import method_config

from cptjax.continual import train_stage
from cptjax.continual.model_state import split_trained
from cptjax.models import causal_lm, lora
from cptjax.models.families import PRESETS
from cptjax.models.layers import DECODER_LINEARS
from cptjax.models.trainable import flatten_params
from cptjax.training.algorithms.continual_learning.gpm import (
    GPM,
    add_directions,
    input_axes,
    remove_directions,
    unit_columns,
)

LAYERS, INPUTS, OUTPUTS = 2, 40, 5
Q, O = ("text", "blocks", "q", "w"), ("text", "blocks", "o", "w")


def tree(seed):
    """Weights q [L, 40, 5] and o [L, 4, 10, 5], and a norm that is not projected."""
    rng = np.random.default_rng(seed)
    put = lambda *shape: jnp.float32(rng.normal(size=shape))
    q, o = put(LAYERS, INPUTS, OUTPUTS), put(LAYERS, 4, 10, OUTPUTS)
    return {"text": {"blocks": {"q": {"w": q}, "o": {"w": o}, "norm1": put(LAYERS, INPUTS)}}}


def mean_product(rows, path):
    """The mean of G G^T / |G|^2 over rows, in float64."""
    total = 0
    for row in rows:
        g = np.asarray(flatten_params(row)[path], np.float64).reshape(LAYERS, INPUTS, OUTPUTS)
        total += g @ g.swapaxes(1, 2) / np.square(g).sum((1, 2))[:, None, None] / len(rows)
    return total


def end_stage(method, kept, rows):
    sketch = method.gradient_pass(8).transform
    mean = jax.tree.map(lambda *x: sum(x) / len(rows), *map(sketch, rows))
    trained = rows[0]
    end, kept = method.stage_end(stage_end(trained, stage=1, seed=0, kept=kept, mean=mean))
    assert end is trained
    return kept


@pytest.mark.parametrize(("rank", "energy"), [(20, 1.0), (12, 1.0), (20, 0.7)])
def test_directions_are_the_largest_eigenvectors_of_both_stages(rank, energy):
    """The two stages have 10 directions each, so 20 are all of them."""
    method, kept, expected = GPM(rank, energy, samples=2), None, {Q: 0, O: 0}
    for stage in (0, 1):
        rows = [tree(2 * stage), tree(2 * stage + 1)]
        kept = end_stage(method, kept, rows)
        for path in (Q, O):
            values, vectors = np.linalg.eigh(expected[path] + mean_product(rows, path))
            values, vectors = values[:, ::-1], vectors[:, :, ::-1]
            share = (values.cumsum(1) - values) / values.sum(1, keepdims=True)
            chosen = (share < energy - 1e-6) & (np.arange(INPUTS) < rank)
            u = vectors * chosen[:, None]
            expected[path] = (u * values[:, None]) @ u.swapaxes(1, 2)
            found = flatten_params(kept)[path]
            assert found.shape == (LAYERS, INPUTS, rank) and found.dtype == jnp.float32
            np.testing.assert_allclose(found @ found.swapaxes(1, 2), expected[path], atol=1e-5)
            found = unit_columns(found)
            np.testing.assert_allclose(
                found @ found.swapaxes(1, 2), u @ u.swapaxes(1, 2), atol=1e-3
            )
            x = tree(9)
            flat = np.asarray(flatten_params(x)[path]).reshape(LAYERS, INPUTS, OUTPUTS)
            rest = flatten_params(method.project_gradient(x, kept))[path].reshape(flat.shape)
            np.testing.assert_allclose(rest, flat - u @ (u.swapaxes(1, 2) @ flat), atol=1e-3)
    assert (energy < 1) == (int((np.abs(found).max(1) > 0).sum(1).max()) < rank)
    same = method.project_change(x, kept)["text"]["blocks"]["norm1"]
    assert same is x["text"]["blocks"]["norm1"]


def test_a_sketch_of_many_directions_finds_the_strongest():
    """Eigenvalues fall by a tenth from one to the next; the sketch has 12 columns of 40."""
    rng = np.random.default_rng(0)
    vectors = np.linalg.qr(rng.normal(size=(1, INPUTS, INPUTS)))[0]
    product = (vectors * 0.9 ** np.arange(INPUTS)) @ vectors.swapaxes(1, 2)
    omega = jax.random.normal(jax.random.key(0), (INPUTS, 12))
    found = add_directions(None, jnp.float32(product @ np.asarray(omega)), 6, 1.0)
    held = np.square(np.linalg.norm(vectors[:, :, :3].swapaxes(1, 2) @ unit_columns(found), axis=2))
    assert held.min() > 0.7
    assert remove_directions({}, None) == {}


@pytest.mark.parametrize(
    ("rank", "layers"), [(0, ("o", "up")), (4, DECODER_LINEARS)], ids=["weights", "adapters"]
)
def test_the_change_of_a_stage_is_orthogonal_to_the_stages_before(rank, layers, tmp_path):
    """With Adam and weight decay, for every projected weight; the budget holds over stages."""
    c = method_config(
        "sft",
        steps=2,
        stages=2,
        method=dict(gradient=dict(name="gpm", rank=6, samples=2, layers=layers)),
        model=dict(lora=dict(rank=rank)) if rank else {},
        train=dict(lr=1e-2, weight_decay=0.1),
    )
    with stage_fixtures.open_tiny_run(c, tmp_path) as (run, model_state):
        changes, kept = [], []
        for stage in run.stages:
            before = jax.device_get(split_trained(c, model_state.params)[0])
            model_state = train_stage.train_stage(run, stage, model_state)
            after = jax.device_get(split_trained(c, model_state.params)[0])
            changes.append(flatten_params(jax.tree.map(np.subtract, after, before)))
            kept.append(flatten_params(jax.device_get(model_state.kept["gpm"])))
    assert {path[2] for path in kept[0]} == set(layers)
    names = {path[-1] for path in kept[0]}
    assert names == ({"lora_a", "lora_b"} if rank else {"w"})
    for path, scaled in kept[0].items():
        assert scaled.shape[2] == (2 if path[-1] == "lora_b" else 6)
        u = np.asarray(unit_columns(scaled))
        overlap = [
            np.linalg.norm(u.swapaxes(1, 2) @ x.reshape(*u.shape[:2], -1)) / np.linalg.norm(x)
            for x in (changes[0][path], changes[1][path])
        ]
        assert overlap[1] < 1e-5 < 1e-2 < overlap[0]


def test_the_number_of_input_axes_is_the_declared_one():
    for name in PRESETS:
        declared = causal_lm.declare_params(PRESETS[name])
        for path, p in flatten_params(lora.add_lora(declared, 2)).items():
            if path[:2] == ("text", "blocks") and path[2] in DECODER_LINEARS and path[-1] != "b":
                assert input_axes(path) == p.inputs, (name, path)
