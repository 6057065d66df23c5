"""From answers to advantages: length rules, accuracies, numbers over all processes, batches without anything to learn from."""

import dataclasses

import jax
import numpy as np
import pytest
import stage_fixtures

from configs import base
from cptjax.common import distributed
from cptjax.config import merge_config
from cptjax.continual import offline_filter, reference_models, train_stage
from cptjax.data import model_context
from cptjax.data.cost import WorkCost
from cptjax.generation import generate
from cptjax.generation.generate import Samples
from cptjax.training import rollouts, train_loop
from cptjax.training.rollouts import GradedRollouts
from cptjax.types import Mean


def config(stages=1, batch=4, **sections):
    c = base.get_config()
    c.stages = tuple(dict(task=task, steps=1) for task in ("first", "second")[:stages])
    c.method.update(
        advantage="reinforce", ratio="token", updates_per_batch=2, passes=2, kl_coef=0.0
    )
    return merge_config(stage_fixtures.tiny(c, stages=stages, batch=batch), sections)


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    with stage_fixtures.desk(config(), tmp_path_factory.mktemp("desk")) as desk:
        yield desk


def builder(desk, **changes):
    """The desk's with other settings of the method."""
    return dataclasses.replace(
        desk.ctx.builder, method=merge_config(desk.ctx.builder.method, changes)
    )


def rolled(desk, builder) -> GradedRollouts:
    with desk.ctx.open_stream(0) as stream:
        return rollouts.sample_rollouts(builder, desk.params, next(stream), desk.ctx.step_key(0), 0)


def advantages(found):
    """[B] of all updates of the first pass."""
    return np.concatenate(
        [
            np.asarray(b.extra["advantages"])
            for _, update in zip(range(2), found.updates, strict=False)
            for b in update
        ]
    )


def test_accuracy_is_decided_answer_by_answer():
    parts = [
        {"reward": 0.25},
        {"reward": 3.0, "accuracy": 0.0},
        {"reward": 0.0, "accuracy": 1.0},
        {"reward": 1.0},
    ]
    graded = GradedRollouts([None, None], None, parts, None, WorkCost(), {})
    np.testing.assert_array_equal(graded.accuracy, [[0.25, 0], [1, 1]])


def test_only_right_answers_are_pushed_whatever_else_earns_a_reward(desk):
    """As in a jigsaw, where a wrong answer of the right form earns more than 1."""
    graded = rolled(desk, desk.ctx.builder)
    parts = [{"reward": 1.0 + i % 2, "accuracy": float(i % 3 == 0)} for i in range(8)]
    t = builder(desk, advantage="reinforce01")
    found = rollouts.rollout_step_batch(
        t, desk.params, dataclasses.replace(graded, reward_parts=parts), None, 1, 1
    )
    np.testing.assert_array_equal(advantages(found), [p["accuracy"] for p in parts])
    cut = dataclasses.replace(
        graded,
        reward_parts=parts,
        samples=dataclasses.replace(graded.samples, finished=np.arange(8) > 3),
    )
    found = rollouts.rollout_step_batch(
        builder(desk, advantage="reinforce01", truncated="zero"), desk.params, cut, None, 1, 1
    )
    np.testing.assert_array_equal(advantages(found), [0, 0, 0, 0, 0, 0, 1, 0])


def test_the_greedy_baseline_follows_the_length_rules(desk):
    class Right:
        def rewards(self, texts, examples):
            return [{"reward": 1.0} for _ in texts]

    t = dataclasses.replace(
        builder(desk, advantage="remax", truncated="zero"), prompted_tasks={"first": Right()}
    )
    graded = rolled(desk, t)
    encoded = [i.encoded for i in graded.items]
    once = dataclasses.replace(t.sampling, group=1, temperature=0.0)
    best = generate.sample_responses(
        t.model_ctx, desk.params, encoded, desk.ctx.step_key(0), np.arange(4), once
    )
    np.testing.assert_array_equal(graded.greedy_rewards, best.finished)
    assert 0 < best.finished.sum() < 4  # both kinds are there
    found = rollouts.rollout_step_batch(t, desk.params, graded, None, 1, 1)
    want = graded.samples.finished.reshape(4, 2) * 1.0 - best.finished[:, None]
    np.testing.assert_array_equal(advantages(found), want.reshape(-1))


def half(graded: GradedRollouts, items: slice, rows: slice) -> GradedRollouts:
    fields = {f.name: getattr(graded.samples, f.name)[rows] for f in dataclasses.fields(Samples)}
    return dataclasses.replace(
        graded,
        items=graded.items[items],
        samples=Samples(**fields),
        reward_parts=graded.reward_parts[rows],
    )


def test_what_is_logged_is_of_all_processes(desk, monkeypatch):
    graded = rolled(desk, desk.ctx.builder)
    graded = dataclasses.replace(
        graded,
        reward_parts=[
            {"reward": i / 8, "accuracy": float(i > 2), f"only {i // 4}": i} for i in range(8)
        ],
    )
    values = np.arange(16.0).reshape(2, 4, 2)
    whole = rollouts.rollout_metrics(graded, *values)
    halves = [
        (half(graded, slice(q, q + 2), slice(2 * q, 2 * q + 4)), *values[:, q : q + 2])
        for q in (0, 2)
    ]
    alone = [rollouts.rollout_metrics(*h) for h in halves]
    said = [[], []]
    for mine, h in zip(said, halves, strict=True):
        monkeypatch.setattr(
            distributed, "gather_objects", lambda value, mine=mine: mine.append(value) or [value]
        )
        rollouts.rollout_metrics(*h)
    for h in halves:  # each process hears both
        heard = zip(*said, strict=True)
        monkeypatch.setattr(
            distributed, "gather_objects", lambda value, heard=heard: list(next(heard))
        )
        assert rollouts.rollout_metrics(*h) == whole
    assert (
        alone[0]["reward"] != whole["reward"] == pytest.approx(3.5 / 8)
        and alone[1]["advantage/std"] != whole["advantage/std"]
    )


def test_where_nothing_counts_nothing_moves_and_nothing_is_warned_of(desk, capsys):
    graded = rolled(desk, desk.ctx.builder)
    cut = dataclasses.replace(
        graded, samples=dataclasses.replace(graded.samples, finished=np.zeros(8, bool))
    )
    (batch,) = next(
        rollouts.rollout_step_batch(
            builder(desk, truncated="mask"), desk.params, cut, None, 1, 1
        ).updates
    )
    assert not np.asarray(batch.mask).any()
    state, metrics = desk.update([batch])
    jax.tree.map(
        np.testing.assert_array_equal,
        (state.params, state.opt_state),
        (desk.state.params, desk.state.opt_state),
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
    train_loop.warn_of_mismatch(read, desk.ctx)
    with pytest.raises(ValueError, match="no token to learn from .*method.truncated='mask'"):
        train_loop.check_skipped_steps(state, 1)
    said = capsys.readouterr()
    assert not said.out + said.err


def test_what_the_shards_can_not_cut_is_refused_before_anything_is_drawn(desk, monkeypatch):
    monkeypatch.setattr(offline_filter, "count_correct", lambda *_: pytest.fail("drawn"))
    monkeypatch.setattr(model_context.ModelContext, "shards", 4)
    which = desk.ctx.stage
    which = dataclasses.replace(
        which,
        config=merge_config(
            which.config, {"method": {"filter": dict(name="incompetent", samples=2)}}
        ),
    )
    with pytest.raises(ValueError, match="2 prompts.* 4 shards"):
        train_stage.make_stage_context(desk.run, which, desk.params, None)


def test_the_reference_of_a_second_stage_is_the_base_or_its_start(tmp_path):
    with stage_fixtures.opened(config(stages=2, method=dict(kl_coef=0.1)), tmp_path) as (
        run,
        base,
    ):
        which, first = run.stages[1], jax.device_get(base.params)
        params = jax.tree.map(lambda x: x + 1, base.params)
        now = jax.device_get(params)
        for name, want in (("base", first), ("stage", now)):
            which.config.method.kl_reference = name
            found = reference_models.load_reference(
                run, which, reference_models.load_stage_start(run, which, params, False)
            )
            jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), want)
        which.config.method.kl_coef = 0.0
        start = reference_models.load_stage_start(run, which, params, False)
        assert start is None and reference_models.load_reference(run, which, start) is None
