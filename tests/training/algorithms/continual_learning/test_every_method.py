"""Every continual-learning method: under each objective, on a mesh, and after a kill."""

import functools
import math

import jax
import numpy as np
import pytest
import run_helpers
import stage_fixtures
from device_fixtures import devices  # noqa: F401
from stage_fixtures import method_config

from cptjax.common.signals import Preempted
from cptjax.continual import driver
from cptjax.continual.stage_callbacks import StageCallbacks
from cptjax.models.families import PRESETS
from cptjax.training.algorithms.continual_learning.table import CONTINUAL_METHODS

# The settings of each method, by its name: large enough to have an effect in a tiny run.
SETTINGS = {
    "gold": dict(replay=dict(name="gold", fraction=0.5)),
    "prompts": dict(replay=dict(name="prompts", fraction=0.5)),
    "lwf": dict(loss=dict(name="lwf", coef=10.0)),
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
    "l2": dict(penalty=dict(name="l2", coef=100.0)),
}
OBJECTIVES = ("sft", "grpo", "sdft")
# Methods that make no sense under an objective, which a stage refuses.
REFUSED = {("gold", "grpo"), ("gold", "sdft"), ("prompts", "sft"), ("lwf", "sdft")}
CASES = [
    (name, objective)
    for name in SETTINGS
    for objective in OBJECTIVES
    if (name, objective) not in REFUSED
]


def config(objective: str, method: dict, **sections):
    """Two stages of two steps each."""
    more = dict(kl_coef=0.0) if objective == "grpo" else {}
    c = method_config(
        objective,
        steps=2,
        stages=2,
        batch=4,
        method=method | more,
        # With a small eps, Adam would turn rounding of a gradient near 0 into a full step.
        train=dict(lr=1e-2, weight_decay=0.0, eps=1e-3),
        **sections,
    )
    if objective == "sdft":
        c.data.update(prompt_limit=128, buckets=(128,))
    return c


def trained(c, folder) -> tuple[list[np.ndarray], list[dict]]:
    _, model_state, lines = stage_fixtures.train_all_stages(c, folder)
    return jax.tree.leaves(jax.device_get(model_state.params)), lines


@functools.cache
def without_method(objective: str, folder) -> list[np.ndarray]:
    return trained(config(objective, {}), folder)[0]


def test_every_method_of_the_table_is_in_this_file():
    names = {cls.name for classes in CONTINUAL_METHODS.values() for cls in classes}
    assert names == set(SETTINGS)


@pytest.mark.parametrize(("name", "objective"), CASES)
def test_a_method_has_an_effect_under_each_objective(name, objective, tmp_path, tmp_path_factory):
    plain = without_method(objective, tmp_path_factory.getbasetemp() / f"plain-{objective}")
    params, lines = trained(config(objective, SETTINGS[name]), tmp_path)
    steps = [line for line in lines if "event" not in line]
    assert all(math.isfinite(line["loss"]) and line["skipped"] == 0 for line in steps)
    assert all(np.isfinite(x).all() for x in params)
    assert max(np.abs(a - b).max() for a, b in zip(params, plain, strict=True)) > 1e-5


@pytest.mark.parametrize("name", SETTINGS)
def test_a_method_gives_the_same_weights_on_a_mesh(name, tmp_path, devices):
    objective = "grpo" if (name, "sft") in REFUSED else "sft"
    sizes = dict(data=2, fsdp=2, model=2)
    one = trained(config(objective, SETTINGS[name]), tmp_path / "one")[0]
    mesh = trained(config(objective, SETTINGS[name], mesh=sizes), tmp_path / "mesh")[0]
    for a, b in zip(one, mesh, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(("name", "count"), [*((name, 1) for name in SETTINGS), ("ewc", 8)])
def test_a_run_with_a_method_resumes_to_the_same_bits(name, count, tmp_path, monkeypatch, devices):
    """The run is stopped in the middle of its second stage, and after its first one."""
    devices(count)
    objective = "grpo" if (name, "sft") in REFUSED else "sft"
    families = ("facts", "arithmetic")
    c = run_helpers.config(
        objective,
        method=SETTINGS[name],
        tasks={family: dict(task="synthetic", family=family) for family in families},
        stages=tuple({"task": family, "steps": 2} for family in families),
        eval=dict(before=False, tasks="facts", limit=2),
        checkpoint=dict(every=1),
    )
    monkeypatch.setitem(PRESETS, "tiny", stage_fixtures.SMALL)
    driver.run(c, tmp_path / "whole")
    after_step = StageCallbacks.after_step
    for stop_at in ((1, 2), (2, 1)):

        def stopped(self, state, progress, *more, stop_at=stop_at):
            go_on = after_step(self, state, progress, *more)
            if (self.stage.number, progress.step) == stop_at:
                self.run.files.checkpoints.wait()
                raise Preempted
            return go_on

        monkeypatch.setattr(StageCallbacks, "after_step", stopped)
        with pytest.raises(Preempted):
            driver.run(c, tmp_path / "cut")
    monkeypatch.setattr(StageCallbacks, "after_step", after_step)
    driver.run(c, tmp_path / "cut")
    states = (run_helpers.run_state(tmp_path / name) for name in ("whole", "cut"))
    run_helpers.assert_same(*states)
