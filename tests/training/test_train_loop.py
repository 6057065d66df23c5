"""The training loop: metrics of updates, batches taken by a step, warnings, empty steps."""

import dataclasses
import threading

import jax
import numpy as np
import pytest
import stage_fixtures
from stage_fixtures import method_config

from cptjax.config import resolve_stages
from cptjax.training import rollouts, train_loop, validate_config
from cptjax.training.stage_context import StageProgress
from cptjax.types import Mean


def test_metrics_of_several_updates_keep_extremes():
    metrics = [
        {"ratio_min": 0.9, "ratio_max": 1.0, "loss": 1.0},
        {"ratio_min": 0.95, "ratio_max": 1.4, "loss": 3.0},
    ]
    assert train_loop.merge_update_metrics(metrics) == {
        "ratio_min": 0.9,
        "ratio_max": 1.4,
        "loss": 2.0,
    }


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    c = method_config("grpo", method=dict(advantage="reinforce", truncated="mask", kl_coef=0.0))
    with stage_fixtures.prepare_stage(c, tmp_path_factory.mktemp("stage")) as prepared:
        yield prepared


@pytest.mark.parametrize(("gap", "warned"), [(0.0, False), (0.2, True)])
def test_a_sampler_that_differs_from_the_trainer_gives_a_warning(prepared, capsys, gap, warned):
    train_loop.warn_of_mismatch({"mismatch": gap, "mismatch_max": 2 * gap}, prepared.ctx.stage)
    printed = capsys.readouterr()
    assert ("log-probabilities differ" in printed.out + printed.err) == warned


def test_padding_is_the_processed_tokens_for_each_real_one(prepared):
    """A prompt counts once for its group, a response without its last token."""
    builder = prepared.ctx.builder
    with prepared.ctx.open_stream(0) as stream:
        graded = rollouts.sample_rollouts(
            builder, prepared.params, next(stream), prepared.ctx.step_key(0), 0
        )
    step = stage_fixtures.rollout_step_batch(builder, prepared.params, graded, None, 1, 1)
    (batch,) = next(step.updates)
    prompts, lengths = sum(len(i.encoded) for i in graded.items), np.asarray(batch.mask).sum(1)
    real, source = prompts + int(lengths.sum()), np.asarray(batch.packing.source)
    assert step.cost.trained == real < batch.tokens_with_padding
    assert (source >= 0).sum() == prompts + np.maximum(lengths - 1, 0).sum()
    metrics = train_loop.cost_metrics(step.cost, batch.tokens_with_padding, 1.0)
    assert metrics["perf/padding"] == source.size / real


def test_a_batch_without_tokens_to_train_on_changes_nothing(prepared, capsys):
    builder = prepared.ctx.builder
    with prepared.ctx.open_stream(0) as stream:
        graded = rollouts.sample_rollouts(
            builder, prepared.params, next(stream), prepared.ctx.step_key(0), 0
        )
    cut = dataclasses.replace(
        graded, samples=dataclasses.replace(graded.samples, finished=np.zeros(8, bool))
    )
    (batch,) = next(
        stage_fixtures.rollout_step_batch(builder, prepared.params, cut, None, 1, 1).updates
    )
    assert not np.asarray(batch.mask).any()
    state, metrics = prepared.update([batch])
    jax.tree.map(
        np.testing.assert_array_equal,
        (state.params, state.opt_state),
        (prepared.state.params, prepared.state.opt_state),
    )
    assert metrics["skipped"] == 1 == state.skipped == state.step
    (read,) = train_loop.fetch_metrics(
        [{"mismatch": Mean(0.0, 0.0), "loss": Mean(0.0, 0.0), "skipped": Mean(1.0, 1.0)}]
    )
    assert read == {"skipped": 1.0}
    assert train_loop.merge_update_metrics([read, {"loss": 2.0, "skipped": 0.0}]) == {
        "skipped": 0.5,
        "loss": 2.0,
    }
    train_loop.warn_of_mismatch(read, prepared.ctx.stage)
    with pytest.raises(ValueError, match="no token to train on, .*method.truncated='mask'"):
        train_loop.check_skipped_steps(state, 1)
    printed = capsys.readouterr()
    assert not printed.out + printed.err


def test_a_step_counts_the_batches_it_took(tmp_path):
    c = method_config(
        "dapo", method=dict(online_filter=dict(lo=0.0, hi=1.0, max_refills=30), overlong=0)
    )
    with stage_fixtures.prepare_stage(c, tmp_path) as prepared:
        with prepared.ctx.open_stream(0) as stream:
            found = [
                train_loop.next_step_batch(prepared.ctx, prepared.params, stream, StageProgress())
                for _ in range(2)
            ]
            assert stream.step == sum(f.batches_taken for f in found) and [
                f.batches_taken for f in found
            ] == [f.metrics["filter/batches"] for f in found]


@pytest.fixture(scope="module")
def stale(tmp_path_factory):
    """A stage whose responses are sampled before the update of the step before."""
    method = dict(advantage="reinforce", ratio="token", kl_coef=0.1)
    c = method_config("grpo", steps=3, method=method, rollout=dict(ahead=1))
    with stage_fixtures.prepare_stage(c, tmp_path_factory.mktemp("stale")) as prepared:
        yield prepared


def test_with_ahead_the_next_step_is_sampled_while_rewards_are_computed(stale, monkeypatch):
    """Its ratio is relative to the weights that sampled; step 1 equals that without `ahead`."""
    ctx, builder, params, next_sampled = stale.ctx, stale.ctx.builder, stale.params, []
    second, sample = threading.Event(), rollouts.generate.sample_from_prompts
    grade = rollouts.grade_responses

    def sample_from_prompts(*args, **more):
        if next_sampled:
            second.set()
        next_sampled.append(args[3])
        return sample(*args, **more)

    monkeypatch.setattr(rollouts.generate, "sample_from_prompts", sample_from_prompts)
    monkeypatch.setattr(
        rollouts, "grade_responses", lambda *args: grade(*args) if second.wait(20) else None
    )
    progress = StageProgress()
    with ctx.open_stream(0) as stream:
        first = train_loop.next_step_batch(ctx, params, stream, progress)
        assert len(next_sampled) == 2 and stream.step == 2
        state, metrics = stale.update(next(first.updates), lr=3e-2)
        assert abs(metrics["ratio_max"] - 1) < 1e-5
        moved = dataclasses.replace(stale, state=state)
        progress.step, progress.batches_taken = 1, 1
        sampled = ctx.ahead.graded.samples.texts
        then = train_loop.next_step_batch(ctx, moved.params, stream, progress)
        (batch,) = next(then.updates)
        _, metrics = moved.update([batch])
    assert metrics["ratio_max"] - metrics["ratio_min"] > 1e-3
    np.testing.assert_array_equal(batch.extra["old_logps"], builder.score(params, batch))
    whole = dataclasses.replace(builder.sampling, ahead=0)
    plain = dataclasses.replace(builder, sampling=whole)
    plain = dataclasses.replace(ctx, builder=plain, ahead=None)
    with ctx.open_stream(0) as stream:
        alone = train_loop.next_step_batch(plain, params, stream, StageProgress())
        progress = StageProgress(step=1, batches_taken=1)
        old = train_loop.next_step_batch(plain, params, stream, progress)
    assert [r["response"] for r in alone.rollout_rows] == [
        r["response"] for r in first.rollout_rows
    ]
    assert alone.metrics["reward"] == first.metrics["reward"]
    assert [r["response"] for r in old.rollout_rows] == sampled


@pytest.mark.parametrize(
    ("ahead", "method", "words"),
    [
        (2, {}, "rollout.ahead=2: expected 0 or 1"),
        (1, {}, "ratio='none'"),
        (1, dict(advantage="remax", ratio="token"), "without .* advantage='remax'"),
    ],
)
def test_ahead_is_refused_where_nothing_corrects_for_older_weights(ahead, method, words):
    c = method_config("grpo", method=method, rollout=dict(ahead=ahead))
    with pytest.raises(ValueError, match=words):
        validate_config.validate_stage(resolve_stages(c)[0])
