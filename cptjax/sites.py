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

from cptjax import batches, ewc, lessons, objectives, penalties, runtime, sharding, stage, train
from cptjax.batching import picture, room
from cptjax.model import trainable
from cptjax.model.config import PRESETS, Config, read
from cptjax.types import Batch, Params, Prompts, TrainState, Vision


@dataclasses.dataclass(frozen=True)
class Site:
    """A stage's config on a mesh, with all that stays in memory as shapes."""

    config: Any
    cfg: Config
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
        return trainable.join(self.state.params, self.frozen)


def model_config(settings: Any) -> Config:
    """The model's shape, from its folder, from the size in its name where the folder is not here, or from the hub."""
    if not settings.path:
        return runtime.preset(settings.preset)
    size = re.search(r"Qwen2\.5-VL-(\d+)B", settings.path, re.I)
    known = size and not Path(settings.path).is_dir() and PRESETS.get(f"{size[1]}b")
    return known or read(settings.path)


def make(config: Any, mesh: Mesh, slices: int = 1) -> Site:
    """A stage's config on a mesh."""
    m, method = config.model, config.method
    cfg = runtime.fitted(model_config(m), m, mesh)
    rules = sharding.rules_for(cfg.text.kv_heads, mesh)
    declared, dtype, wide = runtime.declare(m, cfg), runtime.DTYPES[m.compute_dtype], runtime.DTYPES[m.param_dtype]
    abstract = lambda tree, kind: sharding.abstract(tree, kind, mesh, rules)
    parts = trainable.split(declared, trainable.chosen(m.freeze, m.lora.rank))
    trained, frozen = abstract(parts[0], wide), abstract(parts[1], dtype)
    state = train.abstract_state(stage.optimizer(config, declared), trained, mesh)
    pieces = {"trained weights": trained, "frozen weights": frozen, "optimiser": (state.opt_state, state.step, state.skipped)}
    penalty = _penalty(config, trained, abstract(parts[0], jnp.float32), mesh)
    exact = penalties.exact(method)  # the copies that learning.start_of keeps, and in which type
    reference = teacher = None
    if method.kl_coef:
        reference = pieces["reference"] = abstract(declared, wide if exact and method.kl_reference == "stage" else dtype)
    if objectives.follows(method):
        teacher = pieces["teacher"] = trainable.join(abstract(parts[0], jnp.float32), frozen)
    elif method.objective == "distill" or method.penalty.name == "lwf":
        teacher = pieces["teacher"] = abstract(declared, wide if exact else dtype)
    elif exact and not (method.kl_coef and method.kl_reference == "stage"):
        pieces["stage's start"] = abstract(parts[1] if penalty[0] else declared, wide)  # a penalty's anchor is its trained part
    if penalty[0]:
        pieces["penalty"] = penalty[1]
    return Site(config, cfg, mesh, slices, dtype, declared, state, frozen, reference, teacher, penalty, pieces)


def _penalty(config: Any, trained: Params, fisher: Params, mesh: Mesh) -> tuple[Any, Any]:
    p = config.method.penalty
    if p.name not in ("l2", "ewc"):
        return None, None
    arrays = {"anchor": trained, "coef": everywhere((), jnp.float32, mesh)}
    return (ewc.l2, arrays) if p.name == "l2" else (ewc.ewc, arrays | {"fisher": fisher})


def everywhere(shape: tuple[int, ...], dtype: Any, mesh: Mesh) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.sharding((None,) * len(shape), mesh))


def rows_of(site: Site, *shape: int, dtype: Any = jnp.int32, before: int = 0) -> jax.ShapeDtypeStruct:
    """An array cut along the batch, which is its first axis or stands `before` others."""
    axes = (None,) * before + ("batch",) + (None,) * (len(shape) - before - 1)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.sharding(axes, site.mesh, shape))


def learned(config: Any) -> int:
    """Tokens of the longest row that is learned."""
    return config.data.prompt_limit + lessons.beyond(config.method, config.rollout.max_new_tokens)


def demonstrated(config: Any) -> int:
    """Tokens of the longest question with a demonstration behind it; 24 for the words around, which depend on the tokenizer."""
    return config.data.prompt_limit + config.rollout.max_new_tokens + 24


def prompts(site: Site, rows: int, length: int = 0) -> Prompts:
    """`rows` prompts, a picture each; 0 = of the longest length."""
    v, length = site.cfg.vision, length or site.config.data.prompt_limit
    size = picture(site.cfg, site.config.model.max_pixels) // v.window_slots
    width, count = room([[size] * (rows // site.shards)], size)
    lead = (site.shards, count, width * v.window_slots)
    seen = Vision(rows_of(site, *lead, v.patch_dim, dtype=jnp.float32), rows_of(site, *lead, 2), rows_of(site, *lead))
    ids = rows_of(site, rows, length)
    return Prompts(ids, rows_of(site, 3, rows, length, before=1), ids, ids, seen)


def conversations(site: Site, rows: int) -> Batch:
    """Rows whose answers may be as long as they are."""
    length = learned(site.config)
    ids, mask = rows_of(site, rows, length), rows_of(site, rows, length, dtype=bool)
    return Batch(prompts(site, rows, length), ids, mask, ids, {"segments": ids})


def groups(site: Site, rows: int) -> Batch:
    """Prompts and their answers."""
    r = site.config.rollout
    size = (rows * r.group, r.max_new_tokens)
    return Batch(prompts(site, rows), rows_of(site, *size), rows_of(site, *size, dtype=bool), None, {})


def batch(site: Site, rows: int, scored: bool = True) -> Batch:
    """A device pass of the update; not `scored`: as the log-probability programs see it."""
    m = site.config.method
    found = groups(site, rows) if m.source == "rollouts" else conversations(site, rows)
    b, a = found.targets.shape
    numbers = lambda *shape: rows_of(site, *shape, dtype=jnp.float32)
    extra: dict[str, Any] = {}
    if scored and m.objective == "policy":
        extra |= {"advantages": numbers(b), "sampler_logps": numbers(b, a)}
        extra |= {"behaviour_logps": numbers(b, a)} if m.tis_cap is not None else {}
        extra |= {"old_logps": numbers(b, a)} if m.updates_per_batch * m.passes > 1 else {}
    if scored and m.kl_coef and m.kl_place == "loss":
        extra["ref_logps"] = numbers(b, a)
    if scored and site.teacher is not None:
        t = site.cfg.text
        where = sharding.sharding(("embed", "vocab"), site.mesh, (t.width, t.vocab))
        extra["teacher_hidden"] = rows_of(site, b, a, t.width, dtype=site.dtype)
        extra["teacher_unembed"] = jax.ShapeDtypeStruct((t.width, t.vocab), site.dtype, sharding=where)
    return found.replace(extra=found.extra | extra)


def passes(config: Any, shards: int) -> tuple[int, int]:
    """(rows of a device pass, passes of an update)."""
    t, drawn = config.train, config.method.source == "rollouts"
    return batches.passes(t.batch // config.method.updates_per_batch if drawn else t.batch, t.micro_batch, shards, fill=not drawn)
