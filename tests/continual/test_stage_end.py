"""What continual-learning methods compute and keep at the end of a stage."""

import jax
import numpy as np
import pytest
import stage_fixtures
from stage_fixtures import method_config

from cptjax.common import run_log
from cptjax.common.shuffle import permutation
from cptjax.continual.stage_end import run_gradient_pass
from cptjax.data.device_batches import conversation_batch
from cptjax.data.prompts import make_example_encoder
from cptjax.training.algorithms.continual_learning.ewc import EWC


def test_fisher_is_the_mean_of_single_squares_and_holds_the_next_stage(tmp_path):
    c = method_config(
        "sft",
        steps=1,
        stages=2,
        method=dict(penalty=dict(name="ewc", coef=1e4, samples=2)),
        train=dict(lr=1e-2),
    )
    with stage_fixtures.prepare_stage(c, tmp_path) as prepared:
        fisher, cost = jax.device_get(
            run_gradient_pass(
                prepared.run,
                prepared.run.stages[0],
                prepared.state.params,
                prepared.frozen,
                EWC(1e4, samples=2).gradient_pass(c.train.chunk),
                "ewc",
            )
        )
        squares = None
        build = make_example_encoder(
            prepared.run.model_ctx, prepared.ctx.builder.prompted_tasks, True, 32
        )
        rows = permutation(8, (0, 1, 0))[:2].tolist()
        assert rows != [0, 1]
        for i in rows:
            one = conversation_batch(
                prepared.run.model_ctx, [build(prepared.ctx.sources[0][i]).encoded], rows=1
            )
            gradient = jax.device_get(
                prepared.programs.begin(prepared.state.params, prepared.frozen, one).gradient
            )
            square = jax.tree.map(lambda g: np.square(g) / 2, gradient)
            squares = square if squares is None else jax.tree.map(np.add, squares, square)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-7), fisher, squares
    )
    _, _, lines = stage_fixtures.train_all_stages(c, tmp_path / "run")
    steps = [line for line in lines if "event" not in line]
    spent = [line["flops"] for line in lines if line.get("event") == "stage_end"]
    assert len(spent) == 2 and spent[0] == cost.flops > 0
    assert "penalty" not in steps[0] and steps[1]["penalty"] == pytest.approx(
        0, abs=1e-9
    )  # it starts at the anchor
    ended = [line for line in lines if line.get("event") == "stage_end"]
    parameters = sum(x.size for x in jax.tree.leaves(fisher))
    assert [line["kept_bytes"] for line in ended] == [4 * parameters] * 2
    cost = run_log.summarise_cost(lines, tmp_path / "run")
    assert cost["kept_bytes"] == 4 * parameters and cost["works"]["stage_end"]["flops"] > 0
    # In stage 2: weights, two moments, the weights at the stage's start, the importance.
    assert cost["array_bytes"] > 5 * 4 * parameters
