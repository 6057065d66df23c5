"""How far a model has moved from its base: KL(base || now) per token, on the base's own answers to each task's prompts."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cptjax import sharding
from cptjax.common import distributed, run_log
from cptjax.config import eval_templates
from cptjax.data.device_batches import batch_slices, group_batch, response_bucket
from cptjax.generation import generate
from cptjax.models import decoder, logprobs, trainable
from cptjax.models.logprobs import distill_kl
from cptjax.tasks.scoring import summaries
from cptjax.types import Batch, Params


@functools.lru_cache(maxsize=8)
def _kl_program(cfg: Any, dtype: Any, chunk: int) -> Callable:
    def run(base: Params, now: Params, batch: Batch) -> jax.Array:
        base, now = trainable.cast_params(base, dtype), trainable.cast_params(now, dtype)
        flat = lambda params: (h := logprobs.predicting_states(params, batch, cfg, dtype)).reshape(
            -1, h.shape[-1]
        )
        kl = distill_kl(
            flat(now),
            flat(base),
            decoder.unembedding(now["text"]),
            decoder.unembedding(base["text"]),
            chunk=chunk,
        )
        return jnp.where(batch.mask, kl.reshape(batch.mask.shape), 0)

    return jax.jit(run)


def first_eval_template(current: Any, task: str) -> str:
    return eval_templates(current.config, current.stages, task)[0]


def sample_base_responses(current: Any, task: str) -> list[tuple[Batch, np.ndarray]]:
    """The base model's answers to a task's first prompts, and their lengths, 0 for rows that only fill the shards.

    They are the same at every stage, so drawn once a run.
    """
    c, model_ctx = current.config, current.model_ctx
    template = first_eval_template(current, task)
    prompted, examples = (
        current.prompted(task, c, template),
        current.examples(task, "test", c, template),
    )
    wanted = min(c.eval.drift, len(examples))
    share = -(-wanted // (jax.process_count() * model_ctx.shards)) * model_ctx.shards
    places = np.arange(jax.process_index() * share, (jax.process_index() + 1) * share)
    mine, counted = np.minimum(places, wanted - 1).tolist(), places < wanted
    encoded = [
        model_ctx.processor.encode(prompted.messages(examples[i]), generation=True) for i in mine
    ]
    sampling = generate.SamplingConfig(
        1, 1.0, max_new_tokens=c.eval.max_new_tokens, check_every=c.rollout.check_every
    )
    key = jax.random.fold_in(jax.random.key(c.seed), 20_000)
    out = []
    for p in batch_slices(
        len(mine), max(model_ctx.shards, c.eval.batch // model_ctx.shards * model_ctx.shards)
    ):
        said = generate.sample_responses(
            model_ctx, current.base(), encoded[p], key, np.asarray(mine[p]), sampling
        )
        length = response_bucket(said.mask, sampling.max_new_tokens)
        out.append(
            (
                group_batch(model_ctx, encoded[p], said.tokens, said.mask, length=length, extra={}),
                said.mask.sum(1) * counted[p],
            )
        )
    return out


def base_kl_rows(
    current: Any, number: int, task: str, common: dict[str, Any]
) -> list[dict[str, Any]]:
    """The line of evals.csv for one task."""
    model_ctx, chunk = current.model_ctx, current.config.train.chunk
    answers = current.cached(("drift", task), lambda: sample_base_responses(current, task))
    sums: list[tuple[float, int]] = []
    for batch, lengths in answers:
        with jax.set_mesh(model_ctx.mesh):
            kl = sharding.local_rows(
                _kl_program(model_ctx.cfg, model_ctx.dtype, chunk)(
                    current.base(), current.params, batch
                )
            )
        sums += [(s, n) for s, n in zip(kl.sum(1).tolist(), lengths.tolist(), strict=True) if n]
    every = distributed.concat_lists(distributed.gather_objects(sums))
    own = {
        "task": task,
        "metric": run_log.KL_BASE,
        **summaries.ratio_metric(*zip(*every, strict=True))._asdict(),
    }
    template = current.prompted(
        task, current.config, first_eval_template(current, task)
    ).template.name
    decoding = f"the base's own, T=1, {current.config.eval.max_new_tokens} tokens"
    return [{**own, "scorer": "kl@1", "template": template, **common, "decoding": decoding}]
