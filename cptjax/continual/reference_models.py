"""The models a stage is compared with: its start, the KL reference, the teacher, and the penalty's anchor."""

from typing import Any

import numpy as np

from cptjax.config import Stage, merge_config
from cptjax.continual.open_run import Run
from cptjax.continual.resume import ResumePoint
from cptjax.data import prompts
from cptjax.models import load, trainable
from cptjax.training.algorithms import regularizers
from cptjax.training.algorithms.distillation import Teacher, has_ema_teacher
from cptjax.types import Params

# ---- what a stage is compared with ---------------------------------------------------------------------------------------


def load_stage_start(run: Run, stage: Stage, place: ResumePoint | None) -> Params | None:
    """A copy of the model at the stage's start where something needs it; a restored run reads it back."""
    m = stage.config.method
    exact = regularizers.needs_exact_start(m)
    fixed = needs_teacher(stage) and not has_ema_teacher(m)
    if not (exact or fixed or (m.kl_coef > 0 and m.kl_reference == "stage")):
        return None
    params = run.at_stage(stage.number - 1) if place else run.params
    return run.compared(params, run.config.model.param_dtype if exact else "")


def needs_teacher(stage: Stage) -> bool:
    return stage.config.method.objective == "distill" or stage.config.method.penalty.name == "lwf"


def make_teacher(
    run: Run, stage: Stage, prompted_tasks: dict[str, Any], start: Params | None
) -> Teacher | None:
    """The stage's start, or a copy of its own that follows the student; a place inside the stage has its own."""
    if not needs_teacher(stage):
        return None
    c, d = stage.config, stage.config.method.distill
    model_ctx = run.model_ctx.longer(
        prompts.extra_demonstration_tokens(run.model_ctx.processor, c.rollout.max_new_tokens)
    )
    if has_ema_teacher(stage.config.method):
        return Teacher(
            model_ctx, prompted_tasks, d.ema if d.teacher == "ema" else 1.0, *run.split()
        )
    return Teacher(model_ctx, prompted_tasks, 0.0, *trainable.split_params(start, run.chosen))


def load_reference(run: Run, stage: Stage, start: Params | None) -> Params | None:
    """The model of the KL term: none, the base, the stage's start, or a checkpoint folder."""
    m = stage.config.method
    if not m.kl_coef or m.kl_reference in ("base", "stage"):
        return None if not m.kl_coef else run.base() if m.kl_reference == "base" else start
    other = merge_config(run.config, {"model": {"path": m.kl_reference, "lora": {"rank": 0}}})
    ctx = run.model_ctx
    return run.compared(
        load.create_params(other.model, ctx.cfg, ctx.mesh, ctx.dtype, run.config.seed)
    )


def make_penalty(run: Run, stage: Stage, start: Params | None) -> tuple[Any, Any]:
    """The penalty's function and its arrays: anchor, and Fisher information for EWC (none before the second stage)."""
    p = stage.config.method.penalty
    if p.name not in ("l2", "ewc") or (p.name == "ewc" and run.fisher is None):
        return None, None
    anchor, _ = trainable.split_params(start, run.chosen)
    arrays = {"anchor": anchor, "coef": np.float32(p.coef)}
    return (
        (regularizers.l2_penalty, arrays)
        if p.name == "l2"
        else (regularizers.ewc_penalty, arrays | {"fisher": run.fisher})
    )
