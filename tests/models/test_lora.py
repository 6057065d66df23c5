"""LoRA: adapters start without effect, and merging them keeps the outputs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from cptjax import sharding
from cptjax.models import causal_lm, lora, trainable
from cptjax.models.families import find_family


@pytest.fixture(scope="module")
def adapted():
    """(config, parameters with random adapters of both towers, prompts)."""
    cfg = dataclasses.replace(tiny.our_config(), lora_scale=0.5)
    rng = np.random.default_rng(0)
    declared = lora.add_lora(
        causal_lm.declare_params(cfg), 4, vision=find_family(cfg).tower.adapters
    )
    adapters, _ = trainable.split_params(declared, trainable.is_adapter)
    random = jax.tree.map(
        lambda p: jnp.float32(0.1 * rng.normal(size=p.shape)), adapters, is_leaf=sharding.is_param
    )
    base = jax.tree.map(jnp.asarray, tiny.random_params(cfg))
    row = tiny.random_row([5, tiny.Image(6, 10), 9], cfg, rng)
    return cfg, trainable.join_params(random, base), tiny.prompts([row], cfg)


def test_merged_adapters_keep_the_outputs(adapted):
    cfg, params, prompts = adapted
    merged = lora.merge_lora(params, cfg.lora_scale)
    assert not any(map(trainable.is_adapter, trainable.flatten_params(merged)))
    forward = jax.jit(lambda p: causal_lm.forward(p, prompts, cfg))
    expected = forward(params)
    np.testing.assert_allclose(forward(merged), expected, atol=1e-4 * jnp.abs(expected).max())
    _, base = trainable.split_params(params, trainable.is_adapter)
    assert jnp.abs(forward(base) - expected).max() > 0.1


def test_a_merged_weight_is_that_of_the_formula(adapted):
    cfg, params, _ = adapted
    p = params["text"]["blocks"]["o"]
    merged = lora.merge_lora(params, 0.5)["text"]["blocks"]["o"]["w"]
    a, b = np.asarray(p["lora_a"]), np.asarray(p["lora_b"])
    expected = np.asarray(p["w"]) + 0.5 * np.einsum("lnhr,lrd->lnhd", a, b)
    np.testing.assert_allclose(merged, expected, atol=1e-6)


def test_new_adapters_have_no_effect():
    declared = lora.add_lora(causal_lm.declare_params(tiny.our_config()), 2, ("q", "o"))
    params = sharding.init_params(declared, jax.random.key(0), jnp.float32)
    for name, leaves in params["text"]["blocks"].items():
        if name in ("q", "o"):
            assert np.any(leaves["lora_a"]) and not np.any(leaves["lora_b"])
        elif isinstance(leaves, dict):
            assert leaves.keys() <= {"w", "b"}


@pytest.mark.parametrize("rank, targets", [(0, ("q",)), (2, ()), (2, ("qkv",))])
def test_adapters_without_rank_or_known_target_are_refused(rank, targets):
    declared = causal_lm.declare_params(tiny.our_config())
    with pytest.raises(ValueError, match="expected rank >= 1 and targets among q, k, v, o"):
        lora.add_lora(declared, rank, targets)
