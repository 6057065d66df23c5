"""The model between two stages, and how the weights of a stage are restored."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from cptjax.common import console
from cptjax.config import Stage, resolve_stages
from cptjax.continual.checkpoint import Checkpoints, abstract_tree
from cptjax.data.model_context import ModelContext
from cptjax.models import load, trainable
from cptjax.training.algorithms.continual_learning.hooks import (
    ContinualMethod,
    KeptLayout,
    overrides_hook,
)
from cptjax.training.algorithms.continual_learning.table import continual_methods
from cptjax.types import Params


@dataclasses.dataclass(frozen=True)
class ModelState:
    """The model at the end of a stage, and the state that the next stage continues with.

    A stage takes a ModelState and returns the next one. Its first step donates the trained weights
    and the optimizer state, so their arrays are deleted; only use the returned ModelState.
    """

    params: Params  # all leaves, trained and frozen
    opt_state: optax.OptState | None = None  # None unless train.reset_optimizer=False keeps it
    # What continual-learning methods keep between stages, by their names.
    kept: dict[str, Any] = dataclasses.field(default_factory=dict)


def split_trained(config: ConfigDict, params: Params) -> tuple[Params, Params]:
    """Split parameters into the leaves that the run trains and the frozen ones."""
    chosen = trainable.is_trained(config.model.freeze, config.model.lora.rank)
    return trainable.split_params(params, chosen)


def newest_stage(workdir: Path, checkpoints: Checkpoints | None) -> int:
    """Return the newest finished stage of a run; if it has none, say that the base is used."""
    stage = checkpoints.newest_stage() if checkpoints else 0
    if not stage:
        console.print_warning(f"{workdir} has no finished stage in checkpoints/: the base model")
    return stage


def restore_stage_params(
    config: ConfigDict, model_ctx: ModelContext, checkpoints: Checkpoints | None, stage: int
) -> Params:
    """Load the weights after a stage in the dtypes of the run; stage 0 is the base model."""
    params = load.create_params(
        config.model, model_ctx.cfg, model_ctx.mesh, model_ctx.dtype, config.seed
    )
    if stage == 0:
        return params
    if checkpoints is None:
        raise ValueError(
            f"stage {stage}: expected a workdir of launch/train.py with checkpoints, "
            "got one without"
        )
    trained, frozen = split_trained(config, params)
    step, ended = checkpoints.stage_end(stage), resolve_stages(config)[:stage]
    like = {"params": abstract_tree(trained)}
    # Without kept arrays, the file of a method of the user's own is not needed.
    saved = checkpoints.progress("stages", stage, step)["trees"]
    if "kept" in saved and frozen_weights_methods(ended):
        like["kept"] = kept_shapes(ended, trained, model_ctx.mesh)
    restored = checkpoints.restore("stages", stage, step, like)
    if "kept" in restored:
        frozen = frozen_after(ended, frozen, restored["kept"])
    return trainable.join_params(restored["params"], frozen)


# ---- what continual-learning methods keep --------------------------------------------------------


def kept_shapes(ended: Sequence[Stage], trained: Params, mesh: Mesh) -> dict[str, Any]:
    """Return the shapes of what continual-learning methods keep after these stages, by name."""
    shapes = {}
    for stage in ended:
        layout = KeptLayout(abstract_tree(trained), mesh, stage.number)
        for method in continual_methods(stage.config.method):
            if (tree := method.kept_shapes(layout)) is not None:
                shapes[method.name] = tree
    return shapes


def frozen_weights_methods(ended: Sequence[Stage]) -> dict[str, ContinualMethod]:
    """Return the methods of these stages that change frozen parameters, by name."""
    methods = (m for stage in ended for m in continual_methods(stage.config.method))
    return {m.name: m for m in methods if overrides_hook(m, "frozen_weights")}


def frozen_after(ended: Sequence[Stage], frozen: Params, kept: dict[str, Any]) -> Params:
    """Return the frozen parameters after these stages, from those of the base model."""
    for name, method in frozen_weights_methods(ended).items():
        scale = load.lora_scale(ended[-1].config.model)
        frozen = method.frozen_weights(frozen, kept[name], scale)
    return frozen
