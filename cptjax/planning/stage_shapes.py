"""A stage on a mesh as shapes: what stays in memory, and its largest batches.

What is largest: prompts of `data.prompt_limit` tokens with one picture of `model.max_pixels` each (sides up to 4 : 1), answers of
`rollout.max_new_tokens` (SFT: answers as long as the row), `train.micro_batch` rows of a device pass.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from cptjax import sharding
from cptjax.data import device_batches
from cptjax.data.collate import fit_vision_rows, max_image_slots
from cptjax.models import load, trainable
from cptjax.models.config import PRESETS, ModelConfig, read_model_config
from cptjax.training import build, step_batch, train_step
from cptjax.training.algorithms import distillation, regularizers
from cptjax.types import Batch, Params, Prompts, TrainState, Vision


@dataclasses.dataclass(frozen=True)
class StageShapes:
    """A stage's config on a mesh, with all that stays in memory as shapes."""

    config: Any
    cfg: ModelConfig
    mesh: Mesh
    slices: int
    dtype: Any
    declared: Params
    state: TrainState
    frozen: Params
    reference: Params | None
    teacher: Params | None
    penalty: tuple[Any, Any]  # its function and arrays, or (None, None)
    pieces: dict[str, Any]

    @property
    def shards(self) -> int:
        return sharding.batch_shards(self.mesh)

    @property
    def params(self) -> Params:
        return trainable.join_params(self.state.params, self.frozen)


def model_config_of(settings: Any) -> ModelConfig:
    """The model's shape, from its folder, from the size in its name where the folder is not here, or from the hub."""
    if not settings.path:
        return load.find_preset(settings.preset)
    size = re.search(r"Qwen2\.5-VL-(\d+)B", settings.path, re.I)
    known = size and not Path(settings.path).is_dir() and PRESETS.get(f"{size[1]}b")
    return known or read_model_config(settings.path)


def make_stage_shapes(config: Any, mesh: Mesh, slices: int = 1) -> StageShapes:
    """A stage's config on a mesh."""
    m, method = config.model, config.method
    cfg = load.fit_config(model_config_of(m), m, mesh)
    rules = sharding.rules_for(cfg.text.kv_heads, mesh)
    declared, dtype, wide = (
        load.declare_model_params(m, cfg),
        load.MODEL_DTYPES[m.compute_dtype],
        load.MODEL_DTYPES[m.param_dtype],
    )
    abstract = lambda tree, kind: sharding.abstract_params(tree, kind, mesh, rules)
    parts = trainable.split_params(declared, trainable.is_trained(m.freeze, m.lora.rank))
    trained, frozen = abstract(parts[0], wide), abstract(parts[1], dtype)
    state = train_step.abstract_state(build.optimizer_from_config(config, declared), trained, mesh)
    pieces = {
        "trained weights": trained,
        "frozen weights": frozen,
        "optimiser": (state.opt_state, state.step, state.skipped),
    }
    penalty = _penalty(config, trained, abstract(parts[0], jnp.float32), mesh)
    exact = regularizers.needs_exact_start(
        method
    )  # the copies that learning.start_of keeps, and in which type
    reference = teacher = None
    if method.kl_coef:
        reference = pieces["reference"] = abstract(
            declared, wide if exact and method.kl_reference == "stage" else dtype
        )
    if distillation.has_ema_teacher(method):
        teacher = pieces["teacher"] = trainable.join_params(abstract(parts[0], jnp.float32), frozen)
    elif method.objective == "distill" or method.penalty.name == "lwf":
        teacher = pieces["teacher"] = abstract(declared, wide if exact else dtype)
    elif exact and not (method.kl_coef and method.kl_reference == "stage"):
        pieces["stage's start"] = abstract(
            parts[1] if penalty[0] else declared, wide
        )  # a penalty's anchor is its trained part
    if penalty[0]:
        pieces["penalty"] = penalty[1]
    return StageShapes(
        config,
        cfg,
        mesh,
        slices,
        dtype,
        declared,
        state,
        frozen,
        reference,
        teacher,
        penalty,
        pieces,
    )


def _penalty(config: Any, trained: Params, fisher: Params, mesh: Mesh) -> tuple[Any, Any]:
    p = config.method.penalty
    if p.name not in ("l2", "ewc"):
        return None, None
    arrays = {"anchor": trained, "coef": replicated_shape((), jnp.float32, mesh)}
    return (
        (regularizers.l2_penalty, arrays)
        if p.name == "l2"
        else (regularizers.ewc_penalty, arrays | {"fisher": fisher})
    )


def replicated_shape(shape: tuple[int, ...], dtype: Any, mesh: Mesh) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(
        shape, dtype, sharding=sharding.named_sharding((None,) * len(shape), mesh)
    )


def batch_axis_shape(
    site: StageShapes, *shape: int, dtype: Any = jnp.int32, before: int = 0
) -> jax.ShapeDtypeStruct:
    """An array cut along the batch, which is its first axis or stands `before` others."""
    axes = (None,) * before + ("batch",) + (None,) * (len(shape) - before - 1)
    return jax.ShapeDtypeStruct(
        shape, dtype, sharding=sharding.named_sharding(axes, site.mesh, shape)
    )


def longest_trained_row(config: Any) -> int:
    """Tokens of the longest row that is learned."""
    return config.data.prompt_limit + step_batch.extra_response_tokens(
        config.method, config.rollout.max_new_tokens
    )


def longest_demonstrated_prompt(config: Any) -> int:
    """Tokens of the longest question with a demonstration behind it; 24 for the words around, which depend on the tokenizer."""
    return config.data.prompt_limit + config.rollout.max_new_tokens + 24


def prompt_shapes(site: StageShapes, rows: int, length: int = 0) -> Prompts:
    """`rows` prompts, a picture each; 0 = of the longest length."""
    v, length = site.cfg.vision, length or site.config.data.prompt_limit
    size = max_image_slots(site.cfg, site.config.model.max_pixels) // v.window_slots
    width, count = fit_vision_rows([[size] * (rows // site.shards)], size)
    lead = (site.shards, count, width * v.window_slots)
    seen = Vision(
        batch_axis_shape(site, *lead, v.patch_dim, dtype=jnp.float32),
        batch_axis_shape(site, *lead, 2),
        batch_axis_shape(site, *lead),
    )
    ids = batch_axis_shape(site, rows, length)
    return Prompts(ids, batch_axis_shape(site, 3, rows, length, before=1), ids, ids, seen)


def conversation_shapes(site: StageShapes, rows: int) -> Batch:
    """Rows whose answers may be as long as they are."""
    length = longest_trained_row(site.config)
    ids, mask = (
        batch_axis_shape(site, rows, length),
        batch_axis_shape(site, rows, length, dtype=bool),
    )
    return Batch(prompt_shapes(site, rows, length), ids, mask, ids, {"segments": ids})


def group_shapes(site: StageShapes, rows: int) -> Batch:
    """Prompts and their answers."""
    r = site.config.rollout
    size = (rows * r.group, r.max_new_tokens)
    return Batch(
        prompt_shapes(site, rows),
        batch_axis_shape(site, *size),
        batch_axis_shape(site, *size, dtype=bool),
        None,
        {},
    )


def batch_shapes(site: StageShapes, rows: int, scored: bool = True) -> Batch:
    """A device pass of the update; not `scored`: as the log-probability programs see it."""
    m = site.config.method
    found = group_shapes(site, rows) if m.source == "rollouts" else conversation_shapes(site, rows)
    b, a = found.targets.shape
    numbers = lambda *shape: batch_axis_shape(site, *shape, dtype=jnp.float32)
    extra: dict[str, Any] = {}
    if scored and m.objective == "policy":
        extra |= {"advantages": numbers(b), "sampler_logps": numbers(b, a)}
        extra |= {"behaviour_logps": numbers(b, a)} if m.tis_cap is not None else {}
        extra |= {"old_logps": numbers(b, a)} if m.updates_per_batch * m.passes > 1 else {}
    if scored and m.kl_coef and m.kl_place == "loss":
        extra["ref_logps"] = numbers(b, a)
    if scored and site.teacher is not None:
        t = site.cfg.text
        where = sharding.named_sharding(("embed", "vocab"), site.mesh, (t.width, t.vocab))
        extra["teacher_hidden"] = batch_axis_shape(site, b, a, t.width, dtype=site.dtype)
        extra["teacher_unembed"] = jax.ShapeDtypeStruct(
            (t.width, t.vocab), site.dtype, sharding=where
        )
    return found.replace(extra=found.extra | extra)


def device_passes(config: Any, shards: int) -> tuple[int, int]:
    """(rows of a device pass, passes of an update)."""
    t, drawn = config.train, config.method.source == "rollouts"
    return device_batches.micro_batch_layout(
        t.batch // config.method.updates_per_batch if drawn else t.batch,
        t.micro_batch,
        shards,
        fill=not drawn,
    )
