"""Measure KL(base || current model) per token and response, on the base model's responses."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from cptjax import sharding
from cptjax.common import distributed, run_log
from cptjax.common.compiler_options import PlatformJit
from cptjax.data.device_batches import (
    batch_slices,
    cut_to_shards,
    group_batch,
    response_buckets,
)
from cptjax.data.model_context import ModelContext
from cptjax.generation import generate
from cptjax.generation.sampling_config import SamplingConfig
from cptjax.models import decoder, logprobs, trainable
from cptjax.models.config import ModelConfig
from cptjax.models.logprobs import distill_kl
from cptjax.models.packed_groups import by_target
from cptjax.tasks.prompted_task import PromptedTask
from cptjax.tasks.scoring import summaries
from cptjax.types import Batch, Example, Params

# A batch with the base model's responses, and the length of each response; a length of 0 marks a
# row that only fills the batch.
BaseResponses = list[tuple[Batch, np.ndarray]]


@functools.lru_cache(maxsize=8)
def _kl_program(cfg: ModelConfig, dtype: DTypeLike, chunk: int) -> Callable:
    def kl_by_token(base: Params, params: Params, batch: Batch) -> jax.Array:
        base, params = trainable.cast_params(base, dtype), trainable.cast_params(params, dtype)

        def flat_states(p: Params) -> jax.Array:
            hidden = logprobs.predicting_states(p, batch, cfg, dtype)
            return hidden.reshape(-1, hidden.shape[-1])

        kl = distill_kl(
            flat_states(params),
            flat_states(base),
            decoder.unembedding(params["text"]),
            decoder.unembedding(base["text"]),
            chunk=chunk,
        )
        return jnp.where(batch.mask, by_target(batch, kl), 0)

    return PlatformJit(kl_by_token)


def sample_base_responses(
    model_ctx: ModelContext,
    base: Params,
    prompted: PromptedTask,
    examples: Sequence[Example],
    sampling: SamplingConfig,
    *,
    count: int,
    batch: int,
    seed: int,
) -> BaseResponses:
    """Sample the base model's responses to a task's first `count` prompts.

    The responses are the same at every stage, so the caller keeps them for the whole run.
    """
    count, shards = min(count, len(examples)), model_ctx.shards
    share = -(-count // (jax.process_count() * shards)) * shards  # rows of each process
    positions = np.arange(jax.process_index() * share, (jax.process_index() + 1) * share)
    rows, is_counted = np.minimum(positions, count - 1).tolist(), positions < count
    encoded = [
        model_ctx.processor.encode(prompted.build_prompt(examples[i]), generation=True)
        for i in rows
    ]
    key = jax.random.fold_in(jax.random.key(seed), 20_000)
    responses = []
    for part in batch_slices(len(rows), cut_to_shards(batch, shards)):
        prompts = model_ctx.place_prompts(encoded[part])  # shared by the sampler and the KL
        samples = generate.sample_from_prompts(
            model_ctx, base, prompts, key, np.asarray(rows[part]), sampling
        )
        (length,) = response_buckets([samples.mask], sampling.max_new_tokens)
        tokens, mask = samples.tokens[:, :length], samples.mask[:, :length]
        device_batch = group_batch(model_ctx, prompts, tokens, mask, extra={})
        responses.append((device_batch, samples.mask.sum(1) * is_counted[part]))
    return responses


def measure_base_kl(
    model_ctx: ModelContext, base: Params, params: Params, responses: BaseResponses, chunk: int
) -> dict[str, summaries.Metric]:
    """Compute the KL from the base model to `params`, over all processes.

    Return its mean per token and per response, by the names of evals.csv.
    """
    program = _kl_program(model_ctx.cfg, model_ctx.dtype, chunk)
    sums: list[tuple[float, int]] = []
    for batch, lengths in responses:
        with jax.set_mesh(model_ctx.mesh):
            kl = sharding.local_rows(program(base, params, batch))
        sums += [(s, n) for s, n in zip(kl.sum(1).tolist(), lengths.tolist(), strict=True) if n]
    gathered = distributed.concat_lists(distributed.gather_objects(sums))
    totals, lengths = zip(*gathered, strict=True)
    return {
        run_log.KL_BASE: summaries.ratio_metric(totals, lengths),
        run_log.KL_BASE_SEQUENCE: summaries.mean_metric(totals),
    }


def base_kl_rows(
    prompted: PromptedTask,
    metrics: Mapping[str, summaries.Metric],
    max_new_tokens: int,
    columns: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Return the rows of evals.csv for one task."""
    shared = {
        "task": prompted.name,
        "scorer": "kl@1",
        "template": prompted.template.name,
        **columns,
        "decoding": f"the base's own, T=1, {max_new_tokens} tokens",
    }
    return [{**shared, "metric": name, **metric._asdict()} for name, metric in metrics.items()]
