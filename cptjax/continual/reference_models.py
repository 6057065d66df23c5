"""The models that a stage compares itself with: its start, KL reference, teacher, anchor."""

from typing import Any

import numpy as np

from cptjax.config import Stage, merge_config
from cptjax.continual.model_state import restore_stage_params, split_trained
from cptjax.continual.open_run import Run
from cptjax.data import prompts
from cptjax.models import load
from cptjax.tasks.prompted_task import PromptedTask
from cptjax.training.algorithms import weight_penalties
from cptjax.training.algorithms.distillation import Teacher
from cptjax.training.method_needs import method_needs
from cptjax.training.train_step import PenaltyFn
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
    """Build the teacher of a stage: its start, or a copy of `params` that follows the student."""
    kind = method_needs(stage.config.method).teacher
    if not kind:
        return None
    c, d = stage.config, stage.config.method.distill
    model_ctx = run.model_ctx.with_longer_rows(
        prompts.extra_demonstration_tokens(run.model_ctx.processor, c.rollout.max_new_tokens)
    )
    if kind == "follower":
        rate = d.ema if d.teacher == "ema" else 1.0
        return Teacher(model_ctx, prompted_tasks, rate, *split_trained(run.config, params))
    return Teacher(model_ctx, prompted_tasks, 0.0, *split_trained(run.config, start))


def load_reference(run: Run, stage: Stage, start: Params | None) -> Params | None:
    """Return the reference model of the KL term, or None without a KL term.

    It is the base model, the start of the stage, or a model loaded from a folder.
    """
    reference = method_needs(stage.config.method).reference
    if not reference:
        return None
    if reference == "base":
        return run.base_params
    if reference == "stage":
        return start
    other = merge_config(run.config, {"model": {"path": reference, "lora": {"rank": 0}}})
    ctx = run.model_ctx
    params = load.create_params(other.model, ctx.cfg, ctx.mesh, ctx.dtype, run.config.seed)
    return run.copy_for_comparison(params)


def make_penalty(
    run: Run, stage: Stage, start: Params | None, fisher: Params | None
) -> tuple[PenaltyFn | None, dict[str, Any] | None]:
    """Return the function of a penalty and its arrays, or (None, None) without a penalty.

    EWC has no penalty before Fisher information exists.
    """
    p = stage.config.method.penalty
    penalty = weight_penalties.PENALTY_FUNCTIONS.get(p.name)
    if penalty is None or (p.name == "ewc" and fisher is None):
        return None, None
    anchor, _ = split_trained(run.config, start)
    return penalty, weight_penalties.penalty_arrays(p.name, anchor, np.float32(p.coef), fisher)
