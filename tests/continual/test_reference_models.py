"""The model of the KL term in a later stage."""

import jax
import numpy as np
import stage_fixtures
from stage_fixtures import method_config

from cptjax.continual import reference_models


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
