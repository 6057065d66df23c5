"""The programs of a stage at the largest shapes that its config allows, as functions that lower them without arrays."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from cptjax.data import device_batches
from cptjax.data.collate import max_image_slots
from cptjax.generation import rollout_weights, sampler
from cptjax.generation.decode_pool import StaticSettings
from cptjax.generation.sampling_config import SamplingConfig, eval_sampling, rollout_sampling
from cptjax.models import flops, logprobs
from cptjax.planning.stage_shapes import (
    StageShapes,
    batch_axis_shape,
    batch_shapes,
    conversation_shapes,
    device_passes,
    longest_demonstrated_prompt,
    longest_trained_row,
    prompt_shapes,
    replicated_shape,
)
from cptjax.training import build, train_step
from cptjax.training.algorithms import distillation, regularizers
from cptjax.training.algorithms.losses import LossConfig
from cptjax.training.algorithms.objective import Objective
from cptjax.types import Params

PROGRAM_SECTIONS = (
    "model",
    "mesh",
    "data",
    "method",
    "rollout",
    "train",
    "eval",
)  # of a config: what programs depend on
WEIGHT_PIECES = ("trained weights", "frozen weights")
TEACHER_STATES = "teacher states"


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


def stage_programs(site: StageShapes) -> list[Program]:
    """The programs of a stage in the order in which it runs them, and the evaluation's."""
    c = site.config
    rows, times = device_passes(c, site.shards)
    updates = c.method.updates_per_batch * c.method.passes if c.method.source == "rollouts" else 1
    found = (
        training_rollout_programs(site)
        + scoring_programs(site, rows, times * c.method.updates_per_batch)
        + teacher_programs(site, rows, times * updates)
    )
    return (
        found
        + update_programs(site, rows, times, updates)
        + fisher_programs(site)
        + evaluation_programs(site)
    )


# ---- arithmetic by hand --------------------------------------------------------------------------------------------------


def _vision_flops(site: StageShapes, rows: int) -> float:
    slots = max_image_slots(site.cfg, site.config.model.max_pixels)
    return flops.vision_forward_flops(site.cfg, rows * slots, slots)


def _text_flops(site: StageShapes, rows: int) -> float:
    """The text of one device pass."""
    r, length = site.config.rollout, longest_trained_row(site.config)
    if site.config.method.source == "rollouts":
        return flops.group_forward_flops(site.cfg, rows, length, r.group, r.max_new_tokens)
    return flops.text_forward_flops(site.cfg, rows, length, length)


def _update_flops(site: StageShapes, rows: int) -> float:
    """Forward and backward; frozen weights need no gradient of their own, a frozen tower no backward pass."""
    m = site.config.model
    factor = 2 if m.lora.rank or "language" in m.freeze else 3
    sight = 1 if "vision" in m.freeze else factor
    return factor * _text_flops(site, rows) + sight * _vision_flops(site, rows)


# ---- learning ------------------------------------------------------------------------------------------------------------


def scoring_programs(site: StageShapes, rows: int, calls: int) -> list[Program]:
    """Log-probabilities under the reference, and under the policy where an update needs those of its start."""
    c = site.config
    m, temperature = c.method, c.rollout.temperature if c.method.objective == "policy" else 1.0
    run = logprobs.make_scoring_program(site.cfg, site.dtype, c.train.chunk, temperature)
    lower = lambda params: lambda made: run.lower(params, batch_shapes(site, rows, scored=False))
    useful = _text_flops(site, rows) + _vision_flops(site, rows)
    own = m.source == "rollouts" and (
        m.updates_per_batch * m.passes > 1 or (m.kl_coef and m.kl_place == "reward")
    )
    found = (
        [Program("reference log-probs", lower(site.reference), calls, useful, ("reference",))]
        if site.reference is not None
        else []
    )
    return found + (
        [Program("own log-probs", lower(site.params), calls, useful, WEIGHT_PIECES)] if own else []
    )


def update_programs(site: StageShapes, rows: int, times: int, updates: int) -> list[Program]:
    """One fused step; or gradients that add up over micro-batches, and their application."""
    c, state = site.config, site.state
    penalty, arrays = site.penalty
    opt = build.optimizer_from_config(c, site.declared)
    steps = train_step.make_step_programs(
        site.cfg,
        build.objective_from_config(c),
        opt,
        train_step.StateShardings.of(state),
        site.dtype,
        penalty,
    )
    one, lr, useful = (
        batch_shapes(site, rows),
        replicated_shape((), jnp.float32, site.mesh),
        _update_flops(site, rows),
    )
    more = ("penalty",) if penalty else ()
    everything = (*WEIGHT_PIECES, "optimiser")
    if times == 1:
        lower = lambda made: steps.step.lower(state, site.frozen, one, lr, arrays)
        return [Program("train step", lower, updates, useful, everything + more)]
    states = (
        (TEACHER_STATES,) * times if site.teacher is not None else ()
    )  # an update's, all made before it begins
    total = _place_total(
        jax.eval_shape(steps.begin, state.params, site.frozen, one), state.params, site.mesh
    )
    add = lambda made: steps.add.lower(total, state.params, site.frozen, one)
    return [
        Program("add gradients", add, times * updates, useful, WEIGHT_PIECES, states[1:]),
        Program(
            "apply gradients",
            lambda made: steps.finish.lower(state, total, lr, arrays),
            updates,
            0.0,
            ("trained weights", "optimiser", *more),
            states,
        ),
    ]


def _place_total(total: Any, params: Params, mesh: Mesh) -> Any:
    """Gradients lie beside their parameters, sums everywhere."""
    there = jax.tree.map(
        lambda x, p: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=p.sharding),
        total.gradient,
        params,
    )
    rest = jax.tree.map(
        lambda x: replicated_shape(x.shape, x.dtype, mesh), total.replace(gradient=None)
    )
    return rest.replace(gradient=there)


def teacher_programs(site: StageShapes, rows: int, calls: int) -> list[Program]:
    """The teacher's states on each device pass of the updates."""
    if site.teacher is None:
        return []
    seen = batch_shapes(site, rows, scored=False)
    if site.config.method.objective == "distill":
        seen = seen.replace(
            prompts=prompt_shapes(site, rows, longest_demonstrated_prompt(site.config))
        )
    lower = lambda made: distillation.make_teacher_program(site.cfg, site.dtype).lower(
        site.teacher, seen
    )
    return [
        Program(
            TEACHER_STATES,
            lower,
            calls,
            _text_flops(site, rows) + _vision_flops(site, rows),
            ("teacher",),
        )
    ]


def fisher_programs(site: StageShapes) -> list[Program]:
    """EWC after the stage: one example's gradient at a time, and the sum of squares that lives beside it."""
    c, trained = site.config, site.state.params
    if c.method.penalty.name != "ewc":
        return []
    steps = train_step.make_step_programs(
        site.cfg,
        Objective(LossConfig.plain("sft", c.train.chunk)),
        build.optimizer_from_config(c, {}),
        train_step.StateShardings(None, ()),
        site.dtype,
    )
    one = conversation_shapes(site, site.shards)
    gradient = _place_total(
        jax.eval_shape(steps.begin, trained, site.frozen, one), trained, site.mesh
    ).gradient
    add = jax.jit(
        lambda f, g: regularizers.add_fisher(f, g, c.method.penalty.samples), donate_argnums=0
    )
    return [
        Program(
            "Fisher: sum", lambda made: add.lower(site.penalty[1]["fisher"], gradient), 0.0, 0.0, ()
        ),
        Program(
            "Fisher: gradient",
            lambda made: steps.begin.lower(trained, site.frozen, one),
            0.0,
            0.0,
            WEIGHT_PIECES,
            ("Fisher: sum",),
        ),
    ]


# ---- answers -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class SamplingWeights:
    """The weights that answers are drawn with: those of the state, or a copy that a program of its own made."""

    of: Callable[[dict[str, Any]], Params]
    holds: tuple[str, ...]
    keeps: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()


def training_rollout_programs(site: StageShapes) -> list[Program]:
    """The offline filter's sampling before the stage, and the stage's own."""
    c, found = site.config, []
    m, filled = (
        c.method,
        device_batches.micro_batch_layout(c.train.batch, 0, site.shards, fill=True)[0],
    )
    sampling = rollout_sampling(c)
    if m.filter and "samples" in m.filter:
        there = (
            *WEIGHT_PIECES,
            "stage's start",
            *(() if c.train.reset_optimizer else ("optimiser",)),
        )
        later = tuple(name for name in site.pieces if name not in there)
        several = dataclasses.replace(sampling, group=m.filter["samples"])
        sampled = rollout_programs(site, "filter", filled, several, 0.0)
        found += [dataclasses.replace(p, holds=p.holds + later) for p in sampled]
    if m.source == "self":
        several = dataclasses.replace(sampling, group=m.self_samples)
        found += rollout_programs(site, "rollouts", filled, several, 0.0)
    if m.source == "rollouts":
        made, weights = weight_programs(site, "rollouts", sampling, 1.0)
        found += made + sampling_programs(site, "rollouts", weights, c.train.batch, sampling, 1.0)
        if m.advantage == "remax":
            greedy = dataclasses.replace(sampling, group=1)
            found += sampling_programs(
                site, "greedy responses", weights, c.train.batch, greedy, 1.0
            )
    return found


def evaluation_programs(site: StageShapes) -> list[Program]:
    """The evaluation's sampler."""
    e = site.config.eval
    rows = max(site.shards, e.batch // site.shards * site.shards)
    return rollout_programs(site, "evaluation", rows, eval_sampling(site.config), 0.0)


def rollout_programs(
    site: StageShapes, name: str, rows: int, sampling: SamplingConfig, calls: float
) -> list[Program]:
    """Sampling of `rows` prompts, with the program that prepares the weights where there is one."""
    made, weights = weight_programs(site, name, sampling, calls)
    return made + sampling_programs(site, name, weights, rows, sampling, calls)


def weight_programs(
    site: StageShapes, name: str, sampling: SamplingConfig, calls: float
) -> tuple[list[Program], SamplingWeights]:
    """The weights that rollouts take, and the program that makes them where they are a copy."""
    change = rollout_weights.weights_program(site.params, site.cfg, sampling, site.dtype)
    if change is None:
        return [], SamplingWeights(lambda made: site.params, WEIGHT_PIECES)
    label = f"{name}: weights"
    programs = [Program(label, lambda made: change.lower(site.params), calls, 0.0, WEIGHT_PIECES)]
    if sampling.dtype == "int8" or site.cfg.unroll:
        return programs, SamplingWeights(lambda made: made[label], (), (label,), (label,))
    # its result is known without compiling it
    dtype = sampling.compute_dtype(site.dtype)
    moved = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, dtype, sharding=rollout_weights.without_fsdp(x.sharding)
        ),
        site.params,
    )
    return programs, SamplingWeights(lambda made: moved, (), (label,))


def sampling_programs(
    site: StageShapes,
    name: str,
    weights: SamplingWeights,
    rows: int,
    sampling: SamplingConfig,
    calls: float,
) -> list[Program]:
    """Reading prompts and sampling responses: one program, or with `slots` a queue, the pool's opening, its turns and its refilling."""
    if rows % site.shards:
        raise ValueError(
            f"{name}: {rows} prompts; config.mesh cuts a batch into {site.shards} shards (data x fsdp): expected a multiple"
        )
    prompt, group, new = site.config.data.prompt_limit, sampling.group, sampling.max_new_tokens
    sampling.check_batch_shards(site.shards)
    static = sampler.static_settings(sampling, site.dtype)
    tops = jax.eval_shape(
        lambda: sampler.traced_settings(sampling, jax.random.key(0), site.cfg, site.cfg.eos)
    )
    draws = jax.tree.map(lambda x: replicated_shape(x.shape, x.dtype, site.mesh), tops)
    read = flops.text_forward_flops(site.cfg, rows, prompt, 1)
    drawn = flops.decode_flops(site.cfg, rows, prompt, group, new)
    asked = (batch_axis_shape(site, rows, group), batch_axis_shape(site, rows, group))
    slots = sampling.slots
    if slots and slots < rows:
        return _pool_programs(
            site, name, rows, slots, weights, asked, draws, static, calls, (read, drawn)
        )
    lower = lambda made: sampler.sample_whole_batch.lower(
        weights.of(made), prompt_shapes(site, rows), *asked, draws, site.cfg, static
    )
    useful = _vision_flops(site, rows) + read + drawn
    return [
        Program(
            name, lower, calls, useful, weights.holds, needs=weights.needs, turns=float(new - 1)
        )
    ]


def _pool_programs(
    site: StageShapes,
    name: str,
    rows: int,
    slots: int,
    weights: SamplingWeights,
    asked: tuple,
    draws: Any,
    plan: StaticSettings,
    calls: float,
    useful: tuple[float, float],
) -> list[Program]:
    """The programs of `sampler.sample_with_refill`, without those that only move results."""
    cast, queue, pool = f"{name}: cast", f"{name}: queue", f"{name}: prefill"
    fresh = sampler.refill_size(slots, site.shards)
    numbers = lambda n: replicated_shape((n,), jnp.int32, site.mesh)
    read, drawn = (n * slots / rows for n in useful)
    length = plan.max_new_tokens / plan.check_every  # turns of a pool
    fixed, needs, keeps = (draws, site.cfg, plan), weights.needs, weights.keeps
    smaller = lambda made: sampler.cast_program.lower(weights.of(made), site.cfg, plan)
    see = lambda made: sampler.queue_program.lower(
        made[cast], prompt_shapes(site, rows), *asked, site.cfg, plan
    )
    start = lambda made: sampler.prefill_program.lower(
        made[cast], made[queue], numbers(slots), *fixed
    )
    turn = lambda made: sampler.decode_program.lower(made[cast], made[pool], *fixed)
    refill = lambda made: sampler.refill_program.lower(
        made[cast], made[pool], made[queue], numbers(fresh), numbers(fresh), *fixed
    )
    used = (*needs, cast, queue, pool)
    return [
        Program(cast, smaller, calls, 0.0, weights.holds, needs=needs),
        Program(queue, see, calls, _vision_flops(site, rows), (), keeps, used[:-2]),
        Program(pool, start, calls, read, (), keeps, used[:-1]),
        Program(
            f"{name}: decode",
            turn,
            calls * rows / slots * length,
            drawn / length,
            (),
            (*keeps, queue),
            used,
        ),
        Program(
            f"{name}: refill",
            refill,
            calls * (rows - slots) / fresh,
            read * fresh / slots,
            (),
            keeps,
            used,
        ),
    ]


def memory_advice(name: str, resident: dict[str, float], mesh: dict[str, int]) -> str:
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
