"""The model of `config.model`: dtypes of its parts, random weights by seed, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from cptjax import sharding
from cptjax.models import load, trainable
from cptjax.models.families import PRESETS


def _settings(**changes):
    settings = base.get_config().model
    settings.update(preset="tiny_qwen3", **changes)
    return settings


def test_trained_leaves_and_frozen_leaves_have_their_dtypes():
    settings = _settings(param_dtype="float32")
    settings.lora.rank = 2
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    params = load.create_params(settings, PRESETS["tiny_qwen3"], mesh, jnp.bfloat16, seed=1)
    for path, leaf in trainable.flatten_params(params).items():
        expected = jnp.float32 if trainable.is_adapter(path) else jnp.bfloat16
        assert leaf.dtype == expected, path


def test_random_weights_depend_on_the_seed_and_not_on_the_mesh():
    one, several = sharding.make_mesh(devices=jax.devices()[:1]), sharding.make_mesh(1, 4, 2)

    def embedding(mesh, seed):
        cfg = PRESETS["tiny_qwen3"]
        params = load.create_params(_settings(), cfg, mesh, jnp.float32, seed)
        return np.asarray(params["text"]["embed"])

    assert np.array_equal(embedding(one, 3), embedding(several, 3))
    assert not np.array_equal(embedding(one, 3), embedding(one, 4))


def test_an_unknown_preset_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="model.preset='8b'; expected one of 3b, 7b"):
        load.find_preset("8b")
