"""Packed groups: equal to separate ones, to a mask over whole rows, and on every mesh."""

import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_qwen3_vl
from tiny import Image

from cptjax import sharding
from cptjax.data import packing
from cptjax.models import attention, attention_tiled, causal_lm, decoder, logprobs, packed_groups
from cptjax.types import Batch

G, R = 3, 7
PROMPTS = [[5, Image(4, 4), 9], [12], [3, Image(4, 4), 2, Image(4, 4), 4], [6, Image(4, 8)]]
LENGTHS = [7, 0, 3, 1, 1, 2, 7, 7, 7, 5, 0, 1]  # of the responses; 0 = no targets


@functools.cache
def _inputs(family: str, shards: int = 1):
    """Return (config, parameters, batch of packed groups) as host arrays."""
    qwen3_vl = family == "qwen3_vl"
    cfg = tiny_qwen3_vl.our_config() if qwen3_vl else tiny.our_config(family=family)
    rows = PROMPTS if cfg.vision else [[14], [12], [9], [3]]
    rng = np.random.default_rng(0)
    prompts = tiny.prompts([tiny.random_row(row, cfg, rng) for row in rows], cfg, shards=shards)
    targets = rng.integers(10, 300, (len(rows) * G, R)).astype(np.int32)
    mask = np.arange(R) < np.array(LENGTHS)[:, None]
    mask[0, :2] = False  # tokens that are read but not trained on
    with mock.patch.object(packing, "SMALLEST", 8):  # shorter rows than those of a real batch
        where, plan = packing.plan_packing(prompts.segments > 0, mask, shards)
    return cfg, tiny.random_params(cfg), Batch(prompts, targets, mask, where, {}, plan)


def _packed(params, batch, cfg):
    """Return the states [B R D] of the targets; 0 elsewhere."""
    states = logprobs.predicting_states(params, batch, cfg, jnp.float32)
    return packed_groups.by_target(batch, states.reshape(-1, states.shape[-1]))


def _separate(params, batch, cfg):
    groups = batch.targets.reshape(len(batch.prompts.tokens), G, R)
    states = causal_lm.forward_group(params, batch.prompts, groups, cfg)
    return jnp.where(batch.mask[..., None], states.reshape(len(batch.targets), R, -1), 0)


def _masked(params, batch, cfg):
    """Run the packed rows as rows, under a mask of which keys each token may read."""
    first = causal_lm.next_positions(batch.prompts)
    rows = packed_groups.pack_tokens(batch.prompts, batch.targets, first, batch.packing)
    (nq, p), tokens = batch.prompts.tokens.shape, batch.packing.source
    q, in_prompt = nq // len(tokens), tokens < nq // len(tokens) * p
    response = np.maximum(tokens - q * p, 0) // R
    group = np.where(in_prompt, tokens // p, response // G)
    part = np.where(in_prompt, -1, response)
    same = lambda x: x[:, :, None] == x[:, None]
    visible = same(group) & ((part == -1)[:, None] | same(part)) & (tokens >= 0)[:, None]
    visible &= np.tri(tokens.shape[1], dtype=bool)
    attend = lambda q, k, v: (attention.reference_attention(q, k, v, visible), None)
    x, added = causal_lm.embed_inputs(params, rows, cfg, jnp.float32)
    hidden, _ = decoder.run_decoder(params["text"], x, rows.positions, attend, cfg, added)
    states = jnp.take_along_axis(hidden, batch.where[..., None], 1)
    return packed_groups.by_target(batch, states.reshape(-1, states.shape[-1]))


def _values_and_gradients(states, params, batch, cfg):
    def loss(params):
        out = states(params, batch, cfg)
        return jnp.sum(jnp.sin(3 * out)), out

    (_, out), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return np.asarray(out), jax.tree.map(np.asarray, gradient)


def _assert_equal(found, wanted, tolerance=1e-5):
    (a, da), (b, db) = found, wanted
    np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max(), rtol=0)
    for (path, x), y in zip(jax.tree.leaves_with_path(da), jax.tree.leaves(db), strict=True):
        assert np.linalg.norm(x - y) <= tolerance * np.linalg.norm(y) + 1e-7, path


@functools.cache
def _reference(family: str):
    cfg, params, batch = _inputs(family)
    return _values_and_gradients(_separate, params, batch, cfg)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", *tiny.TEXT_FAMILIES])
def test_packed_groups_equal_separate_ones(family):
    """Values and all gradients, of prompts with and without images."""
    cfg, params, batch = _inputs(family)
    assert batch.tokens_with_padding < batch.prompts.tokens.size + batch.targets.size
    _assert_equal(_values_and_gradients(_packed, params, batch, cfg), _reference(family))


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_packed_groups_equal_the_mask(family):
    """A token reads its own prompt and the response it belongs to, up to itself."""
    cfg, params, batch = _inputs(family)
    _assert_equal(_values_and_gradients(_masked, params, batch, cfg), _reference(family))


@pytest.mark.parametrize("backend", ["tiled", "splash", "cudnn"])
def test_a_kernel_gives_the_states_of_separate_groups(backend, monkeypatch):
    """The kernels themselves, with that of cuDNN: test_attention."""
    monkeypatch.setattr(attention, "INTERPRET", True)
    monkeypatch.setattr(attention_tiled, "SCORES", 1 << 10)
    cfg, params, batch = _inputs("qwen3")
    cfg = dataclasses.replace(cfg, compute=dataclasses.replace(cfg.compute, attention=backend))
    _assert_equal(_values_and_gradients(_packed, params, batch, cfg), _reference("qwen3"))


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 4, 2), (1, 1, 8)])
def test_a_mesh_does_not_change_packed_groups(sizes):
    """Each batch shard has a row of its own; prompts have images."""
    mesh = sharding.make_mesh(*sizes)
    cfg, params, batch = _inputs("qwen2_5_vl", sharding.batch_shards(mesh))
    rules = sharding.rules_for(cfg.text.kv_heads, mesh)
    where = sharding.param_shardings(causal_lm.declare_params(cfg), mesh, rules)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, where), sharding.place_batch(batch, mesh)
        _assert_equal(_values_and_gradients(_packed, *placed, cfg), _reference("qwen2_5_vl"))


def test_scores_are_those_of_each_target():
    """Only real targets reach the unembedding; their scores return to their places."""
    cfg, params, batch = _inputs("qwen3")
    unembed = decoder.unembedding(params["text"])
    scores = logprobs.make_scoring_program(cfg, jnp.float32, 16, 0.7)(params, batch)
    states = jax.jit(_separate, static_argnums=2)(params, batch, cfg)
    logps = jax.nn.log_softmax(states @ unembed / 0.7)
    want = np.take_along_axis(np.asarray(logps), batch.targets[..., None], 2)[..., 0]
    np.testing.assert_allclose(scores, np.where(batch.mask, want, 0), atol=1e-5)
    assert packed_groups.flat_targets(batch)[: batch.mask.sum()].tolist() == (
        batch.targets[batch.mask].tolist()
    )
