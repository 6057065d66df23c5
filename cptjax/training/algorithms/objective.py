"""The objective of a stage: hidden states of the response tokens -> a summed loss with its count.

`batch.extra` has what each objective needs in addition to the tokens, per row [B] or token [B A]:

    policy    advantages [B], sampler_logps, and where the settings use them, old_logps, ref_logps
              and behaviour_logps; old_logps are NaN where the policy is the one that sampled
    sft       ref_logps with a KL term; segments [B A] where rows are packed
    distill   teacher_hidden [B A D] and teacher_unembed [D V]

Continual-learning methods may add a loss of the response tokens, with arrays of their own.
"""

import dataclasses

import jax.numpy as jnp
from jax import lax

from cptjax.models import logprobs
from cptjax.models.packed_groups import by_target, flat_targets
from cptjax.training.algorithms import losses
from cptjax.training.algorithms.continual_learning.hooks import ContinualMethod, Methods
from cptjax.training.algorithms.losses import Loss, LossConfig
from cptjax.types import Array, Batch, Mean


@dataclasses.dataclass(frozen=True)
class Objective:
    """A loss with its settings.

    It is hashable, so stages with equal settings share their compiled programs.
    """

    config: LossConfig
    methods: Methods = ()  # continual-learning methods with a loss of the response tokens

    def __call__(self, hidden: Array, unembed: Array, batch: Batch) -> Loss:
        config, flat = self.config, hidden.reshape(-1, hidden.shape[-1])
        if config.objective == "policy":
            loss = self._policy(flat, unembed, batch)
        elif config.objective == "distill":
            kl = losses.teacher_kl(
                flat, unembed, batch, config.direction, config.top_k, config.chunk
            )
            loss = losses.distill_loss(kl, batch.mask, config)
        else:
            loss = self._sft(flat, unembed, batch)
        for method in self.methods:
            values = jnp.where(batch.mask, method.token_loss(flat, unembed, batch, config.chunk), 0)
            weight, _ = losses.token_weights(batch.mask, config, batch.extra.get("segments"))
            loss = Loss(
                loss.sum + jnp.sum(weight * values),
                loss.count,
                loss.metrics | {method.name: Mean(values.sum(), batch.mask.sum())},
            )
        return loss

    def _sft(self, flat: Array, unembed: Array, batch: Batch) -> Loss:
        config = self.config
        logps, _ = logprobs.token_logps(flat, unembed, flat_targets(batch), chunk=config.chunk)
        logps, weights = by_target(batch, logps), None
        if config.objective == "eaft":
            weights = by_target(batch, logprobs.top_entropy(flat, unembed, chunk=config.chunk))
        elif config.objective == "dft":  # the probability of the token (2508.05629)
            weights = jnp.exp(logps)
        return losses.sft_loss(
            logps,
            batch.mask,
            config,
            segments=batch.extra.get("segments"),
            weights=weights,
            ref_logps=batch.extra.get("ref_logps"),
        )

    def _policy(self, flat: Array, unembed: Array, batch: Batch) -> Loss:
        config, extra, mask = self.config, batch.extra, batch.mask
        logps, entropy = logprobs.token_logps(
            flat,
            unembed,
            flat_targets(batch),
            chunk=config.chunk,
            entropy=True,
            entropy_grad=config.entropy_coef > 0,
            temperature=config.temperature,
        )
        logps, entropy = by_target(batch, logps), by_target(batch, entropy)
        old, tis = extra.get("old_logps"), None
        if old is not None:
            old = jnp.where(jnp.isnan(old), lax.stop_gradient(logps), old)
        before_updates = logps if old is None else old
        if config.tis_cap is not None:
            # With a ratio, the weights only need to correct up to the policy before the updates.
            trained = logps if config.ratio == "none" else before_updates
            tis = losses.tis_weights(trained, extra["behaviour_logps"], mask, config.tis_cap)
        loss = losses.policy_loss(
            logps,
            old,
            extra.get("ref_logps"),
            extra["advantages"],
            mask,
            config,
            tis=tis,
            entropy=entropy,
        )
        mismatch = losses.mismatch_metrics(before_updates, extra["sampler_logps"], mask)
        return Loss(loss.sum, loss.count, loss.metrics | mismatch)


@dataclasses.dataclass(frozen=True)
class MemoryObjective:
    """The loss of a method with a memory on a batch of the memory."""

    method: ContinualMethod
    chunk: int  # number of tokens whose logits are in memory at a time

    def __call__(self, hidden: Array, unembed: Array, batch: Batch) -> Loss:
        flat = hidden.reshape(-1, hidden.shape[-1])
        values = self.method.memory_loss(flat, unembed, batch, self.chunk)
        return Loss(jnp.sum(jnp.where(batch.mask, values, 0)), batch.mask.sum(), {})
