"""Attention of a decode step on TPUs: a kernel that reads only what responses attend to.

The keys and values of a group are cut into blocks of columns: those of its prompt, which its
responses share, and those of the responses. The steps of the kernel for a group are first the
blocks of the prompt, then the blocks of the responses, of several responses at a time:

    step         0        1        2        3        4
    prompt       . . p p  p p p p
    response 0                     a a a a  a a . .  . . . .
    response 1                     (done)

A block is copied from the main memory only if it is live: if it has a column to which a response
that is not done attends. A step without a live block neither copies nor computes. The queries of a
group form one matrix for the prompt, whose blocks are copied once. The softmax grows block by
block, so the scores stay in the vector memory.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from cptjax import sharding
from cptjax.models.attention_tiled import MASKED
from cptjax.types import Array

# The most bytes of the keys of a step, unless `LANES` columns have more. Large blocks keep the
# memory busy, small ones end near the last live column.
PROMPT_BYTES, OWN_BYTES = 1 << 19, 1 << 18
LANES = 128  # columns of a cache and of a block are a multiple
SUBLANES = 8  # the queries of a response to one key/value head are padded to a multiple
RESPONSES = 8  # the most responses of a step; the blocks of each are copied by themselves


def padded_columns(columns: int) -> int:
    """Return the columns of a cache that has room for `columns`."""
    return columns + -columns % LANES


class Past(NamedTuple):
    """The columns to which the responses attend in a decode step, of a ring."""

    column: Array  # [] the newest one, the same for all groups
    age: Array  # [Q G] number of columns before it to which a response attends; [Q 1]: all alike
    active: Array  # [Q G] responses that are not done; the result of another one is not used
    ring: int  # columns

    def visible(self, columns: int) -> Array:
        """Return the mask [Q G W] of those of the first `columns` to which a response attends."""
        numbers = jnp.arange(columns)
        is_past = (self.column - numbers) % self.ring <= self.age[..., None]
        return is_past & (numbers < self.ring)


@flax.struct.dataclass
class Cache:
    """The stacked keys and values of all layers."""

    prompt_k: Array  # [L Q K H P]
    prompt_v: Array  # [L Q K P H]
    own_k: Array  # [L Q G K W H]
    own_v: Array  # [L Q G K W H]


@flax.struct.dataclass
class Reads:
    """What the steps of the kernel read in one decode step, the same for all layers."""

    live: Array  # [Q * steps] 1 = the step has a live block
    # The step, of any group, whose block is held in the vector memory. Where it is that of the step
    # before, nothing is copied.
    prompt_held: Array  # [Q * steps]
    own_held: Array  # [Q * steps * responses]
    start: Array  # [Q] the first column of the prompt, which is left-padded
    age: Array  # [Q * G] or [Q], as in `Past`
    active: Array  # [Q * G] as in `Past`
    column: Array  # [1] as in `Past`


READS_AXES = Reads(*[("batch",)] * 6, column=())  # logical axes


class Blocks(NamedTuple):
    """The sizes of the blocks, and the number of steps."""

    prompt: int  # columns of a block of the prompt
    own: int  # columns of a block of a response
    responses: int  # of a step
    prompt_steps: int  # of a group
    own_steps: int  # of each `responses` of a group
    steps: int  # of a group

    @classmethod
    def of(cls, cache: Cache) -> "Blocks":
        g, kv, w, h = cache.own_k.shape[2:]
        p, column = cache.prompt_k.shape[-1], kv * h * cache.own_k.dtype.itemsize
        responses = max(n for n in range(1, RESPONSES + 1) if g % n == 0)
        prompt = _block_columns(p, PROMPT_BYTES // column)
        own = _block_columns(w, OWN_BYTES // (column * responses))
        steps = p // prompt + g // responses * (w // own)
        return cls(prompt, own, responses, p // prompt, w // own, steps)


def _block_columns(columns: int, most: int) -> int:
    """Return the largest power of two that divides `columns` and is not above `most`."""
    sizes = [LANES << n for n in range(8)]
    return max([n for n in sizes if columns % n == 0 and n <= most], default=LANES)


def plan_reads(cache: Cache, prompt_mask: Array, past: Past, heads: str | None) -> Reads:
    """Return the reads of groups with prompts [Q P].

    heads: the logical axis of the key/value heads.
    """
    arrays = prompt_mask, past.column, past.age, past.active
    of_arrays = ("batch",), (), ("batch",), ("batch",)

    def plan(cache, prompt_mask, *arrays):
        return _reads(Blocks.of(cache), cache.own_k.shape[4], prompt_mask, Past(*arrays, past.ring))

    return _per_device(plan, (cache, *arrays), (_cache_axes(heads), *of_arrays), READS_AXES)


def _reads(blocks: Blocks, columns: int, prompt_mask: Array, past: Past) -> Reads:
    q = len(prompt_mask)
    prompt = prompt_mask.reshape(q, -1, blocks.prompt).any(-1)
    prompt &= past.active.any(1, keepdims=True)
    visible = past.visible(columns).reshape(q, past.age.shape[1], -1, blocks.own).any(-1)
    own = visible & past.active[..., None]
    own = own.reshape(q, -1, blocks.responses, own.shape[-1])
    own = jnp.swapaxes(own, 2, 3).reshape(q, -1, blocks.responses)

    def held(live: Array, before: int, after: int) -> Array:
        """Return for each step the last one with a live block, or the first one of all."""
        live = jnp.pad(live, ((0, 0), (before, after), (0, 0))).reshape(-1, live.shape[-1])
        steps, first = jnp.arange(len(live))[:, None], jnp.argmax(live, 0, keepdims=True)
        return jax.lax.cummax(jnp.where(live, steps, first)).reshape(-1).astype(jnp.int32)

    return Reads(
        live=jnp.concatenate([prompt, own.any(-1)], 1).reshape(-1).astype(jnp.int32),
        prompt_held=held(prompt[..., None], 0, own.shape[1]),
        own_held=held(own, prompt.shape[1], 0),
        start=jnp.argmax(prompt_mask, 1).astype(jnp.int32),
        age=past.age.reshape(-1).astype(jnp.int32),
        active=past.active.reshape(-1).astype(jnp.int32),
        column=past.column.astype(jnp.int32)[None],
    )


def attend_live(
    q: Array,
    cache: Cache,
    reads: Reads,
    layer: Array,
    ring: int,
    heads: str | None,
    interpret: bool = False,
) -> Array:
    """Attend with one query [Q G N H] of each response, in one layer.

    The result equals `attention.attend_cached`; that of a response that is not active is 0.

    heads: the logical axis of the key/value heads.
    """
    kernel = functools.partial(_attend, ring=ring, interpret=interpret)
    of_q = ("batch", None, heads and "heads", None)
    axes = of_q, _cache_axes(heads), READS_AXES, ()
    return _per_device(kernel, (q, cache, reads, layer), axes, of_q)


def _cache_axes(heads: str | None) -> Cache:
    prompt, own = (None, "batch", heads), (None, "batch", None, heads)
    return Cache(prompt, prompt, own, own)


def _per_device(run: Callable, args: tuple, axes: tuple, out_axes: Any) -> Any:
    """Run a function on each device's own groups and heads; axes are logical ones."""
    if jax.sharding.get_abstract_mesh().empty:
        return run(*args)

    def specs(axes: Any) -> Any:
        is_axes = lambda x: type(x) is tuple and all(a is None or isinstance(a, str) for a in x)
        return jax.tree.map(sharding.activation_spec, axes, is_leaf=is_axes)

    return jax.shard_map(run, in_specs=specs(axes), out_specs=specs(out_axes), check_vma=False)(
        *args
    )


def _attend(
    q: Array, cache: Cache, reads: Reads, layer: Array, ring: int, interpret: bool
) -> Array:
    nq, g, n, h = q.shape
    kv, blocks = cache.prompt_k.shape[2], Blocks.of(cache)
    m = n // kv
    padded = m + -m % SUBLANES
    # Queries are float32 until they are multiplied: its tiles have `SUBLANES` rows.
    queries = q.astype(jnp.float32).reshape(nq, g, kv, m, h)
    queries = jnp.pad(queries, ((0, 0), (0, 0), (0, 0), (0, padded - m), (0, 0)))
    queries = jnp.moveaxis(queries, 2, 1).reshape(nq, kv, g * padded, h)
    by_group = pl.BlockSpec((None, kv, g * padded, h), lambda s, j, *_: (s, 0, 0, 0))
    shared_k = pl.BlockSpec((None, None, kv, h, blocks.prompt), _shared_index(blocks, keys=True))
    shared_v = pl.BlockSpec((None, None, kv, blocks.prompt, h), _shared_index(blocks, keys=False))
    own = [
        pl.BlockSpec((None, None, None, kv, blocks.own, h), _own_index(blocks, r))
        for r in range(blocks.responses)
    ]
    scratch = [pltpu.VMEM((kv, g * padded, lanes), jnp.float32) for lanes in (LANES, LANES, h)]
    run = pl.pallas_call(
        functools.partial(
            _kernel, blocks=blocks, group=g, ages=len(reads.age) // nq, ring=ring, scale=h**-0.5
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=8,
            grid=(nq, blocks.steps),
            in_specs=[by_group, shared_k, shared_v, *own, *own],
            out_specs=by_group,
            scratch_shapes=scratch,
        ),
        out_shape=jax.ShapeDtypeStruct(queries.shape, jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=_mean_cost(q, cache, blocks),
        interpret=interpret,
        name="decode_attention",
    )
    scalars = *jax.tree.leaves(reads), jnp.asarray(layer, jnp.int32)[None]
    caches = cache.prompt_k, cache.prompt_v, *[cache.own_k] * len(own), *[cache.own_v] * len(own)
    out = run(*scalars, queries, *caches).reshape(nq, kv, g, padded, h)[:, :, :, :m]
    return jnp.moveaxis(out, 1, 2).reshape(q.shape).astype(q.dtype)


def _shared_index(blocks: Blocks, keys: bool) -> Callable:
    """Return the index of the prompt's block that is held in step j of group s."""

    def index(s, j, *scalars):
        reads, layer = Reads(*scalars[:-1]), scalars[-1][0]
        held = reads.prompt_held[s * blocks.steps + j]
        # Step 0 is held if no step is live, whether or not it is one of the prompt.
        block = jnp.minimum(jax.lax.rem(held, blocks.steps), blocks.prompt_steps - 1)
        return (layer, jax.lax.div(held, blocks.steps), 0, *((0, block) if keys else (block, 0)))

    return index


def _own_index(blocks: Blocks, response: int) -> Callable:
    """Return the index of the block of a response that is held in step j of group s."""

    def index(s, j, *scalars):
        reads, layer = Reads(*scalars[:-1]), scalars[-1][0]
        held = reads.own_held[(s * blocks.steps + j) * blocks.responses + response]
        step = jnp.maximum(jax.lax.rem(held, blocks.steps) - blocks.prompt_steps, 0)
        row = jax.lax.div(step, blocks.own_steps) * blocks.responses + response
        return (
            layer,
            jax.lax.div(held, blocks.steps),
            row,
            0,
            jax.lax.rem(step, blocks.own_steps),
            0,
        )

    return index


def _mean_cost(q: Array, cache: Cache, blocks: Blocks) -> pl.CostEstimate:
    """Return the cost of a call, as the mean over all steps of responses of full length."""
    nq, g, n, h = q.shape
    kv, p = cache.prompt_k.shape[2], cache.prompt_k.shape[-1]
    own = (cache.own_k.shape[4] + blocks.own) / 2
    scores = nq * g * n * (p + own)
    keys_values = 2 * nq * kv * h * (p + g * own) * cache.own_k.dtype.itemsize
    queries_results = 2 * 4 * q.size
    return pl.CostEstimate(
        flops=int(4 * scores * h),
        transcendentals=int(scores),
        bytes_accessed=int(keys_values + queries_results),
    )


class _Softmax(NamedTuple):
    """A softmax that grows by blocks of columns, in the vector memory."""

    top: Any  # [K X 128] the largest score of each query, the same in all lanes
    total: Any  # [K X 128] the sum of the weights exp(score - top)
    mixed: Any  # [K X H] the sum of the weighted values

    def clear(self) -> None:
        self.top[...] = jnp.full_like(self.top, MASKED)
        self.total[...] = jnp.zeros_like(self.total)
        self.mixed[...] = jnp.zeros_like(self.mixed)

    def add(self, head: int, queries: Any, scores: Array, mix: Callable) -> None:
        """Add scores [x W] of some queries of a head; `mix` multiplies weights by the values."""
        old = self.top[head, queries]
        top = jnp.maximum(old, jnp.max(scores, -1, keepdims=True))
        weights, shrink = jnp.exp(scores - top[:, :1]), jnp.exp(old - top)
        self.top[head, queries] = top
        total = self.total[head, queries] * shrink
        self.total[head, queries] = total + jnp.sum(weights, -1, keepdims=True)
        mixed = self.mixed[head, queries] * shrink[:, :1]
        self.mixed[head, queries] = mixed + mix(weights)


_product = functools.partial(jnp.dot, preferred_element_type=jnp.float32)


def _kernel(*refs: Any, blocks: Blocks, group: int, ages: int, ring: int, scale: float) -> None:
    """Do step j of group s, whose responses have so many different ages."""
    reads, (q, shared_k, shared_v), refs = Reads(*refs[:7]), refs[8:11], refs[11:]
    r = blocks.responses
    own_k, own_v, out, softmax = refs[:r], refs[r : 2 * r], refs[2 * r], _Softmax(*refs[-3:])
    s, j = pl.program_id(0), pl.program_id(1)
    heads, rows = range(q.shape[0]), q.shape[1] // group  # rows of a response
    is_live = reads.live[s * blocks.steps + j] == 1
    pl.when(j == 0)(softmax.clear)

    def numbers(block, columns):
        return block * columns + jax.lax.broadcasted_iota(jnp.int32, (1, columns), 1)

    @pl.when(is_live & (j < blocks.prompt_steps))
    def _():
        mask = numbers(j, blocks.prompt) >= reads.start[s]
        for head in heads:
            k, v = shared_k[head], shared_v[head]
            scores = jnp.where(mask, _product(q[head].astype(k.dtype), k) * scale, MASKED)
            mix = lambda x, v: _product(x.astype(v.dtype), v)
            softmax.add(head, slice(None), scores, functools.partial(mix, v=v))

    @pl.when(is_live & (j >= blocks.prompt_steps))
    def _():
        step = j - blocks.prompt_steps
        columns = numbers(jax.lax.rem(step, blocks.own_steps), blocks.own)
        past = reads.column[0] - columns
        past = jnp.where(past < 0, past + ring, past)
        part = jax.lax.div(step, blocks.own_steps)
        first = part * r * rows
        queries = pl.ds(pl.multiple_of(first, r * rows), r * rows)

        def each(x, caches, head, multiply):
            """Multiply the rows of each response by its own keys or values."""
            parts = zip(jnp.split(x.astype(caches[0].dtype), r), caches, strict=True)
            return jnp.concatenate([multiply(part, cache[head]) for part, cache in parts])

        def visible(age):
            return (past <= age) & (columns < ring)

        if ages == 1:
            mask = visible(reads.age[s])
        else:
            masks = [visible(reads.age[s * group + part * r + i]) for i in range(r)]
            mask = jnp.concatenate([jnp.broadcast_to(m, (rows, m.shape[1])) for m in masks])

        for head in heads:
            scores = each(q[head, queries], own_k, head, lambda x, k: _product(x, k.T)) * scale
            mix = functools.partial(each, caches=own_v, head=head, multiply=_product)
            softmax.add(head, queries, jnp.where(mask, scores, MASKED), mix)

    @pl.when(j == blocks.steps - 1)
    def _():
        for response in range(group):
            at = slice(response * rows, (response + 1) * rows)
            result = softmax.mixed[:, at] / softmax.total[:, at, :1]
            # Blocks of a response that is not active are not copied: another one's are held.
            out[:, at] = jnp.where(reads.active[s * group + response] == 1, result, 0.0)
