"""The programs of a stage at the largest shapes that its config allows, as functions that lower them without arrays."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from cptjax import batches, flops, layout, penalties, runtime, sampler, stage, teaching, train
from cptjax.batching import picture
from cptjax.objectives import Objective
from cptjax.pool import Plan as Pool
from cptjax.sites import Site, batch, conversations, demonstrated, everywhere, learned, passes, prompts, rows_of
from cptjax.types import Params

SECTIONS = ("model", "mesh", "data", "method", "rollout", "train", "eval")  # of a config: what programs depend on
WEIGHTS = ("trained weights", "frozen weights")
TEACHER = "teacher states"


@dataclasses.dataclass(frozen=True)
class Program:
    """A program of a run: how to lower it from what earlier ones returned."""

    name: str
    lower: Callable[[dict[str, Any]], Any]
    calls: float  # in one step of training
    useful: float  # the model's floating-point operations of one call, counted by hand
    holds: tuple[str, ...]  # of the site's pieces: those among its arguments, or not made yet
    keeps: tuple[str, ...] = ()  # earlier programs whose results live beside it; twice: two of them
    needs: tuple[str, ...] = ()  # earlier programs whose results it takes
    turns: float = 1.0  # of loops whose end depends on data


def of(site: Site) -> list[Program]:
    """The programs of a stage in the order in which it runs them, and the evaluation's."""
    c = site.config
    rows, times = passes(c, site.shards)
    updates = c.method.updates_per_batch * c.method.passes if c.method.source == "rollouts" else 1
    found = answers(site) + scores(site, rows, times * c.method.updates_per_batch) + taught(site, rows, times * updates)
    return found + updating(site, rows, times, updates) + fisher(site) + exam(site)


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


# ---- learning ------------------------------------------------------------------------------------------------------------


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
    penalty, arrays = site.penalty
    opt = stage.optimizer(c, site.declared)
    steps = train.make_steps(site.cfg, stage.objective(c), opt, train.Places.of(state), site.dtype, penalty)
    one, lr, useful = batch(site, rows), everywhere((), jnp.float32, site.mesh), _learned(site, rows)
    more = ("penalty",) if penalty else ()
    everything = (*WEIGHTS, "optimiser")
    if times == 1:
        lower = lambda made: steps.step.lower(state, site.frozen, one, lr, arrays)
        return [Program("train step", lower, updates, useful, everything + more)]
    states = (TEACHER,) * times if site.teacher is not None else ()  # an update's, all made before it begins
    total = _placed(jax.eval_shape(steps.begin, state.params, site.frozen, one), state.params, site.mesh)
    add = lambda made: steps.add.lower(total, state.params, site.frozen, one)
    return [
        Program("add gradients", add, times * updates, useful, WEIGHTS, states[1:]),
        Program(
            "apply gradients", lambda made: steps.finish.lower(state, total, lr, arrays), updates, 0.0,
            ("trained weights", "optimiser", *more), states,
        ),
    ]  # fmt: skip


def _placed(total: Any, params: Params, mesh: Mesh) -> Any:
    """Gradients lie beside their parameters, sums everywhere."""
    there = jax.tree.map(lambda x, p: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=p.sharding), total.gradient, params)
    rest = jax.tree.map(lambda x: everywhere(x.shape, x.dtype, mesh), total.replace(gradient=None))
    return rest.replace(gradient=there)


def taught(site: Site, rows: int, calls: int) -> list[Program]:
    """The teacher's states on each device pass of the updates."""
    if site.teacher is None:
        return []
    seen = batch(site, rows, scored=False)
    if site.config.method.objective == "distill":
        seen = seen.replace(prompts=prompts(site, rows, demonstrated(site.config)))
    lower = lambda made: teaching._states(site.cfg, site.dtype).lower(site.teacher, seen)
    return [Program(TEACHER, lower, calls, _forward(site, rows) + _sight(site, rows), ("teacher",))]


def fisher(site: Site) -> list[Program]:
    """EWC after the stage: one example's gradient at a time, and the sum of squares that lives beside it."""
    c, trained = site.config, site.state.params
    if c.method.penalty.name != "ewc":
        return []
    steps = train.make_steps(
        site.cfg, Objective("sft", c.train.chunk), stage.optimizer(c, {}), train.Places(None, ()), site.dtype
    )  # fmt: skip
    one = conversations(site, site.shards)
    gradient = _placed(jax.eval_shape(steps.begin, trained, site.frozen, one), trained, site.mesh).gradient
    add = jax.jit(lambda f, g: penalties.add_fisher(f, g, c.method.penalty.samples), donate_argnums=0)
    return [
        Program("Fisher: sum", lambda made: add.lower(site.penalty[1]["fisher"], gradient), 0.0, 0.0, ()),
        Program("Fisher: gradient", lambda made: steps.begin.lower(trained, site.frozen, one), 0.0, 0.0, WEIGHTS, ("Fisher: sum",)),
    ]


# ---- answers -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Weights:
    """The weights that answers are drawn with: those of the state, or a copy that a program of its own made."""

    of: Callable[[dict[str, Any]], Params]
    holds: tuple[str, ...]
    keeps: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()


def answers(site: Site) -> list[Program]:
    """The offline filter's drawing before the stage, and the stage's own."""
    c, found = site.config, []
    m, filled = c.method, batches.passes(c.train.batch, 0, site.shards, fill=True)[0]
    if m.filter and "samples" in m.filter:
        there = (*WEIGHTS, "stage's start", *(() if c.train.reset_optimizer else ("optimiser",)))
        later = tuple(name for name in site.pieces if name not in there)
        drawn = rollouts(site, "filter", filled, m.filter["samples"], c.rollout, 0.0)
        found += [dataclasses.replace(p, holds=p.holds + later) for p in drawn]
    if m.source == "self":
        found += rollouts(site, "rollouts", filled, m.self_samples, c.rollout, 0.0)
    if m.source == "rollouts":
        made, weights = prepared(site, "rollouts", c.rollout, 1.0)
        found += made + drawing(site, "rollouts", weights, c.train.batch, c.rollout.group, c.rollout, 1.0)
        found += drawing(site, "greedy answers", weights, c.train.batch, 1, c.rollout, 1.0) if m.advantage == "remax" else []
    return found


def exam(site: Site) -> list[Program]:
    """The evaluation's sampler."""
    e = site.config.eval
    rows = max(site.shards, e.batch // site.shards * site.shards)
    return rollouts(site, "evaluation", rows, 1, {**e, "gather": site.config.rollout.gather}, 0.0)


def rollouts(site: Site, name: str, rows: int, group: int, settings: Any, calls: float) -> list[Program]:
    made, weights = prepared(site, name, settings, calls)
    return made + drawing(site, name, weights, rows, group, settings, calls)


def prepared(site: Site, name: str, settings: Any, calls: float) -> tuple[list[Program], Weights]:
    """The weights as rollouts want them, and the program that makes them where they are a copy."""
    gather, int8 = settings["gather"], settings.get("dtype", "") == "int8"
    if not (gather or int8):
        return [], Weights(lambda made: site.params, WEIGHTS)
    dtype, label = jnp.dtype(runtime.arithmetic(settings.get("dtype", ""), site.dtype)), f"{name}: weights"
    leaves, tree = jax.tree.flatten(site.params)
    where = tuple(layout._gathered(x.sharding) if gather else None for x in leaves)
    change = layout._program(site.cfg, dtype, int8, tree, where)
    programs = [Program(label, lambda made: change.lower(site.params), calls, 0.0, WEIGHTS)]
    if int8 or site.cfg.unroll:
        return programs, Weights(lambda made: made[label], (), (label,), (label,))
    # its result is known without compiling it
    moved = tree.unflatten([jax.ShapeDtypeStruct(x.shape, dtype, sharding=s or x.sharding) for x, s in zip(leaves, where, strict=True)])
    return programs, Weights(lambda made: moved, (), (label,))


def drawing(site: Site, name: str, weights: Weights, rows: int, group: int, settings: Any, calls: float) -> list[Program]:
    """Reading prompts and drawing answers: one program, or with `slots` a queue, the pool's opening, its turns and its refilling."""
    if rows % site.shards:
        raise ValueError(f"{name}: {rows} prompts; config.mesh cuts a batch into {site.shards} shards (data x fsdp): expected a multiple")
    new, prompt = settings["max_new_tokens"], site.config.data.prompt_limit
    slots, every = settings.get("slots", 0), settings.get("check_every", 16)
    sampler.check(group, new, every, slots, site.shards)
    plan = Pool(group, new, every, jnp.dtype(runtime.arithmetic(settings.get("dtype", ""), site.dtype)))
    tops = jax.eval_shape(lambda: sampler.draws(jax.random.key(0), site.cfg, site.cfg.eos))
    draws = jax.tree.map(lambda x: everywhere(x.shape, x.dtype, site.mesh), tops)
    read = flops.text_forward(site.cfg, rows, prompt, 1)
    drawn = flops.decode(site.cfg, rows, prompt, group, new)
    asked = (rows_of(site, rows, group), rows_of(site, rows, group))
    if slots and slots < rows:
        return _in_turns(site, name, rows, slots, weights, asked, draws, plan, calls, (read, drawn))
    lower = lambda made: sampler.at_once.lower(weights.of(made), prompts(site, rows), *asked, draws, site.cfg, plan)
    useful = _sight(site, rows) + read + drawn
    return [Program(name, lower, calls, useful, weights.holds, needs=weights.needs, turns=float(new - 1))]


def _in_turns(
    site: Site, name: str, rows: int, slots: int, weights: Weights, asked: tuple, draws: Any, plan: Pool, calls: float,
    useful: tuple[float, float],
) -> list[Program]:  # fmt: skip
    """The programs of `sampler.in_turns`, without those that only move results."""
    cast, queue, pool = f"{name}: cast", f"{name}: queue", f"{name}: read"
    fresh = sampler.refilled(slots, site.shards)
    numbers = lambda n: everywhere((n,), jnp.int32, site.mesh)
    read, drawn = (n * slots / rows for n in useful)
    length = plan.max_new / plan.check_every  # turns of a pool
    fixed, needs, keeps = (draws, site.cfg, plan), weights.needs, weights.keeps
    smaller = lambda made: sampler._weights.lower(weights.of(made), site.cfg, plan)
    see = lambda made: sampler._queue.lower(made[cast], prompts(site, rows), *asked, site.cfg, plan)
    start = lambda made: sampler._open.lower(made[cast], made[queue], numbers(slots), *fixed)
    turn = lambda made: sampler._turn.lower(made[cast], made[pool], *fixed)
    refill = lambda made: sampler._refill.lower(made[cast], made[pool], made[queue], numbers(fresh), numbers(fresh), *fixed)
    used = (*needs, cast, queue, pool)
    return [
        Program(cast, smaller, calls, 0.0, weights.holds, needs=needs),
        Program(queue, see, calls, _sight(site, rows), (), keeps, used[:-2]),
        Program(pool, start, calls, read, (), keeps, used[:-1]),
        Program(f"{name}: draw", turn, calls * rows / slots * length, drawn / length, (), (*keeps, queue), used),
        Program(f"{name}: refill", refill, calls * (rows - slots) / fresh, read * fresh / slots, (), keeps, used),
    ]


def advice(name: str, resident: dict[str, float], mesh: dict[str, int]) -> str:
    """What to change so that a program needs less."""
    size = " ".join(f"{k}={v}" for k, v in mesh.items())
    if name.startswith("filter"):
        return "lower method.filter.samples, set or lower rollout.slots, or lower rollout.max_new_tokens"
    if name.startswith(("rollouts", "greedy")):
        return "set or lower rollout.slots, lower train.batch, rollout.max_new_tokens or data.prompt_limit, or raise mesh.model"
    if name.startswith("evaluation"):
        return "lower eval.batch, eval.max_new_tokens or data.prompt_limit"
    if name == "apply gradients":
        stays = sum(resident.values()) / 2**30
        return f"{stays:.2f} GiB of weights and moments stay: add devices to fsdp or model (now {size}), set model.lora.rank or freeze"
    return f"lower train.micro_batch, set model.remat='block', lower train.chunk, or cut further (mesh now {size})"
