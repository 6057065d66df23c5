"""Orbax checkpoints keep every bit of the parameters, adapters and their scale included."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from cptjax import sharding
from cptjax.models import orbax_io


def test_orbax_keeps_every_bit_and_the_adapters(tmp_path):
    cfg = dataclasses.replace(tiny.our_config(), lora_scale=2.0)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), tiny.random_params(cfg))
    depth, width, heads = cfg.text.depth, cfg.text.width, cfg.text.heads
    params["text"]["blocks"]["q"] |= {
        "lora_a": jnp.ones((depth, width, 3)),
        "lora_b": jnp.ones((depth, 3, heads, cfg.text.head_dim)),
    }
    orbax_io.save_orbax(params, cfg, tmp_path / "orbax")
    for mesh in (None, sharding.make_mesh(2, 2, 2)):
        loaded, loaded_cfg = orbax_io.load_orbax(tmp_path / "orbax", mesh)
        assert loaded_cfg == cfg
        assert jax.tree.structure(loaded) == jax.tree.structure(params)
        for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(params), strict=True):
            assert a.dtype == b.dtype and np.array_equal(a, b)
    with pytest.raises(ValueError, match="holds a checkpoint already"):
        orbax_io.save_orbax(params, cfg, tmp_path / "orbax")
