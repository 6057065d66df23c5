"""A stage of a run: refused before it samples; penalties and averages keep weights near the start."""

import dataclasses

import jax
import numpy as np
import pytest
import stage_fixtures
from stage_fixtures import method_config

from cptjax.config import merge_config
from cptjax.continual import offline_filter, train_stage
from cptjax.data import model_context


@pytest.fixture
def prepared(tmp_path):
    method = dict(ratio="token", updates_per_batch=2, kl_coef=0.0)
    with stage_fixtures.prepare_stage(method_config("grpo", method=method), tmp_path) as prepared:
        yield prepared


def test_a_batch_that_the_shards_do_not_divide_is_refused_before_sampling(prepared, monkeypatch):
    monkeypatch.setattr(offline_filter, "count_correct", lambda *_: pytest.fail("sampled"))
    monkeypatch.setattr(model_context.ModelContext, "shards", 4)
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
        "l2": dict(penalty=dict(name="l2", coef=100.0, samples=0)),
        "wise": dict(average=0.75),
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
