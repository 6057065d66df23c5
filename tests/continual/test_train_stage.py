"""The training of a stage: refusals, optimizer state, compilation, distance from its start."""

import dataclasses

import jax
import numpy as np
import pytest
import run_helpers
import stage_fixtures
from device_fixtures import devices  # noqa: F401
from stage_fixtures import method_config

from cptjax import sharding
from cptjax.benchmark.phase_times import CompilationCounter
from cptjax.config import merge_config
from cptjax.continual import offline_filter, train_stage


@pytest.fixture
def prepared(tmp_path):
    method = dict(ratio="token", updates_per_batch=2, kl_coef=0.0)
    with stage_fixtures.prepare_stage(method_config("grpo", method=method), tmp_path) as prepared:
        yield prepared


def test_a_batch_that_the_shards_do_not_divide_is_refused_before_sampling(prepared, monkeypatch):
    monkeypatch.setattr(offline_filter, "count_correct", lambda *_: pytest.fail("sampled"))
    monkeypatch.setattr(sharding, "batch_shards", lambda mesh: 4)
    stage = prepared.ctx.stage
    stage = dataclasses.replace(
        stage,
        config=merge_config(
            stage.config, {"method": {"filter": dict(name="incompetent", samples=2)}}
        ),
    )
    with pytest.raises(ValueError, match="2 prompts.* 4 shards"):
        train_stage.make_stage_context(prepared.run, stage, prepared.params, None)


def test_penalties_and_averages_hold_a_stage_near_its_start(tmp_path):
    distance = {}
    start = None
    cases = {
        "none": {},
        "l2": dict(penalty=dict(name="l2", coef=100.0)),
        "wise": dict(stage_end=dict(name="wise_ft", weight=0.75)),
    }
    for name, method in cases.items():
        c = method_config("sft", steps=6, method=method, train=dict(lr=1e-2, weight_decay=0.0))
        with stage_fixtures.open_tiny_run(c, tmp_path / name) as (run, model_state):
            start = jax.device_get(model_state.params)
            model_state = train_stage.train_stage(run, run.stages[0], model_state)
            gaps = jax.tree.map(
                lambda a, b: float(np.square(a - b).sum()),
                start,
                jax.device_get(model_state.params),
            )
            distance[name] = np.sqrt(sum(jax.tree.leaves(gaps)))
    assert distance["wise"] == pytest.approx(0.25 * distance["none"], rel=1e-3)
    assert distance["l2"] < 0.8 * distance["none"]


def test_the_optimizer_state_is_kept_between_stages_if_the_config_says_so(tmp_path, devices):
    """Two stages on one task with the optimizer kept are one stage of twice the steps in what AdamW
    knows; a reset is not.
    """
    two = ({"task": "facts", "steps": 2}, {"task": "facts", "steps": 2})
    losses = {}
    for keep in (True, False):
        run_helpers.run_quickly(
            tmp_path / str(keep),
            stages=two,
            train={"reset_optimizer": not keep},
            eval={"before": False, "limit": 2},
            seed=3,
        )
        losses[keep] = [x["loss"] for x in run_helpers.metrics_lines(tmp_path / str(keep))]
        kept = tmp_path / str(keep) / "checkpoints" / "stages"
        assert [(p / "opt_state").exists() for p in sorted(kept.iterdir())] == [keep, False]
    assert losses[True][:3] == losses[False][:3] and losses[True][3] != losses[False][3]
    other = (
        {"task": "facts", "steps": 1},
        {
            "task": "facts",
            "steps": 1,
            "train": {"optimizer": "adafactor", "reset_optimizer": False},
        },
    )
    with pytest.raises(
        ValueError,
        match="stage 2: train.reset_optimizer=False: expected the optimizer of the stage before",
    ):
        run_helpers.run_quickly(
            tmp_path / "other", stages=other, eval={"before": False, "limit": 2}
        )


@pytest.mark.parametrize("count, mesh", [(1, {}), (8, {}), (8, dict(data=2, fsdp=2, model=2))])
def test_a_later_stage_compiles_nothing_new(tmp_path, monkeypatch, devices, count, mesh):
    """Programs return arrays with the declared shardings, but under other names."""
    devices(count)
    heard, found, learn = CompilationCounter(), [], train_stage.train_stage

    def counted(*args):
        before = heard.count
        model_state = learn(*args)
        found.append(heard.count - before)
        return model_state

    monkeypatch.setattr(train_stage, "train_stage", counted)
    run_helpers.run_quickly(
        tmp_path,
        stages=[dict(task=t, steps=2) for t in (*run_helpers.TASKS, "colour")],
        mesh=mesh,
        train=dict(batch=8),
    )
    assert found[0] > found[1] == found[2] == 0
