"""The whole model: groups, causality, packing, padding, and the number of compilations."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny import Image

from cptjax import sharding
from cptjax.models import attention, causal_lm, decoder, vision_qwen2_5
from cptjax.models.families import PRESETS
from cptjax.types import Prompts


@pytest.fixture(scope="module")
def model():
    """(config, random parameters)."""
    cfg = tiny.our_config()
    return cfg, jax.tree.map(jnp.asarray, tiny.random_params(cfg))


@functools.partial(jax.jit, static_argnums=2)
def _forward(params, prompts, cfg):
    return causal_lm.forward(params, prompts, cfg)


def _random_rows(rows, cfg, seed=0):
    rng = np.random.default_rng(seed)
    return [tiny.random_row(row, cfg, rng) for row in rows]


PROMPTS = [[5, Image(6, 10), 9], [12], [3, Image(4, 4), 2, Image(8, 12), 4]]
G, R = 3, 7


def _copies(prompts: Prompts, responses: np.ndarray) -> Prompts:
    """Return rows of a copy of the prompt and one response each."""
    nq, p = prompts.tokens.shape
    again = lambda x: np.repeat(x, G, -2)
    after = (np.where(prompts.segments > 0, prompts.positions, -1).max((0, 2)) + 1)[
        :, None
    ] + np.arange(R)
    put = lambda x, new: np.concatenate([again(x), new], -1)
    flat = responses.reshape(nq * G, R)
    return Prompts(
        put(prompts.tokens, flat),
        put(prompts.positions, np.broadcast_to(np.repeat(after, G, 0), (3, nq * G, R))),
        put(prompts.segments, np.ones_like(flat)),
        put(prompts.slots, np.full_like(flat, -1)),
        prompts.vision,
    )


@pytest.mark.parametrize("family", ["qwen2_5_vl", *tiny.TEXT_FAMILIES])
def test_a_group_equals_copies_of_its_prompt(family):
    """Values and all gradients, of prompts with and without images."""
    cfg = tiny.our_config(family=family)
    params = jax.tree.map(jnp.asarray, tiny.random_params(cfg))
    rows = PROMPTS if cfg.vision else [[14], [12], [9]]
    prompts = tiny.prompts(_random_rows(rows, cfg), cfg)
    nq, p = prompts.tokens.shape
    responses = np.random.default_rng(1).integers(10, 300, (nq, G, R)).astype(np.int32)
    weight = np.random.default_rng(2).normal(size=(nq, G, R, cfg.text.width)).astype(np.float32)
    full = _copies(prompts, responses)

    def shared(params):
        return causal_lm.forward_group(params, prompts, responses, cfg)

    def copied(params):
        return causal_lm.forward(params, full, cfg)[:, p - 1 : -1].reshape(weight.shape)

    (a, da), (b, db) = (
        jax.jit(jax.value_and_grad(lambda w: _with(f(w), weight), has_aux=True))(params)
        for f in (shared, copied)
    )
    np.testing.assert_allclose(a[1], b[1], atol=1e-5 * np.abs(b[1]).max())
    for (path, x), y in zip(jax.tree.leaves_with_path(da), jax.tree.leaves(db), strict=True):
        assert np.linalg.norm(x - y) <= 1e-5 * np.linalg.norm(y), jax.tree_util.keystr(path)


def _with(out, weight):
    return jnp.sum(out * weight), out


def test_a_group_needs_a_third_of_the_flops():
    """Widths of the 3B model, prompt 1,000, response 200, G = 8.

    One layer: loops are counted once.
    """
    base = PRESETS["3b"]
    cfg = dataclasses.replace(base, text=dataclasses.replace(base.text, depth=1, vocab=256))
    params = sharding.abstract_params({"text": causal_lm.declare_params(cfg)["text"]}, jnp.float32)

    def flops(f, rows, length, *more):
        ints = [
            jax.ShapeDtypeStruct(s, jnp.int32)
            for s in ((rows, length), (3, rows, length), (rows, length), (rows, length))
        ]
        prompts = Prompts(*ints)
        loss = lambda p, *x: jnp.sum(f(p, *x))
        return jax.jit(jax.grad(loss)).lower(params, prompts, *more).cost_analysis()["flops"]

    copied = flops(lambda p, x: causal_lm.forward(p, x, cfg), 8, 1200)
    shared = flops(
        lambda p, x, r: causal_lm.forward_group(p, x, r, cfg),
        1,
        1000,
        jax.ShapeDtypeStruct((1, 8, 200), jnp.int32),
    )
    t = cfg.text
    by_hand = (
        3 * 2 * 9600 * t.width * (2 * t.width + 2 * t.kv_heads * t.head_dim + 3 * t.mlp)
        + 3 * 4 * 8 * 1200**2 * t.width
    )
    assert by_hand == pytest.approx(copied, rel=0.02)
    assert copied / shared > 3.5


def test_no_state_depends_on_a_later_token(model):
    """The gradient of a state by later embeddings is exactly zero, image features included."""
    cfg, params = model
    prompts = tiny.prompts(_random_rows([[4, Image(4, 6), 5]], cfg), cfg)
    attend = lambda q, k, v: (
        attention.attend(q, k, v, prompts.segments, prompts.segments, causal=True, backend="xla"),
        None,
    )
    x = jax.jit(lambda p: causal_lm.embed_inputs(p, prompts, cfg, jnp.float32).x)(params)
    gradient = jax.jit(
        jax.grad(
            lambda x, i: jnp.sum(
                jnp.sin(
                    decoder.run_decoder(params["text"], x, prompts.positions, attend, cfg)[0][0, i]
                )
            )
        )
    )
    for i in (0, 6, 11):
        by = np.abs(gradient(x, i)[0]).sum(-1)
        assert (by[: i + 1] > 0).all() and not by[i + 1 :].any()


def _packed(rows, cfg):
    """Return one row of several conversations, and each conversation alone."""
    alone = [tiny.prompts([d], cfg) for d in rows]
    together = tiny.prompts(rows, cfg)
    row = lambda field: np.concatenate([getattr(a, field) for a in alone], -1)
    slots = np.concatenate([together.slots[i, together.segments[i] > 0] for i in range(len(rows))])[
        None
    ]
    segments = np.concatenate([np.full_like(a.segments, i + 1) for i, a in enumerate(alone)], -1)
    return Prompts(row("tokens"), row("positions"), segments, slots, together.vision), alone


def test_packed_conversations_do_not_leak(model):
    """Another conversation in the row changes no bit.

    States equal those of the conversation alone.
    """
    cfg, params = model
    rows = _random_rows([[5, Image(6, 10), 9], [4, Image(8, 4), 6, Image(4, 4), 3], [8]], cfg)
    packed, alone = _packed(rows, cfg)
    first = np.asarray(_forward(params, packed, cfg))
    other = _random_rows([[5, Image(6, 10), 9]], cfg, seed=9)
    changed = np.asarray(_forward(params, _packed(other + rows[1:], cfg)[0], cfg))
    mine = packed.segments[0] == 1
    assert (
        np.array_equal(first[0, ~mine], changed[0, ~mine])
        and np.abs(first[0, mine] - changed[0, mine]).max() > 0.1
    )
    for i, a in enumerate(alone):
        states = first[0, packed.segments[0] == i + 1]
        np.testing.assert_allclose(states, np.asarray(_forward(params, a, cfg))[0], atol=2e-5)


def test_padding_does_not_change_the_states(model):
    cfg, params = model
    rows = _random_rows(PROMPTS, cfg)
    rows = [
        tiny.prompts(rows, cfg, left, length)
        for left, length in ((True, None), (False, None), (True, 64), (False, 80))
    ]
    states = [np.asarray(_forward(params, x, cfg))[x.segments > 0] for x in rows]
    for other in states[1:]:
        np.testing.assert_allclose(other, states[0], atol=2e-5)


def test_the_content_of_padding_does_not_change_the_states(model):
    cfg, params = model
    prompts = tiny.prompts(_random_rows(PROMPTS, cfg), cfg)
    real = prompts.segments > 0
    junk = dataclasses.replace(
        prompts,
        tokens=np.where(real, prompts.tokens, 77),
        positions=np.where(real, prompts.positions, 5),
    )
    empty = prompts.vision.frames == 0
    junk = junk.replace(
        vision=prompts.vision.replace(patches=np.where(empty[..., None], 3, prompts.vision.patches))
    )
    assert np.array_equal(
        np.asarray(_forward(params, prompts, cfg))[real],
        np.asarray(_forward(params, junk, cfg))[real],
    )


def _within_bucket(h, w, cfg, slots=512, length=96):
    """Return one image in arrays of fixed size."""
    rows = _random_rows([[7, Image(h, w), 6]], cfg)
    prompts = tiny.prompts(rows, cfg, length=length)
    more = slots - prompts.vision.frames.shape[-1]
    pad = lambda x: np.pad(x, [(0, more if i == 2 else 0) for i in range(x.ndim)])
    return prompts.replace(vision=jax.tree.map(pad, prompts.vision))


def test_image_sizes_of_one_bucket_share_one_program(model):
    cfg, params = model
    traces = []

    @jax.jit
    def forward(params, prompts):
        traces.append(1)
        return causal_lm.forward(params, prompts, cfg)

    for h, w in ((8, 8), (4, 20), (12, 10), (2, 6), (14, 14), (6, 16)):
        assert np.isfinite(forward(params, _within_bucket(h, w, cfg))).all()
    assert len(traces) == 1 and forward._cache_size() == 1


def test_an_unknown_remat_is_refused(model):
    cfg, params = model
    with pytest.raises(ValueError, match="model.remat='all'"):
        causal_lm.forward(
            params,
            tiny.prompts(_random_rows([[4]], cfg), cfg),
            cfg.with_compute(remat="all"),
        )


def test_positions_continue_after_the_prompt(model):
    cfg, _ = model
    rows = _random_rows(PROMPTS, cfg)
    for left in (True, False):
        wanted = [
            vision_qwen2_5.token_positions(
                d.types, [part.grid() for part, _ in d.media], [], cfg.vision
            ).max()
            + 1
            for d in rows
        ]
        assert causal_lm.next_positions(tiny.prompts(rows, cfg, left)).tolist() == wanted


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_parts_of_the_images_give_the_features_of_all(family):
    """Two rows of images of one shard, in the tower together and one after the other."""
    cfg = tiny.our_config() if family == "qwen2_5_vl" else PRESETS["tiny_qwen3_vl"]
    params = jax.tree.map(jnp.asarray, tiny.random_params(cfg))
    prompts = tiny.prompts(
        _random_rows([[5, Image(6, 10), 9], [3, Image(4, 4), 2]], cfg), cfg, shards=2
    )
    features = prompts.vision.patches.shape[2] // cfg.vision.merge**2
    after = np.where(prompts.slots >= 0, features * np.arange(2)[:, None], 0)
    one_shard = prompts.replace(
        slots=prompts.slots + after, vision=jax.tree.map(lambda x: x[:, 0][None], prompts.vision)
    )
    embed = functools.partial(causal_lm.embed_inputs, params, cfg=cfg, dtype=jnp.float32)
    apart = embed(prompts)
    for chunks in (1, 2):
        found = embed(one_shard, image_chunks=chunks)
        for a, b in zip(jax.tree.leaves(apart), jax.tree.leaves(found), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)
    assert len(jax.tree.leaves(apart)) == (1 if family == "qwen2_5_vl" else 2)
