"""Every continual-learning method: under each objective, on a mesh, and after a kill.

CPTJAX_LONG=1 runs all cases. Otherwise each method runs under one objective, and one method of each
kind of state runs on a mesh and after a kill.
"""

import functools
import math
import os
import shutil
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
import stage_fixtures
from stage_fixtures import method_config

from cptjax.common.files import read_jsonl
from cptjax.config import resolve_stages
from cptjax.continual import resume, train_stage
from cptjax.continual.stage_callbacks import StageCallbacks
from cptjax.training import validate_config
from cptjax.training.algorithms.continual_learning.table import CONTINUAL_METHODS

# The settings of each method, by its name: large enough to have an effect in a tiny run.
SETTINGS = {
    "gold": dict(replay=dict(name="gold", fraction=0.5)),
    "prompts": dict(replay=dict(name="prompts", fraction=0.5)),
    "lwf": dict(loss=dict(name="lwf", coef=10.0)),
    "er": dict(replay=dict(name="er", rows=6, tokens=8, batch=4)),
    "der": dict(replay=dict(name="der", rows=6, tokens=8, batch=4, top_k=4, alpha=5.0)),
    "derpp": dict(replay=dict(name="derpp", max_bytes=2000, tokens=8, batch=4, top_k=4)),
    "agem": dict(gradient=dict(name="agem", rows=6, tokens=8, batch=4)),
    "wise_ft": dict(stage_end=dict(name="wise_ft", weight=0.5)),
    "task_arithmetic": dict(stage_end=dict(name="task_arithmetic")),
    "ties": dict(stage_end=dict(name="ties", density=0.5)),
    "dare": dict(stage_end=dict(name="dare", density=0.5)),
    "max_merge": dict(stage_end=dict(name="max_merge")),
    "ewc": dict(penalty=dict(name="ewc", coef=1e4, samples=2)),
    "online_ewc": dict(penalty=dict(name="online_ewc", coef=1e4, samples=2, decay=0.5)),
    "si": dict(penalty=dict(name="si", coef=1e4)),
    "mas": dict(penalty=dict(name="mas", coef=10.0, samples=2)),
    "cpo": dict(penalty=dict(name="cpo", coef=1.0)),
    "rapo": dict(reward=dict(name="rapo"), advantage="dr_grpo"),
    "l2": dict(penalty=dict(name="l2", coef=100.0)),
    "gpm": dict(gradient=dict(name="gpm", rank=8, samples=2, layers=("q", "o", "down"))),
    "merge_lora": dict(parameters=dict(name="merge_lora")),
    "o_lora": dict(parameters=dict(name="o_lora", coef=10.0)),
}
ADAPTERS = ("merge_lora", "o_lora")  # methods that need them
OBJECTIVES = ("sft", "grpo", "sdft")
# Methods that make no sense under an objective, which a stage refuses.
REFUSED = {
    *(("gold", "grpo"), ("gold", "sdft"), ("prompts", "sft"), ("lwf", "sdft")),
    *(("rapo", "sft"), ("rapo", "sdft")),
}
ALLOWED = {name: [o for o in OBJECTIVES if (name, o) not in REFUSED] for name in SETTINGS}
CASES = [(name, objective) for name, allowed in ALLOWED.items() for objective in allowed]
# One objective for each method in turn, the same in all tests, so that they share programs.
OBJECTIVE = {name: allowed[i % len(allowed)] for i, (name, allowed) in enumerate(ALLOWED.items())}
# They keep: importance, a mask, rows of data, directions, adapters, sums of task vectors.
ON_A_MESH = ("ewc", "cpo", "derpp", "gpm", "o_lora")
KILLED = ("prompts", "derpp", "agem", "ties", "online_ewc", "si", "cpo", "rapo", "gpm", "o_lora")
if os.environ.get("CPTJAX_LONG"):
    ON_A_MESH = KILLED = tuple(SETTINGS)
else:
    CASES = list(OBJECTIVE.items())


def sections(name: str) -> dict:
    """The changed sections of a config with a method."""
    model = dict(lora=dict(rank=2)) if name in ADAPTERS else {}
    return dict(method=SETTINGS.get(name, {}), model=model)


def config(objective: str, method: dict, **sections):
    """Two stages of two steps each."""
    more = dict(kl_coef=0.0) if objective == "grpo" else {}
    c = method_config(
        objective,
        steps=2,
        stages=2,
        batch=8,
        method=method | more,
        # With a small eps, Adam would turn rounding of a gradient near 0 into a full step. With
        # micro-batches, the forward and backward pass is a program that most methods share.
        train=dict(lr=1e-2, weight_decay=0.0, eps=1e-3, micro_batch=4),
        **sections,
    )
    if objective == "sdft":
        c.data.update(prompt_limit=128, buckets=(128,))
    return c


class Trained(NamedTuple):
    """What a run of both stages leaves."""

    params: list[np.ndarray]
    lines: list[dict]
    kept: Any  # of its method


def trained(c, folder) -> Trained:
    _, model_state, lines = stage_fixtures.train_all_stages(c, folder)
    params, kept = jax.device_get((model_state.params, model_state.kept))
    return Trained(jax.tree.leaves(params), lines, kept)


@functools.cache
def without_method(objective: str, adapters: bool, folder) -> list[np.ndarray]:
    model = sections(ADAPTERS[0])["model"] if adapters else {}
    return trained(config(objective, {}, model=model), folder / f"{objective}-{adapters}").params


@functools.cache
def with_method(name: str, objective: str, folder) -> Trained:
    """The run of a method on one device, which all tests share."""
    if name in KILLED and objective == OBJECTIVE[name]:
        return run_with_copies(name, 1, folder)
    return trained(config(objective, **sections(name)), folder / f"{name}-{objective}")


def killed_config(name: str, shards: int):
    c = config(
        OBJECTIVE[name], **sections(name), mesh=dict(fsdp=shards), checkpoint=dict(every=1, keep=10)
    )
    c.train.batch = max(c.train.batch, shards)
    return c


@functools.cache
def run_with_copies(name: str, shards: int, folder) -> Trained:
    """Train without a disturbance, and copy the workdir twice.

    After the first stage ("between"), and in the second ("inside").
    """
    c, after_step, folder = killed_config(name, shards), StageCallbacks.after_step, folder / name

    def copy_workdir(run, where):
        run.files.checkpoints.wait()
        shutil.copytree(run.files.workdir, folder / f"{where}-{shards}")

    def copying(self, state, progress, *more):
        go_on = after_step(self, state, progress, *more)
        if (self.stage.number, progress.step) == (2, 1):
            copy_workdir(self.run, "inside")
        return go_on

    workdir = folder / f"whole-{shards}"
    for stage in resolve_stages(c):
        validate_config.validate_stage(stage)
    with stage_fixtures.open_tiny_run(c, workdir, saved=True) as (run, model_state):
        model_state = train_stage.train_stage(run, run.stages[0], model_state)
        copy_workdir(run, "between")
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(StageCallbacks, "after_step", copying)
            model_state = train_stage.train_stage(run, run.stages[1], model_state)
        run.files.checkpoints.wait()
        params, kept = jax.device_get((model_state.params, model_state.kept))
    return Trained(jax.tree.leaves(params), read_jsonl(workdir / "metrics.jsonl"), kept)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


def test_every_method_of_the_table_is_in_this_file():
    names = {cls.name for classes in CONTINUAL_METHODS.values() for cls in classes}
    assert names == set(SETTINGS)


@pytest.mark.parametrize(("name", "objective"), CASES)
def test_a_method_has_an_effect_under_each_objective(name, objective, folder):
    plain = without_method(objective, name in ADAPTERS, folder)
    run = with_method(name, objective, folder)
    steps = [line for line in run.lines if "event" not in line]
    assert all(math.isfinite(line["loss"]) and line["skipped"] == 0 for line in steps)
    assert all(np.isfinite(x).all() for x in run.params)
    moved = max(np.abs(a - b).max() for a, b in zip(run.params, plain, strict=True))
    # A-GEM changes only an update that opposes the memory.
    acts = any(line.get("agem/projected", 1) for line in steps[2:])
    assert moved > 1e-5 if acts else moved < 1e-6


@pytest.mark.parametrize("name", ON_A_MESH)
def test_a_method_gives_the_same_weights_on_a_mesh(name, folder, tmp_path):
    objective, sizes = OBJECTIVE[name], dict(data=2, fsdp=2, model=2)
    one = with_method(name, objective, folder).params
    mesh = trained(config(objective, **sections(name), mesh=sizes), tmp_path).params
    for a, b in zip(one, mesh, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("where", ["between", "inside"])
@pytest.mark.parametrize(("name", "shards"), [*((name, 1) for name in KILLED), ("ewc", 8)])
def test_a_run_with_a_method_resumes_to_the_same_bits(name, shards, where, folder):
    """A kill leaves what was on the disk between the stages, or in the middle of the second one."""
    whole, c = run_with_copies(name, shards, folder), killed_config(name, shards)
    workdir = folder / name / f"{where}-{shards}"
    with stage_fixtures.open_tiny_run(c, workdir, saved=True) as (run, _):
        point, model_state = resume.resume_run(run)
        assert point.stage == {"between": 1, "inside": 2}[where]
        assert (point.unfinished is None) == (where == "between")
        end = train_stage.train_stage(run, run.stages[1], model_state, point.unfinished)
        run.files.checkpoints.wait()
        params, kept = jax.device_get((end.params, end.kept))
    again, wanted = (jax.tree.leaves(params), kept), (whole.params, whole.kept)
    jax.tree.map(np.testing.assert_array_equal, again, wanted)
