"""Sample tokens from logits: temperature, top-k, top-p and min-p, without a sort.

Temperature is applied first, then top-k, then top-p among the tokens that top-k kept, then min-p,
as in transformers. Each of the three filters is a threshold on the logits, so tokens of equal logit
are kept or dropped together. A binary search over the bits of floats finds the threshold in 31
passes over the logits, for any vocabulary; a filter that is off takes no pass. Each row uses one
uniform number.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cptjax.types import Array

TOKEN_BLOCK = 128  # tokens of a block; the block is found first, then the token in it
LOWEST_LOGIT = -3e38  # a finite minus infinity


@flax.struct.dataclass
class SamplingControls:
    """How a token is sampled; all fields are traced, so new values need no compilation."""

    temperature: Array  # 0 = greedy
    top_k: Array  # 0 = off
    top_p: Array  # 1 = off
    min_p: Array  # 0 = off
    forbidden: Array  # [V] never sampled


def make_controls(
    temperature: float, top_k: int, top_p: float, min_p: float, forbidden: np.ndarray
) -> SamplingControls:
    """Return the settings as arrays; `SamplingConfig` has checked their ranges."""
    if forbidden.all():
        raise ValueError(
            "every token of the vocabulary is forbidden; expected at least one that may be sampled"
        )
    return SamplingControls(
        temperature=jnp.asarray(temperature, jnp.float32),
        top_k=jnp.asarray(top_k, jnp.int32),
        top_p=jnp.asarray(top_p, jnp.float32),
        min_p=jnp.asarray(min_p, jnp.float32),
        forbidden=jnp.asarray(forbidden),
    )


def sample_tokens(
    logits: Array, uniform: Array, controls: SamplingControls
) -> tuple[Array, Array, Array]:
    """Sample from float32 logits [B V] with uniform numbers [B] in [0, 1).

    Return tokens [B] and two log-probabilities of each. The first is under the distribution that
    the token is sampled from; it is 0 for a greedy token. The second is under the policy, the plain
    softmax over all V tokens including forbidden ones, as the trainer's forward pass computes it.
    """
    allowed = jnp.where(controls.forbidden, LOWEST_LOGIT, logits)

    def greedy():
        return jnp.argmax(allowed, -1).astype(jnp.int32), jnp.zeros(logits.shape[0])

    def random():
        z = (allowed - jnp.max(allowed, -1, keepdims=True)) / controls.temperature
        weights = jnp.where(z >= lowest_kept(z, controls), jnp.exp(z), 0.0)
        tokens, total = invert_cumulative(weights, uniform)
        return tokens, _select(z, tokens) - jnp.log(total)

    tokens, logps = lax.cond(controls.temperature == 0, greedy, random)
    return tokens, logps, _select(logits, tokens) - jax.nn.logsumexp(logits, -1)


def _select(x: Array, tokens: Array) -> Array:
    return jnp.take_along_axis(x, tokens[:, None], -1)[:, 0]


def invert_cumulative(weights: Array, uniform: Array) -> tuple[Array, Array]:
    """Return the token at which the running sum of weights [B V] passes uniform * total, and total.

    The search finds the token's block first, then the token in it. A token of weight 0 does not
    increase the running sum, so it is never sampled.
    """
    b, v = weights.shape
    blocks = jnp.pad(weights, ((0, 0), (0, -v % TOKEN_BLOCK))).reshape(b, -1, TOKEN_BLOCK)
    sums = jnp.cumsum(jnp.sum(blocks, -1), -1)
    total = sums[:, -1]
    block, rest = _first_above(sums, uniform * total)
    inside = jnp.take_along_axis(blocks, block[:, None, None], 1)[:, 0]
    token, _ = _first_above(jnp.cumsum(inside, -1), rest)
    return block * TOKEN_BLOCK + token, total


def _first_above(sums: Array, goal: Array) -> tuple[Array, Array]:
    """Return where running sums [B n] first exceed goal [B], and goal minus the sum before."""
    # Rounding may raise the goal to the last sum, which no sum exceeds.
    goal = jnp.minimum(goal, jnp.nextafter(sums[:, -1], jnp.zeros(())))
    below = sums <= goal[:, None]
    before = jnp.max(jnp.where(below, sums, 0.0), -1)
    return jnp.sum(below, -1, dtype=jnp.int32), goal - before


def lowest_kept(z: Array, controls: SamplingControls) -> Array:
    """Return the lowest z [B 1] that may be sampled; z [B V] is 0 for the most likely token."""
    lowest = jnp.full((z.shape[0],), LOWEST_LOGIT / 2, jnp.float32)

    def off():
        return lowest

    def top_k():
        return highest_with_mass(z, jnp.ones_like(z), controls.top_k.astype(jnp.float32))

    cut = jnp.maximum(lax.cond(controls.top_k > 0, top_k, off), lowest)

    def top_p():
        mass = jnp.where(z >= cut[:, None], jnp.exp(z), 0.0)
        return highest_with_mass(z, mass, controls.top_p * jnp.sum(mass, -1))

    cut = jnp.maximum(cut, lax.cond(controls.top_p < 1, top_p, off))
    min_p = jnp.where(controls.min_p > 0, jnp.log(controls.min_p), LOWEST_LOGIT / 2)
    return jnp.maximum(cut, min_p)[:, None]


def highest_with_mass(z: Array, mass: Array, goal: Array) -> Array:
    """Return the highest values [B] such that the entries of z at or above have `goal` mass.

    z [B V] must be <= 0. If all entries together have less mass, the value is the lowest float.
    """
    # The higher of two floats <= 0 has the smaller magnitude, and magnitudes sort like their bits.
    bits = lax.bitcast_convert_type(jnp.abs(z), jnp.int32)
    goal = jnp.broadcast_to(goal, z.shape[:1])

    def halve(_, ends):
        low, high = ends
        middle = low + (high - low) // 2
        enough = jnp.sum(jnp.where(bits <= middle[:, None], mass, 0.0), -1) >= goal
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    full = jnp.full(z.shape[:1], np.float32(-LOWEST_LOGIT).view(np.int32))
    low, _ = lax.fori_loop(0, 31, halve, (jnp.zeros_like(full), full))
    return -lax.bitcast_convert_type(low, jnp.float32)
