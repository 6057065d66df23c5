"""Unrolled layers with fused products: the numbers of the loop, and what is not fused."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny import Image

from configs.base import get_config
from cptjax import sharding
from cptjax.models import causal_lm, load, unrolled
from cptjax.types import Prompts

PROMPTS = [[5, Image(6, 10), 9], [12], [3, Image(4, 4), 2, Image(8, 12), 4]]
G, R = 3, 7


@pytest.fixture(scope="module")
def model():
    """(config, random parameters)."""
    cfg = tiny.our_config()
    return cfg, jax.tree.map(jnp.asarray, tiny.random_params(cfg))


def _random_rows(rows, cfg, seed=0):
    rng = np.random.default_rng(seed)
    return [tiny.random_row(row, cfg, rng) for row in rows]


def test_unrolled_layers_equal_the_loop(model):
    """Values and all gradients of prompts with responses, also with fused products."""
    cfg, params = model
    prompts = tiny.prompts(_random_rows(PROMPTS, cfg), cfg)
    responses = (
        np.random.default_rng(1).integers(10, 300, (len(prompts.tokens), G, R)).astype(np.int32)
    )
    weight = (
        np.random.default_rng(2).normal(size=(*responses.shape, cfg.text.width)).astype(np.float32)
    )

    def run(cfg):
        loss = lambda p: (weight * causal_lm.forward_group(p, prompts, responses, cfg)).sum()
        return jax.jit(jax.value_and_grad(loss))(params)

    layer = unrolled.unstack_layers(params, cfg.with_compute(unroll=True))["text"]["blocks"][0]
    assert {"qkv", "gate_up"} <= layer.keys() and not {"q", "gate"} & layer.keys()
    a, wanted = run(cfg.with_compute(attention="xla"))
    for backend in ("xla", "tiled"):
        b, found = run(cfg.with_compute(unroll=True, attention=backend))
        np.testing.assert_allclose(a, b, rtol=1e-5)
        for x, y in zip(jax.tree.leaves(wanted), jax.tree.leaves(found), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5 * np.abs(x).max())


def test_a_gpu_unrolls_the_layers_only_for_sampling(model):
    cfg, params = model
    mesh = lambda platform: SimpleNamespace(
        devices=np.array([SimpleNamespace(platform=platform)]), shape={"model": 1}
    )
    settings = get_config().model
    form = lambda p: isinstance(p["text"]["blocks"], tuple)
    for platform, sampling, forward in (
        ("cpu", True, True),
        ("gpu", True, False),
        ("tpu", False, False),
    ):
        settings.remat = "none"
        fitted = load.fit_config(cfg, settings, mesh(platform))
        assert form(unrolled.unstack_layers(params, fitted)) == sampling
        assert form(unrolled.unstack_for_forward(params, fitted)) == forward
        kept = unrolled.unstack_for_forward(params, fitted.with_compute(remat="block"))
        assert not form(kept)


def test_layers_with_adapters_or_cut_heads_are_not_fused(model):
    cfg, params = model[0].with_compute(unroll=True), model[1]
    first = lambda p: unrolled.unstack_layers(p, cfg)["text"]["blocks"][0]
    blocks = params["text"]["blocks"]
    low = {
        n: jnp.zeros(s)
        for n, s in (
            ("lora_a", (cfg.text.depth, cfg.text.width, 2)),
            ("lora_b", (cfg.text.depth, 2, cfg.text.mlp)),
        )
    }
    adapted = params | {"text": params["text"] | {"blocks": blocks | {"up": blocks["up"] | low}}}
    assert first(adapted).keys() == blocks.keys()
    with jax.set_mesh(sharding.make_mesh(model=2, fsdp=-1)):
        assert first(params).keys() == blocks.keys()


def test_block_remat_saves_memory_with_unrolled_layers(model):
    """Six layers keep only their inputs: less than half of all their arrays."""
    cfg = model[0].with_compute(unroll=True)
    cfg = dataclasses.replace(cfg, text=dataclasses.replace(cfg.text, depth=6))
    params = sharding.abstract_params({"text": causal_lm.declare_params(cfg)["text"]}, jnp.float32)
    prompts = Prompts(
        *(jax.ShapeDtypeStruct(s, jnp.int32) for s in ((8, 128), (3, 8, 128), (8, 128), (8, 128)))
    )

    def temporaries(remat):
        loss = lambda p, x: jnp.sum(causal_lm.forward(p, x, cfg.with_compute(remat=remat)) ** 2)
        return (
            jax.jit(jax.grad(loss))
            .lower(params, prompts)
            .compile()
            .memory_analysis()
            .temp_size_in_bytes
        )

    assert temporaries("block") < temporaries("none") / 2
