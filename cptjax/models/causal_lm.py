"""The model of any family: forward over rows and groups, prefill and decode, as pure functions."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from cptjax.models import attention, attention_decode, decoder, packed_groups, unrolled
from cptjax.models.attention_decode import Past
from cptjax.models.config import ModelConfig
from cptjax.models.families import find_family
from cptjax.models.family import VisionFeatures
from cptjax.models.layers import rms_norm
from cptjax.models.unrolled import LayerArrays, read_layer, unstack_for_forward, write_column
from cptjax.sharding import constrain, on_cpu
from cptjax.types import Array, FeaturePool, Packing, Params, Prompts, Vision


def declare_params(cfg: ModelConfig) -> Params:
    """Declare the parameters of the whole model as a tree of `sharding.Param`."""
    tower = find_family(cfg).tower
    parts = {} if tower is None else tower.declare_params(cfg)
    return parts | {"text": decoder.decoder_params(cfg.text)}


class DecoderInputs(NamedTuple):
    """What the decoder gets for a row of tokens."""

    x: Array  # [B T D] embeddings of tokens, or features of the vision tower
    added: Array | None = None  # [n B T D] added to the hidden states after the first n layers


def embed_inputs(
    p: Params, prompts: Prompts, cfg: ModelConfig, dtype: jnp.dtype, image_chunks: int = 1
) -> DecoderInputs:
    """Return token embeddings with the vision features in their slots.

    The tower runs on so many equal parts of the images, one after the other.
    """
    x = decoder.embed_tokens(p["text"], prompts.tokens, dtype)
    if prompts.vision is None and prompts.tower_states is None:
        return DecoderInputs(x)
    tower, states = find_family(cfg).tower, prompts.tower_states
    with jax.named_scope("vision"):
        if states is None:
            features = _image_features(p, prompts.vision, cfg, dtype, image_chunks)
        else:
            features = tower.merge(p, states, cfg)
        if prompts.pool is not None:
            features = jax.tree.map(lambda x: _add_pool(x, prompts.pool), features)
    shards, (b, t) = features.merged.shape[0], prompts.slots.shape
    slots = prompts.slots.reshape(shards, b // shards * t)
    is_image = prompts.slots[..., None] >= 0

    def place(features: Array, elsewhere: Array | float) -> Array:
        image = jnp.take_along_axis(features, jnp.maximum(slots, 0)[..., None], 1)
        return jnp.where(is_image, image.reshape(x.shape), elsewhere)

    added = features.added
    if added is not None:
        added = jax.vmap(lambda layer: place(layer, jnp.zeros((), x.dtype)))(added)
    return DecoderInputs(place(features.merged, x), added)


def _add_pool(features: Array, pool: FeaturePool) -> Array:
    """Return the features [.. S N D] of each shard with the n of the pool after them."""
    if features.ndim == 4:
        return jax.vmap(lambda layer: _add_pool(layer, pool))(features)
    own = jnp.take_along_axis(features, jnp.maximum(pool.slots, 0)[..., None], 1)
    own = jnp.where(pool.slots[..., None] < 0, jnp.zeros((), own.dtype), own)
    # One shard has each feature, so the sum over the shards is exact.
    by_domain = own.reshape(pool.domains, -1, *own.shape[1:])
    shared = jnp.broadcast_to(by_domain.sum(1, keepdims=True), by_domain.shape).reshape(own.shape)
    return jnp.concatenate([features, constrain(shared, "batch", None, None)], 1)


def _image_features(
    p: Params, vision: Vision, cfg: ModelConfig, dtype: jnp.dtype, chunks: int
) -> VisionFeatures:
    """Return the features of images; see `embed_inputs`."""
    tower = find_family(cfg).tower

    def run(part: Vision) -> VisionFeatures:
        return tower.merge(p, tower.run(p, part, cfg, dtype), cfg)

    if chunks == 1:
        return run(vision)

    def cut(x: Array) -> Array:  # [S W ..] -> [chunks S W/chunks ..]
        return jnp.moveaxis(x.reshape(x.shape[0], chunks, -1, *x.shape[2:]), 1, 0)

    def join(x: Array) -> Array:  # [chunks .. S N/chunks D] -> [.. S N D]
        x = jnp.moveaxis(x, 0, -3)
        return x.reshape(*x.shape[:-3], -1, x.shape[-1])

    return jax.tree.map(join, lax.map(run, jax.tree.map(cut, vision)))


def forward(p: Params, prompts: Prompts, cfg: ModelConfig, dtype: jnp.dtype = jnp.float32) -> Array:
    """Return hidden states [B T D] after the final norm, for single or packed rows."""
    p = unstack_for_forward(p, cfg)
    seg, backend = prompts.segments, cfg.compute.attention
    padding = "right" if prompts.right_padded else ""

    def attend(q, k, v):
        out = attention.attend(q, k, v, seg, seg, causal=True, backend=backend, padding=padding)
        return out, None

    inputs = embed_inputs(p, prompts, cfg, dtype)
    return decoder.run_decoder(p["text"], inputs.x, prompts.positions, attend, cfg, inputs.added)[0]


def next_positions(prompts: Prompts) -> Array:
    """Return the position id [B] of the first token after each prompt."""
    return jnp.max(jnp.where(prompts.segments > 0, prompts.positions, -1), axis=(0, 2)) + 1


def forward_group(
    p: Params, prompts: Prompts, responses: Array, cfg: ModelConfig, dtype: jnp.dtype = jnp.float32
) -> Array:
    """Return hidden states [Q G R D] that predict responses [Q G R] to left-padded prompts.

    A prompt is computed once for its group: one row holds the prompt and its G responses. Token r
    of a response is predicted by the state of token r - 1, and token 0 by that of the prompt's last
    token.
    """
    p = unstack_for_forward(p, cfg)
    nq, g, r = responses.shape
    plen = prompts.tokens.shape[1]
    ids = next_positions(prompts)[:, None] + jnp.arange(r)
    ids = jnp.broadcast_to(ids[None, :, None], (3, nq, g, r)).reshape(3, nq, g * r)
    inputs = embed_inputs(p, prompts, cfg, dtype)
    response_x = decoder.embed_tokens(p["text"], responses.reshape(nq, g * r), dtype)
    x = jnp.concatenate([inputs.x, response_x], 1)
    positions = jnp.concatenate([prompts.positions, ids], 2)

    def attend(q, k, v):
        backend = cfg.compute.attention
        return attention.attend_group(q, k, v, prompts.segments, plen, g, backend), None

    hidden, _ = decoder.run_decoder(p["text"], x, positions, attend, cfg, inputs.added)
    first = jnp.broadcast_to(hidden[:, None, plen - 1 : plen], (nq, g, 1, hidden.shape[-1]))
    return jnp.concatenate([first, hidden[:, plen:].reshape(nq, g, r, -1)[:, :, :-1]], 2)


def forward_packed(
    p: Params,
    prompts: Prompts,
    responses: Array,
    packing: Packing,
    cfg: ModelConfig,
    dtype: jnp.dtype = jnp.float32,
) -> Array:
    """Return hidden states [S N D] of packed groups: prompts [Q P] and responses [B R].

    The states are those of `forward_group`, without padding and with those of the prompts.
    """
    p = unstack_for_forward(p, cfg)
    rows = packed_groups.pack_tokens(prompts, responses, next_positions(prompts), packing)
    inputs, backend = embed_inputs(p, rows, cfg, dtype), cfg.compute.attention
    attend_rows = packed_attention(prompts.segments, responses.shape, packing, backend)

    def attend(q, k, v):
        return attend_rows(q, k, v), None

    return decoder.run_decoder(p["text"], inputs.x, rows.positions, attend, cfg, inputs.added)[0]


def packed_attention(
    segments: Array, responses: tuple[int, int], packing: Packing, backend: str
) -> Callable[[Array, Array, Array], Array]:
    """Return the attention of packed rows, of queries [S N heads H], keys and values [S N K H].

    segments: [Q P] of the prompts; responses: (B, R)
    """
    prompts, (b, r) = segments.shape, responses
    if attention.reads_packed_rows(backend):
        reads = attention.plan_packed_reads(packing, prompts, responses, backend)
        return functools.partial(attention.attend_packed_rows, reads=reads, backend=backend)
    shapes = prompts, (prompts[0], b // prompts[0], r)

    def attend(q: Array, k: Array, v: Array) -> Array:
        padded = (packed_groups.to_padded(x, *shapes, packing) for x in (q, k, v))
        heads, tails = zip(*padded, strict=True)
        out = attention.attend_padded_groups(heads, tails, segments, backend)
        return packed_groups.to_packed(*out, packing)

    return attend


@flax.struct.dataclass
class KVCache:
    """Keys and values of the shared prompts and of each response's own tokens.

    The columns of the responses are in parts of some W, because XLA's products read whole arrays;
    if `reads_live_columns`, there is one part, and P and W are padded. With unrolled weights, keys
    and values are tuples of one array per layer.
    """

    prompt_k: LayerArrays  # [L Q K H P]
    prompt_v: LayerArrays  # [L Q K P H]
    prompt_mask: Array  # [Q P]
    own_k: tuple[LayerArrays, ...] = ()  # parts [L Q G K W H], or [.. H W] as `key_axis` says
    own_v: tuple[LayerArrays, ...] = ()  # parts [L Q G K W H]

    def column_counts(self) -> list[int]:
        """Return the number W of columns of each part."""
        return [jax.tree.leaves(part)[0].shape[-2] for part in self.own_v]


def reads_live_columns(cfg: ModelConfig) -> bool:
    """Return whether decode steps use the TPU kernel, which reads only live columns."""
    return cfg.compute.attention == "splash" and not cfg.compute.samples_unrolled


def prefill(
    p: Params, inputs: DecoderInputs, positions: Array, segments: Array, cfg: ModelConfig
) -> tuple[Array, LayerArrays, LayerArrays]:
    """Run left-padded prompts [Q P], which are the results of `embed_inputs`.

    Return the last hidden states [Q D], and the keys and values [L Q P K H].
    """

    attend_left_padded = functools.partial(
        attention.attend, causal=True, backend=cfg.compute.attention, padding="left"
    )

    def attend(q, k, v):
        return attend_left_padded(q, k, v, segments, segments), (k, v)

    hidden, (keys, values) = decoder.run_decoder(
        p["text"], inputs.x, positions, attend, cfg, inputs.added
    )
    return hidden[:, -1], keys, values


def new_kv_cache(
    keys: LayerArrays, values: LayerArrays, segments: Array, cfg: ModelConfig
) -> KVCache:
    """Return a cache of the prompts of `prefill`, without room for responses."""
    heads, p = kv_axis(cfg), segments.shape[1]
    left = attention_decode.padded_columns(p) - p if reads_live_columns(cfg) else 0

    def shared(x, *order):  # of [(L) Q P K H]
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 3) + [(left, 0), (0, 0), (0, 0)])
        x = jnp.moveaxis(x, (-3, -2, -1), order)
        return constrain(x, *(None,) * (x.ndim - 4), "batch", heads, None, None)

    prompt_k = jax.tree.map(lambda x: shared(x, -1, -3, -2), keys)
    prompt_v = jax.tree.map(lambda x: shared(x, -2, -3, -1), values)
    return KVCache(prompt_k, prompt_v, jnp.pad(segments > 0, ((0, 0), (left, 0))))


def add_columns(cache: KVCache, group: int, columns: int, cfg: ModelConfig) -> KVCache:
    """Return the cache with room for `columns` more tokens of each of `group` responses.

    XLA:CPU writes a column of a bfloat16 array by converting the whole array twice, so on CPUs
    these columns are float32.
    """
    heads, kernel = kv_axis(cfg), reads_live_columns(cfg)
    columns = attention_decode.padded_columns(columns) if kernel else columns
    wide = on_cpu() and not kernel

    def part(x, *tail):  # of [(L) Q K . .]
        *layer, q, k = x.shape[:-2]
        x = jnp.zeros((*layer, q, group, k, *tail), jnp.float32 if wide else x.dtype)
        return constrain(x, *(None,) * len(layer), "batch", None, heads, None, None)

    tail = columns, cfg.text.head_dim
    values = jax.tree.map(lambda x: part(x, *tail), cache.prompt_v)
    tail = tail if unrolled.key_axis(cache.prompt_k) == -2 else tail[::-1]
    keys = jax.tree.map(lambda x: part(x, *tail), cache.prompt_k)
    return cache.replace(own_k=(*cache.own_k, keys), own_v=(*cache.own_v, values))


def kv_axis(cfg: ModelConfig) -> str | None:
    """Return the logical axis of key/value heads; None if `model` has more devices than heads."""
    mesh = jax.sharding.get_abstract_mesh()
    return "kv_heads" if mesh.empty or cfg.text.kv_heads % mesh.shape["model"] == 0 else None


def response_cos_sin(positions: Array, cfg: ModelConfig) -> tuple[Array, Array]:
    """Return cos and sin [Q G H/2] of the position ids [Q G] of text tokens."""
    return decoder.rope_cos_sin(jnp.broadcast_to(positions, (3, *positions.shape)), cfg.text)


def decode_step(
    p: Params,
    tokens: Array,
    rope: tuple[Array, Array],
    past: Past,
    cache: KVCache,
    cfg: ModelConfig,
    dtype: jnp.dtype,
) -> tuple[Array, KVCache]:
    """Run one token [Q G] of each response; return hidden states [Q G D] and the new cache.

    rope: cos and sin of the tokens' positions, from `response_cos_sin`.
    past: the columns to which the responses attend. The keys and values of the tokens are written
        to the newest one, which is in the last part; it is the same for all rows, so that the
        update is in place, without a scatter.
    """
    blocks, axis = p["text"]["blocks"], unrolled.key_axis(cache.prompt_k)
    *older_k, newest_k = cache.own_k
    *older_v, newest_v = cache.own_v
    column = past.column - sum(cache.column_counts()[:-1])
    if reads_live_columns(cfg):  # the kernel takes the prompts' caches of all layers
        attend_cache, prompt = _live_columns(cache, past, cfg), ()
    else:
        attend_cache, prompt = _all_columns(cache, past), (cache.prompt_k, cache.prompt_v)

    def layer(carry, weights, i, *prompt):
        x, own_k, own_v = carry

        def attend(q, k, v):
            keys = write_column(own_k, i, k, column, axis)
            values = write_column(own_v, i, v, column, axis=-2)
            return attend_cache(q, keys, values, i, *prompt), (keys, values)

        x, (own_k, own_v) = decoder.decoder_block(weights, x, rope, attend, cfg)
        return (x, own_k, own_v), None

    x = decoder.embed_tokens(p["text"], tokens, dtype)
    numbers = unrolled.layer_numbers(blocks, cfg.text.depth)
    (x, newest_k, newest_v), _ = unrolled.scan_layers(
        layer, (x, newest_k, newest_v), blocks, numbers, *prompt
    )
    x = rms_norm(x, p["text"]["norm"], cfg.text.norm_eps)
    return x, cache.replace(own_k=(*older_k, newest_k), own_v=(*older_v, newest_v))


def _all_columns(cache: KVCache, past: Past) -> Callable[..., Array]:
    """Return the attention by products that read all columns, and mask those that are not visible.

    It takes the queries, the newest part of the caches, the number of a layer, and the layer's keys
    and values of the prompts.
    """
    axis, visible = unrolled.key_axis(cache.prompt_k), past.visible(sum(cache.column_counts()))

    def attend(q, keys, values, i, prompt_k, prompt_v):
        own_k = [jnp.moveaxis(read_layer(x, i), axis, -2) for x in (*cache.own_k[:-1], keys)]
        own_v = [read_layer(x, i) for x in (*cache.own_v[:-1], values)]
        return attention.attend_cached(
            q, prompt_k, prompt_v, own_k, own_v, cache.prompt_mask, visible
        )

    return attend


def _live_columns(cache: KVCache, past: Past, cfg: ModelConfig) -> Callable[..., Array]:
    """Return the attention by the TPU kernel.

    It takes the queries, the caches of all layers, and the number of a layer.
    """
    (own_k,), (own_v,), heads = cache.own_k, cache.own_v, kv_axis(cfg)
    stacked = attention_decode.Cache(cache.prompt_k, cache.prompt_v, own_k, own_v)
    reads = attention_decode.plan_reads(stacked, cache.prompt_mask, past, heads)

    def attend(q, keys, values, i):
        written = stacked.replace(own_k=keys, own_v=values)
        return attention_decode.attend_live(
            q, written, reads, i, past.ring, heads, attention.INTERPRET
        )

    return attend
