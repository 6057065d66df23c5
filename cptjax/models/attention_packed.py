"""Attention of packed groups on TPUs: a flash kernel that skips blocks without a visible key.

A packed row holds groups one after the other, each a prompt and its responses
(`models/packed_groups`). A token attends to one or two ranges of the row:

    row        p p p a a b b b q q c     prompts p, q; responses a, b to p, and c to q
    token      2nd b
    prompt     x x x . . . . . . . .     range of the prompt, for tokens of responses
    own        . . . . . x x . . . .     range of the prompt or the response, up to the token

Queries and keys are cut into blocks. For each block of queries, a table lists the blocks of keys
that one of them attends to; the steps of the kernel go over this list, so other blocks are neither
copied nor computed. The queries of all heads that share a key/value head are in one block.

Scores are computed as [keys queries], so the bounds of the ranges, the sums of the softmax and
their logarithms are rows, as they are in memory.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from cptjax.models.attention_tiled import MASKED
from cptjax.models.layers import ATTENTION_RESULTS
from cptjax.types import Array

BLOCK = 512  # tokens of a block of a long row
LANES = 128
# Blocks of queries of so many bytes do not fit into the vector memory that a kernel has by default.
LARGE_BLOCK, VECTOR_MEMORY = 2**21, 2**25


@flax.struct.dataclass
class PackedReads:
    """What the tokens of packed rows [S N] attend to; n blocks cover a row."""

    # [S 8 N] of each token: the first and the end of the prompt's range, the first of its own range
    bounds: Array
    keys: Array  # [S n n] the blocks of keys of each block of queries, then the last one again
    key_count: Array  # [S n] how many of them
    whole_keys: Array  # [S n] how many of them, the first ones, have no pair that is masked
    queries: Array  # [S n n] the blocks of queries of each block of keys, in the same way
    query_count: Array  # [S n]
    whole_queries: Array  # [S n]
    block: int = flax.struct.field(pytree_node=False)  # tokens of a block
    # Pairs of a query and a key that the kernel computes in a shard, an estimate.
    pairs: float = flax.struct.field(pytree_node=False)


class _Shape(NamedTuple):
    """The static settings of a call."""

    block: int
    pairs: float
    interpret: bool


def block_size(tokens: int) -> int:
    """Return the tokens of a block of rows of `tokens`."""
    return BLOCK if tokens >= BLOCK else LANES


def find_packed_reads(
    source: Array, prompts: tuple[int, int], responses: tuple[int, int], block: int
) -> PackedReads:
    """Return the reads of the groups of `Packing.source` [S N], in blocks of so many tokens.

    prompts: (number, tokens) of a shard, padded; responses: the same
    """
    (shards, tokens), (q, p), (b, r) = source.shape, prompts, responses
    source = jnp.pad(source, ((0, 0), (0, -tokens % block)), constant_values=-1)
    start, stop, own = _ranges(source, q, p, r, b // q)
    bounds = jnp.pad(jnp.stack([start, stop, own], 1), ((0, 0), (0, 5), (0, 0)))

    number = jnp.arange(source.shape[1])[:, None]
    first = number[::block, 0]  # of each block
    live = (start[..., None] < first + block) & (stop[..., None] > first)
    live |= (own[..., None] < first + block) & (number >= first)
    whole = (start[..., None] <= first) & (stop[..., None] >= first + block)
    whole |= (own[..., None] <= first) & (number >= first + block - 1)
    of_blocks = (shards, len(first), block, len(first))
    live, whole = live.reshape(of_blocks).any(2), whole.reshape(of_blocks).all(2)
    keys, queries = _list_blocks(live, whole), _list_blocks(live.mT, whole.mT)
    pairs = _computed_pairs(tokens, block, q, p, b // q, r)
    return PackedReads(bounds.astype(jnp.int32), *keys, *queries, block, pairs)


def _ranges(source: Array, q: int, p: int, r: int, group: int) -> tuple[Array, Array, Array]:
    """Return the first and the end of the prompt's range of each token, and the first of its own.

    source: [S N] the index of each token in q prompts of p tokens and then q * group responses of r
    """
    number = jnp.arange(source.shape[1])
    is_prompt = (source >= 0) & (source < q * p)
    response = jnp.maximum(source - q * p, 0) // r
    group_of = jnp.where(is_prompt, source // p, response // group)
    group_of = jnp.where(source < 0, -1 - number, group_of)  # padding: ranges of one token

    def last_start(starts: Array) -> Array:
        return lax.cummax(jnp.where(starts, number, 0), axis=1)

    def differs(x: Array) -> Array:
        return jnp.concatenate([jnp.ones_like(x[:, :1], bool), x[:, 1:] != x[:, :-1]], 1)

    new_group = differs(group_of)
    own = last_start(new_group | differs(jnp.where(is_prompt, -1, response)))
    after_prompt = ~is_prompt & jnp.concatenate([is_prompt[:, :1], is_prompt[:, :-1]], 1)
    of_prompt = last_start(new_group), last_start(after_prompt)
    in_response = (source >= 0) & ~is_prompt
    start, stop = (jnp.where(in_response, x, 0) for x in of_prompt)
    return start, stop, own


def _list_blocks(live: Array, whole: Array) -> tuple[Array, Array, Array]:
    """Return the live blocks [S n n] of each block [S n n], and how many there are [S n].

    Those that are `whole` come first; the last array [S n] is their number. The list goes on with
    the last block.
    """
    count, whole_count = (x.sum(2, dtype=jnp.int32) for x in (live, whole))
    order = 2 - live.astype(jnp.int32) - whole
    listed = jnp.argsort(order, axis=2, stable=True).astype(jnp.int32)
    at = jnp.minimum(jnp.arange(listed.shape[2]), count[..., None] - 1)
    return jnp.take_along_axis(listed, at, 2), count, whole_count


def _computed_pairs(
    tokens: int, block: int, prompts: int, prompt: int, group: int, response: int
) -> float:
    """Return the pairs in live blocks of a row whose prompts and responses are shorter alike.

    prompts: of the row, with `prompt` tokens and `group` responses of `response` tokens at most
    """
    scale = min(1.0, tokens / (prompts * (prompt + group * response)))
    lengths = ([prompt * scale] + [response * scale] * group) * prompts
    edges = np.concatenate([[0], np.cumsum(lengths)]).astype(int)
    live = np.zeros((tokens // block + 1,) * 2, bool)
    for part, (first, end) in enumerate(itertools.pairwise(edges)):
        blocks = slice(first // block, (end - 1) // block + 1)
        live[blocks, blocks] |= np.tri(live[blocks, blocks].shape[0], dtype=bool)
        if of_group := part % (group + 1):
            start, stop = edges[part - of_group], edges[part - of_group + 1]
            live[blocks, start // block : (stop - 1) // block + 1] = True
    return float(live.sum()) * block**2


def attend_packed(q: Array, k: Array, v: Array, reads: PackedReads, interpret: bool) -> Array:
    """Attend in packed rows: queries [S N heads H], keys and values [S N K H]."""
    s, n, heads, h = q.shape
    kv, tokens = k.shape[2], reads.bounds.shape[2]

    def pad(x: Array) -> Array:
        return jnp.pad(x, ((0, 0), (0, tokens - n), (0, 0), (0, -h % LANES)))

    width = h + -h % LANES
    queries = pad(q * h**-0.5).reshape(s, tokens, kv, heads // kv, width).transpose(0, 2, 3, 4, 1)
    keys, values = (pad(x).transpose(0, 2, 1, 3) for x in (k, v))
    shape = _Shape(reads.block, reads.pairs, interpret)
    out = _attention(shape, queries, keys, values, reads)
    return out.transpose(0, 4, 1, 2, 3)[:, :n, ..., :h].reshape(q.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(shape: _Shape, q: Array, k: Array, v: Array, reads: PackedReads) -> Array:
    """Attend with scaled queries [S K M H N] to keys and values [S K N H]; return [S K M H N]."""
    return _forward(shape, q, k, v, reads)[0]


def _forward(
    shape: _Shape, q: Array, k: Array, v: Array, reads: PackedReads
) -> tuple[Array, tuple[Array, ...]]:
    m, h, block = q.shape[2], q.shape[3], shape.block
    out, logs = _run(
        _forward_kernel,
        shape,
        (reads.keys, reads.key_count),
        outer=[(q, "queries"), (reads.bounds, "bounds")],
        inner=[(k, "rows"), (v.mT, "columns")],
        outputs=[(q, "queries"), (jax.ShapeDtypeStruct(_sums(q), jnp.float32), "sums")],
        scratch=[(m, block), (m, block), (m, h, block)],
        products=2,
    )
    out, logs = (checkpoint_name(x, ATTENTION_RESULTS) for x in (out, logs))
    return out, (q, k, v, reads, out, logs)


def _backward(shape: _Shape, kept: tuple[Any, ...], slope: Array) -> tuple[Any, ...]:
    q, k, v, reads, out, logs = kept
    m, h, block = q.shape[2], q.shape[3], shape.block
    delta = jnp.sum(slope.astype(jnp.float32) * out.astype(jnp.float32), 3)
    of_queries = [(q, "queries"), (slope, "queries"), (logs, "sums"), (delta, "sums")]
    of_queries += [(reads.bounds, "bounds")]
    (of_q,) = _run(
        _query_gradient_kernel,
        shape,
        (reads.keys, reads.key_count),
        outer=of_queries,
        inner=[(k, "rows"), (v, "rows"), (k.mT, "columns")],
        outputs=[(q, "queries")],
        scratch=[(m, h, block)],
        products=3,
    )
    of_k, of_v = _run(
        _key_gradient_kernel,
        shape,
        (reads.queries, reads.query_count),
        outer=[(k, "rows"), (v, "rows")],
        inner=of_queries,
        outputs=[(k, "rows"), (v, "rows")],
        scratch=[(block, h), (block, h)],
        products=4,
    )
    return of_q, of_k, of_v, None


_attention.defvjp(_forward, _backward)


def _sums(q: Array) -> tuple[int, ...]:
    """Return the shape [S K M N] of one number for each query."""
    return (*q.shape[:3], q.shape[4])


def _run(
    kernel: Callable,
    shape: _Shape,
    reads: tuple[Array, Array],
    *,
    outer: list[tuple[Array, str]],
    inner: list[tuple[Array, str]],
    outputs: list[tuple[Any, str]],
    scratch: list[tuple[int, ...]],
    products: int,
) -> list[Array]:
    """Run a kernel whose steps go over the inner blocks that `reads` list for each outer block.

    Inputs and outputs are arrays with the kind of their blocks. The outputs are at outer blocks.

    products: of matrices, for each block of scores
    """
    table, count = reads
    arrays = [x for x, _ in outer + inner]
    q = next(x for x, kind in outer + inner if kind == "queries")
    s, kv, m, h, _ = q.shape
    n, block = table.shape[2], shape.block

    def spec(kind: str, is_inner: bool) -> pl.BlockSpec:
        sizes, index = {
            "queries": ((None, None, m, h, block), lambda i, head, at: (i, head, 0, 0, at)),
            "sums": ((None, None, m, block), lambda i, head, at: (i, head, 0, at)),
            "bounds": ((None, 8, block), lambda i, head, at: (i, 0, at)),
            "rows": ((None, None, block, h), lambda i, head, at: (i, head, at, 0)),
            "columns": ((None, None, h, block), lambda i, head, at: (i, head, 0, at)),
        }[kind]
        if is_inner:
            listed = lambda i, head, o, j, table, _: index(i, head, table[(i * n + o) * n + j])
            return pl.BlockSpec(sizes, listed)
        return pl.BlockSpec(sizes, lambda i, head, o, j, *_: index(i, head, o))

    scores = shape.pairs * s * kv * m
    read_again = scores / m / block * h * sum(x.dtype.itemsize for x, kind in inner)
    whole = sum(x.size * x.dtype.itemsize for x, _ in outer + outputs)
    is_large = m * h * block * q.dtype.itemsize >= LARGE_BLOCK
    run = pl.pallas_call(
        functools.partial(kernel, of=_Blocks(n, block)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(s, kv, n, jnp.max(count)),
            in_specs=[spec(k, False) for _, k in outer] + [spec(k, True) for _, k in inner],
            out_specs=[spec(k, False) for _, k in outputs],
            scratch_shapes=[pltpu.VMEM(sizes, jnp.float32) for sizes in scratch],
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x, _ in outputs],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=VECTOR_MEMORY if is_large else None,
        ),
        cost_estimate=pl.CostEstimate(
            flops=int(2 * products * scores * h),
            transcendentals=int(scores),
            bytes_accessed=int(whole + read_again),
        ),
        interpret=shape.interpret,
        name=kernel.__name__.strip("_"),
    )
    return run(table.reshape(-1), count.reshape(-1), *arrays)


# ---- kernels: one step of one block --------------------------------------------------------------


class _Blocks(NamedTuple):
    """The blocks of a row."""

    count: int
    tokens: int  # of each


class _Step(NamedTuple):
    """A step of a kernel."""

    outer: Any  # the block of the outputs
    inner: Any  # the listed block
    is_first: Any
    is_listed: Any
    is_last: Any

    @classmethod
    def now(cls, table: Any, count: Any, blocks: _Blocks) -> "_Step":
        outer, j = pl.program_id(2), pl.program_id(3)
        row = pl.program_id(0) * blocks.count + outer
        inner, is_last = table[row * blocks.count + j], j == pl.num_programs(3) - 1
        return cls(outer, inner, j == 0, j < count[row], is_last)


_product = functools.partial(jnp.dot, preferred_element_type=jnp.float32)


def _product_of_rows(x: Array, y: Array) -> Array:
    """Multiply [a n] by [b n] to [a b]."""
    return lax.dot_general(x, y, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def _visible(bounds: Any, queries: Any, keys: Any, block: int) -> Array:
    """Return the mask [keys queries] of two blocks."""
    key = keys * block + lax.broadcasted_iota(jnp.int32, (block, 1), 0)
    query = queries * block + lax.broadcasted_iota(jnp.int32, (1, block), 1)
    start, stop, own = (bounds[i : i + 1] for i in range(3))
    return ((key >= start) & (key < stop)) | ((key >= own) & (key <= query))


def _forward_kernel(
    table, count, q, bounds, k, v_columns, out, logs, top, total, mixed, *, of: _Blocks
) -> None:
    step = _Step.now(table, count, of)

    @pl.when(step.is_first)
    def _():
        top[...] = jnp.full_like(top, MASKED)
        total[...] = jnp.zeros_like(total)
        mixed[...] = jnp.zeros_like(mixed)

    @pl.when(step.is_listed)
    def _():
        mask = _visible(bounds, step.outer, step.inner, of.tokens)
        keys, values = k[...], v_columns[...]
        for head in range(q.shape[0]):
            at = slice(head, head + 1)
            scores = jnp.where(mask, _product(keys, q[head]), MASKED)
            largest = jnp.maximum(top[at], jnp.max(scores, 0, keepdims=True))
            weights, shrink = jnp.exp(scores - largest), jnp.exp(top[at] - largest)
            top[at] = largest
            total[at] = total[at] * shrink + jnp.sum(weights, 0, keepdims=True)
            mixed[head] = mixed[head] * shrink + _product(values, weights.astype(values.dtype))

    @pl.when(step.is_last)
    def _():
        for head in range(q.shape[0]):
            at = slice(head, head + 1)
            out[head] = (mixed[head] / total[at]).astype(out.dtype)
            logs[at] = top[at] + jnp.log(total[at])


def _score_gradient(
    keys: Array, values: Array, mask: Array, q: Array, slope: Array, logs: Array, delta: Array
) -> tuple[Array, Array]:
    """Return the weights [keys queries] of one head, and the gradient of its scores."""
    weights = jnp.exp(jnp.where(mask, _product(keys, q), MASKED) - logs)
    return weights, weights * (_product(values, slope) - delta)


def _query_gradient_kernel(
    table, count, q, slope, logs, delta, bounds, k, v, k_columns, of_q, total, *, of: _Blocks
) -> None:
    step = _Step.now(table, count, of)

    @pl.when(step.is_first)
    def _():
        total[...] = jnp.zeros_like(total)

    @pl.when(step.is_listed)
    def _():
        mask = _visible(bounds, step.outer, step.inner, of.tokens)
        keys, values, columns = k[...], v[...], k_columns[...]
        for head in range(q.shape[0]):
            at = slice(head, head + 1)
            row = q[head], slope[head], logs[at], delta[at]
            _, of_scores = _score_gradient(keys, values, mask, *row)
            total[head] += _product(columns, of_scores.astype(columns.dtype))

    @pl.when(step.is_last)
    def _():
        of_q[...] = total[...].astype(of_q.dtype)


def _key_gradient_kernel(
    table, count, k, v, q, slope, logs, delta, bounds, of_k, of_v, total_k, total_v, *, of: _Blocks
) -> None:
    step = _Step.now(table, count, of)

    @pl.when(step.is_first)
    def _():
        total_k[...] = jnp.zeros_like(total_k)
        total_v[...] = jnp.zeros_like(total_v)

    @pl.when(step.is_listed)
    def _():
        mask = _visible(bounds, step.inner, step.outer, of.tokens)
        keys, values = k[...], v[...]
        for head in range(q.shape[0]):
            at, queries, slopes = slice(head, head + 1), q[head], slope[head]
            row = queries, slopes, logs[at], delta[at]
            weights, of_scores = _score_gradient(keys, values, mask, *row)
            total_v[...] += _product_of_rows(weights.astype(slopes.dtype), slopes)
            total_k[...] += _product_of_rows(of_scores.astype(queries.dtype), queries)

    @pl.when(step.is_last)
    def _():
        of_k[...], of_v[...] = total_k[...].astype(of_k.dtype), total_v[...].astype(of_v.dtype)
