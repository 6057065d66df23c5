"""Collect all programs of a stage and its evaluation, as training and sampling provide them."""

from pathlib import Path

from jax.sharding import Mesh
from ml_collections import ConfigDict

from cptjax.common.program import Program
from cptjax.continual.stage_end import stage_end_programs
from cptjax.data.device_batches import cut_to_shards
from cptjax.generation.sampling_config import eval_sampling
from cptjax.models import load
from cptjax.models.config import ModelConfig
from cptjax.models.families import RELEASED
from cptjax.training.programs import (
    MEMORY_GRADIENT,
    AbstractStage,
    abstract_stage,
    response_programs,
    training_programs,
)

# The sections of a config on which programs depend.
PROGRAM_SECTIONS = ("model", "mesh", "data", "method", "rollout", "train", "eval")


def stage_programs(stage: AbstractStage) -> list[Program]:
    """Return the programs of a stage in the order of first calls, then those of the evaluation."""
    rows = cut_to_shards(stage.config.eval.batch, stage.shards)
    sampling = eval_sampling(stage.config)
    return [
        *training_programs(stage),
        *stage_end_programs(stage),
        *response_programs(stage, "evaluation", rows, [sampling], 0.0),
    ]


def planned_stage(config: ConfigDict, mesh: Mesh) -> AbstractStage:
    """Return the abstract stage on a mesh of devices that need not exist."""
    cfg = load.fit_config(planned_model_config(config.model), config.model, mesh)
    return abstract_stage(config, cfg, mesh)


def planned_model_config(settings: ConfigDict) -> ModelConfig:
    """Return the model's config from its folder, from its name on the hub, or from the hub."""
    path = Path(settings.path)
    known = None if path.is_dir() else RELEASED.get(path.name)
    return known or load.find_model_config(settings)


def memory_advice(name: str, resident: dict[str, float], mesh: dict[str, int]) -> str:
    """Return advice on what to change so that a program needs less memory."""
    size = " ".join(f"{k}={v}" for k, v in mesh.items())
    if name.endswith(": weights"):
        return (
            "set rollout.gather=False, raise rollout.model, or shard over more devices (mesh now "
            f"{size})"
        )
    if name.startswith("filter"):
        return (
            "lower method.filter.samples, set or lower rollout.slots, or lower "
            "rollout.max_new_tokens"
        )
    if name.startswith(("rollouts", "greedy")) or ": responses" in name:
        return (
            "set or lower rollout.slots, lower train.batch, rollout.max_new_tokens or "
            "data.prompt_limit, or raise mesh.model"
        )
    if name.startswith("evaluation"):
        return "lower eval.batch, eval.max_new_tokens or data.prompt_limit"
    if name == MEMORY_GRADIENT:
        return "lower batch or tokens of the method's memory, or set model.remat='block'"
    if name == "apply gradients":
        stays = sum(resident.values()) / 2**30
        return (
            f"{stays:.2f} GiB of weights and moments stay: "
            f"add devices to fsdp or model (now {size}), set model.lora.rank or freeze"
        )
    return (
        "lower train.micro_batch, set model.remat='block', lower train.chunk, or shard over more "
        f"devices (mesh now {size})"
    )
