"""The objective of a stage: hidden states of the response tokens -> a summed loss with its count.

`batch.extra` has what each objective needs in addition to the tokens, per row [B] or token [B A]:

    policy    advantages [B], sampler_logps, and where the settings use them, old_logps, ref_logps
              and behaviour_logps
    sft       ref_logps with a KL term; segments [B A] where rows are packed
    distill   teacher_hidden [B A D] and teacher_unembed [D V]; also any objective with
              lwf_coef > 0, whose teacher is the previous stage
"""

import dataclasses

import jax.numpy as jnp

from cptjax.models import logprobs
from cptjax.training.algorithms import losses
from cptjax.training.algorithms.losses import Loss, LossConfig
from cptjax.types import Array, Batch, Mean


@dataclasses.dataclass(frozen=True)
class Objective:
    """A loss with its settings.

    It is hashable, so stages with equal settings share their compiled programs.
    """

    config: LossConfig

    def __call__(self, hidden: Array, unembed: Array, batch: Batch) -> Loss:
        config, flat = self.config, hidden.reshape(-1, hidden.shape[-1])
        if config.objective == "policy":
            loss = self._policy(flat, unembed, batch)
        elif config.objective == "distill":
            kl = self._teacher_kl(flat, unembed, batch, config.direction, config.top_k)
            loss = losses.distill_loss(kl, batch.mask, config)
        else:
            loss = self._sft(flat, unembed, batch)
        if not config.lwf_coef:
            return loss
        weight, _ = losses.token_weights(batch.mask, config, batch.extra.get("segments"))
        kl = jnp.where(batch.mask, self._teacher_kl(flat, unembed, batch, "forward", 0), 0)
        return Loss(
            loss.sum + config.lwf_coef * jnp.sum(weight * kl),
            loss.count,
            loss.metrics | {"lwf": Mean(kl.sum(), batch.mask.sum())},
        )

    def _sft(self, flat: Array, unembed: Array, batch: Batch) -> Loss:
        config, shape = self.config, batch.targets.shape
        logps, _ = logprobs.token_logps(
            flat, unembed, batch.targets.reshape(-1), chunk=config.chunk
        )
        weights = None
        if config.objective == "eaft":
            weights = logprobs.top_entropy(flat, unembed, chunk=config.chunk).reshape(shape)
        return losses.sft_loss(
            logps.reshape(shape),
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
            batch.targets.reshape(-1),
            chunk=config.chunk,
            entropy=True,
            entropy_grad=config.entropy_coef > 0,
            temperature=config.temperature,
        )
        logps, entropy = logps.reshape(mask.shape), entropy.reshape(mask.shape)
        before_updates = extra.get("old_logps", logps)
        tis = None
        if config.tis_cap is not None:
            # With a ratio, the weights only need to correct up to the policy before the updates.
            trained = logps if config.ratio == "none" else before_updates
            tis = losses.tis_weights(trained, extra["behaviour_logps"], mask, config.tis_cap)
        loss = losses.policy_loss(
            logps,
            extra.get("old_logps"),
            extra.get("ref_logps"),
            extra["advantages"],
            mask,
            config,
            tis=tis,
            entropy=entropy,
        )
        mismatch = losses.mismatch_metrics(before_updates, extra["sampler_logps"], mask)
        return Loss(loss.sum, loss.count, loss.metrics | mismatch)

    def _teacher_kl(
        self, flat: Array, unembed: Array, batch: Batch, direction: str, top_k: int
    ) -> Array:
        teacher = batch.extra["teacher_hidden"]
        kl = logprobs.distill_kl(
            flat,
            teacher.reshape(-1, teacher.shape[-1]),
            unembed,
            batch.extra["teacher_unembed"],
            direction=direction,
            top_k=top_k,
            chunk=self.config.chunk,
        )
        return kl.reshape(batch.targets.shape)
