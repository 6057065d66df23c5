"""The options of the decoder: which positions rotate, features added after layers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from cptjax.models import attention, decoder, unrolled
from cptjax.models.config import RopeConfig
from cptjax.models.families import PRESETS


def test_sections_in_blocks_and_interleaved_are_the_diagram_of_the_docstring():
    rope = lambda **options: decoder.position_axes(RopeConfig(1e4, **options), 16).tolist()
    assert rope() == [0] * 8
    assert rope(sections=(4, 2, 2)) == [0, 0, 0, 0, 1, 1, 2, 2]
    assert rope(sections=(4, 2, 2), interleaved=True) == [0, 1, 2, 0, 1, 2, 0, 0]


def test_interleaved_sections_rotate_as_in_transformers():
    torch = pytest.importorskip("torch")
    from transformers import AutoConfig
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

    sections = {"mrope_section": [24, 20, 20], "mrope_interleaved": True}
    rope = {"rope_type": "default", "rope_theta": 5e6} | sections
    config = AutoConfig.for_model("qwen3_vl_text", head_dim=128, rope_parameters=rope)
    ids = np.stack([np.arange(9), 3 * np.arange(9), 70 + np.arange(9)])
    wanted = Qwen3VLTextRotaryEmbedding(config)(torch.zeros(1), torch.tensor(ids[:, None]))
    text = dataclasses.replace(
        PRESETS["qwen3-8b"].text, rope=RopeConfig(5e6, (24, 20, 20), interleaved=True)
    )
    for ours, theirs in zip(decoder.rope_cos_sin(ids, text), wanted, strict=True):
        np.testing.assert_allclose(ours, theirs[0, :, :64], atol=1e-5)


@pytest.mark.parametrize("unroll", [False, True])
@pytest.mark.parametrize("remat", ["none", "block"])
def test_features_are_added_after_the_first_layers(unroll, remat):
    cfg = tiny.our_config(family="qwen3", text={"num_hidden_layers": 3}).with_compute(remat=remat)
    params = jax.tree.map(jnp.asarray, tiny.random_params(cfg))["text"]
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 7, cfg.text.width)), jnp.float32)
    added = jnp.asarray(rng.normal(size=(2, *x.shape)), jnp.float32)
    positions = jnp.broadcast_to(jnp.arange(7), (3, 2, 7))
    seg = jnp.ones((2, 7), jnp.int32)
    attend = lambda q, k, v: (attention.attend(q, k, v, seg, seg, causal=True, backend="xla"), None)

    def by_hand(added):
        y, rope = x, decoder.rope_cos_sin(positions, cfg.text)
        for i in range(3):
            layer = jax.tree.map(lambda w: w[i], params["blocks"])
            y, _ = decoder.decoder_block(layer, y, rope, attend, cfg)
            y = y + added[i] if i < 2 else y
        return decoder.rms_norm(y, params["norm"], cfg.text.norm_eps)

    form = unrolled.unstack_layers({"text": params}, cfg.with_compute(unroll=unroll))["text"]
    run = jax.jit(lambda added: decoder.run_decoder(form, x, positions, attend, cfg, added)[0])
    (a, da), (b, db) = (
        jax.jit(jax.value_and_grad(lambda y: jnp.sin(f(y)).sum()))(added) for f in (run, by_hand)
    )
    np.testing.assert_allclose(a, b, rtol=1e-5)
    np.testing.assert_allclose(da, db, atol=1e-4)
    assert jnp.abs(run(added) - run(jnp.zeros_like(added))).max() > 0.1
