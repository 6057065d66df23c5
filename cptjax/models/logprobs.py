"""What the unembedding says about each token, by chunks: never [N, V] for all N.

    hidden [N D] --cut--> chunk [n D] x unembed [D V] -> logits [n V] float32 -> numbers [n]   (logits are made again for gradients)

On a mesh each batch shard walks through its own tokens, with the unembedding gathered once and its gradient summed once.
Left to the partitioner, every chunk would be spread over all shards and its logits summed across the network.
A gradient with respect to the unembedding adds up over the chunks in the unembedding's own type: in bfloat16, at 4,096 tokens and 8,192
words, it is 0.30 % off at 1,024 tokens a chunk (0.17 % at once, 1.9 % at 32); a float32 sum would take 4 bytes a weight beside the rest.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from cptjax.models import decoder, qwen2_5_vl
from cptjax.models.config import ModelConfig
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
    transposed: bool = False,
) -> tuple[Array, Array | None]:
    """Log-probability [N] of each target after its hidden state, with the entropy [N] on request; `transposed`: unembed is [V, D].

    `chunk` tokens of each batch shard have their logits in memory at one time; with at most that many tokens nothing is computed twice.
    No gradient flows through the entropy unless `entropy_grad` says so: an entropy that is only logged should not double the backward pass.
    """
    check_logprobs(chunk=chunk, temperature=temperature)

    def numbers(weights: tuple, h: Array, t: Array) -> tuple[Array, Array | None]:
        z = _logits(h, weights[0], transposed) / temperature
        norm = jax.nn.logsumexp(z, -1)
        logp = jnp.take_along_axis(z, t[:, None], -1)[:, 0] - norm
        return logp, _entropy(z if entropy_grad else lax.stop_gradient(z)) if entropy else None

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
    transposed: bool = False,
) -> Array:
    """KL divergence [N] of next-token distributions given hidden states [N, D]; no gradient reaches the teacher.

    forward = KL(teacher || student), reverse = KL(student || teacher).
    `top_k` keeps the teacher's k likeliest tokens and lumps the others into one: a lower bound of the full divergence, 0 only where
    those agree, and exact for both directions on what it keeps. 0 = the whole vocabulary.
    """
    check_logprobs(chunk=chunk, direction=direction, top_k=top_k)

    def divergence(weights: tuple, s: Array, t: Array) -> Array:
        ours = jax.nn.log_softmax(_logits(s, weights[0], transposed))
        theirs = jax.nn.log_softmax(lax.stop_gradient(_logits(t, weights[1], transposed)))
        if 0 < top_k < theirs.shape[-1]:
            kept = lax.top_k(theirs, top_k)[1]
            ours, theirs = _kept_and_rest(ours, kept), _kept_and_rest(theirs, kept)
        first, second = (theirs, ours) if direction == "forward" else (ours, theirs)
        return jnp.sum(jnp.exp(first) * (first - second), -1)

    return _by_chunks(divergence, (unembed_student, unembed_teacher), (student, teacher), chunk)


def top_entropy(
    hidden: Array, unembed: Array, *, k: int = 20, chunk: int = 1024, transposed: bool = False
) -> Array:
    """Entropy [N] of the k likeliest tokens among themselves, divided by log k: EAFT's weight in [0, 1], without gradient."""
    check_logprobs(chunk=chunk)
    if k < 2:
        raise ValueError(f"k={k}: the entropy of the likeliest tokens needs at least 2 of them")

    def numbers(weights: tuple, h: Array) -> Array:
        return _entropy(lax.top_k(_logits(h, weights[0], transposed), k)[0]) / jnp.log(float(k))

    return lax.stop_gradient(_by_chunks(numbers, (unembed,), (hidden,), chunk))


def logit_gradient_norm(
    hidden: Array, unembed: Array, targets: Array, *, chunk: int = 1024
) -> Array:
    """Squared length [N] of the gradient of each target's log-probability with respect to its logits: 1 - 2 p(target) + sum of p^2."""
    check_logprobs(chunk=chunk)

    def numbers(weights: tuple, h: Array, t: Array) -> Array:
        logp = jax.nn.log_softmax(_logits(h, weights[0], False))
        return (
            1
            - 2 * jnp.exp(jnp.take_along_axis(logp, t[:, None], -1)[:, 0])
            + jnp.exp(2 * logp).sum(-1)
        )

    return _by_chunks(numbers, (unembed,), (hidden, targets), chunk)


def check_logprobs(
    *, chunk: int = 1, temperature: Any = 1.0, direction: str = "forward", top_k: int = 0
) -> None:
    """Refuse settings that these functions cannot honour."""
    if chunk < 1:
        raise ValueError(f"train.chunk={chunk}: expected at least 1 token")
    if isinstance(temperature, float | int) and temperature <= 0:
        raise ValueError(f"temperature={temperature}: log-probabilities need a temperature above 0")
    if direction not in KL_DIRECTIONS:
        raise ValueError(
            f"distill.direction={direction!r}: choose one of {', '.join(KL_DIRECTIONS)}"
        )
    if top_k < 0:
        raise ValueError(
            f"distill.top_k={top_k}: expected 0 (the whole vocabulary) or a number of tokens"
        )


def _logits(hidden: Array, unembed: Array, transposed: bool) -> Array:
    axes = (((1,), (1 if transposed else 0,)), ((), ()))
    return lax.dot_general(
        hidden, unembed.astype(hidden.dtype), axes, preferred_element_type=jnp.float32
    )


def _entropy(logits: Array) -> Array:
    logp = jax.nn.log_softmax(logits)
    return -jnp.sum(jnp.exp(logp) * logp, -1)


def _kept_and_rest(logps: Array, kept: Array) -> Array:
    """Log-probabilities [n V] at kept [n k] -> [n k+1]; the last is that of all other tokens together."""
    row = jnp.arange(len(kept))[:, None]
    rest = jax.nn.logsumexp(logps.at[row, kept].set(-jnp.inf), -1, keepdims=True)
    return jnp.concatenate([logps[row, kept], rest], -1)


def _by_chunks(f: Callable, weights: tuple, rows: tuple, chunk: int) -> Any:
    """f(weights, *rows) -> numbers [N], on each batch shard's own rows, `chunk` at a time."""
    mesh = jax.sharding.get_abstract_mesh()
    free = {
        a
        for a, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == AxisType.Auto and mesh.shape[a] > 1
    }
    axes = tuple(a for a in RULES["batch"] if a in free)
    if not axes:
        return _walk(f, weights, rows, chunk)
    n = rows[0].shape[0]
    rows = tuple(_pad(x, -n % math.prod(mesh.shape[a] for a in axes)) for x in rows)
    by_row = PartitionSpec(axes)
    walk = jax.shard_map(
        lambda weights, *rows: _walk(f, weights, rows, chunk),
        in_specs=(PartitionSpec(), *(by_row for _ in rows)),
        out_specs=by_row,
        axis_names=set(axes),
    )
    return jax.tree.map(lambda x: x[:n], walk(weights, *rows))


def _walk(f: Callable, weights: tuple, rows: tuple, chunk: int) -> Any:
    n = rows[0].shape[0]
    if n <= chunk:
        return f(weights, *rows)
    count = -(-n // chunk)
    size = -(-n // count)
    cut = tuple(_pad(x, count * size - n).reshape(count, size, *x.shape[1:]) for x in rows)
    once_more = jax.checkpoint(f, prevent_cse=False)
    out = lax.map(lambda x: once_more(weights, *x), cut)
    return jax.tree.map(lambda x: x.reshape(-1)[:n], out)


def _pad(x: Array, more: int) -> Array:
    return x if more == 0 else jnp.pad(x, [(0, more)] + [(0, 0)] * (x.ndim - 1))


def target_logps(
    hidden: Array, unembed: Array, batch: Batch, chunk: int, temperature: float = 1.0
) -> Array:
    """Log-probabilities [B A] of a batch's targets, 0 where there is none."""
    found, _ = token_logps(
        hidden.reshape(-1, hidden.shape[-1]),
        unembed,
        batch.targets.reshape(-1),
        chunk=chunk,
        temperature=temperature,
    )
    return jnp.where(batch.mask, found.reshape(batch.targets.shape), 0)


def predicting_states(params: Params, batch: Batch, cfg: ModelConfig, dtype: jnp.dtype) -> Array:
    """The hidden states [B A D] that predict `batch.targets`."""
    if batch.where is None:
        q, (b, a) = batch.prompts.tokens.shape[0], batch.targets.shape
        hidden = qwen2_5_vl.forward_group(
            params, batch.prompts, batch.targets.reshape(q, b // q, a), cfg, dtype
        )
        return hidden.reshape(b, a, -1)
    return jnp.take_along_axis(
        qwen2_5_vl.forward(params, batch.prompts, cfg, dtype), batch.where[..., None], 1
    )


@functools.lru_cache(maxsize=32)
def make_scoring_program(
    cfg: Any, dtype: Any, chunk: int, temperature: float
) -> Callable[[Params, Batch], jax.Array]:
    """A program for the log-probabilities [B A] of a batch's targets."""

    def run(params: Params, batch: Batch) -> jax.Array:
        params = cast_params(params, dtype)
        hidden = predicting_states(params, batch, cfg, dtype)
        return target_logps(hidden, decoder.unembedding(params["text"]), batch, chunk, temperature)

    return jax.jit(run)
