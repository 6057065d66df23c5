"""The model of the KL term in a later stage."""

import jax
import numpy as np
import pytest
import stage_fixtures
from stage_fixtures import method_config

from cptjax.continual import reference_models, resume
from cptjax.models import trainable


def test_the_reference_of_a_second_stage_is_the_base_or_its_start(tmp_path):
    with stage_fixtures.open_tiny_run(
        method_config("grpo", steps=1, stages=2, method=dict(kl_coef=0.1)), tmp_path
    ) as (
        run,
        base,
    ):
        stage, first = run.stages[1], jax.device_get(base.params)
        params = jax.tree.map(lambda x: x + 1, base.params)
        now = jax.device_get(params)
        for name, want in (("base", first), ("stage", now)):
            stage.config.method.kl_reference = name
            found = reference_models.load_reference(
                run, stage, reference_models.load_stage_start(run, stage, params, False)
            )
            jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), want)
        stage.config.method.kl_coef = 0.0
        start = reference_models.load_stage_start(run, stage, params, False)
        assert start is None and reference_models.load_reference(run, stage, start) is None


@pytest.mark.parametrize("parameters, shared", [({}, True), ({"name": "merge_lora"}, False)])
def test_models_of_a_run_share_frozen_weights_that_do_not_change(tmp_path, parameters, shared):
    """The model, the base model and the stage's start."""
    c = method_config("grpo", steps=1, method={"kl_coef": 0.1, "parameters": parameters})
    c.model.lora.update(rank=2, alpha=2.0)
    with stage_fixtures.open_tiny_run(c, tmp_path, saved=True) as (run, _):
        params = resume.resume_run(run)[1].params
        models = [
            {path: id(x) for path, x in trainable.flatten_params(tree).items()}
            for tree in (params, run.base_params, run.copy_for_comparison(params))
        ]
        same = {path for path in models[0] if len({ids[path] for ids in models}) == 1}
        frozen = {path for path in models[0] if not trainable.is_adapter(path)}
        assert frozen and same == (frozen if shared else set())
