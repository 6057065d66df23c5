"""The decode pool, the slots in which groups are decoded: prefill, decode steps, refill.

A slot holds one group: the keys and values of its prompt, and rows in which its G responses are
decoded. All slots write into one ring of R columns: decode step s reads the token of column s % R
and writes the token of column (s + 1) % R. So keys and values are updated in place, without a
scatter, even if responses started at different steps. A response that started at step b has its
token i in column (b + i) % R and attends only to columns that were written since it started:

    R = 6               column  0 1 2 3 4 5
    after step 7:
    started at 0, done          a b c d e f      reached its limit after step 5
    started at 3                d e . a b c      token e, in column 7 % 6, was sampled last
    started at 7                . a . . . .

A slot may have fewer rows than the group has responses. A row whose response ends then starts the
next response of the group in the next step: the first token depends only on the prompt's last
hidden state, which the slot keeps. So the rows of a group with one long response stay busy:

    G = 4, two rows     steps ->
    row 0               response 0 . . . . . . . . . . . .
    row 1               response 1 . . | response 2 . | response 3 . . .

The TPU kernel reads only the columns that a row attends to, and none of a row that is done
(`attention_decode`). Elsewhere a decode step reads all columns of keys and values that exist.
Groups that start together fill the columns in order, so theirs are added part by part
(`add_columns`), and no step reads columns that are still empty. Groups of different ages use the
whole ring.
"""

import dataclasses
import functools
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
    """The groups being decoded; S slots of N rows. N is G, the responses of a group, or fewer."""

    cache: causal_lm.KVCache | None
    step: Array | None  # [] decode steps since the pool was created
    # [S N] the step at which a row's response started; [S 1] if a slot has a row for each response.
    start_step: Array
    prompts: QueuedPrompts  # of the slots, without embeddings, positions and segments
    rope: tuple[Array, Array]  # [S N H/2] cos and sin of the position of the tokens sampled last
    token: Array  # [S N] sampled last
    done: Array  # [S N] rows without a response to decode
    length: Array  # [S G] tokens sampled
    finished: Array  # [S G] done by a stop token
    # [S G R]; a ring, as the columns of the cache, if a slot has a row for each response.
    tokens: Array
    logps: Array
    policy_logps: Array
    # Only if a slot has fewer rows than responses:
    response: Array | None  # [S N] the response that a row decodes
    started: Array | None  # [S] responses that have started
    prompt_hidden: Array | None  # [S D] the state that predicts the first token of a response

    def of_rows(self, by_response: Array) -> Array:
        """Return for each row the value [S N] of its response, from [S G]."""
        if self.response is None:
            return by_response
        return jnp.take_along_axis(by_response, self.response, 1)

    def of_responses(self, by_row: Array) -> Array:
        """Return for each response whether its row is marked [S G], from [S N]."""
        if self.response is None:
            return by_row
        is_own = self.response[:, :, None] == jnp.arange(self.length.shape[1])
        return jnp.any(by_row[:, :, None] & is_own, 1)


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
    rows: int  # of a slot, at most `group`
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
    slots: int = 0,
) -> QueuedPrompts:
    """Embed the tokens and images of all prompts; an empty prompt gets a limit of 0.

    With `slots`, the tower runs on about as many prompts at a time as are decoded at a time.
    """
    filled = jnp.any(prompts.segments > 0, 1)[:, None]
    first_position = causal_lm.next_positions(prompts)
    images = jax.tree.leaves((prompts.vision, (prompts.tower_states or ())[:1]))
    with sharding.whole_rows(len(prompts.tokens), *map(len, images)):
        chunks = 1
        if slots and prompts.vision is not None:
            windows, most = prompts.vision.patches.shape[1], len(prompts.tokens) // slots
            chunks = max(n for n in range(1, windows + 1) if windows % n == 0 and n <= max(most, 1))
        inputs = causal_lm.embed_inputs(weights, prompts, cfg, static.dtype, chunks)
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
    (s, g), n = prompts.row_ids.shape, static.rows
    results = jnp.zeros((s, g, static.max_new_tokens), jnp.float32)
    start_step = jnp.full((s, n if n < g else 1), step)
    rest = {"response": None, "started": None, "prompt_hidden": None}
    if n < g:
        rest["response"] = jnp.broadcast_to(jnp.arange(n), (s, n))
        rest |= {"started": jnp.full(s, n, jnp.int32), "prompt_hidden": hidden}
    pool = DecodePool(
        cache=cache,
        step=step,
        start_step=start_step,
        prompts=prompts.replace(inputs=None, positions=None, segments=None),
        rope=_cos_sin(prompts, step - start_step, cfg),
        token=jnp.zeros((s, n), jnp.int32),
        done=jnp.zeros((s, n), bool),
        length=jnp.zeros((s, g), jnp.int32),
        finished=jnp.zeros((s, g), bool),
        tokens=results.astype(jnp.int32),
        logps=results,
        policy_logps=results,
        **rest,
    )
    logits = _logits(weights, hidden)
    logits = jnp.broadcast_to(logits[:, None], (s, n, logits.shape[-1]))
    return _sample_and_store(pool, logits, traced)


def _cos_sin(prompts: QueuedPrompts, age: Array, cfg: ModelConfig) -> tuple[Array, Array]:
    """Return cos and sin [S N H/2] of the positions of the tokens [S N] of responses."""
    return causal_lm.response_cos_sin(prompts.first_position[:, None] + age, cfg)


def add_columns(pool: DecodePool, columns: int, cfg: ModelConfig) -> DecodePool:
    """Return the pool with more columns for keys and values."""
    rows = pool.token.shape[1]
    return pool.replace(cache=causal_lm.add_columns(pool.cache, rows, columns, cfg))


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
        age = pool.step - pool.start_step  # index of the token of each row that was sampled last
        past = Past(pool.step % ring, age, ~pool.done, ring)
        hidden, cache = causal_lm.decode_step(
            weights, pool.token, pool.rope, past, pool.cache, cfg, static.dtype
        )
        if pool.response is not None:  # a response without a token starts with its first one
            is_new = pool.of_rows(pool.length) == 0
            hidden = jnp.where(is_new[..., None], pool.prompt_hidden[:, None], hidden)
        pool = pool.replace(cache=cache, step=pool.step + 1)
        pool = _sample_and_store(pool, _logits(weights, hidden), traced)
        return pool.replace(rope=_cos_sin(pool.prompts, pool.step - pool.start_step, cfg))

    return jax.lax.fori_loop(0, steps, step, pool)


def _logits(weights: Params, hidden: Array) -> Array:
    hidden = move_rows(hidden, "mlp_batch")
    return jnp.dot(hidden, decoder.unembedding(weights["text"]), preferred_element_type=jnp.float32)


def _sample_and_store(pool: DecodePool, logits: Array, traced: TracedSettings) -> DecodePool:
    """Sample a token of each row from logits [S N V], and store it where a row is not done."""

    def random_number(row_id: Array, length: Array) -> Array:
        key = jax.random.fold_in(jax.random.fold_in(traced.key, row_id), length)
        return jax.random.uniform(key)

    length, limit = pool.of_rows(pool.length), pool.of_rows(pool.prompts.limits)
    row_ids = pool.of_rows(pool.prompts.row_ids)
    uniform = jax.vmap(random_number)(row_ids.reshape(-1), length.reshape(-1))
    sampled = token_sampling.sample_tokens(
        logits.reshape(-1, logits.shape[-1]), uniform, traced.controls
    )
    token, logps, policy_logps = (x.reshape(pool.token.shape) for x in sampled)
    active = ~pool.done & (length < limit)
    store = functools.partial(_store, pool, length, active)
    stopped = active & jnp.isin(token, traced.stops)
    ended = pool.done | stopped | (length + active >= limit)
    stored = pool.replace(
        token=token,
        length=pool.length + pool.of_responses(active),
        finished=pool.finished | pool.of_responses(stopped),
        tokens=store(pool.tokens, token),
        logps=store(pool.logps, logps),
        policy_logps=store(pool.policy_logps, policy_logps),
    )
    if pool.response is None:
        return stored.replace(done=ended)
    return _start_next_responses(stored, ended & ~pool.done)


def _store(pool: DecodePool, length: Array, active: Array, results: Array, new: Array) -> Array:
    """Write the values [S N] of active rows into results [S G R]; `length` is their index."""
    if pool.response is None:  # a column of the ring, without a scatter
        column = pool.step % results.shape[-1]
        old = jax.lax.dynamic_index_in_dim(results, column, 2)
        kept = jnp.where(active[..., None], new[..., None], old)
        return jax.lax.dynamic_update_slice_in_dim(results, kept, column, 2)
    at = jnp.where(active, length, results.shape[-1])  # beyond the end, where nothing is written
    write = lambda results, response, at, new: results.at[response, at].set(new, mode="drop")
    return jax.vmap(write)(results, pool.response, at, new)


def _start_next_responses(pool: DecodePool, ended: Array) -> DecodePool:
    """Give each row [S N] whose response has ended the next one of its group, if there is one.

    The next decode step samples its first token.
    """
    number = pool.started[:, None] + jnp.cumsum(ended, 1) - 1
    starts = ended & (number < pool.length.shape[1])
    return pool.replace(
        response=jnp.where(starts, number, pool.response),
        started=pool.started + jnp.sum(starts, 1),
        start_step=jnp.where(starts, pool.step + 1, pool.start_step),
        done=pool.done | (ended & ~starts),
    )


def slot_results(pool: DecodePool) -> GroupResults:
    """Return the responses of every slot so far, each with its first token first."""
    results = pool.tokens, pool.logps, pool.policy_logps
    if pool.response is None:
        size = pool.tokens.shape[-1]
        columns = ((pool.start_step + jnp.arange(size)) % size)[:, None]
        results = (jnp.take_along_axis(ring, columns, 2) for ring in results)
    return GroupResults(*results, pool.length, pool.finished)


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
