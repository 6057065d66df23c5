"""Sample tokens from logits: temperature, top-k, top-p and min-p, without a sort.

Temperature is applied first, then top-k, then top-p among the tokens that top-k kept, then min-p,
as in transformers. Each of the three filters is a threshold on the logits, so tokens of equal logit
are kept or dropped together. A search over the bits of floats finds the threshold in a few passes
over the logits, for any vocabulary; a filter that is off takes no pass. Each row uses one uniform
number.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cptjax import sharding
from cptjax.sharding import constrain
from cptjax.types import Array

TOKEN_BLOCK = 128  # tokens of a block; the block is found first, then the token in it
LOWEST_LOGIT = -3e38  # a finite minus infinity
FLOAT_BITS = 31  # of a magnitude


@flax.struct.dataclass
class SamplingControls:
    """How a token is sampled.

    The numbers are traced, so new values need no compilation. A filter that is off is None: the
    compiled program has no branch for it, which a GPU would wait for at every token.
    """

    temperature: Array | None  # None = greedy
    top_k: Array | None
    top_p: Array | None
    min_p: Array | None
    forbidden: Array  # [V] never sampled


def make_controls(
    temperature: float, top_k: int, top_p: float, min_p: float, forbidden: np.ndarray
) -> SamplingControls:
    """Return the settings as arrays; `SamplingConfig` has checked their ranges."""
    if forbidden.all():
        raise ValueError(
            "every token of the vocabulary is forbidden; expected at least one that may be sampled"
        )

    def unless(off: float, value: float, dtype: Any) -> Array | None:
        return None if value == off else jnp.asarray(value, dtype)

    return SamplingControls(
        temperature=unless(0, temperature, jnp.float32),
        top_k=unless(0, top_k, jnp.int32),
        top_p=unless(1, top_p, jnp.float32),
        min_p=unless(0, min_p, jnp.float32),
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
    if controls.temperature is None:
        tokens, logps = jnp.argmax(allowed, -1).astype(jnp.int32), jnp.zeros(logits.shape[0])
    else:
        z = (allowed - jnp.max(allowed, -1, keepdims=True)) / controls.temperature
        weights = keep_likely(z, jnp.exp(z), controls)
        tokens, total = invert_cumulative(weights, uniform)
        logps = _select(z, tokens) - jnp.log(total)
    return tokens, logps, _select(logits, tokens) - jax.nn.logsumexp(logits, -1)


def _select(x: Array, tokens: Array) -> Array:
    return jnp.take_along_axis(x, tokens[:, None], -1)[:, 0]


def invert_cumulative(weights: Array, uniform: Array) -> tuple[Array, Array]:
    """Return the token at which the running sum of weights [B V] passes uniform * total, and total.

    The search finds the token's block first, then the token in it. A token of weight 0 is never
    sampled.
    """
    b, v = weights.shape
    # Devices that share the vocabulary get whole blocks; otherwise each would fetch all weights.
    whole = TOKEN_BLOCK * sharding.decoder_shards()
    padded = jnp.pad(weights, ((0, 0), (0, -v % whole)))
    blocks = constrain(padded.reshape(b, -1, TOKEN_BLOCK), "mlp_batch", "vocab", None)
    sums = constrain(jnp.sum(blocks, -1), "mlp_batch", None)
    running = jnp.cumsum(sums, -1)
    total = running[:, -1]
    block, rest = _first_above(sums, running, uniform * total)
    inside = jnp.take_along_axis(blocks, block[:, None, None], 1)[:, 0]
    token, _ = _first_above(inside, jnp.cumsum(inside, -1), rest)
    return block * TOKEN_BLOCK + token, total


def _first_above(weights: Array, sums: Array, goal: Array) -> tuple[Array, Array]:
    """Return where the running sums of weights [B n] first exceed goal [B], and its rest there."""
    # XLA adds in a tree, so a weight of 0 can change the running sum in its last bit.
    sums = jnp.where(weights > 0, sums, 0.0)
    # Rounding may raise the goal to the highest sum, which no sum exceeds.
    goal = jnp.minimum(goal, jnp.nextafter(jnp.max(sums, -1), jnp.zeros(())))
    above = sums > goal[:, None]
    before = jnp.max(jnp.where(above, 0.0, sums), -1)
    return jnp.argmax(above, -1).astype(jnp.int32), goal - before


def keep_likely(z: Array, weights: Array, controls: SamplingControls) -> Array:
    """Set the weights [B V] = exp(z) of tokens that a filter drops to 0.

    z [B V] is 0 for the most likely token.
    """
    kept = jnp.exp
    if controls.top_k is not None:
        cut = highest_with_mass(z, jnp.ones_like, controls.top_k.astype(jnp.float32))[:, None]
        weights = jnp.where(z >= cut, weights, 0.0)
        kept = lambda z: jnp.where(z >= cut, jnp.exp(z), 0.0)
    if controls.top_p is not None:
        cut = highest_with_mass(z, kept, controls.top_p * jnp.sum(weights, -1))
        weights = jnp.where(z >= cut[:, None], weights, 0.0)
    if controls.min_p is not None:
        weights = jnp.where(z >= jnp.log(controls.min_p), weights, 0.0)
    return weights


def highest_with_mass(z: Array, mass: Callable[[Array], Array], goal: Array) -> Array:
    """Return the highest values [B] such that the entries of z at or above have `goal` mass.

    z [B V] must be <= 0; `mass` returns the masses [B V] of such values. If all entries together
    have less mass, the value is the lowest float.
    """
    # The higher of two floats <= 0 has the smaller magnitude, and magnitudes sort like their bits.
    bits = lax.bitcast_convert_type(jnp.abs(z), jnp.uint32)
    goal = jnp.broadcast_to(goal, z.shape[:1])
    # A CPU waits for the comparisons, of which a pass that settles four bits has fifteen. A TPU
    # waits for memory, and reads bits and masses in 8 passes instead of 31. A GPU computes a few
    # sums with one kernel: it reads the bits alone, once in each of 11 passes.
    found = lax.platform_dependent(
        bits,
        goal,
        cpu=functools.partial(_lowest_with_mass, mass, bits_per_pass=1, keep_masses=True),
        cuda=functools.partial(_lowest_with_mass, mass, bits_per_pass=3, keep_masses=False),
        default=functools.partial(_lowest_with_mass, mass, bits_per_pass=4, keep_masses=True),
    )
    lowest = np.float32(-LOWEST_LOGIT).view(np.uint32)
    return -lax.bitcast_convert_type(jnp.minimum(found, lowest), jnp.float32)


def _lowest_with_mass(
    mass: Callable[[Array], Array],
    bits: Array,
    goal: Array,
    *,
    bits_per_pass: int,
    keep_masses: bool,
) -> Array:
    """Return the lowest numbers n [B] such that the entries of bits [B V] up to n have `goal` mass.

    Each pass settles the next bits of n, from the highest down: they are the number of candidates
    whose lower neighbour has too little mass. The masses are computed once or in each pass.
    """
    passes = -(-FLOAT_BITS // bits_per_pass)
    masses_of = lambda: mass(-lax.bitcast_convert_type(bits, jnp.float32))
    kept = masses_of() if keep_masses else None

    def settle(i: Array, low: Array) -> Array:
        step = jnp.uint32(1) << (bits_per_pass * (passes - 1 - i)).astype(jnp.uint32)
        count, masses = jnp.zeros_like(low), masses_of() if kept is None else kept
        for j in range(1, 2**bits_per_pass):
            below = bits < (low + j * step)[:, None]
            # In 33 bits the highest candidates of the first pass have no number.
            is_candidate = step <= jnp.uint32(2**FLOAT_BITS // j)
            count += is_candidate & (jnp.sum(jnp.where(below, masses, 0.0), -1) < goal)
        return low + count * step

    return lax.fori_loop(0, passes, settle, jnp.zeros(goal.shape, jnp.uint32))
