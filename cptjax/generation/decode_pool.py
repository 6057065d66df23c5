"""The decode pool, the slots in which groups are decoded: prefill, decode steps, refill.

A slot holds one group: the keys and values of its prompt, and the G responses that are decoded for
it. All slots write into one ring of R columns: decode step s reads the token of column s % R and
writes the token of column (s + 1) % R. So keys, values and tokens are updated in place, without a
scatter, even if groups started at different steps. A group that started at step b has its token i
in column (b + i) % R and attends only to columns that were written since it started:

    R = 6               column  0 1 2 3 4 5
    after step 7:
    started at 0, done          a b c d e f      reached its limit after step 5
    started at 3                d e . a b c      token e, in column 7 % 6, was sampled last
    started at 7                . a . . . .

The TPU kernel reads only the columns that a row attends to, and none of a row that is done
(`attention_decode`). Elsewhere a decode step reads all columns of keys and values that exist.
Groups that start together fill the columns in order, so theirs are added part by part
(`add_columns`), and no step reads columns that are still empty. Groups of different ages use the
whole ring.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from cptjax import sharding
from cptjax.generation import token_sampling
from cptjax.models import causal_lm, decoder, trainable, unrolled
from cptjax.models.attention_decode import Past
from cptjax.models.config import ModelConfig
from cptjax.sharding import constrain, move_rows
from cptjax.types import Array, Params, Prompts, Rollouts


@flax.struct.dataclass
class QueuedPrompts:
    """Embedded prompts with the limits and ids of their responses."""

    inputs: causal_lm.DecoderInputs | None  # [Q P D]
    positions: Array | None  # [3 Q P]
    segments: Array | None  # [Q P]
    first_position: Array  # [Q] position id of the first response token
    limits: Array  # [Q G] the most tokens of each response; 0 = a padding row
    row_ids: Array  # [Q G] the number from which a row's random key is derived
    index: Array  # [Q] index in the batch


@flax.struct.dataclass
class DecodePool:
    """The groups being decoded; S slots."""

    cache: causal_lm.KVCache | None
    step: Array | None  # [] decode steps since the pool was created
    start_step: Array  # [S] the step at which a slot's group started
    prompts: QueuedPrompts  # of the slots, without embeddings, positions and segments
    rope: tuple[Array, Array]  # [S 1 H/2] cos and sin of the position of the tokens sampled last
    token: Array  # [S G] sampled last
    length: Array  # [S G] tokens sampled
    done: Array  # [S G]
    finished: Array  # [S G] done by a stop token
    tokens: Array  # [S G R] a ring, as are the next two
    logps: Array
    policy_logps: Array


@flax.struct.dataclass
class GroupResults:
    """Responses by prompt."""

    tokens: Array  # [Q G R]
    logps: Array
    policy_logps: Array
    length: Array  # [Q G]
    finished: Array  # [Q G]


@dataclasses.dataclass(frozen=True)
class StaticSettings:
    """The sampling settings for which programs are compiled."""

    group: int
    max_new_tokens: int
    check_every: int
    dtype: Any


@flax.struct.dataclass
class TracedSettings:
    """The sampling settings that programs take as arrays: new values need no compilation."""

    key: Array
    controls: token_sampling.SamplingControls
    stops: Array  # [n] token ids


def cast_weights(params: Params, cfg: ModelConfig, static: StaticSettings) -> Params:
    """Cast the weights to the compute dtype once, before any loop; int8 weights stay int8."""
    return unrolled.unstack_layers(trainable.cast_params(params, static.dtype), cfg)


def queue_prompts(
    weights: Params,
    prompts: Prompts,
    limits: Array,
    row_ids: Array,
    cfg: ModelConfig,
    static: StaticSettings,
) -> QueuedPrompts:
    """Embed the tokens and images of all prompts; an empty prompt gets a limit of 0."""
    filled = jnp.any(prompts.segments > 0, 1)[:, None]
    first_position = causal_lm.next_positions(prompts)
    images = jax.tree.leaves((prompts.vision, (prompts.tower_states or ())[:1]))
    with sharding.whole_rows(len(prompts.tokens), *map(len, images)):
        inputs = causal_lm.embed_inputs(weights, prompts, cfg, static.dtype)
    return QueuedPrompts(
        inputs=inputs,
        positions=prompts.positions,
        segments=prompts.segments,
        first_position=first_position,
        limits=jnp.where(filled, jnp.minimum(limits, static.max_new_tokens), 0),
        row_ids=row_ids,
        index=jnp.arange(len(first_position)),
    )


def select_prompts(queue: QueuedPrompts, index: Array) -> QueuedPrompts:
    """Return some prompts of the queue as a batch."""

    def select(x: Array) -> Array:
        return constrain(x[index], "batch", *(None,) * (x.ndim - 1))

    def select_second(x: Array) -> Array:  # [3 Q P], [n Q P D]
        return constrain(x[:, index], None, "batch", *(None,) * (x.ndim - 2))

    second = queue.positions, queue.inputs.added
    rest = queue.replace(positions=None, inputs=queue.inputs._replace(added=None))
    positions, added = jax.tree.map(select_second, second)
    selected = jax.tree.map(select, rest)
    return selected.replace(positions=positions, inputs=selected.inputs._replace(added=added))


def prefill_slots(
    weights: Params,
    prompts: QueuedPrompts,
    step: Array,
    traced: TracedSettings,
    cfg: ModelConfig,
    static: StaticSettings,
) -> DecodePool:
    """Compute the keys and values of these prompts, and sample the first token of each response.

    The cache has no columns yet.
    """
    with sharding.whole_rows(len(prompts.segments)):
        hidden, keys, values = causal_lm.prefill(
            weights, prompts.inputs, prompts.positions, prompts.segments, cfg
        )
    cache = causal_lm.new_kv_cache(keys, values, prompts.segments, cfg)
    s, g = prompts.row_ids.shape
    zeros = jnp.zeros((s, g), jnp.int32)
    ring = jnp.zeros((s, g, static.max_new_tokens), jnp.float32)
    pool = DecodePool(
        cache=cache,
        step=step,
        start_step=jnp.full(s, step),
        prompts=prompts.replace(inputs=None, positions=None, segments=None),
        rope=causal_lm.response_cos_sin(prompts.first_position, cfg),
        token=zeros,
        length=zeros,
        done=prompts.limits <= 0,
        finished=zeros > 0,
        tokens=ring.astype(jnp.int32),
        logps=ring,
        policy_logps=ring,
    )
    logits = _logits(weights, hidden)
    logits = jnp.broadcast_to(logits[:, None], (s, g, logits.shape[-1]))
    return _sample_and_store(pool, logits, traced)


def add_columns(pool: DecodePool, columns: int, cfg: ModelConfig) -> DecodePool:
    """Return the pool with more columns for keys and values."""
    group = pool.token.shape[1]
    return pool.replace(cache=causal_lm.add_columns(pool.cache, group, columns, cfg))


def run_decode_steps(
    weights: Params,
    pool: DecodePool,
    steps: int,
    traced: TracedSettings,
    cfg: ModelConfig,
    static: StaticSettings,
) -> DecodePool:
    """Sample `steps` more tokens of every row that is not done; the other rows do not change.

    The columns of these steps must be in the last part of the cache.
    """
    ring = static.max_new_tokens

    def step(_: Any, pool: DecodePool) -> DecodePool:
        age = pool.step - pool.start_step  # index of the token of each group that was sampled last
        past = Past(pool.step % ring, age, ~pool.done, ring)
        hidden, cache = causal_lm.decode_step(
            weights, pool.token, pool.rope, past, pool.cache, cfg, static.dtype
        )
        rope = causal_lm.response_cos_sin(pool.prompts.first_position + age + 1, cfg)
        pool = pool.replace(cache=cache, step=pool.step + 1, rope=rope)
        return _sample_and_store(pool, _logits(weights, hidden), traced)

    return jax.lax.fori_loop(0, steps, step, pool)


def _logits(weights: Params, hidden: Array) -> Array:
    hidden = move_rows(hidden, "mlp_batch")
    return jnp.dot(hidden, decoder.unembedding(weights["text"]), preferred_element_type=jnp.float32)


def _sample_and_store(pool: DecodePool, logits: Array, traced: TracedSettings) -> DecodePool:
    """Sample a token of each row from logits [S G V], and store it where a row is not done."""

    def random_number(row_id: Array, length: Array) -> Array:
        key = jax.random.fold_in(jax.random.fold_in(traced.key, row_id), length)
        return jax.random.uniform(key)

    uniform = jax.vmap(random_number)(pool.prompts.row_ids.reshape(-1), pool.length.reshape(-1))
    sampled = token_sampling.sample_tokens(
        logits.reshape(-1, logits.shape[-1]), uniform, traced.controls
    )
    token, logps, policy_logps = (x.reshape(pool.token.shape) for x in sampled)
    active = ~pool.done
    column = pool.step % pool.tokens.shape[-1]

    def store(ring: Array, new: Array) -> Array:
        old = jax.lax.dynamic_index_in_dim(ring, column, 2)
        kept = jnp.where(active[..., None], new[..., None], old)
        return jax.lax.dynamic_update_slice_in_dim(ring, kept, column, 2)

    length = pool.length + active
    stopped = active & jnp.isin(token, traced.stops)
    return pool.replace(
        token=token,
        length=length,
        finished=pool.finished | stopped,
        done=pool.done | stopped | (length >= pool.prompts.limits),
        tokens=store(pool.tokens, token),
        logps=store(pool.logps, logps),
        policy_logps=store(pool.policy_logps, policy_logps),
    )


def slot_results(pool: DecodePool) -> GroupResults:
    """Return the responses of every slot so far, each with its first token first."""
    ring_size = pool.tokens.shape[-1]
    columns = ((pool.start_step[:, None] + jnp.arange(ring_size)) % ring_size)[:, None]
    tokens, logps, policy_logps = (
        jnp.take_along_axis(ring, columns, 2)
        for ring in (pool.tokens, pool.logps, pool.policy_logps)
    )
    return GroupResults(tokens, logps, policy_logps, pool.length, pool.finished)


def store_results(pool: DecodePool, results: GroupResults | None, prompts: int) -> GroupResults:
    """Write the responses of every slot at the index of its prompt.

    An unfinished group is written again later.
    """
    new = slot_results(pool)
    if results is None:
        results = jax.tree.map(lambda x: jnp.zeros((prompts, *x.shape[1:]), x.dtype), new)

    def store(old: Array, x: Array) -> Array:
        return constrain(old.at[pool.prompts.index].set(x), "batch", *(None,) * (x.ndim - 1))

    return jax.tree.map(store, results, new)


def to_rollouts(results: GroupResults, cfg: ModelConfig) -> Rollouts:
    """Reshape [Q G ...] to rows, and clear everything after the last token of each row."""
    mask = jnp.arange(results.tokens.shape[-1]) < results.length[..., None]

    def rows(x: Array) -> Array:
        return constrain(x.reshape(-1, *x.shape[2:]), "batch", *(None,) * (x.ndim - 2))

    return Rollouts(
        tokens=rows(jnp.where(mask, results.tokens, cfg.pad)),
        mask=rows(mask),
        logps=rows(jnp.where(mask, results.logps, 0.0)),
        policy_logps=rows(jnp.where(mask, results.policy_logps, 0.0)),
        finished=rows(results.finished),
    )


def refill_slots(
    weights: Params,
    pool: DecodePool,
    queue: QueuedPrompts,
    slots: Array,
    index: Array,
    traced: TracedSettings,
    cfg: ModelConfig,
    static: StaticSettings,
) -> DecodePool:
    """Start the prompts `index` of the queue in `slots`.

    The ring is not cleared, because a group does not attend to columns from before its start.
    """
    new = prefill_slots(weights, select_prompts(queue, index), pool.step, traced, cfg, static)

    def set_slots(old: Array, x: Array) -> Array:
        return old.at[slots].set(x)

    def set_prompt(old: Array, x: Array) -> Array:  # [(L) S K . .]
        return old.at[..., slots, :, :, :].set(x)

    cache = pool.cache.replace(
        prompt_k=jax.tree.map(set_prompt, pool.cache.prompt_k, new.cache.prompt_k),
        prompt_v=jax.tree.map(set_prompt, pool.cache.prompt_v, new.cache.prompt_v),
        prompt_mask=set_slots(pool.cache.prompt_mask, new.cache.prompt_mask),
    )
    per_slot = jax.tree.map(
        set_slots, pool.replace(cache=None, step=None), new.replace(cache=None, step=None)
    )
    return per_slot.replace(cache=cache, step=pool.step)
