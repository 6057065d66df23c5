"""Log-probabilities, entropy and KL of tokens by chunks, without the logits [N, V] of all tokens.

    hidden [N D] --cut--> chunk [n D] x unembed [D V] -> logits [n V] float32 -> numbers [n]

The backward pass computes the logits again. On a mesh, each batch shard processes its own tokens;
the unembedding is gathered once, and its gradient is summed once. Left to itself, the partitioner
would spread every chunk over all shards and sum its logits across the network.

The gradient of the unembedding is summed over the chunks in the dtype of the unembedding. In
bfloat16, with 4,096 tokens and a vocabulary of 8,192, its error is 0.30 % for chunks of 1,024
tokens (0.17 % for one chunk, 1.1 % for chunks of 32 tokens). A sum in float32 would take 4 more
bytes per weight.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from cptjax.common.compiler_options import PlatformJit
from cptjax.models import bfloat16_products, causal_lm, decoder
from cptjax.models.config import ModelConfig
from cptjax.models.packed_groups import by_target, flat_targets
from cptjax.models.trainable import cast_params
from cptjax.sharding import RULES
from cptjax.types import Array, Batch, Params

KL_DIRECTIONS = ("forward", "reverse")


def token_logps(
    hidden: Array,
    unembed: Array,
    targets: Array,
    *,
    chunk: int = 1024,
    entropy: bool = False,
    entropy_grad: bool = False,
    temperature: float | Array = 1.0,
) -> tuple[Array, Array | None]:
    """Return the log-probability [N] of each target after its hidden state, and the entropy [N].

    The entropy is None unless `entropy` is set. No gradient flows through it unless `entropy_grad`
    is set: an entropy that is only logged should not double the cost of the backward pass.
    The logits of `chunk` tokens of each batch shard are in memory at a time; with at most that
    many tokens, nothing is computed twice.
    """
    check_logprobs(chunk=chunk, temperature=temperature)

    def numbers(weights: tuple, h: Array, t: Array) -> tuple[Array, Array | None]:
        z = _logits(h, weights[0]) / temperature
        norm = jax.nn.logsumexp(z, -1)
        logp = jnp.take_along_axis(z, t[:, None], -1)[:, 0] - norm
        if not entropy:
            return logp, None
        if not entropy_grad:
            z, norm = lax.stop_gradient((z, norm))
        return logp, _entropy(z, norm)

    return _by_chunks(numbers, (unembed,), (hidden, targets), chunk)


def distill_kl(
    student: Array,
    teacher: Array,
    unembed_student: Array,
    unembed_teacher: Array,
    *,
    direction: str = "forward",
    top_k: int = 0,
    chunk: int = 1024,
) -> Array:
    """Return the KL divergence [N] of next-token distributions, given hidden states [N, D].

    forward = KL(teacher || student), reverse = KL(student || teacher). No gradient reaches the
    teacher. `top_k` keeps the teacher's k most likely tokens and merges the others into one, which
    gives a lower bound of the full divergence; 0 = the whole vocabulary.
    """
    check_logprobs(chunk=chunk, direction=direction, top_k=top_k)

    def divergence(weights: tuple, s: Array, t: Array) -> Array:
        ours = jax.nn.log_softmax(_logits(s, weights[0]))
        theirs = jax.nn.log_softmax(lax.stop_gradient(_logits(t, weights[1])))
        if 0 < top_k < theirs.shape[-1]:
            kept = lax.top_k(theirs, top_k)[1]
            ours, theirs = _kept_and_rest(ours, kept), _kept_and_rest(theirs, kept)
        first, second = (theirs, ours) if direction == "forward" else (ours, theirs)
        return jnp.sum(jnp.exp(first) * (first - second), -1)

    return _by_chunks(divergence, (unembed_student, unembed_teacher), (student, teacher), chunk)


def top_logps(hidden: Array, unembed: Array, *, k: int, chunk: int = 1024) -> tuple[Array, Array]:
    """Return the k likeliest tokens [N k] after each state, and log-probabilities [N k+1].

    The last log-probability is that of all other tokens together.
    """
    check_logprobs(chunk=chunk)

    def numbers(weights: tuple, h: Array) -> tuple[Array, Array]:
        logps = jax.nn.log_softmax(_logits(h, weights[0]))
        kept = lax.top_k(logps, k)[1]
        return kept, _kept_and_rest(logps, kept)

    return _by_chunks(numbers, (unembed,), (hidden,), chunk)


def stored_kl(
    hidden: Array, unembed: Array, kept: Array, logps: Array, *, chunk: int = 1024
) -> Array:
    """Return the divergence KL(stored || now) [N] from the distributions of `top_logps`.

    The stored log-probabilities may be rounded; they are normalised again.
    """
    check_logprobs(chunk=chunk)

    def divergence(weights: tuple, h: Array, kept: Array, stored: Array) -> Array:
        now = _kept_and_rest(jax.nn.log_softmax(_logits(h, weights[0])), kept)
        return jnp.sum(jnp.exp(stored) * (stored - now), -1)

    stored = jax.nn.log_softmax(logps.astype(jnp.float32))
    return _by_chunks(divergence, (unembed,), (hidden, kept, stored), chunk)


def top_entropy(hidden: Array, unembed: Array, *, k: int = 20, chunk: int = 1024) -> Array:
    """Return EAFT's weights [N]: the entropy of the k most likely tokens, divided by log k.

    The probabilities of the k tokens are normalised to sum to 1. The weights are in [0, 1] and have
    no gradient.
    """
    check_logprobs(chunk=chunk)
    if k < 2:
        raise ValueError(f"k={k}: the entropy of the likeliest tokens needs at least 2 of them")

    def numbers(weights: tuple, h: Array) -> Array:
        top = lax.top_k(_logits(h, weights[0]), k)[0]
        return _entropy(top, jax.nn.logsumexp(top, -1)) / jnp.log(float(k))

    return lax.stop_gradient(_by_chunks(numbers, (unembed,), (hidden,), chunk))


def logit_gradient_norm(
    hidden: Array, unembed: Array, targets: Array, *, chunk: int = 1024
) -> Array:
    """Return the squared norms [N] of the gradients of the targets' log-probabilities.

    The gradient is with respect to the logits; its squared norm is 1 - 2 p(target) + sum of p^2.
    """
    check_logprobs(chunk=chunk)

    def numbers(weights: tuple, h: Array, t: Array) -> Array:
        logp = jax.nn.log_softmax(_logits(h, weights[0]))
        target = jnp.take_along_axis(logp, t[:, None], -1)[:, 0]
        return 1 - 2 * jnp.exp(target) + jnp.exp(2 * logp).sum(-1)

    return _by_chunks(numbers, (unembed,), (hidden, targets), chunk)


def logit_square_norm(hidden: Array, unembed: Array, *, chunk: int = 1024) -> Array:
    """Return the squared L2 norms [N] of the logits after hidden states [N, D]."""
    check_logprobs(chunk=chunk)
    norm = lambda weights, h: jnp.square(_logits(h, weights[0])).sum(-1)
    return _by_chunks(norm, (unembed,), (hidden,), chunk)


def check_logprobs(
    *, chunk: int = 1, temperature: Any = 1.0, direction: str = "forward", top_k: int = 0
) -> None:
    """Refuse settings that the functions of this module do not support."""
    if chunk < 1:
        raise ValueError(f"train.chunk={chunk}: expected at least 1 token")
    if isinstance(temperature, float | int) and temperature <= 0:
        raise ValueError(f"temperature={temperature}: log-probabilities need a temperature above 0")
    if direction not in KL_DIRECTIONS:
        raise ValueError(
            f"distill.direction={direction!r}: expected one of {', '.join(KL_DIRECTIONS)}"
        )
    if top_k < 0:
        raise ValueError(
            f"distill.top_k={top_k}: expected 0 (the whole vocabulary) or a number of tokens"
        )


@jax.custom_vjp
def _logits(hidden: Array, unembed: Array) -> Array:
    """Return float32 logits [n V] of hidden states [n D].

    Both products of the backward pass multiply in the dtype of the hidden states: left to itself,
    JAX multiplies the float32 gradient of the logits, which in bfloat16 takes twice the time.
    """
    return jnp.dot(hidden, unembed.astype(hidden.dtype), preferred_element_type=jnp.float32)


def _logits_and_inputs(hidden: Array, unembed: Array) -> tuple[Array, tuple[Array, Array]]:
    return _logits(hidden, unembed), (hidden, unembed)


def _logits_gradients(inputs: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    hidden, unembed = inputs
    gradient, weights = gradient.astype(hidden.dtype), unembed.astype(hidden.dtype)
    if bfloat16_products.are_faster(hidden):
        of_hidden = bfloat16_products.input_gradient(weights, gradient)
        of_unembed = bfloat16_products.weight_gradient(hidden, gradient)
    else:
        of_hidden, of_unembed = gradient @ weights.T, hidden.T @ gradient
    return of_hidden, of_unembed.astype(unembed.dtype)


_logits.defvjp(_logits_and_inputs, _logits_gradients)


def _entropy(logits: Array, norm: Array) -> Array:
    """Return the entropy [n] of the distributions of logits [n V], given their logsumexp [n]."""
    logp = logits - norm[:, None]
    return -jnp.sum(jnp.exp(logp) * logp, -1)


def _kept_and_rest(logps: Array, kept: Array) -> Array:
    """Return log-probabilities [n k+1]: those of the tokens `kept` [n k], then that of the rest."""
    row = jnp.arange(len(kept))[:, None]
    rest = jax.nn.logsumexp(logps.at[row, kept].set(-jnp.inf), -1, keepdims=True)
    return jnp.concatenate([logps[row, kept], rest], -1)


def _by_chunks(f: Callable, weights: tuple, rows: tuple, chunk: int) -> Any:
    """Return f(weights, *rows), one result for each row.

    Each batch shard maps its rows, `chunk` at a time.
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    axes = tuple(a for a in RULES["batch"] if kinds.get(a) == AxisType.Auto and mesh.shape[a] > 1)
    if not axes:
        return _map_chunks(f, weights, rows, chunk)
    n = rows[0].shape[0]
    rows = tuple(_pad(x, -n % math.prod(mesh.shape[a] for a in axes)) for x in rows)
    by_row = PartitionSpec(axes)

    def map_shard(weights: tuple, *rows: Array) -> Any:
        # Each shard sums its own gradient of the weights; they are summed over the shards once.
        weights = jax.tree.map(lambda w: lax.pcast(w, axes, to="varying"), weights)
        return _map_chunks(f, weights, rows, chunk)

    mapped = jax.shard_map(
        map_shard,
        in_specs=(PartitionSpec(), *(by_row for _ in rows)),
        out_specs=by_row,
        axis_names=set(axes),
    )
    return jax.tree.map(lambda x: x[:n], mapped(weights, *rows))


def _map_chunks(f: Callable, weights: tuple, rows: tuple, chunk: int) -> Any:
    n = rows[0].shape[0]
    if n <= chunk:
        return f(weights, *rows)
    count = -(-n // chunk)
    size = -(-n // count)
    chunks = tuple(_pad(x, count * size - n).reshape(count, size, *x.shape[1:]) for x in rows)
    recomputed = jax.checkpoint(f, prevent_cse=False)
    out = lax.map(lambda x: recomputed(weights, *x), chunks)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:n], out)


def _pad(x: Array, more: int) -> Array:
    return x if more == 0 else jnp.pad(x, [(0, more)] + [(0, 0)] * (x.ndim - 1))


def target_logps(
    hidden: Array, unembed: Array, batch: Batch, chunk: int, temperature: float = 1.0
) -> Array:
    """Return the log-probabilities [B A] of a batch's targets; 0 where the mask is False."""
    logps, _ = token_logps(
        hidden.reshape(-1, hidden.shape[-1]),
        unembed,
        flat_targets(batch),
        chunk=chunk,
        temperature=temperature,
    )
    return jnp.where(batch.mask, by_target(batch, logps), 0)


def predicting_states(params: Params, batch: Batch, cfg: ModelConfig, dtype: jnp.dtype) -> Array:
    """Return the hidden states [B A D] that predict the targets; of packed groups [S A D]."""
    if batch.packing is None:
        hidden = causal_lm.forward(params, batch.prompts, cfg, dtype)
    else:
        hidden = causal_lm.forward_packed(
            params, batch.prompts, batch.targets, batch.packing, cfg, dtype
        )
    return jnp.take_along_axis(hidden, batch.where[..., None], 1)


@functools.lru_cache(maxsize=32)
def make_scoring_program(
    cfg: Any, dtype: Any, chunk: int, temperature: float
) -> Callable[[Params, Batch], jax.Array]:
    """Return a jitted function that computes the log-probabilities [B A] of a batch's targets."""

    @jax.named_scope("logps")
    def run(params: Params, batch: Batch) -> jax.Array:
        params = cast_params(params, dtype)
        hidden = predicting_states(params, batch, cfg, dtype)
        return target_logps(hidden, decoder.unembedding(params["text"]), batch, chunk, temperature)

    return PlatformJit(run)


@functools.lru_cache(maxsize=16)
def make_top_logps_program(
    cfg: Any, dtype: Any, chunk: int, k: int
) -> Callable[[Params, Batch], tuple[jax.Array, jax.Array]]:
    """Return a jitted function that computes `top_logps` of a batch: [B A k] and [B A k+1]."""

    @jax.named_scope("logps")
    def run(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        params = cast_params(params, dtype)
        hidden = predicting_states(params, batch, cfg, dtype)
        flat = hidden.reshape(-1, hidden.shape[-1])
        out = top_logps(flat, decoder.unembedding(params["text"]), k=k, chunk=chunk)
        return jax.tree.map(lambda x: by_target(batch, x), out)

    return PlatformJit(run)
