"""From logits to a token: one uniform number per row, no sort, every setting traced.

Temperature first, then top-k, then top-p among what top-k kept, then min-p, as transformers orders them. Each of the three is a
lowest logit that still counts, so ties stay together, and that number is found by halving the range of float bits: 32 passes
over the logits whatever the vocabulary, and none where the filter is off.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cptjax.types import Array

TOKEN_BLOCK = 128  # tokens whose weights are summed before one of them is looked for
LOWEST_LOGIT = -3e38  # a finite minus infinity


@flax.struct.dataclass
class SamplingControls:
    """How a token is drawn; all traced, so another temperature is not another program."""

    temperature: Array  # 0 = the likeliest token
    top_k: Array  # 0 = off
    top_p: Array  # 1 = off
    min_p: Array  # 0 = off
    forbidden: Array  # [V] never drawn


def check_sampling(temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    """Refuse settings under which nothing can be drawn."""
    checks = (
        ("temperature", temperature, temperature >= 0, "0 (greedy) or more"),
        ("top_k", top_k, top_k >= 0 and int(top_k) == top_k, "0 (off) or a number of tokens"),
        ("top_p", top_p, 0 < top_p <= 1, "a share in (0, 1]; 1 is off"),
        ("min_p", min_p, 0 <= min_p <= 1, "a share in [0, 1]; 0 is off"),
    )
    for name, came, ok, expected in checks:
        if not ok:
            raise ValueError(f"rollout.{name}={came}: expected {expected}")


def make_controls(
    temperature: float, top_k: int, top_p: float, min_p: float, forbidden: np.ndarray
) -> SamplingControls:
    """Checked settings as arrays."""
    check_sampling(temperature, top_k, top_p, min_p)
    if forbidden.all():
        raise ValueError("every token of the vocabulary is forbidden; nothing can be drawn")
    number = lambda x: jnp.asarray(x, jnp.float32)
    return SamplingControls(
        number(temperature),
        jnp.asarray(top_k, jnp.int32),
        number(top_p),
        number(min_p),
        jnp.asarray(forbidden),
    )


def sample_tokens(logits: Array, uniform: Array, c: SamplingControls) -> tuple[Array, Array, Array]:
    """logits [B V] float32, uniform [B] in [0, 1) -> tokens [B], their log-probability as drawn, and under the raw policy.

    The raw policy is the plain softmax over all V, forbidden tokens included: what the trainer's forward computes.
    A greedy token has log-probability 0 as drawn.
    """
    allowed = jnp.where(c.forbidden, LOWEST_LOGIT, logits)

    def likeliest():
        return jnp.argmax(allowed, -1).astype(jnp.int32), jnp.zeros(logits.shape[0])

    def random():
        z = (allowed - jnp.max(allowed, -1, keepdims=True)) / c.temperature  # 0 at the likeliest
        tokens, total = invert_cumulative(
            jnp.where(z >= lowest_kept(z, c), jnp.exp(z), 0.0), uniform
        )
        return tokens, _pick(z, tokens) - jnp.log(total)

    tokens, logps = lax.cond(c.temperature == 0, likeliest, random)
    return tokens, logps, _pick(logits, tokens) - jax.nn.logsumexp(logits, -1)


def _pick(x: Array, tokens: Array) -> Array:
    return jnp.take_along_axis(x, tokens[:, None], -1)[:, 0]


def invert_cumulative(weights: Array, uniform: Array) -> tuple[Array, Array]:
    """The token at which the running sum of weights [B V] passes uniform * total, and the total: first its block, then it.

    A token of weight 0 adds nothing to the running sum, so it is never where the sum passes.
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
    """Where running sums [B n] first exceed goal [B], and how far into that step the goal lies."""
    goal = jnp.minimum(goal, jnp.nextafter(sums[:, -1], jnp.zeros(())))[
        :, None
    ]  # rounding may lift it to the very end
    below = sums <= goal
    before = jnp.max(jnp.where(below, sums, 0.0), -1)
    return jnp.sum(below, -1, dtype=jnp.int32), goal[:, 0] - before


def lowest_kept(z: Array, c: SamplingControls) -> Array:
    """[B 1] the lowest z that may be drawn; z [B V] is 0 at the likeliest token."""
    none = jnp.full((z.shape[0],), LOWEST_LOGIT / 2, jnp.float32)
    cut = lax.cond(
        c.top_k > 0,
        lambda: highest_with_mass(z, jnp.ones_like(z), c.top_k.astype(jnp.float32)),
        lambda: none,
    )
    cut = jnp.maximum(cut, none)

    def nucleus():
        mass = jnp.where(z >= cut[:, None], jnp.exp(z), 0.0)
        return highest_with_mass(z, mass, c.top_p * jnp.sum(mass, -1))

    cut = jnp.maximum(cut, lax.cond(c.top_p < 1, nucleus, lambda: none))
    return jnp.maximum(cut, jnp.where(c.min_p > 0, jnp.log(c.min_p), LOWEST_LOGIT / 2))[:, None]


def highest_with_mass(z: Array, mass: Array, goal: Array) -> Array:
    """[B] the highest value at or above which the entries of z <= 0 [B V] hold at least `goal` mass; the lowest float if none does."""
    # Of two floats <= 0 the higher has the smaller magnitude, and magnitudes order like their bits.
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
