"""Losses (GRPO and relatives, cross-entropy, distillation) and KL estimators, as sums with counts.

The caller divides the global sum by the global count, once:

    loss = (sum over all micro-batches and devices of `sum`) / (the same of `count`)

so micro-batches, padding and the number of devices cannot change the loss. The weight of one
response token, and what is counted:

    normalise   weight of a token            count                                used by
    token       1                            tokens                               DAPO, EasyR1, SFT
    sequence    1 / tokens of its sequence   sequences with a token to train on   GRPO, GSPO
    fixed       1                            those sequences x fixed_length       Dr.GRPO

Importance ratios, with d = logp - old_logp and A the advantage (while d = 0, the gradient of all
four is A grad logp):

    none       -A logp                              its value is -A, comparable with the others
    token      -min(r A, clip(r, 1-low, 1+high) A)  r = exp(d); for A < 0 at most -dual A (PPO)
    sequence   the same                             r = exp(mean of d over the sequence) (GSPO)
    cispo      -clip(r, 1-low, 1+high) A logp       the clipped r carries no gradient

Divergence from a reference, with d = logp - ref_logp on sampled tokens:

    k1 = d        k2 = d^2 / 2        k3 = exp(-d) - 1 + d

Example: two responses of three and two tokens, A = [1, -1], low 0.2, high 0.3, dual 3; the same d
in the ratios and in the divergence, and the loss of each token:

    d          [[ 0.5,      0.1,      0     ], [-0.5,      0.3    ]]
    none       [[-1,       -1,       -1     ], [ 1,        1      ]]     surrogates of the ratios
    token      [[-1.3,     -1.10517, -1     ], [ 0.8,      1.34986]]     not clipped: A < 0
    sequence   [[-1.22140, -1.22140, -1.2214], [ 0.90484,  0.90484]]     means 0.2 and -0.1
    cispo      [[-1.3,     -1.10517, -1     ], [ 0.8,      1.3    ]]     clipped on both sides
    k1         [[ 0.5,      0.1,      0     ], [-0.5,      0.3    ]]
    k2         [[ 0.125,    0.005,    0     ], [ 0.125,    0.045  ]]
    k3         [[ 0.10653,  0.00484,  0     ], [ 0.14872,  0.04082]]
    weights    token [[1, 1, 1], [1, 1]] of 5, sequence [[1/3, 1/3, 1/3], [1/2, 1/2]] of 2,
               fixed (length 4) [[1, 1, 1], [1, 1]] of 8

Departures from the papers: 1. k1 is refused as a loss, since its gradient has mean zero. 2. d is
clipped to +-20 before exp. 3. k3 is cut at `kl_limit` (10, as in EasyR1; None = no cut), so a token
13 times less likely than under the reference gets no gradient.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from cptjax.models.logprobs import check_logprobs, distill_kl
from cptjax.models.packed_groups import by_target
from cptjax.types import Array, Batch, Mean

OBJECTIVES = ("policy", "sft", "eaft", "dft", "distill")
TOKEN_OBJECTIVES = ("sft", "eaft", "dft")  # cross-entropy of given responses
RATIOS = ("none", "token", "sequence", "cispo")
NORMALISERS = ("token", "sequence", "fixed")
KL_ESTIMATORS = ("k1", "k2", "k3")
KL_PLACES = ("loss", "reward")


class Loss(NamedTuple):
    """A summed loss, the count to divide it by, and metrics to log."""

    sum: Array
    count: Array
    metrics: dict[str, Mean]


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The settings of a stage's loss. `configs/base.py` has their defaults and ranges."""

    objective: str  # policy | sft | eaft | dft | distill
    ratio: str  # none | token | sequence | cispo
    clip_low: float
    clip_high: float
    clip_dual: float | None
    normalise: str  # token | sequence | fixed
    fixed_length: int  # tokens that a sequence counts for with normalise="fixed"
    kl_coef: float
    kl_estimator: str  # k1 | k2 | k3
    kl_place: str  # loss | reward
    kl_limit: float | None
    tis_cap: float | None
    entropy_coef: float
    temperature: float  # of the distribution whose log-probabilities are trained
    direction: str  # distillation: forward | reverse
    top_k: int  # distillation: number of tokens compared; 0 = the whole vocabulary
    skip_tokens: int  # distillation: number of first tokens of each response left out
    chunk: int  # number of tokens whose logits are in memory at a time

    @classmethod
    def from_config(cls, config: Any) -> "LossConfig":
        """Read the settings of a stage, most of them from `method` and `method.distill` by name."""
        method = config.method
        is_tempered = method.objective == "policy" and method.tempered
        other = {
            "fixed_length": config.rollout.max_new_tokens,
            "temperature": config.rollout.temperature if is_tempered else 1.0,
            "chunk": config.train.chunk,
        }
        by_name = {**method.distill, **method}
        names = [f.name for f in dataclasses.fields(cls) if f.name not in other]
        return cls(**other, **{name: by_name[name] for name in names})

    @classmethod
    def plain(cls, objective: str, chunk: int) -> "LossConfig":
        """Return plain cross-entropy ("sft") or REINFORCE ("policy"), without any other term."""
        return cls(
            objective=objective,
            ratio="none",
            clip_low=0.0,
            clip_high=0.0,
            clip_dual=None,
            normalise="token",
            fixed_length=0,
            kl_coef=0.0,
            kl_estimator="k3",
            kl_place="loss",
            kl_limit=None,
            tis_cap=None,
            entropy_coef=0.0,
            temperature=1.0,
            direction="forward",
            top_k=0,
            skip_tokens=0,
            chunk=chunk,
        )

    @property
    def loss_kl_coef(self) -> float:
        """The coefficient of the KL term in the loss; 0 if the term is in the reward."""
        return self.kl_coef if self.kl_place == "loss" else 0.0

    def validate(self) -> None:
        """Refuse settings that make no sense, with an error that names the allowed values."""
        choices = {
            "objective": OBJECTIVES,
            "ratio": RATIOS,
            "normalise": NORMALISERS,
            "kl_estimator": KL_ESTIMATORS,
            "kl_place": KL_PLACES,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"method.{name}={getattr(self, name)!r}: choose one of {', '.join(allowed)}"
                )
        if not 0 <= self.clip_low < 1:
            raise ValueError(
                f"method.clip_low={self.clip_low}: expected 0 <= clip_low < 1 "
                "(the ratio is held above 1 - clip_low)"
            )
        if self.clip_high < 0:
            raise ValueError(
                f"method.clip_high={self.clip_high}: expected 0 or more "
                "(the ratio is held below 1 + clip_high)"
            )
        if self.clip_dual is not None and self.clip_dual <= 1:
            raise ValueError(
                f"method.clip_dual={self.clip_dual}: expected a ratio above 1, "
                "or None for no dual clip"
            )
        if self.normalise == "fixed" and self.fixed_length < 1:
            raise ValueError(
                f"method.normalise='fixed' with fixed_length={self.fixed_length}: "
                "expected at least 1 token; set rollout.max_new_tokens"
            )
        if self.kl_coef < 0:
            raise ValueError(
                f"method.kl_coef={self.kl_coef}: expected 0 (no reference model) or more"
            )
        if self.loss_kl_coef > 0 and self.kl_estimator == "k1":
            raise ValueError(
                "method.kl_estimator='k1' has a gradient of mean zero as a loss: "
                "choose k2 or k3, or method.kl_place='reward'"
            )
        if self.kl_limit is not None and self.kl_limit <= 0:
            raise ValueError(
                f"method.kl_limit={self.kl_limit}: expected a number of nats above 0, "
                "or None for no limit"
            )
        if self.tis_cap is not None and self.tis_cap <= 0:
            raise ValueError(
                f"method.tis_cap={self.tis_cap}: expected a weight above 0, "
                "or None for no importance sampling"
            )
        if self.entropy_coef < 0 or self.skip_tokens < 0:
            raise ValueError(
                f"method.entropy_coef={self.entropy_coef}, "
                f"method.distill.skip_tokens={self.skip_tokens}: expected 0 or more"
            )
        check_logprobs(chunk=self.chunk, direction=self.direction, top_k=self.top_k)


def token_weights(
    mask: Array, config: LossConfig, segments: Array | None = None
) -> tuple[Array, Array]:
    """Return the weight [B, A] of each token and the count [].

    `segments` [B, A] numbers the packed conversations of a row.
    """
    ones = mask.astype(jnp.float32)
    if config.normalise == "token":
        return ones, ones.sum()
    if segments is None:
        lengths = jnp.broadcast_to(ones.sum(1, keepdims=True), mask.shape)
        sequences = jnp.sum(mask.any(1), dtype=jnp.float32)
    else:
        # Segment 0 is padding, and every other segment has at least one token.
        most = mask.shape[1] + 1
        segment_sum = lambda m, s: jax.ops.segment_sum(m, s, num_segments=most)
        per_segment = jax.vmap(segment_sum)(ones, segments)
        lengths = jnp.take_along_axis(per_segment, segments, 1)
        sequences = jnp.sum(per_segment > 0, dtype=jnp.float32)
    if config.normalise == "fixed":
        return ones, sequences * config.fixed_length
    return ones / jnp.maximum(lengths, 1), sequences


def estimate_kl(logps: Array, ref_logps: Array, estimator: str, limit: float | None) -> Array:
    """Estimate KL(policy || reference) at each sampled token; k3 is cut at `limit`."""
    d = logps - ref_logps
    match estimator:
        case "k1":
            return d
        case "k2":
            return 0.5 * jnp.square(d)
        case "k3":
            d = jnp.clip(d, -20, 20)
            k3 = jnp.expm1(-d) + d
            return k3 if limit is None else jnp.minimum(k3, limit)
    raise ValueError(f"kl_estimator={estimator!r}: choose one of {', '.join(KL_ESTIMATORS)}")


def policy_loss(
    logps: Array,
    old_logps: Array | None,
    ref_logps: Array | None,
    advantages: Array,
    mask: Array,
    config: LossConfig,
    *,
    tis: Array | None = None,
    entropy: Array | None = None,
) -> Loss:
    """Compute the policy gradient loss of responses [B, R] with advantages [B].

    `tis` are importance weights [B, R] of stale rollouts. With `old_logps` None, the policy is the
    one that sampled, and every ratio is 1.
    """
    logps = jnp.where(mask, logps, 0)
    old = lax.stop_gradient(logps) if old_logps is None else jnp.where(mask, old_logps, 0)
    log_ratio = logps - old
    if config.ratio == "sequence":
        mean = log_ratio.sum(1, keepdims=True) / jnp.maximum(mask.sum(1, keepdims=True), 1)
        log_ratio = jnp.where(mask, mean, 0)
    a = jnp.broadcast_to(advantages[:, None], mask.shape)
    r = jnp.exp(jnp.clip(log_ratio, -20, 20))
    value = _surrogate(logps, r, a, config)
    if tis is not None:
        value = value * lax.stop_gradient(tis)
    weight, count = token_weights(mask, config)
    total = jnp.sum(weight * value)
    metrics = _ratio_metrics(r, a, mask, config)
    kl_loss, kl_metrics = _kl_term(logps, ref_logps, mask, weight, config)
    if entropy is not None:
        metrics["entropy"] = _masked_mean(entropy, mask)
        total = total - config.entropy_coef * jnp.sum(weight * jnp.where(mask, entropy, 0))
    elif config.entropy_coef:
        raise ValueError(f"entropy_coef={config.entropy_coef} needs the entropy of each token")
    return Loss(total + kl_loss, count, metrics | kl_metrics)


def _surrogate(logps: Array, r: Array, a: Array, config: LossConfig) -> Array:
    low, high = 1 - config.clip_low, 1 + config.clip_high
    if config.ratio in ("none", "cispo"):
        held = 1.0 if config.ratio == "none" else lax.stop_gradient(jnp.clip(r, low, high))
        return -a * held * jnp.exp(logps - lax.stop_gradient(logps))
    value = jnp.maximum(-a * r, -a * jnp.clip(r, low, high))
    if config.clip_dual is None:
        return value
    return jnp.where(a < 0, jnp.minimum(value, -a * config.clip_dual), value)


def _ratio_metrics(r: Array, a: Array, mask: Array, config: LossConfig) -> dict[str, Mean]:
    r = lax.stop_gradient(r)
    metrics = {
        "ratio_min": Mean(jnp.min(r, where=mask, initial=1.0), jnp.ones(())),
        "ratio_max": Mean(jnp.max(r, where=mask, initial=1.0), jnp.ones(())),
    }
    if config.ratio == "none":
        return metrics
    low, high = 1 - config.clip_low, 1 + config.clip_high
    both = config.ratio == "cispo"  # clipped on both sides for either sign of the advantage
    metrics["clip_low"] = _masked_mean((r < low) & (both | (a < 0)), mask)
    metrics["clip_high"] = _masked_mean((r > high) & (both | (a > 0)), mask)
    if config.clip_dual is not None and not both:
        metrics["clip_dual"] = _masked_mean((r > config.clip_dual) & (a < 0), mask)
    return metrics


def _kl_term(
    logps: Array, ref_logps: Array | None, mask: Array, weight: Array, config: LossConfig
) -> tuple[Array | float, dict[str, Mean]]:
    coef = config.loss_kl_coef
    if ref_logps is None:
        if coef:
            raise ValueError(f"kl_coef={coef} needs the reference's log-probabilities")
        return 0.0, {}
    ref_logps = lax.stop_gradient(jnp.where(mask, ref_logps, 0))
    kl = estimate_kl(logps, ref_logps, config.kl_estimator, config.kl_limit)
    loss = coef * jnp.sum(weight * jnp.where(mask, kl, 0)) if coef else 0.0
    return loss, {"kl": _masked_mean(kl, mask)}


def _masked_mean(x: Array, mask: Array) -> Mean:
    return Mean(
        jnp.sum(jnp.where(mask, lax.stop_gradient(x), 0), dtype=jnp.float32),
        jnp.sum(mask, dtype=jnp.float32),
    )


def sft_loss(
    logps: Array,
    mask: Array,
    config: LossConfig,
    *,
    segments: Array | None = None,
    weights: Array | None = None,
    ref_logps: Array | None = None,
) -> Loss:
    """Compute the cross-entropy of responses [B, A].

    The `weights` [B, A] of EAFT and DFT leave the count unchanged.
    """
    logps = jnp.where(mask, logps, 0)
    weight, count = token_weights(mask, config, segments)
    metrics = {"nll": _masked_mean(-logps, mask)}
    value = -logps
    if weights is not None:
        value = value * lax.stop_gradient(jnp.where(mask, weights, 0))
        metrics[f"{config.objective}_weight"] = _masked_mean(weights, mask)
    kl_loss, kl_metrics = _kl_term(logps, ref_logps, mask, weight, config)
    return Loss(jnp.sum(weight * value) + kl_loss, count, metrics | kl_metrics)


def teacher_kl(
    hidden: Array, unembed: Array, batch: Batch, direction: str, top_k: int, chunk: int
) -> Array:
    """Compute the divergence between teacher and policy at each response token, [B A].

    hidden: [n D] of `flat_targets`; the teacher's states are in `batch.extra`
    direction, top_k, chunk: as in `logprobs.distill_kl`

    Models of one family may pad their vocabulary to different sizes; the tokens that only one of
    them has are left out of both distributions.
    """
    teacher, unembed_teacher = batch.extra["teacher_hidden"], batch.extra["teacher_unembed"]
    common = min(unembed.shape[-1], unembed_teacher.shape[-1])
    kl = distill_kl(
        hidden,
        teacher.reshape(-1, teacher.shape[-1]),
        unembed[:, :common],
        unembed_teacher[:, :common],
        direction=direction,
        top_k=top_k,
        chunk=chunk,
    )
    return by_target(batch, kl)


def distill_loss(kl: Array, mask: Array, config: LossConfig) -> Loss:
    """Average a divergence from a teacher [B, R] over the tokens of each response.

    The first `skip_tokens` tokens of each response are left out.
    """
    mask = mask & (jnp.cumsum(mask, 1) > config.skip_tokens)
    weight, count = token_weights(mask, config)
    total = jnp.sum(weight * jnp.where(mask, kl, 0))
    return Loss(total, count, {"kl_teacher": _masked_mean(kl, mask)})


def subtract_kl(
    rewards: Array, logps: Array, ref_logps: Array, mask: Array, config: LossConfig
) -> Array:
    """Return the rewards [B] minus `kl_coef` times each response's summed divergence."""
    logps, ref_logps = jnp.where(mask, logps, 0), jnp.where(mask, ref_logps, 0)
    kl = estimate_kl(logps, ref_logps, config.kl_estimator, config.kl_limit)
    return rewards - config.kl_coef * jnp.where(mask, kl, 0).sum(1)


def tis_weights(logps: Array, sampled_logps: Array, mask: Array, cap: float) -> Array:
    """Compute importance weights min(policy / sampler, cap) [B, R].

    They correct for tokens sampled by another policy or in another number format.
    """
    return jnp.where(mask, jnp.minimum(jnp.exp(jnp.clip(logps - sampled_logps, -20, 20)), cap), 0)


def mismatch_metrics(logps: Array, sampled_logps: Array, mask: Array) -> dict[str, Mean]:
    """Measure how far the trainer's log-probabilities are from the sampler's."""
    gap = jnp.where(mask, jnp.abs(logps - sampled_logps), 0)
    return {
        "mismatch": _masked_mean(gap, mask),
        "mismatch_max": Mean(lax.stop_gradient(gap.max()), jnp.ones(())),
    }


def combine_metrics(a: dict[str, Mean], b: dict[str, Mean]) -> dict[str, Mean]:
    """Combine the metrics of two micro-batches: extremes for _min and _max, sums otherwise."""
    extremes = {"_min": jnp.minimum, "_max": jnp.maximum}
    out = {}
    for name in a:
        pick = extremes.get(name[-4:])
        out[name] = (
            Mean(pick(a[name].sum, b[name].sum), a[name].count) if pick else a[name] + b[name]
        )
    return out
