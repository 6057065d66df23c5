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

from cptjax import sampling
from cptjax.model import qwen25_vl, text
from cptjax.model.config import Config
from cptjax.sharding import constrain
from cptjax.types import Array, Params, Prompts, Rollouts


@flax.struct.dataclass
class Queue:
    """Prompts with their images in place, and what is asked of their responses."""

    embedded: Array | None  # [Q P D]
    positions: Array | None  # [3 Q P]
    segments: Array | None  # [Q P]
    start: Array  # [Q] position id of the first response token
    limits: Array  # [Q G] response tokens at most; 0 = a padding row
    rows: Array  # [Q G] the number on which a row's randomness depends
    entry: Array  # [Q] place in the batch


@flax.struct.dataclass
class Pool:
    """The groups being decoded; S slots."""

    cache: qwen25_vl.Cache | None
    step: Array | None  # [] since the pool was opened
    born: Array  # [S] the step at which a slot's group joined
    queue: Queue  # what the slots hold
    rope: tuple[Array, Array]  # [S 1 H/2] cos and sin of the place of the tokens drawn last
    token: Array  # [S G] drawn last
    length: Array  # [S G] tokens drawn
    done: Array  # [S G]
    finished: Array  # [S G] done by a stop token
    tokens: Array  # [S G R] ring, as are the next two
    logps: Array
    policy_logps: Array


@flax.struct.dataclass
class Results:
    """Responses by prompt."""

    tokens: Array  # [Q G R]
    logps: Array
    policy_logps: Array
    length: Array  # [Q G]
    finished: Array  # [Q G]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the programs are compiled for."""

    group: int
    max_new: int
    check_every: int
    dtype: Any


@flax.struct.dataclass
class Draws:
    """How tokens are drawn and where rows end; traced."""

    key: Array
    controls: sampling.Controls
    stops: Array  # [n]


def cast(params: Params, cfg: Config, plan: Plan) -> Params:
    """Weights in the type of the arithmetic, once, before any loop; integers stay."""
    cast = lambda x: x.astype(plan.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x
    return qwen25_vl.unstack(jax.tree.map(cast, params), cfg)


def queue(weights: Params, prompts: Prompts, limits: Array, rows: Array, cfg: Config, plan: Plan) -> Queue:
    embedded = qwen25_vl.embed(weights, prompts, cfg, plan.dtype)
    start = qwen25_vl.next_positions(prompts)
    limits = jnp.where(jnp.any(prompts.segments > 0, 1)[:, None], jnp.minimum(limits, plan.max_new), 0)
    return Queue(embedded, prompts.positions, prompts.segments, start, limits, rows, jnp.arange(len(start)))


def take(queue: Queue, entries: Array) -> Queue:
    """Some of the queue, as a batch of its own."""
    pick = lambda x: constrain(x[entries], "batch", *(None,) * (x.ndim - 1))
    positions = constrain(queue.positions[:, entries], None, "batch", None)
    return jax.tree.map(pick, queue.replace(positions=None)).replace(positions=positions)


def admit(weights: Params, queue: Queue, step: Array, draws: Draws, cfg: Config, plan: Plan) -> Pool:
    """Read every prompt of `queue` and draw the first token of its responses."""
    hidden, keys, values = qwen25_vl.prefill_embedded(weights, queue.embedded, queue.positions, queue.segments, cfg)
    cache = qwen25_vl.new_cache(keys, values, queue.segments, plan.group, plan.max_new, cfg)
    s, g = queue.rows.shape
    none, ring = jnp.zeros((s, g), jnp.int32), jnp.zeros((s, g, plan.max_new), jnp.float32)
    pool = Pool(
        cache=cache, step=step, born=jnp.full(s, step), queue=queue.replace(embedded=None, positions=None, segments=None),
        rope=qwen25_vl.rotation(queue.start, cfg),
        token=none, length=none, done=queue.limits <= 0, finished=none > 0,
        tokens=ring.astype(jnp.int32), logps=ring, policy_logps=ring,
    )  # fmt: skip
    logits = _logits(weights, hidden)
    return _draw(pool, jnp.broadcast_to(logits[:, None], (s, g, logits.shape[-1])), draws)


def advance(weights: Params, pool: Pool, steps: Any, draws: Draws, cfg: Config, plan: Plan) -> Pool:
    """`steps` tokens for every row that is not done; the others stand still."""
    columns = jnp.arange(plan.max_new)

    def step(_, pool):
        age = pool.step - pool.born  # which of its tokens a group's last one is
        at = pool.step % plan.max_new
        seen = (at - columns) % plan.max_new <= age[:, None]
        hidden, cache = qwen25_vl.decode_step(weights, pool.token, pool.rope, at, seen, pool.cache, cfg, plan.dtype)
        rope = qwen25_vl.rotation(pool.queue.start + age + 1, cfg)
        return _draw(pool.replace(cache=cache, step=pool.step + 1, rope=rope), _logits(weights, hidden), draws)

    return jax.lax.fori_loop(0, steps, step, pool)


def _logits(weights: Params, hidden: Array) -> Array:
    return jnp.dot(hidden, text.unembedding(weights["text"]), preferred_element_type=jnp.float32)


def _draw(pool: Pool, logits: Array, draws: Draws) -> Pool:
    """Draw from logits [S G V] and keep, of each row still running, what was drawn."""
    shape = pool.token.shape
    number = lambda row, t: jax.random.uniform(jax.random.fold_in(jax.random.fold_in(draws.key, row), t))
    uniform = jax.vmap(number)(pool.queue.rows.reshape(-1), pool.length.reshape(-1))
    drawn = sampling.draw(logits.reshape(-1, logits.shape[-1]), uniform, draws.controls)
    token, logps, policy_logps = (x.reshape(shape) for x in drawn)
    alive, column = ~pool.done, pool.step % pool.tokens.shape[-1]

    def put(ring, new):
        old = jax.lax.dynamic_index_in_dim(ring, column, 2)
        return jax.lax.dynamic_update_slice_in_dim(ring, jnp.where(alive[..., None], new[..., None], old), column, 2)

    length = pool.length + alive
    stopped = alive & jnp.isin(token, draws.stops)
    return pool.replace(
        token=token, length=length, finished=pool.finished | stopped, done=pool.done | stopped | (length >= pool.queue.limits),
        tokens=put(pool.tokens, token), logps=put(pool.logps, logps), policy_logps=put(pool.policy_logps, policy_logps),
    )  # fmt: skip


def results(pool: Pool) -> Results:
    """What every slot has so far, first token first."""
    r = pool.tokens.shape[-1]
    columns = ((pool.born[:, None] + jnp.arange(r)) % r)[:, None]
    unroll = lambda ring: jnp.take_along_axis(ring, columns, 2)
    return Results(unroll(pool.tokens), unroll(pool.logps), unroll(pool.policy_logps), pool.length, pool.finished)


def rollouts(results: Results, cfg: Config) -> Rollouts:
    """[Q G ...] -> rows, with everything after the last token blank."""
    rows = lambda x: constrain(x.reshape(-1, *x.shape[2:]), "batch", *(None,) * (x.ndim - 2))
    mask = jnp.arange(results.tokens.shape[-1]) < results.length[..., None]
    keep = lambda x, blank: rows(jnp.where(mask, x, blank))
    return Rollouts(
        keep(results.tokens, cfg.pad), rows(mask), keep(results.logps, 0.0), keep(results.policy_logps, 0.0), rows(results.finished)
    )


def hand_in(pool: Pool, out: Results | None, count: int) -> Results:
    """Every slot's results at its prompt's place; a group that goes on hands in again later."""
    new = results(pool)
    out = jax.tree.map(lambda x: jnp.zeros((count, *x.shape[1:]), x.dtype), new) if out is None else out
    return jax.tree.map(lambda old, x: constrain(old.at[pool.queue.entry].set(x), "batch", *(None,) * (x.ndim - 1)), out, new)


def refill(weights: Params, pool: Pool, queue: Queue, places: Array, entries: Array, draws: Draws, cfg: Config, plan: Plan) -> Pool:
    """New prompts in idle places; their own columns need no clearing, a group sees none older than itself."""
    fresh = admit(weights, take(queue, entries), pool.step, draws, cfg, plan)
    first = lambda old, new: old.at[places].set(new)
    second = (lambda old, new: old.at[:, places].set(new)) if not isinstance(pool.cache.prompt_k, tuple) else first
    put = lambda where, old, new: jax.tree.map(where, old, new)
    cache = pool.cache.replace(
        prompt_k=put(second, pool.cache.prompt_k, fresh.cache.prompt_k),
        prompt_v=put(second, pool.cache.prompt_v, fresh.cache.prompt_v),
        prompt_mask=first(pool.cache.prompt_mask, fresh.cache.prompt_mask),
    )
    aside = {"cache": None, "step": None}
    return put(first, pool.replace(**aside), fresh.replace(**aside)).replace(cache=cache, step=pool.step)
