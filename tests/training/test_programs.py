"""The abstract arguments of the planner are those of a real training step."""

import jax
import pytest
import stage_fixtures
from stage_fixtures import method_config

from cptjax.training import train_loop
from cptjax.training.programs import abstract_stage, abstract_update_batch
from cptjax.training.stage_context import StageProgress

TWO_UPDATES = {"updates_per_batch": 2, "passes": 2, "tis_cap": 2.0}


def kinds(tree):
    """Return the type and number of axes of every array."""
    return jax.tree.map(lambda x: (x.dtype, x.ndim), tree)


def shapes(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


@pytest.mark.parametrize(
    ("method", "changes"),
    [("grpo", {}), ("dapo", TWO_UPDATES), ("sdft", {}), ("sft", {"kl_coef": 0.1})],
    ids=str,
)
def test_a_planned_stage_has_the_models_and_batches_of_a_real_one(tmp_path, method, changes):
    c = method_config(method, method=changes)
    with stage_fixtures.prepare_stage(c, tmp_path) as prepared:
        ctx = prepared.ctx
        with ctx.open_stream(0) as stream:
            step = train_loop.next_step_batch(ctx, prepared.params, stream, StageProgress())
            batch = next(iter(step.updates))[0]
        stage = abstract_stage(ctx.config, ctx.builder.model_ctx.cfg, prepared.run.model_ctx.mesh)
        planned = abstract_update_batch(stage, len(batch.prompts.tokens))
        assert kinds(planned.extra) == kinds(batch.extra)
        names = ("targets", "mask", "where")
        assert [kinds(getattr(planned, n)) for n in names] == [
            kinds(getattr(batch, n)) for n in names
        ]
        assert len(planned.targets) == len(batch.targets)
        assert shapes(stage.state) == shapes(prepared.state)
        assert shapes(stage.params) == shapes(prepared.params)
        assert (stage.reference is None) == (ctx.reference is None)
        assert stage.reference is None or shapes(stage.reference) == shapes(ctx.reference)
        assert (stage.teacher is None) == (ctx.teacher is None)
