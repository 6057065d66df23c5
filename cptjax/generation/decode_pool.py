"""The groups being decoded, as one value that each step replaces.

All rows write into one ring of R columns: step s feeds the token of column s % R and draws that of column s + 1, so keys, values and
tokens are stored in place, without a scatter, whenever a group joined. A group born at step b has token i in column (b + i) % R and
sees only the columns as old as itself:

    R = 6       column  0 1 2 3 4 5
    after step 7:
    born at 0, done     a b c d e f      at its limit after step 5; nothing of it is written any more
    born at 3           d e . a b c      its token e, in column 7 % 6, was drawn last
    born at 7           . a . . . .
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from cptjax.generation import token_sampling
from cptjax.models import decoder, qwen2_5_vl, trainable, unrolled
from cptjax.models.config import ModelConfig
from cptjax.sharding import constrain
from cptjax.types import Array, Params, Prompts, Rollouts


@flax.struct.dataclass
class PromptQueue:
    """Prompts with their images in place, and what is asked of their responses."""

    embedded: Array | None  # [Q P D]
    positions: Array | None  # [3 Q P]
    segments: Array | None  # [Q P]
    start: Array  # [Q] position id of the first response token
    limits: Array  # [Q G] response tokens at most; 0 = a padding row
    rows: Array  # [Q G] the number on which a row's randomness depends
    entry: Array  # [Q] place in the batch


@flax.struct.dataclass
class DecodePool:
    """The groups being decoded; S slots."""

    cache: qwen2_5_vl.KVCache | None
    step: Array | None  # [] since the pool was opened
    born: Array  # [S] the step at which a slot's group joined
    queue: PromptQueue  # what the slots hold
    rope: tuple[Array, Array]  # [S 1 H/2] cos and sin of the place of the tokens drawn last
    token: Array  # [S G] drawn last
    length: Array  # [S G] tokens drawn
    done: Array  # [S G]
    finished: Array  # [S G] done by a stop token
    tokens: Array  # [S G R] ring, as are the next two
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
class SamplerConfig:
    """What the programs are compiled for."""

    group: int
    max_new: int
    check_every: int
    dtype: Any


@flax.struct.dataclass
class SamplingInputs:
    """How tokens are drawn and where rows end; traced."""

    key: Array
    controls: token_sampling.SamplingControls
    stops: Array  # [n]


def cast_weights(params: Params, cfg: ModelConfig, plan: SamplerConfig) -> Params:
    """Weights in the type of the arithmetic, once, before any loop; integers stay."""
    return unrolled.unstack_layers(trainable.cast_params(params, plan.dtype), cfg)


def make_queue(
    weights: Params,
    prompts: Prompts,
    limits: Array,
    rows: Array,
    cfg: ModelConfig,
    plan: SamplerConfig,
) -> PromptQueue:
    embedded = qwen2_5_vl.embed_inputs(weights, prompts, cfg, plan.dtype)
    start = qwen2_5_vl.next_positions(prompts)
    limits = jnp.where(
        jnp.any(prompts.segments > 0, 1)[:, None], jnp.minimum(limits, plan.max_new), 0
    )
    return PromptQueue(
        embedded, prompts.positions, prompts.segments, start, limits, rows, jnp.arange(len(start))
    )


def take_prompts(queue: PromptQueue, entries: Array) -> PromptQueue:
    """Some of the queue, as a batch of its own."""
    pick = lambda x: constrain(x[entries], "batch", *(None,) * (x.ndim - 1))
    positions = constrain(queue.positions[:, entries], None, "batch", None)
    return jax.tree.map(pick, queue.replace(positions=None)).replace(positions=positions)


def admit_prompts(
    weights: Params,
    queue: PromptQueue,
    step: Array,
    draws: SamplingInputs,
    cfg: ModelConfig,
    plan: SamplerConfig,
) -> DecodePool:
    """Read every prompt of `queue` and draw the first token of its responses."""
    hidden, keys, values = qwen2_5_vl.prefill(
        weights, queue.embedded, queue.positions, queue.segments, cfg
    )
    cache = qwen2_5_vl.new_kv_cache(keys, values, queue.segments, plan.group, plan.max_new, cfg)
    s, g = queue.rows.shape
    none, ring = jnp.zeros((s, g), jnp.int32), jnp.zeros((s, g, plan.max_new), jnp.float32)
    pool = DecodePool(
        cache=cache,
        step=step,
        born=jnp.full(s, step),
        queue=queue.replace(embedded=None, positions=None, segments=None),
        rope=qwen2_5_vl.response_cos_sin(queue.start, cfg),
        token=none,
        length=none,
        done=queue.limits <= 0,
        finished=none > 0,
        tokens=ring.astype(jnp.int32),
        logps=ring,
        policy_logps=ring,
    )
    logits = _logits(weights, hidden)
    return _sample_next(pool, jnp.broadcast_to(logits[:, None], (s, g, logits.shape[-1])), draws)


def advance_pool(
    weights: Params,
    pool: DecodePool,
    steps: Any,
    draws: SamplingInputs,
    cfg: ModelConfig,
    plan: SamplerConfig,
) -> DecodePool:
    """`steps` tokens for every row that is not done; the others stand still."""
    columns = jnp.arange(plan.max_new)

    def step(_, pool):
        age = pool.step - pool.born  # which of its tokens a group's last one is
        at = pool.step % plan.max_new
        seen = (at - columns) % plan.max_new <= age[:, None]
        hidden, cache = qwen2_5_vl.decode_step(
            weights, pool.token, pool.rope, at, seen, pool.cache, cfg, plan.dtype
        )
        rope = qwen2_5_vl.response_cos_sin(pool.queue.start + age + 1, cfg)
        return _sample_next(
            pool.replace(cache=cache, step=pool.step + 1, rope=rope),
            _logits(weights, hidden),
            draws,
        )

    return jax.lax.fori_loop(0, steps, step, pool)


def _logits(weights: Params, hidden: Array) -> Array:
    return jnp.dot(hidden, decoder.unembedding(weights["text"]), preferred_element_type=jnp.float32)


def _sample_next(pool: DecodePool, logits: Array, draws: SamplingInputs) -> DecodePool:
    """Draw from logits [S G V] and keep, of each row still running, what was drawn."""
    shape = pool.token.shape
    number = lambda row, t: jax.random.uniform(
        jax.random.fold_in(jax.random.fold_in(draws.key, row), t)
    )
    uniform = jax.vmap(number)(pool.queue.rows.reshape(-1), pool.length.reshape(-1))
    drawn = token_sampling.sample_tokens(
        logits.reshape(-1, logits.shape[-1]), uniform, draws.controls
    )
    token, logps, policy_logps = (x.reshape(shape) for x in drawn)
    alive, column = ~pool.done, pool.step % pool.tokens.shape[-1]

    def put(ring, new):
        old = jax.lax.dynamic_index_in_dim(ring, column, 2)
        return jax.lax.dynamic_update_slice_in_dim(
            ring, jnp.where(alive[..., None], new[..., None], old), column, 2
        )

    length = pool.length + alive
    stopped = alive & jnp.isin(token, draws.stops)
    return pool.replace(
        token=token,
        length=length,
        finished=pool.finished | stopped,
        done=pool.done | stopped | (length >= pool.queue.limits),
        tokens=put(pool.tokens, token),
        logps=put(pool.logps, logps),
        policy_logps=put(pool.policy_logps, policy_logps),
    )


def pool_results(pool: DecodePool) -> GroupResults:
    """What every slot has so far, first token first."""
    r = pool.tokens.shape[-1]
    columns = ((pool.born[:, None] + jnp.arange(r)) % r)[:, None]
    unroll = lambda ring: jnp.take_along_axis(ring, columns, 2)
    return GroupResults(
        unroll(pool.tokens),
        unroll(pool.logps),
        unroll(pool.policy_logps),
        pool.length,
        pool.finished,
    )


def to_rollouts(results: GroupResults, cfg: ModelConfig) -> Rollouts:
    """[Q G ...] -> rows, with everything after the last token blank."""
    rows = lambda x: constrain(x.reshape(-1, *x.shape[2:]), "batch", *(None,) * (x.ndim - 2))
    mask = jnp.arange(results.tokens.shape[-1]) < results.length[..., None]
    keep = lambda x, blank: rows(jnp.where(mask, x, blank))
    return Rollouts(
        keep(results.tokens, cfg.pad),
        rows(mask),
        keep(results.logps, 0.0),
        keep(results.policy_logps, 0.0),
        rows(results.finished),
    )


def collect_results(pool: DecodePool, out: GroupResults | None, count: int) -> GroupResults:
    """Every slot's results at its prompt's place; a group that goes on hands in again later."""
    new = pool_results(pool)
    out = (
        jax.tree.map(lambda x: jnp.zeros((count, *x.shape[1:]), x.dtype), new)
        if out is None
        else out
    )
    return jax.tree.map(
        lambda old, x: constrain(old.at[pool.queue.entry].set(x), "batch", *(None,) * (x.ndim - 1)),
        out,
        new,
    )


def refill_pool(
    weights: Params,
    pool: DecodePool,
    queue: PromptQueue,
    places: Array,
    entries: Array,
    draws: SamplingInputs,
    cfg: ModelConfig,
    plan: SamplerConfig,
) -> DecodePool:
    """New prompts in idle places; their own columns need no clearing, a group sees none older than itself."""
    fresh = admit_prompts(weights, take_prompts(queue, entries), pool.step, draws, cfg, plan)
    first = lambda old, new: old.at[places].set(new)
    slot = lambda old, new: old.at[..., places, :, :, :].set(new)  # [(L) S K . .]
    put = lambda where, old, new: jax.tree.map(where, old, new)
    cache = pool.cache.replace(
        prompt_k=put(slot, pool.cache.prompt_k, fresh.cache.prompt_k),
        prompt_v=put(slot, pool.cache.prompt_v, fresh.cache.prompt_v),
        prompt_mask=first(pool.cache.prompt_mask, fresh.cache.prompt_mask),
    )
    aside = {"cache": None, "step": None}
    return put(first, pool.replace(**aside), fresh.replace(**aside)).replace(
        cache=cache, step=pool.step
    )
