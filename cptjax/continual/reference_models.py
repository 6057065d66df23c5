"""The models a stage is compared with: its start, the KL reference, the teacher, and the penalty's anchor."""

from typing import Any

import numpy as np

from cptjax.config import Stage, merge_config
from cptjax.continual.open_run import Run
from cptjax.continual.resume import ResumePoint
from cptjax.data import model_context, prompts
from cptjax.models import trainable
from cptjax.training.algorithms import regularizers
from cptjax.training.algorithms.distillation import Teacher, has_ema_teacher
from cptjax.types import Params

# ---- what a stage is compared with ---------------------------------------------------------------------------------------


def load_stage_start(current: Run, which: Stage, place: ResumePoint | None) -> Params | None:
    """A copy of the model at the stage's start where something needs it; a restored run reads it back."""
    m = which.config.method
    exact = regularizers.needs_exact_start(m)
    fixed = needs_teacher(which) and not has_ema_teacher(m)
    if not (exact or fixed or (m.kl_coef > 0 and m.kl_reference == "stage")):
        return None
    params = current.at_stage(which.number - 1) if place else current.params
    return current.compared(params, current.config.model.param_dtype if exact else "")


def needs_teacher(which: Stage) -> bool:
    return which.config.method.objective == "distill" or which.config.method.penalty.name == "lwf"


def make_teacher(
    current: Run, which: Stage, courses: dict[str, Any], start: Params | None
) -> Teacher | None:
    """The stage's start, or a copy of its own that follows the student; a place inside the stage has its own."""
    if not needs_teacher(which):
        return None
    c, d = which.config, which.config.method.distill
    rt = current.rt.longer(
        prompts.extra_demonstration_tokens(current.rt.processor, c.rollout.max_new_tokens)
    )
    if has_ema_teacher(which.config.method):
        return Teacher(rt, courses, d.ema if d.teacher == "ema" else 1.0, *current.split())
    return Teacher(rt, courses, 0.0, *trainable.split_params(start, current.chosen))


def load_reference(current: Run, which: Stage, start: Params | None) -> Params | None:
    """The model of the KL term: none, the base, the stage's start, or a checkpoint folder."""
    m = which.config.method
    if not m.kl_coef or m.kl_reference in ("base", "stage"):
        return None if not m.kl_coef else current.base() if m.kl_reference == "base" else start
    other = merge_config(current.config, {"model": {"path": m.kl_reference, "lora": {"rank": 0}}})
    return current.compared(
        model_context.create_params(other.model, current.rt, current.config.seed)
    )


def make_penalty(current: Run, which: Stage, start: Params | None) -> tuple[Any, Any]:
    """The penalty's function and its arrays: anchor, and Fisher information for EWC (none before the second stage)."""
    p = which.config.method.penalty
    if p.name not in ("l2", "ewc") or (p.name == "ewc" and current.fisher is None):
        return None, None
    anchor, _ = trainable.split_params(start, current.chosen)
    arrays = {"anchor": anchor, "coef": np.float32(p.coef)}
    return (
        (regularizers.l2_penalty, arrays)
        if p.name == "l2"
        else (regularizers.ewc_penalty, arrays | {"fisher": current.fisher})
    )
