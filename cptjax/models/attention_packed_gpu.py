"""Attention of packed groups on NVIDIA GPUs: a flash kernel that Pallas translates to Triton.

The ranges that tokens attend to, and the lists of blocks with a visible key, are those of the TPU
kernel (`attention_packed`). A program of a kernel has one block of queries, or of keys, of one head
of queries. It loops over the blocks that are listed for its own, in parts that fit into registers:
first over those without a masked pair, then over the others. The arrays are those of the layers,
and nothing is transposed in memory.

Exponentials and logarithms of the softmax are to the base 2, which takes a GPU one instruction.

JAX 0.12 warns that it will remove the Triton back end of Pallas. The other one for GPUs, Mosaic,
does not support the A100.
"""

import functools
import json
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.xla_metadata import set_xla_metadata

from cptjax.models.attention_packed import PackedReads
from cptjax.models.attention_tiled import MASKED
from cptjax.models.layers import ATTENTION_RESULTS
from cptjax.types import Array

BLOCK = 128  # tokens of a block
SMALLEST_WIDTH = 16  # of a matrix that Triton multiplies


class _Kernel(NamedTuple):
    """How a kernel runs on a multiprocessor."""

    body: Callable
    part: int  # tokens of a listed block that are read at a time
    warps: int
    stages: int  # parts in shared memory, so that the next one is read during a product
    products: int  # of matrices, for each block of scores


class _Shape(NamedTuple):
    """The static settings of a call."""

    block: int
    pairs: float
    scale: float  # of the scores
    interpret: bool


def block_size(tokens: int) -> int:
    """Return the tokens of a block of rows of `tokens`."""
    return BLOCK


def attend_packed(q: Array, k: Array, v: Array, reads: PackedReads, interpret: bool) -> Array:
    """Attend in packed rows: queries [S N heads H], keys and values [S N K H]."""
    n, h = q.shape[1], q.shape[3]
    more = reads.bounds.shape[2] - n
    width = max(SMALLEST_WIDTH, pl.next_power_of_2(h))
    q, k, v = (jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, width - h))) for x in (q, k, v))
    shape = _Shape(reads.block, reads.pairs, h**-0.5, interpret)
    return _attention(shape, q, k, v, reads)[:, :n, :, :h]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(shape: _Shape, q: Array, k: Array, v: Array, reads: PackedReads) -> Array:
    """Attend with queries [S N heads H] to keys and values [S N K H]."""
    return _forward(shape, q, k, v, reads)[0]


def _forward(
    shape: _Shape, q: Array, k: Array, v: Array, reads: PackedReads
) -> tuple[Array, tuple[Any, ...]]:
    sums = jax.ShapeDtypeStruct(_sums(q), jnp.float32)
    out, logs = _run(
        FORWARD,
        shape,
        (reads.keys, reads.key_count, reads.whole_keys),
        block=[(q, "queries"), (reads.bounds, "bounds")],
        row=[(k, "keys"), (v, "keys")],
        outputs=[(q, "queries"), (sums, "sums")],
    )
    out, logs = (checkpoint_name(x, ATTENTION_RESULTS) for x in (out, logs))
    return out, (q, k, v, reads, out, logs)


def _backward(shape: _Shape, kept: tuple[Any, ...], slope: Array) -> tuple[Any, ...]:
    q, k, v, reads, out, logs = kept
    delta = jnp.sum(slope.astype(jnp.float32) * out.astype(jnp.float32), 3).swapaxes(1, 2)
    of_queries = [(q, "queries"), (slope, "queries"), (logs, "sums"), (delta, "sums")]
    of_queries += [(reads.bounds, "bounds")]
    of_keys = [(k, "keys"), (v, "keys")]
    (of_q,) = _run(
        QUERY_GRADIENT,
        shape,
        (reads.keys, reads.key_count, reads.whole_keys),
        block=of_queries,
        row=of_keys,
        outputs=[(q, "queries")],
    )
    # The gradients that each head of queries adds to those of its keys and values.
    shares = [(jax.ShapeDtypeStruct(q.shape, x.dtype), "queries") for x in (k, v)]
    of_k, of_v = _run(
        KEY_GRADIENT,
        shape,
        (reads.queries, reads.query_count, reads.whole_queries),
        block=of_keys,
        row=of_queries,
        outputs=shares,
    )
    s, n, kv, h = k.shape
    of_k, of_v = (
        jnp.sum(x.reshape(s, n, kv, -1, h), 3, dtype=jnp.float32).astype(k.dtype)
        for x in (of_k, of_v)
    )
    return of_q, of_k, of_v, None


_attention.defvjp(_forward, _backward)


def _sums(q: Array) -> tuple[int, int, int]:
    """Return the shape [S heads N] of one number for each query [S N heads H]."""
    return q.shape[0], q.shape[2], q.shape[1]


def _run(
    kernel: _Kernel,
    shape: _Shape,
    lists: tuple[Array, Array, Array],
    *,
    block: list[tuple[Array, str]],
    row: list[tuple[Array, str]],
    outputs: list[tuple[Any, str]],
) -> list[Array]:
    """Run a kernel whose programs go over the blocks that are listed for their own block.

    Inputs and outputs are arrays with their kind. Of those of `block` and of the outputs, a program
    gets its block; of those of `row`, it gets the whole row.

    lists: of `PackedReads`, the blocks [S n n], and how many there are and are whole [S n]
    """
    from jax.experimental.pallas import triton

    q = next(x for x, kind in block + row if kind == "queries")
    kv = next(x for x, kind in block + row if kind == "keys").shape[2]
    (s, tokens, heads, h), n, ways = q.shape, lists[0].shape[2], q.shape[2] // kv

    def spec(kind: str, is_block: bool) -> pl.BlockSpec:
        size = shape.block if is_block else tokens
        sizes, index = {
            "queries": ((None, size, None, h), lambda head, i, row: (row, i, head, 0)),
            "keys": ((None, size, None, h), lambda head, i, row: (row, i, lax.div(head, ways), 0)),
            "sums": ((None, None, size), lambda head, i, row: (row, head, i)),
            "bounds": ((None, 8, size), lambda head, i, row: (row, 0, i)),
        }[kind]
        if is_block:
            return pl.BlockSpec(sizes, index)
        return pl.BlockSpec(sizes, lambda head, i, row: index(head, 0, row))

    counts = pl.BlockSpec((None, n), lambda head, i, row: (row, 0))
    listed = [pl.BlockSpec((None, None, n), lambda head, i, row: (row, i, 0)), counts, counts]
    run = pl.pallas_call(
        functools.partial(kernel.body, of=_Parts(shape.block, kernel.part, shape.scale)),
        # All heads of a block run at about the same time. Blocks of prompts, whose keys have long
        # lists, come before those of their responses.
        grid=(heads, n, s),
        in_specs=listed + [spec(x, True) for _, x in block] + [spec(x, False) for _, x in row],
        out_specs=[spec(x, True) for _, x in outputs],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x, _ in outputs],
        compiler_params=triton.CompilerParams(num_warps=kernel.warps, num_stages=kernel.stages),
        interpret=shape.interpret,
        name=kernel.body.__name__.strip("_"),
    )
    # The cost estimate of a call of Pallas is for TPUs; plans read it from this attribute.
    cost = {"flops": str(int(2 * kernel.products * shape.pairs * s * heads * h))}
    stated = json.dumps({"cost_estimate": cost}, separators=(",", ":"))
    with set_xla_metadata(kernel_metadata=stated):
        return run(*lists, *(x for x, _ in block + row))


# ---- kernels: one block of one head --------------------------------------------------------------


class _Parts(NamedTuple):
    """The listed blocks of a program, cut into parts."""

    block: int  # tokens, as is the next one
    part: int
    scale: float

    def first_token(self) -> Array:
        """Return the first token of the program's own block."""
        return pl.program_id(1) * self.block

    def loop(self, lists: tuple[Any, Any, Any], step: Callable, start: Any) -> Any:
        """Return the last result of step(first token, whether it is masked, result before)."""
        (table, count, whole), own = lists, pl.program_id(1)
        parts = self.block // self.part

        def steps(masked: bool, first: Array, end: Array, start: Any) -> Any:
            def next_part(j: Array, carry: Any) -> Any:
                token = table[lax.div(j, parts)] * self.block + lax.rem(j, parts) * self.part
                return step(pl.multiple_of(token, self.part), masked, carry)

            return lax.fori_loop(first * parts, end * parts, next_part, start)

        # A mask takes about as many instructions as the softmax, and most blocks need none.
        return steps(True, whole[own], count[own], steps(False, 0, whole[own], start))

    def scores(self, x: Array, y: Array, mask: Array | None) -> Array:
        """Return the scores of rows x with rows y, to the base 2."""
        scores = _product(x, y.T) * (self.scale * math.log2(math.e))
        return scores if mask is None else jnp.where(mask, scores, MASKED)


_product = functools.partial(jnp.dot, preferred_element_type=jnp.float32)


def _visible(bounds: Sequence[Array], query: Array, key: Array) -> Array:
    """Return whether queries attend to keys; the arguments are arrays that broadcast.

    bounds: the first and the end of the prompt's range of each query, the first of its own range
    """
    start, stop, own = bounds
    return ((key >= start) & (key < stop)) | ((key >= own) & (key <= query))


def _forward_kernel(table, count, whole, q, bounds, k, v, out, logs, *, of: _Parts) -> None:
    queries, query = q[...], of.first_token() + jnp.arange(of.block)[:, None]
    ranges = [bounds[i][:, None] for i in range(3)]

    def step(first: Array, masked: bool, carry: Any) -> Any:
        top, total, mixed = carry
        at, key = pl.ds(first, of.part), first + jnp.arange(of.part)[None]
        mask = _visible(ranges, query, key) if masked else None
        scores = of.scores(queries, k[at, :], mask)
        largest = jnp.maximum(top, jnp.max(scores, 1))
        weights, shrink = jnp.exp2(scores - largest[:, None]), jnp.exp2(top - largest)
        total = total * shrink + jnp.sum(weights, 1)
        values = v[at, :]
        mixed = mixed * shrink[:, None] + _product(weights.astype(values.dtype), values)
        return largest, total, mixed

    start = jnp.full(of.block, MASKED), jnp.zeros(of.block), jnp.zeros(queries.shape, jnp.float32)
    top, total, mixed = of.loop((table, count, whole), step, start)
    out[...] = (mixed / total[:, None]).astype(out.dtype)
    logs[...] = top + jnp.log2(total)


def _query_gradient_kernel(
    table, count, whole, q, slope, logs, delta, bounds, k, v, of_q, *, of: _Parts
) -> None:
    queries, slopes, log, less = q[...], slope[...], logs[...][:, None], delta[...][:, None]
    query = of.first_token() + jnp.arange(of.block)[:, None]
    ranges = [bounds[i][:, None] for i in range(3)]

    def step(first: Array, masked: bool, total: Array) -> Array:
        at, key = pl.ds(first, of.part), first + jnp.arange(of.part)[None]
        keys = k[at, :]
        mask = _visible(ranges, query, key) if masked else None
        weights = jnp.exp2(of.scores(queries, keys, mask) - log)
        of_scores = weights * (_product(slopes, v[at, :].T) - less)
        return total + _product(of_scores.astype(keys.dtype), keys)

    total = of.loop((table, count, whole), step, jnp.zeros(queries.shape, jnp.float32))
    of_q[...] = (total * of.scale).astype(of_q.dtype)


def _key_gradient_kernel(
    table, count, whole, k, v, q, slope, logs, delta, bounds, of_k, of_v, *, of: _Parts
) -> None:
    keys, values, key = k[...], v[...], of.first_token() + jnp.arange(of.block)[:, None]

    def step(first: Array, masked: bool, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        total_k, total_v = carry
        at, query = pl.ds(first, of.part), first + jnp.arange(of.part)[None]
        queries, slopes, mask = q[at, :], slope[at, :], None
        if masked:
            mask = _visible([bounds[i, at][None] for i in range(3)], query, key)
        weights = jnp.exp2(of.scores(keys, queries, mask) - logs[at][None])  # [keys queries]
        of_scores = weights * (_product(values, slopes.T) - delta[at][None])
        total_v += _product(weights.astype(slopes.dtype), slopes)
        total_k += _product(of_scores.astype(queries.dtype), queries)
        return total_k, total_v

    zeros = jnp.zeros(keys.shape, jnp.float32)
    total_k, total_v = of.loop((table, count, whole), step, (zeros, zeros))
    of_k[...], of_v[...] = (total_k * of.scale).astype(of_k.dtype), total_v.astype(of_v.dtype)


FORWARD = _Kernel(_forward_kernel, part=64, warps=8, stages=3, products=2)
QUERY_GRADIENT = _Kernel(_query_gradient_kernel, part=64, warps=8, stages=2, products=3)
KEY_GRADIENT = _Kernel(_key_gradient_kernel, part=64, warps=8, stages=2, products=4)
