"""Sample responses to encoded prompts: prepare weights, run the decode loop, decode the tokens."""

import dataclasses
import time
from collections.abc import Sequence

import jax
import numpy as np

from cptjax import sharding
from cptjax.common import device_time
from cptjax.data.collate import EncodedConversation
from cptjax.data.model_context import ModelContext
from cptjax.generation import decode_loop, rollout_weights
from cptjax.generation.sampling_config import SamplingConfig
from cptjax.types import Params, Prompts


@dataclasses.dataclass(frozen=True)
class Samples:
    """This process's responses on the host; row q * G + g is response g to prompt q."""

    texts: list[str]
    tokens: np.ndarray  # [B R]
    mask: np.ndarray  # [B R]
    logps: np.ndarray  # [B R]
    policy_logps: np.ndarray  # [B R]
    finished: np.ndarray  # [B]

    def restore_order(self, order: np.ndarray) -> "Samples":
        """Return the responses by prompt; sampled group i responds to prompt `order[i]`."""
        group = len(self.texts) // len(order)
        rows = (np.argsort(order)[:, None] * group + np.arange(group)).ravel()
        arrays = {f.name: getattr(self, f.name)[rows] for f in dataclasses.fields(self)[1:]}
        return Samples([self.texts[r] for r in rows], **arrays)


def prepare_weights(model_ctx: ModelContext, params: Params, sampling: SamplingConfig) -> Params:
    """Return the weights that `sample_responses` takes: `params`, or a gathered or int8 copy.

    Call this function once for several batches.
    """
    with jax.set_mesh(model_ctx.mesh):
        return rollout_weights.prepare_rollout_weights(
            params, model_ctx.cfg, sampling, model_ctx.dtype
        )


def sample_responses(
    model_ctx: ModelContext,
    weights: Params,
    encoded: Sequence[EncodedConversation],
    key: jax.Array,
    rows: np.ndarray,
    sampling: SamplingConfig,
    limits: np.ndarray | None = None,
) -> Samples:
    """Sample responses to encoded prompts with the weights of `prepare_weights`.

    rows: the number of each prompt in the run, from which its random keys are derived.
    limits: the most tokens of a response, by prompt.
    """
    prompts = model_ctx.place_prompts(encoded)
    return sample_from_prompts(model_ctx, weights, prompts, key, rows, sampling, limits)


def sample_from_prompts(
    model_ctx: ModelContext,
    weights: Params,
    prompts: Prompts,
    key: jax.Array,
    rows: np.ndarray,
    sampling: SamplingConfig,
    limits: np.ndarray | None = None,
) -> Samples:
    """Do what `sample_responses` does, for left-padded prompts that are already on the mesh."""
    began = time.perf_counter()
    with jax.set_mesh(model_ctx.mesh):
        out = decode_loop.generate_rollouts(
            weights,
            prompts,
            key,
            model_ctx.cfg,
            sampling,
            dtype=model_ctx.dtype,
            limits=limits,
            rows=rows,
        )
    device_time.watch("rollout", began, out)
    local = {f.name: sharding.local_rows(getattr(out, f.name)) for f in dataclasses.fields(out)}
    stops = set(model_ctx.cfg.eos)
    ids = [
        [int(t) for t in row[keep] if int(t) not in stops]
        for row, keep in zip(local["tokens"], local["mask"].astype(bool), strict=True)
    ]
    return Samples(model_ctx.processor.decode(ids), **local)
