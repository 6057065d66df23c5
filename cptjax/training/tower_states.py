"""The states of images in a frozen vision tower, computed once for all models of a step.

The policy that samples, the reference, the policy before the updates, and each update have the same
tower if it is frozen. Its states replace the images in their batches; the merger, which may be
trained, is part of each model.
"""

import functools
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from cptjax.common.compiler_options import PlatformJit
from cptjax.models import trainable
from cptjax.models.config import ModelConfig
from cptjax.models.families import find_family
from cptjax.training.method_needs import MethodNeeds, method_needs
from cptjax.types import Array, Batch, Params, Prompts, Vision


def shares_tower(config: ConfigDict, cfg: ModelConfig) -> bool:
    """Return whether several models of a stage's step run one frozen tower on the same images."""
    needs, model = method_needs(config.method), config.model
    frozen = "vision" in model.freeze or (model.lora.rank > 0 and not model.lora.vision)
    several = (
        config.method.source == "rollouts"
        or needs.reference in ("base", "stage")
        or (needs.teacher in ("start", "follower") and not needs.demonstrations)
    )
    return cfg.vision is not None and frozen and several


@functools.lru_cache(maxsize=16)
def make_tower_program(
    cfg: ModelConfig, dtype: Any
) -> Callable[[Params, Vision], tuple[Array, ...]]:
    """Return a program for `Prompts.tower_states`."""

    def run(params: Params, vision: Vision) -> tuple[Array, ...]:
        params = trainable.cast_params(params, dtype)
        return find_family(cfg).tower.run(params, vision, cfg, dtype)

    return PlatformJit(run)


def tower_params(params: Params) -> Params:
    """Return the parameters that the program takes."""
    return {"vision": params["vision"]}


def replace_images(prompts: Prompts, states: tuple[Array, ...], needs: MethodNeeds) -> Prompts:
    """Return the prompts with states of their images, arrays or shapes.

    The images stay for a model of a folder, which has another tower.
    """
    others = needs.other_reference or needs.teacher == "model"
    return prompts.replace(tower_states=states, vision=prompts.vision if others else None)


def for_other_tower(batch: Batch) -> Batch:
    """Return the batch for a model with another tower, which runs on the images."""
    return batch.replace(prompts=batch.prompts.replace(tower_states=None))
