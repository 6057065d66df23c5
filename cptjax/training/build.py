"""Build the objective, the optimizer and the batch builder of a stage from its config."""

from collections.abc import Callable, Sequence
from typing import Any

from ml_collections import ConfigDict

from cptjax import sharding
from cptjax.config import Stage
from cptjax.data.data_config import DataConfig
from cptjax.data.mixture import Mixture
from cptjax.data.model_context import ModelContext
from cptjax.generation.sampling_config import rollout_sampling
from cptjax.models.config import ModelConfig
from cptjax.models.logprobs import make_scoring_program
from cptjax.tasks.prompted_task import PromptedTask
from cptjax.training.algorithms.continual_learning.hooks import (
    UPDATE_HOOKS,
    Methods,
    overrides_hook,
)
from cptjax.training.algorithms.continual_learning.table import continual_methods
from cptjax.training.algorithms.losses import TOKEN_OBJECTIVES, LossConfig
from cptjax.training.algorithms.objective import MemoryObjective, Objective
from cptjax.training.algorithms.optimizers import Optimizer, OptimizerConfig, make_optimizer
from cptjax.training.step_batch import BatchBuilder
from cptjax.training.tower_states import shares_tower, tower_params
from cptjax.types import Array, Batch, Params


def stage_mixture(stage: Stage, sizes: Sequence[int], seed: int) -> Mixture:
    """Build the order of a stage's rows.

    `sizes` are the numbers of rows of the stage's own tasks, then of the tasks that it replays.
    """
    c, own = stage.config, len(stage.tasks)
    return Mixture(
        tuple(sizes[:own]),
        c.train.batch,
        DataConfig.from_config(c.data).weights,
        tuple(sizes[own:]),
        sum(m.replayed_share for m in continual_methods(c.method)),
        seed,
        stage.number,
    )


def objective_from_config(config: ConfigDict) -> Objective:
    """Build the objective of a stage."""
    methods = (m for m in continual_methods(config.method) if overrides_hook(m, "token_loss"))
    return Objective(LossConfig.from_config(config), tuple(methods))


def memory_objective_from_config(config: ConfigDict) -> MemoryObjective | None:
    """Build the loss on the memory of a stage, if one of its methods has a memory."""
    for method in continual_methods(config.method):
        if method.memory is not None:
            return MemoryObjective(method, config.train.chunk)
    return None


def step_methods_from_config(config: ConfigDict) -> Methods:
    """Return the continual-learning methods that act in the update of a stage."""
    return tuple(m for m in continual_methods(config.method) if overrides_hook(m, *UPDATE_HOOKS))


def optimizer_from_config(config: ConfigDict, declared: Params) -> Optimizer:
    """Build the optimizer of a stage for its declared parameters."""
    return make_optimizer(OptimizerConfig.from_config(config.train), declared)


def scoring_program_from_config(
    cfg: ModelConfig, dtype: Any, config: ConfigDict
) -> Callable[[Params, Batch], Array]:
    """Build the log-probability program; a policy is scored at the temperature that it trains."""
    loss = LossConfig.from_config(config)
    return make_scoring_program(cfg, dtype, loss.chunk, loss.temperature)


def packs_conversations(config: ConfigDict) -> bool:
    """Return whether a row that a stage trains on may have several conversations."""
    return config.data.pack and config.method.objective in TOKEN_OBJECTIVES


def batch_builder_from_config(
    model_ctx: ModelContext,
    prompted_tasks: dict[str, PromptedTask],
    config: ConfigDict,
    params: Params,
) -> BatchBuilder:
    """Build the batch builder of a stage; refuse sampling slots that the mesh cannot divide.

    Of the model's parameters it takes a frozen vision tower.
    """
    sampling = rollout_sampling(config)
    sampling.check_batch_shards(sharding.batch_shards(model_ctx.mesh))
    return BatchBuilder(
        model_ctx=model_ctx,
        prompted_tasks=prompted_tasks,
        sampling=sampling,
        method=config.method,
        loss=LossConfig.from_config(config),
        batch_size=config.train.batch,
        micro_batch=config.train.micro_batch,
        pack=packs_conversations(config),
        score=scoring_program_from_config(model_ctx.cfg, model_ctx.dtype, config),
        tower=tower_params(params) if shares_tower(config, model_ctx.cfg) else None,
    )
