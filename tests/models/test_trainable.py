"""Trained and frozen leaves of parameter trees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cptjax.models import trainable
from cptjax.models.causal_lm import declare_params
from cptjax.models.families import PRESETS

TREE = {
    "vision": {"patch": {"w": jnp.ones(3)}},
    "merger": {"norm": jnp.ones(2)},
    "text": {"blocks": {"q": {"w": jnp.ones(4), "lora_a": jnp.ones(5)}}, "embed": jnp.ones(6)},
}


def test_a_tree_is_split_into_trained_and_frozen_leaves_and_joined():
    trained, frozen = trainable.split_params(TREE, trainable.is_trained(("vision",)))
    assert trained.keys() == {"merger", "text"} and frozen.keys() == {"vision"}
    assert trainable.join_params(trained, frozen).keys() == TREE.keys()
    assert trainable.count_params(TREE) == 20
    adapters, _ = trainable.split_params(TREE, trainable.is_trained((), lora_rank=4))
    assert list(trainable.flatten_params(adapters)) == [("text", "blocks", "q", "lora_a")]


def test_a_cast_changes_only_floating_point_leaves():
    tree = {"w": jnp.ones(2, jnp.float32), "int8": jnp.ones(2, jnp.int8)}
    cast = trainable.cast_params(tree, jnp.bfloat16)
    assert cast["w"].dtype == jnp.bfloat16 and cast["int8"].dtype == jnp.int8


def test_a_leaf_is_stacked_if_its_first_axis_is_declared_as_that_of_layers():
    for cfg in PRESETS.values():
        for path, p in trainable.flatten_params(declare_params(cfg)).items():
            assert trainable.is_stacked(path) == (p.axes[0] == "layer"), path


@pytest.mark.parametrize("freeze", [("tower",), ("vision", "merger", "language")])
def test_unknown_parts_and_all_parts_cannot_be_frozen(freeze):
    with pytest.raises(ValueError, match="model.freeze"):
        trainable.is_trained(freeze)


def test_interpolation():
    values = np.random.default_rng(0).normal(size=(2, 3))
    p, a = ({"text": {"b": jnp.asarray(x, jnp.float32)}} for x in values)
    half = trainable.interpolate(p, a, 0.25)
    np.testing.assert_allclose(
        half["text"]["b"], 0.75 * p["text"]["b"] + 0.25 * a["text"]["b"], rtol=1e-6
    )
    jax.tree.map(np.testing.assert_array_equal, trainable.interpolate(p, a, 0.0), p)
    assert (
        trainable.interpolate({"w": jnp.ones(1, jnp.bfloat16)}, {"w": jnp.zeros(1)}, 0.5)["w"].dtype
        == jnp.bfloat16
    )
