"""A stage's config -> its objective, sampling, optimizer and batch builder."""

from typing import Any

from cptjax import sharding
from cptjax.data.model_context import ModelContext
from cptjax.generation.sampling_config import rollout_sampling
from cptjax.models.logprobs import make_scoring_program
from cptjax.tasks.prompted_task import PromptedTask
from cptjax.training.algorithms import optimizers
from cptjax.training.algorithms.objective import Objective
from cptjax.training.step_batch import BatchBuilder
from cptjax.types import Params


def objective_from_config(config: Any) -> Objective:
    """The loss of a stage."""
    m, d = config.method, config.method.distill
    policy = m.objective == "policy"
    return Objective(
        kind=m.objective,
        chunk=config.train.chunk,
        ratio=m.ratio,
        clip_low=m.clip_low,
        clip_high=m.clip_high,
        clip_dual=m.clip_dual,
        normalise=m.normalise,
        fixed_length=config.rollout.max_new_tokens,
        kl_coef=m.kl_coef if m.kl_place == "loss" else 0.0,
        kl_estimator=m.kl_estimator,
        kl_limit=m.kl_limit,
        tis_cap=m.tis_cap,
        entropy_coef=m.entropy_coef,
        temperature=config.rollout.temperature if policy else 1.0,
        direction=d.direction,
        top_k=d.top_k,
        skip_tokens=d.skip_tokens,
        lwf=m.penalty.coef if m.penalty.name == "lwf" else 0.0,
    )


def optimizer_from_config(config: Any, declared: Params) -> optimizers.Optimizer:
    t = config.train
    return optimizers.make_optimizer(
        optimizer=t.optimizer,
        b1=t.b1,
        b2=t.b2,
        eps=t.eps,
        weight_decay=t.weight_decay,
        clip=t.clip,
        moments_dtype=t.moments_dtype,
        declared=declared,
    )


def batch_builder_from_config(
    model_ctx: ModelContext, prompted_tasks: dict[str, PromptedTask], config: Any
) -> BatchBuilder:
    sampling = rollout_sampling(config)
    sampling.check_batch_shards(sharding.batch_shards(model_ctx.mesh))
    temperature = config.rollout.temperature if config.method.objective == "policy" else 1.0
    logps = make_scoring_program(model_ctx.cfg, model_ctx.dtype, config.train.chunk, temperature)
    pack = config.data.pack and config.method.objective in ("sft", "eaft")
    return BatchBuilder(
        model_ctx,
        prompted_tasks,
        sampling,
        config.method,
        config.train.batch,
        config.train.micro_batch,
        pack,
        logps,
    )
