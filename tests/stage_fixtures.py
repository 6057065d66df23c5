"""Tiny versions of any config: the tiny model with one layer, text tasks drawn from a seed, a coin as scorer, no files but the log."""

import contextlib
import dataclasses
import functools
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from cptjax import sharding
from cptjax.common.files import read_jsonl
from cptjax.config import resolve_stages
from cptjax.continual import open_run, reference_models, train_stage
from cptjax.continual.model_state import ModelState, restore_stage_params, split_trained
from cptjax.continual.open_run import Run
from cptjax.models import load, trainable
from cptjax.models.config import PRESETS
from cptjax.training import build, train_step, validate_config

MAKE_MESH = sharding.make_mesh
SMALL = dataclasses.replace(
    PRESETS["tiny"],
    text=dataclasses.replace(PRESETS["tiny"].text, depth=1, mlp=64),
    vision=dataclasses.replace(PRESETS["tiny"].vision, depth=1, full_blocks=(0,)),
    eos=(2, 0, *range(40, 320, 4)),  # so that a random model often ends its answer
)


def coin(prediction: str, answer: Any, meta: Any = None) -> float:
    """A score that a random model reaches half of the time."""
    return float(zlib.crc32(prediction.encode()) % 2)


class Unsaved:
    """Checkpoints that are never written."""

    def __init__(self, *_: Any, **__: Any):
        self.kept: list[tuple] = []

    def due(self, step: int) -> bool:
        return False

    def save(self, *what: Any) -> None:
        self.kept.append(what)

    def wait(self) -> None:
        """Nothing is under way."""

    close = wait


def tiny(
    config: ConfigDict,
    steps: int = 1,
    stages: int = 1,
    batch: int = 4,
    family: str = "arithmetic",
    **tasks: Any,
) -> ConfigDict:
    """The config with everything small; its method stays."""
    c = ConfigDict(config.to_dict())
    with c.unlocked(), c.ignore_type():
        names = dict.fromkeys(
            t for s in c.stages for t in ((s["task"],) if isinstance(s["task"], str) else s["task"])
        )
        c.tasks = ConfigDict(
            {n: dict(task="synthetic", family=family, scorer=coin) | tasks for n in names}
        )
        c.stages = tuple(
            {k: v for k, v in s.items() if k != "epochs"} | {"steps": steps}
            for s in c.stages[:stages]
        )
        c.model.update(
            path="",
            preset="tiny",
            compute_dtype="float32",
            remat="none",
            min_pixels=1024,
            max_pixels=1024,
        )
        c.model.lora.rank = min(c.model.lora.rank, 2)
        c.data.update(prompt_limit=32, buckets=(32,), limit=8, workers=0)
        c.train.update(batch=batch, micro_batch=0)
        c.rollout.update(group=2, max_new_tokens=4, check_every=4)
        c.eval.update(
            general=(), before=False, limit=8, batch=8, max_new_tokens=4, every=None, drift=0
        )
        c.method.update(overlong=min(c.method.overlong, 2), self_samples=8)
        if c.method.filter:
            c.method.filter = dict(c.method.filter, samples=3) | (
                {"hi": 3} if "hi" in c.method.filter else {}
            )
        c.method.penalty.samples = min(c.method.penalty.samples, 2)
        c.method.updates_per_batch = min(c.method.updates_per_batch, 2)
    return c


@contextlib.contextmanager
def opened(
    config: ConfigDict, workdir: Path, model: Any = SMALL
) -> Iterator[tuple[Run, ModelState]]:
    """A run without checkpoints, and its base model, on as many devices as the mesh names, on one where it names none."""
    with contextlib.ExitStack() as stack:
        sizes = [max(config.mesh[axis], 1) for axis in sharding.AXES]
        some = functools.partial(MAKE_MESH, *sizes, jax.devices()[: math.prod(sizes)])
        patched(stack, sharding, "make_mesh", lambda **_: some())
        patched(stack, open_run, "Checkpoints", Unsaved)
        stack.enter_context(contextlib.closing(_Presets(model)))
        run = open_run.open_run(config, workdir)
        stack.callback(run.sandbox.close)
        stack.callback(run.files.log.close)
        yield run, ModelState(restore_stage_params(config, run.model_ctx, None, 0))


def patched(stack: contextlib.ExitStack, owner: Any, name: str, value: Any) -> None:
    before = getattr(owner, name)
    setattr(owner, name, value)
    stack.callback(setattr, owner, name, before)


class _Presets:
    def __init__(self, model: Any):
        self.before = PRESETS["tiny"]
        PRESETS["tiny"] = model

    def close(self) -> None:
        PRESETS["tiny"] = self.before


def train_all_stages(
    config: ConfigDict, workdir: Path, model: Any = SMALL
) -> tuple[Run, ModelState, list[dict]]:
    """Train every stage in turn; return the run, the last model, and the lines of metrics.jsonl."""
    for stage in resolve_stages(config):
        validate_config.validate_stage(stage)
    with opened(config, workdir, model) as (run, model_state):
        for stage in run.stages:
            model_state = train_stage.train_stage(run, stage, model_state)
    return run, model_state, read_jsonl(workdir / "metrics.jsonl")


@dataclasses.dataclass
class Desk:
    """A stage in the middle: everything that `learning.learn` makes before its loop."""

    run: Run
    ctx: Any
    state: Any
    frozen: Any
    steps: Any
    extra: Any

    @property
    def params(self) -> Any:
        return trainable.join_params(self.state.params, self.frozen)

    def update(self, batches: list, lr: float = 1e-3) -> tuple[Any, dict[str, float]]:
        """One update on copies: the desk's own state is kept."""
        with jax.set_mesh(self.run.model_ctx.mesh):
            state, metrics = self.steps.run(
                jax.tree.map(jnp.copy, self.state), self.frozen, batches, lr, self.extra
            )
        return state, {k: v.value for k, v in jax.device_get(metrics).items()}


@contextlib.contextmanager
def desk(config: ConfigDict, workdir: Path, number: int = 1, model: Any = SMALL) -> Iterator[Desk]:
    """Stage `number` of a tiny config, about to start."""
    with opened(config, workdir, model) as (run, model_state):
        stage = run.stages[number - 1]
        validate_config.validate_stage(stage)
        trained, frozen = split_trained(config, model_state.params)
        start = run.copy_for_comparison(model_state.params)
        ctx = train_stage.make_stage_context(run, stage, model_state.params, start)
        opt = build.optimizer_from_config(
            stage.config, load.declare_model_params(stage.config.model, run.model_ctx.cfg)
        )
        state = train_step.init_state(opt, trained, run.model_ctx.mesh)
        penalty, extra = reference_models.make_penalty(run, stage, start, None)
        steps = train_step.make_step_programs(
            run.model_ctx.cfg,
            build.objective_from_config(stage.config),
            opt,
            train_step.StateShardings.of(state),
            run.model_ctx.dtype,
            penalty,
        )
        yield Desk(run, ctx, state, frozen, steps, extra)
