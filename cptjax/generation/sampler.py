"""Rollouts on the training mesh with the training weights: each prompt read once, its responses drawn in one loop on the device.

With `slots`, a pool of groups is decoded; every `check_every` steps the groups whose every row is done hand in their tokens and the
next prompts of the queue take their places (a group keeps its place until its longest row is done: rows share the prompt's cache):

    slots    steps 0 .. k     k .. 2k      2k .. 3k
      0      prompt 0         prompt 0     prompt 3
      1      prompt 1         prompt 2     prompt 2        (prompt 1 was done within the first k steps)
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cptjax import sharding
from cptjax.generation import decode_pool, token_sampling
from cptjax.generation.decode_pool import SamplerConfig, SamplingInputs
from cptjax.models.config import ModelConfig
from cptjax.sharding import constrain
from cptjax.types import Array, Params, Prompts, Rollouts


def generate_rollouts(
    params: Params,
    prompts: Prompts,
    key: Array,
    cfg: ModelConfig,
    *,
    group: int,
    max_new: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    stop: tuple[int, ...] | None = None,
    limits: np.ndarray | None = None,
    rows: np.ndarray | None = None,
    slots: int = 0,
    check_every: int = 16,
    dtype: Any = jnp.bfloat16,
) -> Rollouts:
    """`group` responses to each left-padded prompt, as row q * group + g; call it under `jax.set_mesh` where there is a mesh.

    Equal (key, rows, weights) give equal responses whatever the batch, its order, the slots and the mesh, up to float rounding.
    stop: ids that end a row, all kept in its mask; None = cfg.eos, (-1,) = none. limits: [Q] or [Q G] tokens at most.
    rows: [Q] each prompt's number in the run; None = its place here. Empty prompts are padding and get nothing.
    slots: groups decoded at a time, 0 = all; every `check_every` steps one looks which groups are done, all their rows.
    `params` may come from `layout.prepare`. `temperature` 0 takes the likeliest token.
    """
    plan = SamplerConfig(group, max_new, check_every, jnp.dtype(dtype))
    stops = cfg.eos if stop is None else tuple(stop)
    limits, rows = _check_prompts(prompts, cfg, plan, stops, limits, rows, slots)
    drawn = make_sampling_inputs(key, cfg, stops, temperature, top_k, top_p, min_p)
    if slots and slots < prompts.tokens.shape[0]:
        return sample_in_turns(params, prompts, limits, rows, drawn, cfg, plan, slots)[0]
    return sample_at_once(params, prompts, limits, rows, drawn, cfg, plan)


def make_sampling_inputs(
    key: Array,
    cfg: ModelConfig,
    stops: tuple[int, ...],
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> SamplingInputs:
    """Checked settings as traced arrays."""
    return SamplingInputs(
        key,
        token_sampling.make_controls(
            temperature, top_k, top_p, min_p, forbidden_tokens(cfg, stops)
        ),
        jnp.asarray(stops, jnp.int32),
    )


def forbidden_tokens(cfg: ModelConfig, stops: tuple[int, ...]) -> np.ndarray:
    """[V] tokens that are never drawn: those only the processor may write, and padding unless it ends a row."""
    out = np.zeros(cfg.text.vocab, bool)
    out[[t for t in (*cfg.vision_tokens, cfg.pad) if t not in stops and t < cfg.text.vocab]] = True
    return out


def kv_cache_bytes(
    cfg: ModelConfig,
    prompts: int,
    prompt: int,
    group: int,
    new: int,
    dtype: Any = jnp.bfloat16,
    shared: bool = True,
) -> int:
    """Bytes of keys and values of `prompts` prompts of `prompt` tokens with `group` responses; not `shared`: a prompt copy per response."""
    tokens = prompt + group * new if shared else group * (prompt + new)
    return (
        2
        * cfg.text.depth
        * cfg.text.kv_heads
        * cfg.text.head_dim
        * jnp.dtype(dtype).itemsize
        * prompts
        * tokens
    )


def check_rollout_sizes(
    group: int, max_new: int, check_every: int, slots: int, shards: int = 1
) -> None:
    """Refuse sizes that no batch can be drawn in; before there is a mesh, with one shard."""
    if group < 1 or max_new < 1 or check_every < 1:
        raise ValueError(
            f"rollout group={group} max_new_tokens={max_new} check_every={check_every}: each must be at least 1"
        )
    if slots < 0 or slots % shards:
        raise ValueError(
            f"rollout.slots={slots}: expected a multiple of the {shards} batch shards, or 0 for the whole batch"
        )


def _check_prompts(
    prompts: Prompts,
    cfg: ModelConfig,
    plan: SamplerConfig,
    stops: tuple[int, ...],
    limits: Any,
    rows: Any,
    slots: int,
) -> tuple[Array, Array]:
    """Refuse what cannot be sampled; limits and row numbers [Q G] where the prompts are."""
    q, p = prompts.tokens.shape
    check_rollout_sizes(plan.group, plan.max_new, plan.check_every, slots, _shards())
    if not stops:
        raise ValueError(
            "no stop token: the model names no end token; give stop=(id, ...), or stop=(-1,) to run every row to its limit"
        )
    limits = place_per_response(limits, plan.max_new, q, plan.group, "limits")
    rows = place_per_response(rows, None, q, plan.group, "rows")
    longest, filled, unnamed = np.asarray(_lengths(prompts.segments, limits, rows))
    if not filled or unnamed:
        what = (
            "every prompt is empty"
            if not filled
            else "limits or rows end before the last prompt that is not empty"
        )
        raise ValueError(
            f"{what}; give each prompt text or an image (empty rows pad a batch, they stand at its end)"
        )
    if p + plan.max_new > cfg.text.max_positions < longest + plan.max_new:
        raise ValueError(
            f"a prompt of {longest} tokens and {plan.max_new} new ones exceed the model's {cfg.text.max_positions} positions; "
            "shorten the prompt or lower max_new_tokens"
        )
    return limits, rows


@jax.jit
def _lengths(segments: Array, limits: Array, rows: Array) -> Array:
    """Tokens of the longest prompt, prompts that are not padding, and how many of these have no limit or row number."""
    count = jnp.sum(segments > 0, 1)
    unnamed = (count > 0) & (jnp.minimum(limits, rows)[:, 0] < 0)
    return constrain(jnp.stack([jnp.max(count), jnp.sum(count > 0), jnp.sum(unnamed)]), None)


def place_per_response(given: Any, default: int | None, q: int, group: int, name: str) -> Array:
    """[Q] or [Q G] host numbers of this process's prompts -> [Q G] on the mesh, -1 where a batch is padded beyond them."""
    if given is None:
        rows = jnp.arange(q * group, dtype=jnp.int32).reshape(q, group)
        return rows if default is None else jnp.full_like(rows, default)
    x = np.asarray(given)
    x = (
        x[:, None] * group + np.arange(group)
        if name == "rows"
        else np.broadcast_to(x if x.ndim == 2 else x[:, None], (len(x), group))
    )
    local = q // jax.process_count()
    if len(x) > local:
        raise ValueError(f"{name} came for {len(x)} prompts, the batch has {local}")
    x = np.concatenate([x, np.full((local - len(x), group), -1)]).astype(np.int32)
    mesh = jax.sharding.get_mesh()
    return sharding.place_rows(x, None if mesh.empty else mesh)


def _shards() -> int:
    mesh = jax.sharding.get_mesh()
    return 1 if mesh.empty else sharding.batch_shards(mesh)


@functools.partial(jax.jit, static_argnames=("cfg", "plan"))
def sample_at_once(
    params: Params,
    prompts: Prompts,
    limits: Array,
    rows: Array,
    draws: SamplingInputs,
    cfg: ModelConfig,
    plan: SamplerConfig,
) -> Rollouts:
    """All prompts in one program that ends when every row has."""
    weights = decode_pool.cast_weights(params, cfg, plan)
    pool = decode_pool.admit_prompts(
        weights,
        decode_pool.make_queue(weights, prompts, limits, rows, cfg, plan),
        jnp.zeros((), jnp.int32),
        draws,
        cfg,
        plan,
    )
    last = plan.max_new - 1
    busy = lambda pool: (pool.step < last) & ~jnp.all(pool.done)
    turn = lambda pool: decode_pool.advance_pool(
        weights, pool, jnp.minimum(plan.check_every, last - pool.step), draws, cfg, plan
    )
    return decode_pool.to_rollouts(
        decode_pool.pool_results(jax.lax.while_loop(busy, turn, pool)), cfg
    )


def refill_size(slots: int, shards: int) -> int:
    """Prompts that are read at a time when places become free."""
    return shards * max(1, slots // shards // 8)


def sample_in_turns(
    params: Params,
    prompts: Prompts,
    limits: Array,
    rows: Array,
    draws: SamplingInputs,
    cfg: ModelConfig,
    plan: SamplerConfig,
    slots: int,
) -> tuple[Rollouts, int]:
    """`slots` groups at a time, their places refilled from the queue; also the number of decode steps."""
    weights = cast_program(params, cfg, plan)
    queue = queue_program(weights, prompts, limits, rows, cfg, plan)
    count, batch = queue.segments.shape[0], refill_size(slots, _shards())
    pool, out = open_program(weights, queue, np.arange(slots), draws, cfg, plan), None
    waiting = slots
    while True:
        pool = advance_program(weights, pool, draws, cfg, plan)
        idle = np.flatnonzero(np.asarray(_idle(pool)))
        if len(idle) == slots and waiting == count:
            return _close(pool, out, count, cfg), int(pool.step)
        idle = idle[: count - waiting]
        if len(idle):
            out = _hand_in(pool, out, count)
        for at in range(0, len(idle), batch):
            places = idle[at : at + batch]
            entries = waiting + np.arange(len(places))
            waiting += len(places)
            fill = lambda x: np.resize(x, batch)  # over again, into the same places
            pool = refill_program(
                weights, pool, queue, fill(places), fill(entries), draws, cfg, plan
            )


_static = {"static_argnames": ("cfg", "plan")}
cast_program = jax.jit(decode_pool.cast_weights, **_static)
queue_program = jax.jit(decode_pool.make_queue, **_static)
open_program = jax.jit(
    lambda weights, queue, entries, draws, cfg, plan: decode_pool.admit_prompts(
        weights,
        decode_pool.take_prompts(queue, entries),
        jnp.zeros((), jnp.int32),
        draws,
        cfg,
        plan,
    ),
    **_static,
)
refill_program = jax.jit(decode_pool.refill_pool, donate_argnames="pool", **_static)
advance_program = jax.jit(
    lambda weights, pool, draws, cfg, plan: decode_pool.advance_pool(
        weights, pool, plan.check_every, draws, cfg, plan
    ),
    donate_argnames="pool",
    **_static,
)
_idle = jax.jit(lambda pool: constrain(jnp.all(pool.done, 1), None))
_hand_in = jax.jit(decode_pool.collect_results, donate_argnames="out", static_argnames="count")
_close = jax.jit(
    lambda pool, out, count, cfg: decode_pool.to_rollouts(
        decode_pool.collect_results(pool, out, count), cfg
    ),
    static_argnames=("count", "cfg"),
)
