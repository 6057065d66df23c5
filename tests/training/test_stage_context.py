"""The data of a stage: rows of earlier stages are replayed in their exact share."""

import pytest
import stage_fixtures
from stage_fixtures import method_config

from cptjax.training import self_training


@pytest.mark.parametrize(
    ("method", "kind"), [("sft", "gold"), ("grpo", "prompts"), ("self_sft", "prompts")]
)
def test_replay_is_counted(method, kind, tmp_path):
    c = method_config(
        method,
        steps=4,
        stages=2,
        batch=8,
        method=dict(replay=dict(name=kind, fraction=0.25), kl_coef=0.0),
    )
    with stage_fixtures.prepare_stage(c, tmp_path, number=2) as prepared:
        assert list(prepared.ctx.builder.prompted_tasks) == ["second", "first"]
        tasks = []
        with prepared.ctx.open_stream(0) as stream:
            for step in range(4):
                items = (
                    next(stream)
                    if method != "self_sft"
                    else self_training.response_examples(prepared.ctx, prepared.params, step)[0]
                )
                tasks += [i.example.task for i in items]
        assert [tasks[i : i + 8].count("first") for i in range(0, 32, 8)] == [
            2
        ] * 4  # a quarter of each step's rows


def test_first_stage_has_nothing_to_replay(tmp_path):
    c = method_config("sft", stages=2, method=dict(replay=dict(name="gold", fraction=0.25)))
    with stage_fixtures.prepare_stage(c, tmp_path) as prepared:
        assert (
            list(prepared.ctx.builder.prompted_tasks) == ["first"]
            and prepared.ctx.mixture.own_share == 1
        )
