"""The programs of a stage at the largest shapes that its config allows, as functions that lower them without arrays.

What is largest: prompts of `data.prompt_limit` tokens with one picture of `model.max_pixels` each (sides up to 4 : 1), answers of
`rollout.max_new_tokens` (SFT: answers as long as the row), `train.micro_batch` rows of a device pass.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from cptjax import batches, ewc, flops, layout, lessons, runtime, sampler, sharding, stage, train
from cptjax.batching import step as rung
from cptjax.model import positions, trainable
from cptjax.model.config import PRESETS, Config, read
from cptjax.pool import Plan as Pool
from cptjax.types import Batch, Params, Prompts, TrainState, Vision

SECTIONS = ("model", "mesh", "data", "method", "rollout", "train", "eval")  # of a config: what programs depend on


@dataclasses.dataclass(frozen=True)
class Program:
    """A program of a run: how to lower it from what earlier ones returned."""

    name: str
    lower: Callable[[dict[str, Any]], Any]
    calls: float  # in one step of training
    useful: float  # the model's floating-point operations of one call, counted by hand
    holds: tuple[str, ...]  # of the site's pieces: those among its arguments
    keeps: tuple[str, ...] = ()  # results of earlier programs that live beside it
    needs: tuple[str, ...] = ()  # earlier programs whose results it takes
    turns: float = 1.0  # of loops whose end depends on data


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


def site(config: Any, mesh: Mesh, slices: int = 1) -> Site:
    """A stage's config on a mesh."""
    m = config.model
    cfg = runtime.fitted(model_config(m), m, mesh)
    rules = sharding.rules_for(cfg.text.kv_heads, mesh)
    declared, dtype = runtime.declare(m, cfg), runtime.DTYPES[m.compute_dtype]
    abstract = lambda tree, kind: sharding.abstract(tree, kind, mesh, rules)
    parts = trainable.split(declared, trainable.chosen(m.freeze, m.lora.rank))
    trained, frozen = abstract(parts[0], runtime.DTYPES[m.param_dtype]), abstract(parts[1], dtype)
    opt = stage.optimizer(config, declared)
    state = train.abstract_state(opt, trained, mesh)
    reference = abstract(declared, dtype) if config.method.kl_coef else None
    pieces = {"trained weights": trained, "frozen weights": frozen, "optimiser": (state.opt_state, state.step, state.skipped)}
    pieces |= {"reference": reference} if reference is not None else {}
    pieces |= {"teacher": trained} if config.method.objective == "distill" or config.method.penalty.name == "lwf" else {}
    pieces |= {"penalty": _penalty(config, trained, mesh)[1]} if _penalty(config, trained, mesh)[0] else {}
    return Site(config, cfg, mesh, slices, dtype, declared, state, frozen, reference, pieces)


def _penalty(config: Any, trained: Params, mesh: Mesh) -> tuple[Any, Any]:
    p = config.method.penalty
    if p.name not in ("l2", "ewc"):
        return None, None
    arrays = {"anchor": trained, "coef": _everywhere((), jnp.float32, mesh)}
    return (ewc.l2, arrays) if p.name == "l2" else (ewc.ewc, arrays | {"fisher": trained})


# ---- shapes --------------------------------------------------------------------------------------------------------------


def _everywhere(shape: tuple[int, ...], dtype: Any, mesh: Mesh) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.sharding((None,) * len(shape), mesh))


def _rows(site: Site, *shape: int, dtype: Any = jnp.int32, before: int = 0) -> jax.ShapeDtypeStruct:
    """An array cut along the batch, which is its first axis or stands `before` others."""
    axes = (None,) * before + ("batch",) + (None,) * (len(shape) - before - 1)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.sharding(axes, site.mesh, shape))


def picture(cfg: Config, max_pixels: int) -> int:
    """Slots of the vision tower that a picture of so many pixels takes at most, with sides up to 4 : 1."""
    v = cfg.vision
    unit = v.patch * v.merge
    units = max(max_pixels // unit**2, 1)
    sides = range(max(1, math.isqrt(units) // 2), math.isqrt(units) + 1)
    return max(len(positions.frame_layout(h * v.merge, units // h * v.merge, v).order) for h in sides)


def learned(config: Any) -> int:
    """Tokens of the longest row that is learned."""
    return config.data.prompt_limit + lessons.beyond(config.method, config.rollout.max_new_tokens)


def prompts(site: Site, rows: int, length: int = 0) -> Prompts:
    """`rows` prompts, a picture each; 0 = of the longest length."""
    v, length = site.cfg.vision, length or site.config.data.prompt_limit
    slots = picture(site.cfg, site.config.model.max_pixels)
    lead = (site.shards, rung(rows // site.shards), v.window_slots * rung(slots // v.window_slots))
    seen = Vision(_rows(site, *lead, v.patch_dim, dtype=jnp.float32), _rows(site, *lead, 2), _rows(site, *lead))
    ids = _rows(site, rows, length)
    return Prompts(ids, _rows(site, 3, rows, length, before=1), ids, ids, seen)


def batch(site: Site, rows: int, scored: bool = True) -> Batch:
    """A device pass of the update; not `scored`: as the log-probability programs see it."""
    m, r, length = site.config.method, site.config.rollout, learned(site.config)
    groups = m.source == "rollouts"
    b, a = (rows * r.group, r.max_new_tokens) if groups else (rows, length)
    numbers = lambda *shape: _rows(site, *shape, dtype=jnp.float32)
    ids, mask = _rows(site, b, a), _rows(site, b, a, dtype=bool)
    extra: dict[str, Any] = {} if groups else {"segments": ids}
    if scored and m.objective == "policy":
        extra |= {"advantages": numbers(b), "sampler_logps": numbers(b, a)}
        extra |= {"behaviour_logps": numbers(b, a)} if m.tis_cap is not None else {}
        extra |= {"old_logps": numbers(b, a)} if m.updates_per_batch * m.passes > 1 else {}
    if scored and m.kl_coef and m.kl_place == "loss":
        extra["ref_logps"] = numbers(b, a)
    if scored and (m.objective == "distill" or m.penalty.name == "lwf"):
        t = site.cfg.text
        where = sharding.sharding(("embed", "vocab"), site.mesh, (t.width, t.vocab))
        extra["teacher_hidden"] = _rows(site, b, a, t.width, dtype=site.dtype)
        extra["teacher_unembed"] = jax.ShapeDtypeStruct((t.width, t.vocab), site.dtype, sharding=where)
    return Batch(prompts(site, rows, length), ids, mask, None if groups else ids, extra)


def passes(config: Any, shards: int) -> tuple[int, int]:
    """(rows of a device pass, passes of an update)."""
    t, drawn = config.train, config.method.source == "rollouts"
    return batches.passes(t.batch // config.method.updates_per_batch if drawn else t.batch, t.micro_batch, shards, fill=not drawn)


# ---- arithmetic by hand --------------------------------------------------------------------------------------------------


def _sight(site: Site, rows: int) -> float:
    slots = picture(site.cfg, site.config.model.max_pixels)
    return flops.vision_forward(site.cfg, rows * slots, slots)


def _forward(site: Site, rows: int) -> float:
    """The text of one device pass."""
    r, length = site.config.rollout, learned(site.config)
    if site.config.method.source == "rollouts":
        return flops.group_forward(site.cfg, rows, length, r.group, r.max_new_tokens)
    return flops.text_forward(site.cfg, rows, length, length)


def _learned(site: Site, rows: int) -> float:
    """Forward and backward; frozen weights need no gradient of their own, a frozen tower no backward pass."""
    m = site.config.model
    factor = 2 if m.lora.rank or "language" in m.freeze else 3
    sight = 1 if "vision" in m.freeze else factor
    return factor * _forward(site, rows) + sight * _sight(site, rows)


# ---- programs ------------------------------------------------------------------------------------------------------------

WEIGHTS = ("trained weights", "frozen weights")


def of(site: Site) -> list[Program]:
    """The programs of a stage in the order in which a step runs them, and the evaluation's."""
    c = site.config
    rows, times = passes(c, site.shards)
    updates = c.method.updates_per_batch * c.method.passes if c.method.source == "rollouts" else 1
    found: list[Program] = []
    if c.method.source in ("rollouts", "self"):
        group = c.rollout.group if c.method.source == "rollouts" else c.method.self_samples
        every = 1.0 if c.method.source == "rollouts" else 0.0
        found += rollouts(site, "rollouts", c.train.batch, group, c.rollout, every)
    return found + scores(site, rows, times * c.method.updates_per_batch) + updating(site, rows, times, updates) + exam(site)


def scores(site: Site, rows: int, calls: int) -> list[Program]:
    """Log-probabilities under the reference, and under the policy where an update needs those of its start."""
    c = site.config
    m, temperature = c.method, c.rollout.temperature if c.method.objective == "policy" else 1.0
    run = stage.scorer(site.cfg, site.dtype, c.train.chunk, temperature)
    lower = lambda params: lambda made: run.lower(params, batch(site, rows, scored=False))
    useful = _forward(site, rows) + _sight(site, rows)
    own = m.source == "rollouts" and (m.updates_per_batch * m.passes > 1 or (m.kl_coef and m.kl_place == "reward"))
    found = [Program("reference log-probs", lower(site.reference), calls, useful, ("reference",))] if site.reference is not None else []
    return found + ([Program("own log-probs", lower(site.params), calls, useful, WEIGHTS)] if own else [])


def updating(site: Site, rows: int, times: int, updates: int) -> list[Program]:
    """One fused step; or gradients that add up over micro-batches, and their application."""
    c, state = site.config, site.state
    penalty, arrays = _penalty(c, state.params, site.mesh)
    opt = stage.optimizer(c, site.declared)
    steps = train.make_steps(site.cfg, stage.objective(c), opt, train.Places.of(state), site.dtype, penalty)
    one, lr, useful = batch(site, rows), _everywhere((), jnp.float32, site.mesh), _learned(site, rows)
    more = ("penalty",) if penalty else ()
    everything = (*WEIGHTS, "optimiser")
    if times == 1:
        lower = lambda made: steps.step.lower(state, site.frozen, one, lr, arrays)
        return [Program("train step", lower, updates, useful, everything + more)]
    total = _placed(jax.eval_shape(steps.begin, state.params, site.frozen, one), state.params, site.mesh)
    return [
        Program("add gradients", lambda made: steps.add.lower(total, state.params, site.frozen, one), times * updates, useful, WEIGHTS),
        Program(
            "apply gradients", lambda made: steps.finish.lower(state, total, lr, arrays), updates, 0.0,
            ("trained weights", "optimiser", *more),
        ),
    ]  # fmt: skip


def _placed(total: Any, params: Params, mesh: Mesh) -> Any:
    """Gradients lie beside their parameters, sums everywhere."""
    there = jax.tree.map(lambda x, p: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=p.sharding), total.gradient, params)
    rest = jax.tree.map(lambda x: _everywhere(x.shape, x.dtype, mesh), total.replace(gradient=None))
    return rest.replace(gradient=there)


def exam(site: Site) -> list[Program]:
    """The evaluation's sampler."""
    e = site.config.eval
    rows = max(site.shards, e.batch // site.shards * site.shards)
    return rollouts(site, "evaluation", rows, 1, {**e, "gather": site.config.rollout.gather}, 0.0)


def rollouts(site: Site, name: str, rows: int, group: int, settings: Any, calls: float) -> list[Program]:
    """Reading prompts and drawing answers: one program, or with `slots` a queue, the pool's opening, and its turns."""
    if rows % site.shards:
        raise ValueError(f"{name}: {rows} prompts; config.mesh cuts a batch into {site.shards} shards (data x fsdp): expected a multiple")
    new, prompt = settings["max_new_tokens"], site.config.data.prompt_limit
    plan = Pool(group, new, settings.get("check_every", 16), jnp.dtype(site.dtype))
    tops = jax.eval_shape(lambda: sampler.draws(jax.random.key(0), site.cfg, site.cfg.eos))
    draws = jax.tree.map(lambda x: _everywhere(x.shape, x.dtype, site.mesh), tops)
    read = _sight(site, rows) + flops.text_forward(site.cfg, rows, prompt, 1)
    drawn = flops.decode(site.cfg, rows, prompt, group, new)
    found, weights, holds, needs = [], lambda made: site.params, WEIGHTS, ()
    gather, int8 = settings["gather"], settings.get("dtype", "") == "int8"
    if gather or int8:
        leaves, tree = jax.tree.flatten(site.params)
        where = tuple(layout._gathered(x.sharding) if gather else None for x in leaves)
        change = layout._program(site.cfg, jnp.dtype(site.dtype), int8, tree, where)
        found = [Program(f"{name}: weights", lambda made: change.lower(site.params), calls, 0.0, WEIGHTS)]
        weights, holds, needs = lambda made: made[f"{name}: weights"], (), (f"{name}: weights",)
        if not int8 and not site.cfg.unroll:  # its result is known without compiling it
            there = (jax.ShapeDtypeStruct(x.shape, site.dtype, sharding=s or x.sharding) for x, s in zip(leaves, where, strict=True))
            moved = tree.unflatten(list(there))
            weights, needs = lambda made: moved, ()
    asked = (_rows(site, rows, group), _rows(site, rows, group))
    slots = settings.get("slots", 0)
    if not slots or slots >= rows:
        lower = lambda made: sampler.at_once.lower(weights(made), prompts(site, rows), *asked, draws, site.cfg, plan)
        return [*found, Program(name, lower, calls, read + drawn, holds, needs=needs, turns=float(new - 1))]
    return found + _in_turns(site, name, rows, slots, weights, asked, draws, plan, calls, (read, drawn), bool(needs))


def _in_turns(
    site: Site, name: str, rows: int, slots: int, weights: Callable, asked: Sequence[Any], draws: Any, plan: Pool, calls: float,
    useful: tuple[float, float], needs: bool,
) -> list[Program]:  # fmt: skip
    """The programs of `sampler.in_turns`, without those that only move results."""
    if slots % site.shards:
        raise ValueError(f"rollout.slots={slots}: expected a multiple of the {site.shards} batch shards, or 0 for the whole batch")
    cast, queue, pool = f"{name}: cast", f"{name}: queue", f"{name}: read"
    entries = _everywhere((slots,), jnp.int32, site.mesh)
    share, turns = slots / rows, calls * rows / slots
    changed = (f"{name}: weights",) if needs else ()
    sight = _sight(site, rows)
    smaller = lambda made: sampler._weights.lower(weights(made), site.cfg, plan)
    draw = lambda made: sampler._turn.lower(made[cast], made[pool], draws, site.cfg, plan)
    read = lambda made: sampler._open.lower(made[cast], made[queue], entries, draws, site.cfg, plan)
    see = lambda made: sampler._queue.lower(made[cast], prompts(site, rows), *asked, site.cfg, plan)
    length = plan.max_new / plan.check_every  # turns of a pool
    return [
        Program(cast, smaller, calls, 0.0, () if needs else WEIGHTS, (), changed),
        Program(queue, see, calls, sight, (), (), (*changed, cast)),
        Program(pool, read, turns, (useful[0] - sight) * share, (), (), (*changed, cast, queue)),
        Program(f"{name}: draw", draw, turns * length, useful[1] * share / length, (), (queue,), (*changed, cast, queue, pool)),
    ]


def advice(name: str, resident: dict[str, float], mesh: dict[str, int]) -> str:
    """What to change so that a program needs less."""
    size = " ".join(f"{k}={v}" for k, v in mesh.items())
    if name.startswith("rollouts"):
        return "set or lower rollout.slots, lower train.batch, rollout.max_new_tokens or data.prompt_limit, or raise mesh.model"
    if name.startswith("evaluation"):
        return "lower eval.batch, eval.max_new_tokens or data.prompt_limit"
    if name == "apply gradients":
        stays = sum(resident.values()) / 2**30
        return f"{stays:.2f} GiB of weights and moments stay: add devices to fsdp or model (now {size}), set model.lora.rank or freeze"
    return f"lower train.micro_batch, set model.remat='block', lower train.chunk, or cut further (mesh now {size})"
