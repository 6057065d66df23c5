"""The models that a stage compares itself with: its start, KL reference, teacher."""

import dataclasses
from typing import Any

from cptjax.config import Stage
from cptjax.continual.model_state import restore_stage_params, split_trained
from cptjax.continual.open_run import Run
from cptjax.data import prompts
from cptjax.data.model_context import ModelContext
from cptjax.data.processor import load_processor
from cptjax.models import load
from cptjax.tasks.prompted_task import PromptedTask
from cptjax.training import build
from cptjax.training.algorithms import distillation
from cptjax.training.algorithms.continual_learning.hooks import HookArrays
from cptjax.training.algorithms.distillation import Teacher
from cptjax.training.method_needs import method_needs
from cptjax.training.programs import other_model_settings
from cptjax.types import Params


def load_stage_start(run: Run, stage: Stage, params: Params, resumed: bool) -> Params | None:
    """Copy the model at the start of a stage, if something needs it.

    `params` is the current model. A stage that is resumed in its middle loads its start from the
    checkpoint of the stage before.
    """
    precision = method_needs(stage.config.method).start
    if not precision:
        return None
    if resumed:
        params = restore_stage_params(
            run.config, run.model_ctx, run.files.checkpoints, stage.number - 1
        )
    dtype = run.config.model.param_dtype if precision == "exact" else ""
    return run.copy_for_comparison(params, dtype)


def make_teacher(
    run: Run,
    stage: Stage,
    prompted_tasks: dict[str, PromptedTask],
    params: Params,
    start: Params | None,
) -> Teacher | None:
    """Build the teacher of a stage.

    It is the stage's start, a copy of `params` that follows the student, or the model of a folder.
    """
    kind = method_needs(stage.config.method).teacher
    if not kind:
        return None
    c, d = stage.config, stage.config.method.distill
    if kind == "model":
        model_ctx, params = load_other_model(run, d.teacher)
        distillation.refuse_other_inputs(
            run.model_ctx, model_ctx, f"method.distill.teacher={d.teacher}"
        )
        return Teacher(model_ctx, prompted_tasks, 0.0, {}, params)
    model_ctx = run.model_ctx.with_longer_rows(
        prompts.extra_demonstration_tokens(run.model_ctx.processor, c.rollout.max_new_tokens)
    )
    if kind == "follower":
        rate = d.ema if d.teacher == "ema" else 1.0
        return Teacher(model_ctx, prompted_tasks, rate, *split_trained(run.config, params))
    return Teacher(model_ctx, prompted_tasks, 0.0, *split_trained(run.config, start))


def load_reference(
    run: Run, stage: Stage, start: Params | None
) -> tuple[ModelContext, Params | None]:
    """Return the reference model of the KL term; its weights are None without a KL term.

    It is the base model, the start of the stage, or a model loaded from a folder, which may have
    another config.
    """
    reference = method_needs(stage.config.method).reference
    if not reference:
        return run.model_ctx, None
    if reference == "base":
        return run.model_ctx, run.base_params
    if reference == "stage":
        return run.model_ctx, start
    model_ctx, params = load_other_model(run, reference)
    distillation.refuse_other_inputs(run.model_ctx, model_ctx, f"method.kl_reference={reference}")
    return model_ctx, params


def load_other_model(run: Run, folder: str) -> tuple[ModelContext, Params]:
    """Load a model that the run does not train, in the compute dtype, on the mesh of the run."""
    settings = other_model_settings(run.config, folder)
    ctx = run.model_ctx
    cfg = load.fit_config(load.find_model_config(settings), settings, ctx.mesh)
    processor = load_processor(folder, cfg, settings.min_pixels, settings.max_pixels)
    params = load.create_params(settings, cfg, ctx.mesh, ctx.dtype, run.config.seed)
    other = dataclasses.replace(ctx, cfg=processor.cfg, processor=processor)
    return other, load.copy_params(params, run.config.model.compute_dtype)


def hook_arrays(run: Run, stage: Stage, start: Params | None, kept: dict[str, Any]) -> HookArrays:
    """Return the arrays that the stage's continual-learning methods take in each update."""
    methods = build.step_methods_from_config(stage.config)
    names = {m.name for m in methods}
    kept = {name: tree for name, tree in kept.items() if name in names}
    if not any(m.needs_start for m in methods):
        return HookArrays(None, kept)
    return HookArrays(split_trained(run.config, start)[0], kept)
