"""Qwen2.5-VL as functions of (params, inputs): forward over rows, over groups, prefill and decode."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from cptjax.models import attention, decoder, vision
from cptjax.models.config import ModelConfig
from cptjax.models.layers import rms_norm
from cptjax.models.unrolled import unstack_for_forward
from cptjax.sharding import constrain
from cptjax.types import Array, Params, Prompts


@flax.struct.dataclass
class KVCache:
    """Keys and values, of the shared prompts and of each response's own tokens; with unstacked weights a tuple of one array per layer."""

    prompt_k: Array | tuple[Array, ...]  # [L Q K H P] | L x [Q K H P]
    prompt_v: Array | tuple[Array, ...]  # [L Q K P H] | L x [Q K P H]
    prompt_mask: Array  # [Q P]
    own_k: Array | tuple[Array, ...]  # [L Q G K H R] | L x [Q G K H R]
    own_v: Array | tuple[Array, ...]  # [L Q G K R H] | L x [Q G K R H]


def declare_params(cfg: ModelConfig) -> Params:
    """The whole model as a tree of sharding.Param."""
    return {
        "vision": vision.vision_params(cfg.vision),
        "merger": vision.merger_params(cfg),
        "text": decoder.decoder_params(cfg.text),
    }


def embed_inputs(p: Params, prompts: Prompts, cfg: ModelConfig, dtype: jnp.dtype) -> Array:
    """Token embeddings [B T D] with the vision features in their slots."""
    x = decoder.embed_tokens(p["text"], prompts.tokens, dtype)
    if prompts.vision is None:
        return x
    with jax.named_scope("vision"):
        features = vision.encode_vision(p["vision"], p["merger"], prompts.vision, cfg, dtype)
    shards, (b, t) = features.shape[0], prompts.slots.shape
    slots = prompts.slots.reshape(shards, b // shards * t)
    found = jnp.take_along_axis(features, jnp.maximum(slots, 0)[..., None], 1).reshape(x.shape)
    return jnp.where(prompts.slots[..., None] >= 0, found, x)


def forward(p: Params, prompts: Prompts, cfg: ModelConfig, dtype: jnp.dtype = jnp.float32) -> Array:
    """Hidden states [B T D] after the final norm, for single or packed rows."""
    p, seg = unstack_for_forward(p, cfg), prompts.segments
    attend = lambda q, k, v: (
        attention.attend(q, k, v, seg, seg, causal=True, backend=cfg.attention),
        None,
    )
    return decoder.run_decoder(
        p["text"], embed_inputs(p, prompts, cfg, dtype), prompts.positions, attend, cfg
    )[0]


def next_positions(prompts: Prompts) -> Array:
    """[B] the position id of the first token after each prompt."""
    return jnp.max(jnp.where(prompts.segments > 0, prompts.positions, -1), axis=(0, 2)) + 1


def forward_group(
    p: Params, prompts: Prompts, responses: Array, cfg: ModelConfig, dtype: jnp.dtype = jnp.float32
) -> Array:
    """Hidden states [Q G R D] that predict responses [Q G R]; prompts are left-padded and computed once per group.

    Predicting state of response token r is the one before it; for r = 0 the prompt's last.
    """
    p, (nq, g, r) = unstack_for_forward(p, cfg), responses.shape
    plen = prompts.tokens.shape[1]
    own = next_positions(prompts)[:, None] + jnp.arange(r)
    own = jnp.broadcast_to(own[None, :, None], (3, nq, g, r)).reshape(3, nq, g * r)
    x = jnp.concatenate(
        [
            embed_inputs(p, prompts, cfg, dtype),
            decoder.embed_tokens(p["text"], responses.reshape(nq, g * r), dtype),
        ],
        1,
    )
    attend = lambda q, k, v: (
        attention.attend_group(q, k, v, prompts.segments, plen, g, cfg.attention),
        None,
    )
    hidden, _ = decoder.run_decoder(
        p["text"], x, jnp.concatenate([prompts.positions, own], 2), attend, cfg
    )
    first = jnp.broadcast_to(hidden[:, None, plen - 1 : plen], (nq, g, 1, hidden.shape[-1]))
    return jnp.concatenate([first, hidden[:, plen:].reshape(nq, g, r, -1)[:, :, :-1]], 2)


def prefill(
    p: Params, prompts: Prompts, cfg: ModelConfig, dtype: jnp.dtype = jnp.float32
) -> tuple[Array, Array, Array]:
    """Left-padded prompts -> the last hidden states [Q D] and the prompt's keys and values [L Q P K H]."""
    return prefill_embedded(
        p, embed_inputs(p, prompts, cfg, dtype), prompts.positions, prompts.segments, cfg
    )


def prefill_embedded(
    p: Params, x: Array, positions: Array, segments: Array, cfg: ModelConfig
) -> tuple[Array, Any, Any]:
    """`prefill` of embedded prompts [Q P D]: the images are already in place."""
    attend = lambda q, k, v: (
        attention.attend(q, k, v, segments, segments, causal=True, backend=cfg.attention),
        (k, v),
    )
    hidden, kept = decoder.run_decoder(p["text"], x, positions, attend, cfg)
    keys, values = zip(*kept, strict=True) if isinstance(kept[0], tuple) else kept
    return hidden[:, -1], keys, values


def new_kv_cache(
    keys: Any, values: Any, segments: Array, group: int, new: int, cfg: ModelConfig
) -> KVCache:
    """The cache of prompts whose keys and values `prefill` returned, with room for `new` tokens of each response."""
    place = lambda x, *axes: constrain(x, *((None,) * (x.ndim - len(axes))), *axes)
    turn = lambda x, *order: place(
        jnp.moveaxis(x, (-3, -2, -1), order), "batch", kv_axis(cfg), None, None
    )  # of [.. P K H]
    prompt_k, prompt_v = (
        jax.tree.map(lambda x: turn(x, -1, -3, -2), keys),
        jax.tree.map(lambda x: turn(x, -2, -3, -1), values),
    )

    def own(x, *tail):
        *layer, q, kv = x.shape[:-2]
        return place(
            jnp.zeros((*layer, q, group, kv, *tail), x.dtype),
            "batch",
            None,
            kv_axis(cfg),
            None,
            None,
        )

    h = cfg.text.head_dim
    own_k, own_v = (
        jax.tree.map(lambda x: own(x, h, new), prompt_k),
        jax.tree.map(lambda x: own(x, new, h), prompt_v),
    )
    return KVCache(prompt_k, prompt_v, segments > 0, own_k, own_v)


def kv_axis(cfg: ModelConfig) -> str | None:
    """The logical axis of key/value heads; None where the mesh has more members of `model` than heads to cut."""
    mesh = jax.sharding.get_abstract_mesh()
    return "kv_heads" if mesh.empty or cfg.text.kv_heads % mesh.shape["model"] == 0 else None


def response_cos_sin(positions: Array, cfg: ModelConfig) -> tuple[Array, Array]:
    """cos and sin [Q 1 H/2] of the position ids [Q] of text tokens; a loop hands them from step to step."""
    return decoder.mrope_cos_sin(
        jnp.broadcast_to(positions[None, :, None], (3, positions.shape[0], 1)), cfg.text
    )


def decode_step(
    p: Params,
    tokens: Array,
    rope: tuple[Array, Array],
    at: Array,
    seen: Array,
    cache: KVCache,
    cfg: ModelConfig,
    dtype: jnp.dtype,
) -> tuple[Array, KVCache]:
    """One token [Q G], at the place of `rotation`, kept in column `at` of the own caches -> hidden [Q G D] and the new cache.

    `at` is one number for all rows (an update in place, no scatter); `seen` [Q R] says which columns are a group's own past, `at` included.
    """
    x = decoder.embed_tokens(p["text"], tokens, dtype)

    def layer(x, weights, prompt_k, prompt_v, own_k, own_v, i):
        def attend(q, k, v):
            keys, values = _write_column(own_k, k, i, at, -1), _write_column(own_v, v, i, at, -2)
            mine = (
                (lambda c: c)
                if i is None
                else (lambda c: jax.lax.dynamic_index_in_dim(c, i, keepdims=False))
            )
            out = attention.attend_cached(
                q, prompt_k, prompt_v, mine(keys), mine(values), cache.prompt_mask, seen
            )
            return out, (keys, values)

        return decoder.decoder_block(weights, x, rope, attend, cfg)

    blocks = p["text"]["blocks"]
    if isinstance(blocks, tuple):
        kept = []
        for weights, *rest in zip(
            blocks, cache.prompt_k, cache.prompt_v, cache.own_k, cache.own_v, strict=True
        ):
            x, new = layer(x, weights, *rest, None)
            kept.append(new)
        own_k, own_v = zip(*kept, strict=True)
    else:

        def step(carry, xs):
            x, own_k, own_v = carry
            weights, prompt_k, prompt_v, i = xs
            x, (own_k, own_v) = layer(x, weights, prompt_k, prompt_v, own_k, own_v, i)
            return (x, own_k, own_v), None

        layers = (blocks, cache.prompt_k, cache.prompt_v, jnp.arange(cfg.text.depth))
        (x, own_k, own_v), _ = jax.lax.scan(step, (x, cache.own_k, cache.own_v), layers)
    return rms_norm(x, p["text"]["norm"], cfg.text.norm_eps), cache.replace(
        own_k=own_k, own_v=own_v
    )


def _write_column(cache: Array, new: Array, layer: Array | None, at: Array, tokens: int) -> Array:
    """Write new [Q G K H] into column `at` of axis `tokens` of [Q G K . .], or of layer `layer` of [L Q G K . .]."""
    new = jnp.expand_dims(new, tokens).astype(cache.dtype)
    start = [0] * cache.ndim
    start[tokens] = at
    if layer is not None:
        new, start[0] = new[None], layer
    return jax.lax.dynamic_update_slice(cache, new, start)
