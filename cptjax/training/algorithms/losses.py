"""Losses as sums with their counts. The caller divides the global sum by the global count, once:

    loss = (sum over all micro-batches and devices of `sum`) / (the same of `count`)

so micro-batches, padding and the number of devices can not change it. What one response token weighs, and what is counted:

    normalise   weight of a token                      count                                  used by
    token       1                                      tokens                                 DAPO, EasyR1, SFT
    sequence    1 / tokens of its sequence             sequences with a token to learn from   GRPO, GSPO
    fixed       1                                      those sequences x fixed_length         Dr.GRPO

Importance ratios, with d = logp - old_logp and A the advantage (gradients of all four are A grad logp while d = 0):

    none       -A logp                                      as a value -A, so that it reads like the others
    token      -min(r A, clip(r, 1-low, 1+high) A)          r = exp(d); for A < 0 never above -dual A (PPO, dual clip)
    sequence   the same                                     r = exp(mean of d over the sequence) (GSPO)
    cispo      -clip(r, 1-low, 1+high) A logp               the clipped r carries no gradient

Divergence from a reference, with d = logp - ref_logp on sampled tokens: k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d.

Two answers of three and two tokens, A = [1, -1], low 0.2, high 0.3, dual 3; d of both kinds, and what each token gives:

    d          [[ 0.5,      0.1,      0     ], [-0.5,      0.3    ]]
    none       [[-1,       -1,       -1     ], [ 1,        1      ]]     the ratios' surrogates
    token      [[-1.3,     -1.10517, -1     ], [ 0.8,      1.34986]]     0.3 is not held: with A < 0 it pushes the answer down
    sequence   [[-1.22140, -1.22140, -1.2214], [ 0.90484,  0.90484]]     means 0.2 and -0.1
    cispo      [[-1.3,     -1.10517, -1     ], [ 0.8,      1.3    ]]     held on both sides
    k1         [[ 0.5,      0.1,      0     ], [-0.5,      0.3    ]]
    k2         [[ 0.125,    0.005,    0     ], [ 0.125,    0.045  ]]
    k3         [[ 0.10653,  0.00484,  0     ], [ 0.14872,  0.04082]]
    weights    token [[1, 1, 1], [1, 1]] of 5, sequence [[1/3, 1/3, 1/3], [1/2, 1/2]] of 2, fixed (length 4) [[1, 1, 1], [1, 1]] of 8

Departures: 1. k1 is refused as a loss: its gradient has mean zero. 2. d is cut at +-20 before exp. 3. k3 is cut at `kl_limit`
(10, as EasyR1 does; None = not): a token beyond it, 13 times less likely than under the reference, feels no pull back.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from cptjax.types import Array, Mean

OBJECTIVES = ("policy", "sft", "eaft", "distill")
RATIOS = ("none", "token", "sequence", "cispo")
NORMALISERS = ("token", "sequence", "fixed")
KL_ESTIMATORS = ("k1", "k2", "k3")
KL_PLACES = ("loss", "reward")


class Loss(NamedTuple):
    """A summed loss, what it is divided by, and numbers to log."""

    sum: Array
    count: Array
    metrics: dict[str, Mean]


def check_loss(
    *,
    objective: str = "policy",
    ratio: str = "none",
    clip_low: float = 0.2,
    clip_high: float = 0.3,
    clip_dual: float | None = 3.0,
    normalise: str = "token",
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    kl_place: str = "loss",
    tis_cap: float | None = None,
    entropy_coef: float = 0.0,
    skip_tokens: int = 0,
) -> None:
    """Refuse settings that have no meaning, in one line that names the allowed values."""
    named = {
        "objective": OBJECTIVES,
        "ratio": RATIOS,
        "normalise": NORMALISERS,
        "kl_estimator": KL_ESTIMATORS,
        "kl_place": KL_PLACES,
    }
    given = {
        "objective": objective,
        "ratio": ratio,
        "normalise": normalise,
        "kl_estimator": kl_estimator,
        "kl_place": kl_place,
    }
    for name, allowed in named.items():
        if given[name] not in allowed:
            raise ValueError(f"method.{name}={given[name]!r}: choose one of {', '.join(allowed)}")
    if not 0 <= clip_low < 1:
        raise ValueError(
            f"method.clip_low={clip_low}: expected 0 <= clip_low < 1 (the ratio is held above 1 - clip_low)"
        )
    if clip_high < 0:
        raise ValueError(
            f"method.clip_high={clip_high}: expected 0 or more (the ratio is held below 1 + clip_high)"
        )
    if clip_dual is not None and clip_dual <= 1:
        raise ValueError(
            f"method.clip_dual={clip_dual}: expected a ratio above 1, or None for no dual clip"
        )
    if kl_coef < 0:
        raise ValueError(f"method.kl_coef={kl_coef}: expected 0 (no reference model) or more")
    if kl_coef > 0 and kl_place == "loss" and kl_estimator == "k1":
        raise ValueError(
            "method.kl_estimator='k1' has a gradient of mean zero as a loss: choose k2 or k3, or method.kl_place='reward'"
        )
    if tis_cap is not None and tis_cap <= 0:
        raise ValueError(
            f"method.tis_cap={tis_cap}: expected a weight above 0, or None for no importance sampling"
        )
    if entropy_coef < 0 or skip_tokens < 0:
        raise ValueError(
            f"method.entropy_coef={entropy_coef}, method.distill.skip_tokens={skip_tokens}: expected 0 or more"
        )


def token_weights(
    mask: Array, normalise: str = "token", fixed_length: int = 0, segments: Array | None = None
) -> tuple[Array, Array]:
    """Weight [B, A] of each token and the count []; `segments` [B, A] tells packed conversations of a row apart."""
    check_loss(normalise=normalise)
    if normalise == "fixed" and fixed_length < 1:
        raise ValueError(
            f"normalise='fixed' needs fixed_length in tokens (rollout.max_new_tokens), not {fixed_length}"
        )
    ones = mask.astype(jnp.float32)
    if normalise == "token":
        return ones, ones.sum()
    if segments is None:
        lengths, sequences = (
            jnp.broadcast_to(ones.sum(1, keepdims=True), mask.shape),
            jnp.sum(mask.any(1), dtype=jnp.float32),
        )
    else:
        most = mask.shape[1] + 1  # 0 is padding, and every segment has at least one token
        per_segment = jax.vmap(lambda m, s: jax.ops.segment_sum(m, s, num_segments=most))(
            ones, segments
        )
        lengths, sequences = (
            jnp.take_along_axis(per_segment, segments, 1),
            jnp.sum(per_segment > 0, dtype=jnp.float32),
        )
    if normalise == "fixed":
        return ones, sequences * fixed_length
    return ones / jnp.maximum(lengths, 1), sequences


def estimate_kl(
    logps: Array, ref_logps: Array, kind: str = "k3", limit: float | None = 10.0
) -> Array:
    """Estimate of KL(policy || reference) at each sampled token."""
    d = logps - ref_logps
    match kind:
        case "k1":
            return d
        case "k2":
            return 0.5 * jnp.square(d)
        case "k3":
            d = jnp.clip(d, -20, 20)
            k3 = jnp.expm1(-d) + d
            return k3 if limit is None else jnp.minimum(k3, limit)
    raise ValueError(f"kl_estimator={kind!r}: choose one of {', '.join(KL_ESTIMATORS)}")


def policy_loss(
    logps: Array,
    old_logps: Array | None,
    ref_logps: Array | None,
    advantages: Array,
    mask: Array,
    *,
    ratio: str = "none",
    clip_low: float = 0.2,
    clip_high: float = 0.3,
    clip_dual: float | None = 3.0,
    normalise: str = "token",
    fixed_length: int = 0,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    kl_limit: float | None = 10.0,
    tis: Array | None = None,
    entropy: Array | None = None,
    entropy_coef: float = 0.0,
) -> Loss:
    """Policy gradient of responses [B, R] with advantages [B]; `tis` are importance weights [B, R] of stale rollouts.

    `old_logps` None means that the policy is the one that sampled: every ratio is 1.
    """
    check_loss(
        ratio=ratio,
        clip_low=clip_low,
        clip_high=clip_high,
        clip_dual=clip_dual,
        kl_coef=kl_coef,
        kl_estimator=kl_estimator,
    )
    logps = jnp.where(mask, logps, 0)
    log_ratio = logps - (
        lax.stop_gradient(logps) if old_logps is None else jnp.where(mask, old_logps, 0)
    )
    if ratio == "sequence":
        mean = log_ratio.sum(1, keepdims=True) / jnp.maximum(mask.sum(1, keepdims=True), 1)
        log_ratio = jnp.where(mask, mean, 0)
    a = jnp.broadcast_to(advantages[:, None], mask.shape)
    r = jnp.exp(jnp.clip(log_ratio, -20, 20))
    value = _surrogate(logps, r, a, ratio, 1 - clip_low, 1 + clip_high, clip_dual)
    if tis is not None:
        value = value * lax.stop_gradient(tis)
    weight, count = token_weights(mask, normalise, fixed_length)
    total, metrics = (
        jnp.sum(weight * value),
        _ratio_metrics(r, a, mask, ratio, 1 - clip_low, 1 + clip_high, clip_dual),
    )
    pull, pull_metrics = _kl_term(logps, ref_logps, mask, weight, kl_coef, kl_estimator, kl_limit)
    if entropy is not None:
        metrics["entropy"] = _masked_mean(entropy, mask)
        total = total - entropy_coef * jnp.sum(weight * jnp.where(mask, entropy, 0))
    elif entropy_coef:
        raise ValueError(f"entropy_coef={entropy_coef} needs the entropy of each token")
    return Loss(total + pull, count, metrics | pull_metrics)


def _surrogate(
    logps: Array, r: Array, a: Array, ratio: str, low: float, high: float, dual: float | None
) -> Array:
    if ratio in ("none", "cispo"):
        held = 1.0 if ratio == "none" else lax.stop_gradient(jnp.clip(r, low, high))
        return -a * held * jnp.exp(logps - lax.stop_gradient(logps))
    value = jnp.maximum(-a * r, -a * jnp.clip(r, low, high))
    return value if dual is None else jnp.where(a < 0, jnp.minimum(value, -a * dual), value)


def _ratio_metrics(
    r: Array, a: Array, mask: Array, ratio: str, low: float, high: float, dual: float | None
) -> dict[str, Mean]:
    r = lax.stop_gradient(r)
    metrics = {
        "ratio_min": Mean(jnp.min(r, where=mask, initial=1.0), jnp.ones(())),
        "ratio_max": Mean(jnp.max(r, where=mask, initial=1.0), jnp.ones(())),
    }
    if ratio == "none":
        return metrics
    both = ratio == "cispo"  # its ratio is held on both sides whatever the advantage's sign
    metrics["clip_low"] = _masked_mean((r < low) & (both | (a < 0)), mask)
    metrics["clip_high"] = _masked_mean((r > high) & (both | (a > 0)), mask)
    if dual is not None and not both:
        metrics["clip_dual"] = _masked_mean((r > dual) & (a < 0), mask)
    return metrics


def _kl_term(
    logps: Array,
    ref_logps: Array | None,
    mask: Array,
    weight: Array,
    coef: float,
    kind: str,
    limit: float | None,
) -> tuple[Array | float, dict[str, Mean]]:
    if ref_logps is None:
        if coef:
            raise ValueError(f"kl_coef={coef} needs the reference's log-probabilities")
        return 0.0, {}
    kl = estimate_kl(logps, lax.stop_gradient(jnp.where(mask, ref_logps, 0)), kind, limit)
    return coef * jnp.sum(weight * jnp.where(mask, kl, 0)) if coef else 0.0, {
        "kl": _masked_mean(kl, mask)
    }


def _masked_mean(x: Array, mask: Array) -> Mean:
    return Mean(
        jnp.sum(jnp.where(mask, lax.stop_gradient(x), 0), dtype=jnp.float32),
        jnp.sum(mask, dtype=jnp.float32),
    )


def sft_loss(
    logps: Array,
    mask: Array,
    *,
    normalise: str = "token",
    fixed_length: int = 0,
    segments: Array | None = None,
    weights: Array | None = None,
    ref_logps: Array | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k2",
    kl_limit: float | None = 10.0,
) -> Loss:
    """Cross-entropy of the answers [B, A]; EAFT's `weights` [B, A] (`logps.top_entropy`) scale each token and leave the count alone."""
    check_loss(kl_coef=kl_coef, kl_estimator=kl_estimator)
    logps = jnp.where(mask, logps, 0)
    weight, count = token_weights(mask, normalise, fixed_length, segments)
    metrics = {"nll": _masked_mean(-logps, mask)}
    value = -logps
    if weights is not None:
        value = value * lax.stop_gradient(jnp.where(mask, weights, 0))
        metrics["eaft_weight"] = _masked_mean(weights, mask)
    pull, pull_metrics = _kl_term(logps, ref_logps, mask, weight, kl_coef, kl_estimator, kl_limit)
    return Loss(jnp.sum(weight * value) + pull, count, metrics | pull_metrics)


def distill_loss(
    kl: Array, mask: Array, *, skip_tokens: int = 0, normalise: str = "token", fixed_length: int = 0
) -> Loss:
    """Mean of a divergence from a teacher [B, R] (`logps.distill_kl`), the first `skip_tokens` of each response left out."""
    check_loss(skip_tokens=skip_tokens)
    mask = mask & (jnp.cumsum(mask, 1) > skip_tokens)
    weight, count = token_weights(mask, normalise, fixed_length)
    return Loss(
        jnp.sum(weight * jnp.where(mask, kl, 0)), count, {"kl_teacher": _masked_mean(kl, mask)}
    )


def subtract_kl(
    rewards: Array, logps: Array, ref_logps: Array, mask: Array, coef: float, kind: str = "k1"
) -> Array:
    """Rewards [B] less `coef` times each response's summed divergence from the reference."""
    check_loss(kl_coef=coef, kl_estimator=kind, kl_place="reward")
    kl = jnp.where(
        mask, estimate_kl(jnp.where(mask, logps, 0), jnp.where(mask, ref_logps, 0), kind), 0
    )
    return rewards - coef * kl.sum(1)


def tis_weights(logps: Array, sampled_logps: Array, mask: Array, cap: float) -> Array:
    """Truncated importance weights min(policy / sampler, cap) [B, R] for tokens that another policy or number format sampled."""
    check_loss(tis_cap=cap)
    return jnp.where(mask, jnp.minimum(jnp.exp(jnp.clip(logps - sampled_logps, -20, 20)), cap), 0)


def mismatch_metrics(logps: Array, sampled_logps: Array, mask: Array) -> dict[str, Mean]:
    """How far the trainer's log-probabilities of sampled tokens lie from the sampler's own: 0 up to rounding where both are one policy."""
    gap = jnp.where(mask, jnp.abs(logps - sampled_logps), 0)
    return {
        "mismatch": _masked_mean(gap, mask),
        "mismatch_max": Mean(lax.stop_gradient(gap.max()), jnp.ones(())),
    }


def combine_metrics(a: dict[str, Mean], b: dict[str, Mean]) -> dict[str, Mean]:
    """Metrics of two micro-batches as of one: names ending in _min or _max keep the extreme, all others add up."""
    pick = {"_min": jnp.minimum, "_max": jnp.maximum}
    join = lambda k: (
        Mean(pick[k[-4:]](a[k].sum, b[k].sum), a[k].count) if k[-4:] in pick else a[k] + b[k]
    )
    return {k: join(k) for k in a}
