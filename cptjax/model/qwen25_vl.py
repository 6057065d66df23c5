"""Qwen2.5-VL as functions of (params, inputs): forward over rows, over groups, prefill and decode."""

import flax.struct
import jax
import jax.numpy as jnp

from cptjax.model import attention, text, vision
from cptjax.model.config import Config
from cptjax.types import Array, Params, Prompts


@flax.struct.dataclass
class Cache:
    """Keys and values of the layers: shared prompts and each response's own."""

    prompt_k: Array  # [L Q P K H]
    prompt_v: Array
    prompt_mask: Array  # [Q P]
    own_k: Array  # [L Q G R K H]
    own_v: Array


def params(cfg: Config) -> Params:
    """The whole model as a tree of sharding.Param."""
    return {"vision": vision.params(cfg.vision), "merger": vision.merger_params(cfg), "text": text.params(cfg.text)}


def embed(p: Params, prompts: Prompts, cfg: Config, dtype: jnp.dtype) -> Array:
    """Token embeddings [B T D] with the vision features in their slots."""
    x = text.embed(p["text"], prompts.tokens, dtype)
    if prompts.vision is None:
        return x
    with jax.named_scope("vision"):
        features = vision.encode(p["vision"], p["merger"], prompts.vision, cfg, dtype)
    shards, (b, t) = features.shape[0], prompts.slots.shape
    slots = prompts.slots.reshape(shards, b // shards * t)
    found = jnp.take_along_axis(features, jnp.maximum(slots, 0)[..., None], 1).reshape(x.shape)
    return jnp.where(prompts.slots[..., None] >= 0, found, x)


def forward(p: Params, prompts: Prompts, cfg: Config, dtype: jnp.dtype = jnp.float32) -> Array:
    """Hidden states [B T D] after the final norm, for single or packed rows."""
    seg = prompts.segments
    attend = lambda q, k, v: (attention.attend(q, k, v, seg, seg, causal=True, backend=cfg.attention), None)
    return text.run(p["text"], embed(p, prompts, cfg, dtype), prompts.positions, attend, cfg)[0]


def next_positions(prompts: Prompts) -> Array:
    """[B] the position id of the first token after each prompt."""
    return jnp.max(jnp.where(prompts.segments > 0, prompts.positions, -1), axis=(0, 2)) + 1


def forward_group(p: Params, prompts: Prompts, responses: Array, cfg: Config, dtype: jnp.dtype = jnp.float32) -> Array:
    """Hidden states [Q G R D] that predict responses [Q G R]; prompts are left-padded and computed once per group.

    Predicting state of response token r is the one before it; for r = 0 the prompt's last.
    """
    nq, g, r = responses.shape
    plen = prompts.tokens.shape[1]
    own = next_positions(prompts)[:, None] + jnp.arange(r)
    own = jnp.broadcast_to(own[None, :, None], (3, nq, g, r)).reshape(3, nq, g * r)
    x = jnp.concatenate([embed(p, prompts, cfg, dtype), text.embed(p["text"], responses.reshape(nq, g * r), dtype)], 1)
    attend = lambda q, k, v: (attention.attend_group(q, k, v, prompts.segments, plen, g, cfg.attention), None)
    hidden, _ = text.run(p["text"], x, jnp.concatenate([prompts.positions, own], 2), attend, cfg)
    first = jnp.broadcast_to(hidden[:, None, plen - 1 : plen], (nq, g, 1, hidden.shape[-1]))
    return jnp.concatenate([first, hidden[:, plen:].reshape(nq, g, r, -1)[:, :, :-1]], 2)


def prefill(p: Params, prompts: Prompts, cfg: Config, dtype: jnp.dtype = jnp.float32) -> tuple[Array, Array, Array]:
    """Left-padded prompts -> the last hidden states [Q D] and the prompt's keys and values [L Q P K H]."""
    seg = prompts.segments
    attend = lambda q, k, v: (attention.attend(q, k, v, seg, seg, causal=True, backend=cfg.attention), (k, v))
    hidden, (keys, values) = text.run(p["text"], embed(p, prompts, cfg, dtype), prompts.positions, attend, cfg)
    return hidden[:, -1], keys, values


def decode_step(p: Params, tokens: Array, positions: Array, at: Array, cache: Cache, cfg: Config, dtype: jnp.dtype) -> tuple[Array, Cache]:
    """One token [Q G] at position ids [Q G], stored at index `at` [Q] of the own caches -> hidden [Q G D] and the new cache."""
    nq, g = tokens.shape
    rope = text.angles(jnp.broadcast_to(positions[None], (3, nq, g)), cfg.text)
    x = text.embed(p["text"], tokens, dtype)
    seen = (jnp.arange(cache.own_k.shape[3]) <= at[:, None])[:, None, None]

    def step(carry, layer):
        x, own_k, own_v = carry
        weights, prompt_k, prompt_v, i = layer

        def attend(q, k, v):
            put = lambda cache, new: _store(cache, new, i, at)
            keys, values = put(own_k, k), put(own_v, v)
            mine = lambda c: jax.lax.dynamic_index_in_dim(c, i, keepdims=False)
            out = attention.attend_shared(q[:, :, None], prompt_k, prompt_v, mine(keys), mine(values), cache.prompt_mask, seen)
            return out[:, :, 0], (keys, values)

        x, (own_k, own_v) = text.block(weights, x, rope, attend, cfg)
        return (x, own_k, own_v), None

    layers = (p["text"]["blocks"], cache.prompt_k, cache.prompt_v, jnp.arange(cfg.text.depth))
    (x, own_k, own_v), _ = jax.lax.scan(step, (x, cache.own_k, cache.own_v), layers, unroll=cfg.text.depth if cfg.unroll else 1)
    return text.rms_norm(x, p["text"]["norm"], cfg.text.norm_eps), cache.replace(own_k=own_k, own_v=own_v)


def _store(cache: Array, new: Array, layer: Array, at: Array) -> Array:
    """Write new [Q G K H] at [layer, q, :, at[q]]."""
    rows = jnp.arange(new.shape[0])
    return cache.at[layer, rows, :, at].set(new, unique_indices=True, indices_are_sorted=True)
