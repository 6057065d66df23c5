"""What a stage minimises: hidden states of the answer tokens in, a summed loss with its count out. Frozen, so programs are shared.

`batch.extra` carries what each objective needs beside the tokens, per row [B] or per token [B A]:

    policy    advantages [B], sampler_logps, and old_logps / ref_logps / behaviour_logps where the settings ask for them
    sft       ref_logps with a KL term; segments [B A] where rows are packed
    distill   teacher_hidden [B A D] and teacher_unembed [D V]; any objective with lwf > 0 (the previous stage is the teacher) too
"""

import dataclasses

import jax.numpy as jnp

from cptjax.models import logprobs
from cptjax.training.algorithms import losses
from cptjax.training.algorithms.losses import Loss
from cptjax.types import Array, Batch, Mean


@dataclasses.dataclass(frozen=True)
class Objective:
    """A loss with its settings; see `losses` for their meaning."""

    kind: str = "sft"
    chunk: int = 1024
    ratio: str = "none"
    clip_low: float = 0.2
    clip_high: float = 0.3
    clip_dual: float | None = 3.0
    normalise: str = "token"
    fixed_length: int = 0
    kl_coef: float = 0.0
    kl_estimator: str = "k3"
    kl_limit: float | None = 10.0
    tis_cap: float | None = None
    entropy_coef: float = 0.0
    temperature: float = 1.0  # of the sampled distribution, which is the one that is trained
    direction: str = "forward"
    top_k: int = 0
    skip_tokens: int = 0
    lwf: float = 0.0  # coefficient of KL(previous stage || now) on the answer tokens

    def __call__(self, hidden: Array, unembed: Array, batch: Batch) -> Loss:
        flat = hidden.reshape(-1, hidden.shape[-1])
        loss = {"policy": self._policy, "distill": self._distill}.get(self.kind, self._sft)(
            flat, unembed, batch
        )
        if not self.lwf:
            return loss
        weight, _ = losses.token_weights(
            batch.mask, self.normalise, self.fixed_length, batch.extra.get("segments")
        )
        kl = jnp.where(batch.mask, self._kl(flat, unembed, batch, "forward", 0), 0)
        return Loss(
            loss.sum + self.lwf * jnp.sum(weight * kl),
            loss.count,
            loss.metrics | {"lwf": Mean(kl.sum(), batch.mask.sum())},
        )

    def _sft(self, flat: Array, unembed: Array, batch: Batch) -> Loss:
        shape = batch.targets.shape
        found, _ = logprobs.token_logps(flat, unembed, batch.targets.reshape(-1), chunk=self.chunk)
        weights = (
            logprobs.top_entropy(flat, unembed, chunk=self.chunk).reshape(shape)
            if self.kind == "eaft"
            else None
        )
        return losses.sft_loss(
            found.reshape(shape),
            batch.mask,
            normalise=self.normalise,
            fixed_length=self.fixed_length,
            segments=batch.extra.get("segments"),
            weights=weights,
            ref_logps=batch.extra.get("ref_logps"),
            kl_coef=self.kl_coef,
            kl_estimator=self.kl_estimator,
            kl_limit=self.kl_limit,
        )

    def _policy(self, flat: Array, unembed: Array, batch: Batch) -> Loss:
        extra, mask = batch.extra, batch.mask
        wanted = dict(
            entropy=True, entropy_grad=self.entropy_coef > 0, temperature=self.temperature
        )
        numbers = logprobs.token_logps(
            flat, unembed, batch.targets.reshape(-1), chunk=self.chunk, **wanted
        )
        found, entropy = (x.reshape(mask.shape) for x in numbers)
        tis = None
        if self.tis_cap is not None:
            now = (
                found if self.ratio == "none" else extra.get("old_logps", found)
            )  # a ratio leads from old to now by itself
            tis = losses.tis_weights(now, extra["behaviour_logps"], mask, self.tis_cap)
        loss = losses.policy_loss(
            found,
            extra.get("old_logps"),
            extra.get("ref_logps"),
            extra["advantages"],
            mask,
            ratio=self.ratio,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            clip_dual=self.clip_dual,
            normalise=self.normalise,
            fixed_length=self.fixed_length,
            kl_coef=self.kl_coef,
            kl_estimator=self.kl_estimator,
            kl_limit=self.kl_limit,
            tis=tis,
            entropy=entropy,
            entropy_coef=self.entropy_coef,
        )
        run = extra.get("old_logps", found)
        return Loss(
            loss.sum,
            loss.count,
            loss.metrics | losses.mismatch_metrics(run, extra["sampler_logps"], mask),
        )

    def _distill(self, flat: Array, unembed: Array, batch: Batch) -> Loss:
        kl = self._kl(flat, unembed, batch, self.direction, self.top_k)
        settings = dict(
            skip_tokens=self.skip_tokens, normalise=self.normalise, fixed_length=self.fixed_length
        )
        return losses.distill_loss(kl, batch.mask, **settings)

    def _kl(self, flat: Array, unembed: Array, batch: Batch, direction: str, top_k: int) -> Array:
        teacher = batch.extra["teacher_hidden"]
        kl = logprobs.distill_kl(
            flat,
            teacher.reshape(-1, teacher.shape[-1]),
            unembed,
            batch.extra["teacher_unembed"],
            direction=direction,
            top_k=top_k,
            chunk=self.chunk,
        )
        return kl.reshape(batch.targets.shape)
