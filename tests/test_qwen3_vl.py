"""Qwen3-VL end to end: files, greedy search, groups, packed rows, sampling, meshes, adapters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_qwen3_vl
from safetensors.numpy import load_file
from tiny import Image, Video

from cptjax import sharding
from cptjax.generation import decode_loop
from cptjax.generation.sampling_config import SamplingConfig
from cptjax.models import causal_lm, decoder, hf_checkpoint, lora, trainable
from cptjax.models.families import find_family

ROWS = [
    [5, Image(6, 10), 9],
    [12],
    [3, Image(4, 4), 2, Image(8, 12), 4],
    [2, Video(2, 4, 10), 6],
]
GROUP, NEW = 3, 6


@functools.cache
def _model():
    cfg = tiny_qwen3_vl.our_config()
    return cfg, jax.tree.map(jnp.asarray, tiny.random_params(cfg))


def _rows(rows, seed=0):
    rng = np.random.default_rng(seed)
    return [tiny.random_row(row, _model()[0], rng) for row in rows]


@functools.partial(jax.jit, static_argnums=2)
def _forward(params, prompts, cfg):
    return causal_lm.forward(params, prompts, cfg)


@pytest.mark.parametrize("tied", [False, True])
def test_load_then_save_is_bit_identical(tmp_path, tied):
    pytest.importorskip("torch")
    folder = tiny_qwen3_vl.save(tmp_path / "theirs", dtype="bfloat16", tied=tied)
    cfg = tiny_qwen3_vl.our_config(tied=tied)
    hf_checkpoint.save_hf_checkpoint(
        hf_checkpoint.load_hf_checkpoint(folder, cfg), cfg, tmp_path / "ours"
    )
    theirs, ours = (load_file(tmp_path / who / "model.safetensors") for who in ("theirs", "ours"))
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
        assert x.dtype == theirs[name].dtype and x.tobytes() == theirs[name].tobytes(), name


def test_greedy_tokens_equal_transformers(tmp_path):
    """50 prompts in a batch: text, images and videos, from a folder that we saved."""
    torch = pytest.importorskip("torch")
    from transformers import Qwen3VLForConditionalGeneration

    cfg, params = _model()
    hf_checkpoint.save_hf_checkpoint(params, cfg, tmp_path / "model", dtype="float32")
    model = Qwen3VLForConditionalGeneration.from_pretrained(tmp_path / "model").eval()
    kinds = [[7], [4, Image(4, 4), 3], [2, Image(2, 6), 1, Image(4, 2), 5], [3, Video(2, 2, 4), 4]]
    rows = _rows([kinds[i % 4] for i in range(50)])
    with torch.no_grad():
        theirs = model.generate(
            **tiny.hf_inputs(rows, cfg),
            max_new_tokens=NEW,
            do_sample=False,
            suppress_tokens=[*cfg.vision_tokens, cfg.pad],
        )
    prompts = tiny.prompts(rows, cfg)
    settings = SamplingConfig(group=1, max_new_tokens=NEW, temperature=0.0, check_every=NEW)
    out = decode_loop.generate_rollouts(
        params, prompts, jax.random.key(0), cfg, settings, dtype=jnp.float32
    )
    theirs = theirs[:, prompts.tokens.shape[1] :].numpy()
    mask = np.asarray(out.mask)[:, : theirs.shape[1]]
    assert mask.sum() > 200
    np.testing.assert_array_equal(np.asarray(out.tokens)[:, : theirs.shape[1]][mask], theirs[mask])


def _copies(prompts, responses):
    """Return rows of a copy of the prompt and one response each."""
    nq = len(prompts.tokens)
    after = np.asarray(causal_lm.next_positions(prompts))[:, None] + np.arange(NEW)
    put = lambda x, new: np.concatenate([np.repeat(x, GROUP, -2), new], -1)
    flat = responses.reshape(nq * GROUP, NEW)
    positions = np.broadcast_to(np.repeat(after, GROUP, 0), (3, nq * GROUP, NEW))
    return prompts.replace(
        tokens=put(prompts.tokens, flat),
        positions=put(prompts.positions, positions),
        segments=put(prompts.segments, np.ones_like(flat)),
        slots=put(prompts.slots, np.full_like(flat, -1)),
    )


def test_a_group_equals_copies_of_its_prompt():
    """Values and all gradients."""
    cfg, params = _model()
    prompts = tiny.prompts(_rows(ROWS), cfg)
    responses = np.random.default_rng(1).integers(10, 300, (4, GROUP, NEW)).astype(np.int32)
    full = _copies(prompts, responses)
    weight = np.random.default_rng(2).normal(size=(4, GROUP, NEW, cfg.text.width))
    start = prompts.tokens.shape[1] - 1

    def shared(params):
        return jnp.sum(weight * causal_lm.forward_group(params, prompts, responses, cfg))

    def copied(params):
        states = causal_lm.forward(params, full, cfg)[:, start:-1]
        return jnp.sum(weight * states.reshape(weight.shape))

    (a, da), (b, db) = (jax.jit(jax.value_and_grad(f))(params) for f in (shared, copied))
    np.testing.assert_allclose(a, b, rtol=1e-5)
    for (path, x), y in zip(jax.tree.leaves_with_path(da), jax.tree.leaves(db), strict=True):
        assert np.linalg.norm(x - y) <= 1e-4 * np.linalg.norm(y), jax.tree_util.keystr(path)


def test_packed_conversations_equal_each_alone():
    cfg, params = _model()
    rows = _rows(ROWS)
    alone, together = [tiny.prompts([row], cfg) for row in rows], tiny.prompts(rows, cfg)
    row = lambda field: np.concatenate([getattr(a, field) for a in alone], -1)
    numbered = [np.full_like(a.segments, i + 1) for i, a in enumerate(alone)]
    real = together.segments > 0
    packed = together.replace(
        tokens=row("tokens"),
        positions=row("positions"),
        segments=np.concatenate(numbered, -1),
        slots=together.slots[real][None],
    )
    states = np.asarray(_forward(params, packed, cfg))[0]
    wanted = np.asarray(_forward(params, together, cfg))[real]
    np.testing.assert_allclose(states, wanted, atol=2e-5)


def test_the_sampler_equals_the_trainer_and_plain_copies():
    """Prefill and decode give the log-probabilities of the update; a group equals its copies.

    The layers are unrolled here, and scanned in the other tests.
    """
    cfg, params = _model()
    cfg, prompts = cfg.with_compute(unroll=True), tiny.prompts(_rows(ROWS), cfg)

    def sample(group, rows=None):
        settings = SamplingConfig(group=group, max_new_tokens=NEW, temperature=1.0, check_every=NEW)
        out = decode_loop.generate_rollouts(
            params, prompts, jax.random.key(7), cfg, settings, dtype=jnp.float32, rows=rows
        )
        return jax.tree.map(np.asarray, out)

    out = sample(GROUP)
    hidden = jax.jit(causal_lm.forward_group, static_argnums=3)(
        params, prompts, out.tokens.reshape(4, GROUP, NEW), cfg
    )
    logps = jax.nn.log_softmax(hidden @ decoder.unembedding(params["text"]))
    wanted = np.take_along_axis(logps, out.tokens.reshape(4, GROUP, NEW, 1), -1)[..., 0]
    wanted = np.where(out.mask, wanted.reshape(out.mask.shape), 0)
    np.testing.assert_allclose(out.policy_logps, wanted, atol=1e-4)
    alone = sample(1, rows=np.arange(4) * GROUP)  # the number of the first response of each group
    np.testing.assert_array_equal(alone.tokens, out.tokens[::GROUP])
    np.testing.assert_allclose(alone.policy_logps, out.policy_logps[::GROUP], atol=1e-4)


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 4, 2)])
def test_a_mesh_gives_the_logits_of_one_device(sizes):
    cfg, params = _model()
    mesh = sharding.make_mesh(*sizes)
    logits = jax.jit(lambda p, x: causal_lm.forward(p, x, cfg) @ decoder.unembedding(p["text"]))
    one, cut = (tiny.prompts(_rows(ROWS), cfg, shards=s) for s in (1, sharding.batch_shards(mesh)))
    wanted = np.asarray(logits(params, one))
    where = sharding.param_shardings(causal_lm.declare_params(cfg), mesh)
    with jax.set_mesh(mesh):
        found = np.asarray(logits(jax.device_put(params, where), sharding.place_prompts(cut, mesh)))
    real = one.segments > 0
    np.testing.assert_allclose(found[real], wanted[real], atol=1e-5 * np.abs(wanted).max())


def test_adapters_and_frozen_parts_cover_the_tower_and_all_mergers():
    cfg, params = _model()
    adapters = find_family(cfg).tower.adapters
    declared = lora.add_lora(causal_lm.declare_params(cfg), 2, vision=adapters)
    flat = trainable.flatten_params(declared)
    adapted = {path[:-1] for path in flat if path[-1] == "lora_a"}
    vision = {path[2] for path in adapted if path[0] == "vision"}
    assert vision == {"qkv", "proj", "up", "down"}
    is_trained = trainable.is_trained(("vision", "merger"))
    assert not any(is_trained(path) for path in flat if path[0] != "text")
    assert ("merger", "deepstack", "fc1", "w") in flat
