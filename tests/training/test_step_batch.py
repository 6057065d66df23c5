"""Batches of supervised fine-tuning: collated and uploaded once, whatever scores them."""

import jax
import numpy as np
import pytest
import stage_fixtures
from stage_fixtures import method_config

from cptjax import sharding
from cptjax.data import device_batches
from cptjax.training import step_batch


@pytest.mark.parametrize("micro_batch", [0, 2])
def test_a_reference_scores_the_batches_that_are_trained_on(tmp_path, monkeypatch, micro_batch):
    c = method_config("sft", method=dict(kl_coef=0.1), train=dict(micro_batch=micro_batch))
    with (
        stage_fixtures.prepare_stage(c, tmp_path) as prepared,
        prepared.ctx.open_stream(0) as stream,
    ):
        items, builder = next(stream), prepared.ctx.builder
        calls, collate_rows = [], device_batches.collate_rows
        monkeypatch.setattr(
            device_batches, "collate_rows", lambda *a, **k: calls.append(a) or collate_rows(*a, **k)
        )
        monkeypatch.setattr(sharding, "local_rows", lambda _: pytest.fail("fetched"))
        reference = jax.tree.map(lambda x: x * 1.5, prepared.params)
        (update,) = step_batch.sft_step_batch(builder, items, reference).updates
        assert len(calls) == len(update) == (2 if micro_batch else 1)
        alone = builder.conversation_batches(items)
        for batch, fresh in zip(update, alone, strict=True):
            want = builder.score(reference, fresh)
            np.testing.assert_array_equal(batch.extra["ref_logps"], want)
            assert np.abs(np.asarray(want) - builder.score(prepared.params, fresh)).max() > 1e-3


def test_a_step_counts_the_forward_passes_of_reference_and_teacher(tmp_path):
    with stage_fixtures.prepare_stage(method_config("sft", steps=1), tmp_path) as prepared:
        with prepared.ctx.open_stream(0) as stream:
            items = next(stream)
        plain = step_batch.sft_step_batch(prepared.ctx.builder, items).cost
        scored = step_batch.sft_step_batch(prepared.ctx.builder, items, prepared.params).cost
        assert scored.flops == pytest.approx(4 / 3 * plain.flops)
        assert plain.trained == plain.seen == sum(len(i.encoded) for i in items)
