"""Rollouts: rewards, length rules, ratios, KL in the reward, online filter, one upload a step."""

import collections
import dataclasses
import json
import threading

import jax
import numpy as np
import pytest
import stage_fixtures
from stage_fixtures import method_config

from cptjax import sharding
from cptjax.common import distributed
from cptjax.config import merge_config
from cptjax.data import balance, collate, device_batches, packing
from cptjax.data.cost import WorkCost
from cptjax.generation import decode_loop, generate
from cptjax.generation.generate import Samples
from cptjax.models.families import PRESETS
from cptjax.training import device_passes, rollouts
from cptjax.training.algorithms import losses
from cptjax.training.rollouts import GradedRollouts


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A stage of four updates on each batch: two parts, two passes."""
    method = dict(advantage="reinforce", ratio="token", updates_per_batch=2, passes=2, kl_coef=0.0)
    with stage_fixtures.prepare_stage(
        method_config("grpo", method=method), tmp_path_factory.mktemp("stage")
    ) as prepared:
        yield prepared


def sample(prepared, builder=None, key=None) -> GradedRollouts:
    """Responses of the stage's policy to its first batch."""
    builder = prepared.ctx.builder if builder is None else builder
    key = prepared.ctx.step_key(0) if key is None else key
    with prepared.ctx.open_stream(0) as stream:
        return rollouts.sample_rollouts(builder, prepared.params, next(stream), key, 0)


def builder(prepared, **changes):
    """The prepared batch builder with other settings of the method."""
    return dataclasses.replace(
        prepared.ctx.builder, method=merge_config(prepared.ctx.builder.method, changes)
    )


def advantages(found):
    """[B] of all updates of the first pass."""
    return np.concatenate(
        [
            np.asarray(b.extra["advantages"])
            for _, update in zip(range(2), found.updates, strict=False)
            for b in update
        ]
    )


def test_each_pass_goes_over_all_groups_and_only_stale_ones_have_a_ratio(prepared):
    graded = sample(prepared)
    found = stage_fixtures.rollout_step_batch(
        prepared.ctx.builder, prepared.params, graded, None, 0, 1
    )
    state, metrics, rows = prepared.state, [], []
    for update in found.updates:
        state, numbers = dataclasses.replace(prepared, state=state).update(update, lr=3e-2)
        metrics.append(numbers)
        rows.append(np.concatenate([np.asarray(b.targets) for b in update]))
    assert len(metrics) == 4
    np.testing.assert_array_equal(np.concatenate(rows[:2]), np.concatenate(rows[2:]))
    np.testing.assert_array_equal(
        np.concatenate(rows[:2]), graded.samples.tokens[:, : rows[0].shape[1]]
    )
    assert (
        abs(metrics[0]["ratio_min"] - 1) < 1e-5
        and abs(metrics[0]["ratio_max"] - 1) < 1e-5
        and metrics[0]["clip_high"] == 0
    )
    assert all(n["ratio_max"] - n["ratio_min"] > 1e-3 for n in metrics[2:])
    assert metrics[0]["mismatch_max"] < 1e-5


def test_rollout_rows_hold_what_another_run_needs(prepared):
    graded = sample(prepared)
    found = stage_fixtures.rollout_step_batch(
        prepared.ctx.builder, prepared.params, graded, None, 3, 1
    )
    row = found.rollout_rows[0]
    assert (row["step"], row["stage"], row["task"]) == (3, 1, "first") and row["id"].startswith(
        "first/train/"
    )
    assert len(found.rollout_rows) == 8 == found.cost.rollouts and 8 <= found.cost.tokens <= 32
    assert found.cost.trained == 2 * (
        sum(len(i.encoded) for i in graded.items) + found.cost.tokens
    )  # two passes
    assert json.loads(json.dumps(row)) == row


def test_kl_goes_into_the_reward_at_the_sampled_tokens(tmp_path):
    method = dict(
        kl_place="reward",
        kl_coef=0.5,
        kl_estimator="k1",
        advantage="reinforce",
        updates_per_batch=1,
    )
    with stage_fixtures.prepare_stage(method_config("grpo", method=method), tmp_path) as prepared:
        t, graded = prepared.ctx.builder, sample(prepared)
        found = stage_fixtures.rollout_step_batch(
            t, prepared.params, graded, prepared.ctx.reference, 0, 1
        )
        assert found.metrics["kl"] == pytest.approx(0, abs=1e-6)
        assert found.metrics["reward/shaped"] == pytest.approx(found.metrics["reward"], abs=1e-5)
        moved = jax.tree.map(lambda x: x * 1.5, prepared.params)
        found = stage_fixtures.rollout_step_batch(t, prepared.params, graded, moved, 0, 1)
        (batch,) = next(found.updates)
        own, ref = np.asarray(t.score(prepared.params, batch)), np.asarray(t.score(moved, batch))
        want = graded.rewards.reshape(-1) - 0.5 * np.where(batch.mask, own - ref, 0).sum(1)
        np.testing.assert_allclose(batch.extra["advantages"], want, atol=1e-4)
        assert abs(found.metrics["kl"]) > 1e-4 and "ref_logps" not in batch.extra


def test_importance_weights_undo_a_cut_distribution(tmp_path):
    """With top_p < 1 the sampler is sharper than the policy, so weights are below 1."""
    c = method_config("grpo", method=dict(tis_cap=2.0, kl_coef=0.0), rollout=dict(top_p=0.5))
    with stage_fixtures.prepare_stage(c, tmp_path) as prepared:
        graded = sample(prepared)
        (batch,) = next(
            stage_fixtures.rollout_step_batch(
                prepared.ctx.builder, prepared.params, graded, None, 0, 1
            ).updates
        )
        mask = np.asarray(batch.mask)
        weight = np.asarray(
            losses.tis_weights(
                batch.extra["sampler_logps"], batch.extra["behaviour_logps"], batch.mask, 2.0
            )
        )
        assert (weight[mask] < 0.6).all() and (
            weight[mask] > 0.4
        ).all()  # the nucleus holds about half of the mass
        _, metrics = prepared.update([batch])
        assert metrics["mismatch_max"] < 1e-5  # the policy itself is what the trainer computes


def test_remax_compares_with_one_greedy_response(tmp_path):
    with stage_fixtures.prepare_stage(
        method_config("remax", method=dict(kl_coef=0.0)), tmp_path
    ) as prepared:
        graded = sample(prepared)
        assert graded.greedy_rewards.shape == (4,) and graded.cost.rollouts == 8 + 4
        (batch,) = next(
            stage_fixtures.rollout_step_batch(
                prepared.ctx.builder, prepared.params, graded, None, 0, 1
            ).updates
        )
        want = graded.rewards - graded.greedy_rewards[:, None]
        np.testing.assert_allclose(
            np.asarray(batch.extra["advantages"]).reshape(4, 2), want, atol=1e-6
        )


def test_tasks_with_their_own_rewards_share_a_batch(prepared):
    items = sample(prepared).items
    prompted_tasks = prepared.ctx.builder.prompted_tasks
    other = [
        dataclasses.replace(i, example=dataclasses.replace(i.example, task="other"))
        for i in items[::2]
    ]
    mixed = [x for pair in zip(items[1::2], other, strict=True) for x in pair]

    @dataclasses.dataclass
    class Constant:
        def compute_rewards(self, texts, examples):
            assert {e.task for e in examples} == {"other"}
            return [{"reward": 7.0} for _ in texts]

    builder = dataclasses.replace(
        prepared.ctx.builder, prompted_tasks=prompted_tasks | {"other": Constant()}
    )
    parts = rollouts.grade_responses(
        builder.prompted_tasks, mixed, [f"response {i}" for i in range(8)]
    )
    assert [p["reward"] == 7.0 for p in parts] == [False, False, True, True] * 2


def test_accuracy_is_decided_response_by_response():
    parts = [
        {"reward": 0.25},
        {"reward": 3.0, "accuracy": 0.0},
        {"reward": 0.0, "accuracy": 1.0},
        {"reward": 1.0},
    ]
    graded = GradedRollouts([None, None], None, parts, None, WorkCost(), {})
    np.testing.assert_array_equal(graded.accuracy, [[0.25, 0], [1, 1]])


def test_reinforce01_raises_correct_responses_only(prepared):
    """In a jigsaw a wrong response of the right form earns more than 1."""
    graded = sample(prepared, prepared.ctx.builder)
    parts = [{"reward": 1.0 + i % 2, "accuracy": float(i % 3 == 0)} for i in range(8)]
    t = builder(prepared, advantage="reinforce01")
    found = stage_fixtures.rollout_step_batch(
        t, prepared.params, dataclasses.replace(graded, reward_parts=parts), None, 1, 1
    )
    np.testing.assert_array_equal(advantages(found), [p["accuracy"] for p in parts])
    cut = dataclasses.replace(
        graded,
        reward_parts=parts,
        samples=dataclasses.replace(graded.samples, finished=np.arange(8) > 3),
    )
    found = stage_fixtures.rollout_step_batch(
        builder(prepared, advantage="reinforce01", truncated="zero"),
        prepared.params,
        cut,
        None,
        1,
        1,
    )
    np.testing.assert_array_equal(advantages(found), [0, 0, 0, 0, 0, 0, 1, 0])


def test_the_greedy_baseline_follows_the_length_rules(prepared):
    class Right:
        def compute_rewards(self, texts, examples):
            return [{"reward": 1.0} for _ in texts]

    t = dataclasses.replace(
        builder(prepared, advantage="remax", truncated="zero"), prompted_tasks={"first": Right()}
    )
    graded = sample(prepared, t)
    encoded = [i.encoded for i in graded.items]
    once = dataclasses.replace(t.sampling, group=1, temperature=0.0)
    best = generate.sample_responses(
        t.model_ctx, prepared.params, encoded, prepared.ctx.step_key(0), np.arange(4), once
    )
    np.testing.assert_array_equal(graded.greedy_rewards, best.finished)
    assert 0 < best.finished.sum() < 4  # both kinds are there
    found = stage_fixtures.rollout_step_batch(t, prepared.params, graded, None, 1, 1)
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


def test_logged_metrics_are_those_of_all_processes(prepared, monkeypatch):
    graded = sample(prepared, prepared.ctx.builder)
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
    sent = [[], []]
    for mine, h in zip(sent, halves, strict=True):
        monkeypatch.setattr(
            distributed, "gather_objects", lambda value, mine=mine: mine.append(value) or [value]
        )
        rollouts.rollout_metrics(*h)
    for h in halves:  # each process hears both
        received = zip(*sent, strict=True)
        monkeypatch.setattr(
            distributed, "gather_objects", lambda value, received=received: list(next(received))
        )
        assert rollouts.rollout_metrics(*h) == whole
    assert (
        alone[0]["reward"] != whole["reward"] == pytest.approx(3.5 / 8)
        and alone[1]["advantage/std"] != whole["advantage/std"]
    )


# ---- online filter -------------------------------------------------------------------------------


def test_the_online_filter_fills_a_batch_with_mixed_groups(tmp_path):
    c = method_config(
        "dapo", method=dict(online_filter=dict(lo=0.0, hi=1.0, max_refills=30), overlong=0)
    )
    with (
        stage_fixtures.prepare_stage(c, tmp_path) as prepared,
        prepared.ctx.open_stream(0) as stream,
    ):
        graded, info, turns = rollouts.sample_filtered_rollouts(
            prepared.ctx.builder, prepared.params, stream, prepared.ctx.step_key(0), 0
        )
        assert (
            len(graded.items) == 4
            and graded.samples.tokens.shape[0] == 8
            and turns == info["filter/batches"] == stream.step
        )
        assert (np.ptp(graded.accuracy, 1) == 1).all()
        assert graded.cost.rollouts == 8 * turns  # dropped responses count
        again = sample(prepared, key=jax.random.fold_in(prepared.ctx.step_key(0), 0))
        keep = [r for q in np.flatnonzero(np.ptp(again.accuracy, 1)) for r in (2 * q, 2 * q + 1)]
        assert graded.samples.texts[: len(keep)] == [again.samples.texts[r] for r in keep]


def test_the_online_filter_stops_after_its_refills(tmp_path):
    c = method_config(
        "dapo", method=dict(online_filter=dict(lo=0.0, hi=1.0, max_refills=2), overlong=0)
    )
    c.tasks["first"].scorer = lambda prediction, answer, meta=None: 0.0
    with (
        stage_fixtures.prepare_stage(c, tmp_path) as prepared,
        prepared.ctx.open_stream(0) as stream,
    ):
        with pytest.raises(ValueError, match="after 3 batches of 4 prompts only 0 of 4 groups"):
            rollouts.sample_filtered_rollouts(
                prepared.ctx.builder, prepared.params, stream, prepared.ctx.step_key(0), 0
            )


# ---- rewards while the device works --------------------------------------------------------------


def test_rewards_of_finished_groups_are_computed_while_others_decode(tmp_path, monkeypatch):
    """Four groups after another in each of two slots; rewards, texts and order do not change."""
    c = method_config("grpo", batch=8, rollout=dict(max_new_tokens=16, slots=2))
    model = dataclasses.replace(stage_fixtures.SMALL_TEXT, eos=(2,))
    decode, graded, waited = decode_loop.decode_program, threading.Event(), []
    tasks = []

    def score(prediction, answer, meta=None):
        graded.set()
        return stage_fixtures.coin(prediction, answer)

    def decode_turn(*args):
        """The first groups end after the 4th turn, and are passed on during the 5th."""
        waited.append(len(waited) != 5 or graded.wait(20))
        return decode(*args)

    monkeypatch.setattr(decode_loop, "decode_program", decode_turn)
    c.tasks["first"].scorer = score
    with stage_fixtures.prepare_stage(c, tmp_path, model=model) as prepared:
        grade = rollouts.grade_responses
        monkeypatch.setattr(
            rollouts, "grade_responses", lambda *a: tasks.append(len(a[1])) or grade(*a)
        )
        queued = sample(prepared)
        assert len(waited) > 8 and all(waited) and sum(tasks) == 8 and len(tasks) > 2
        whole = dataclasses.replace(prepared.ctx.builder.sampling, slots=0)
        whole = sample(prepared, dataclasses.replace(prepared.ctx.builder, sampling=whole))
    assert queued.samples.texts == whole.samples.texts and len(set(whole.samples.texts)) == 16
    assert queued.reward_parts == whole.reward_parts and np.ptp(queued.rewards) > 0
    for name in ("tokens", "mask", "finished"):
        np.testing.assert_array_equal(getattr(queued.samples, name), getattr(whole.samples, name))


def test_log_probabilities_are_computed_while_rewards_are(prepared):
    scored = threading.Event()

    class Slow:
        def compute_rewards(self, texts, examples):
            return [{"reward": float(scored.wait(20))} for _ in texts]

    def score(params, batch):
        scored.set()
        return prepared.ctx.builder.score(params, batch)

    b = dataclasses.replace(prepared.ctx.builder, prompted_tasks={"first": Slow()}, score=score)
    with prepared.ctx.open_stream(0) as stream:
        pending = rollouts.start_rollouts(
            b, prepared.params, next(stream), prepared.ctx.step_key(0), 0
        )
    found = stage_fixtures.rollout_step_batch(b, prepared.params, pending, None, 1, 1)
    assert found.metrics["reward"] == 1


# ---- one collation and one upload of prompts and images a step -----------------------------------


@pytest.fixture(scope="module")
def image_stage(tmp_path_factory):
    """Prompts with an image each."""
    c = method_config("grpo", method=dict(advantage="reinforce", ratio="token", kl_coef=0.0))
    c = stage_fixtures.tiny(c, family="colour", side=32)
    c.data.template = "none"
    with stage_fixtures.prepare_stage(c, tmp_path_factory.mktemp("images")) as prepared:
        yield prepared


@pytest.fixture
def counts(monkeypatch):
    """Counts of collations, uploads of image patches, and arrays fetched from the device."""
    counts = collections.Counter()

    def counting(name, function, wanted=lambda *_: True):
        def call(*args, **more):
            counts[name] += bool(wanted(*args))
            return function(*args, **more)

        return call

    monkeypatch.setattr(collate, "collate_prompts", counting("collations", collate.collate_prompts))
    fill = counting("filled", collate._BatchPlan.fill)
    monkeypatch.setattr(collate._BatchPlan, "fill", fill)
    upload = counting(
        "images",
        jax.make_array_from_process_local_data,
        lambda _, x: np.ndim(x) == 4 and x.dtype == np.uint8,
    )
    monkeypatch.setattr(jax, "make_array_from_process_local_data", upload)
    monkeypatch.setattr(sharding, "local_rows", counting("fetched", sharding.local_rows))
    return counts


PATHS = {  # changes of method, rows of a device pass -> micro-batches of the step
    "kl in the loss": (dict(kl_coef=0.1), 0, 1),
    "kl in the reward": (dict(kl_coef=0.1, kl_place="reward", kl_estimator="k1"), 0, 1),
    "several passes over the batch": (dict(kl_coef=0.1, passes=2), 0, 1),
    "greedy baseline": (dict(advantage="remax"), 0, 1),
    "several updates": (dict(kl_coef=0.1, updates_per_batch=2), 0, 2),
    "micro-batches": (dict(kl_coef=0.1), 2, 2),
    "greedy baseline of micro-batches": (dict(advantage="remax", updates_per_batch=2), 1, 4),
}


@pytest.mark.parametrize("name", PATHS)
def test_a_step_collates_and_uploads_its_prompts_once(image_stage, counts, name):
    changes, micro_batch, micro_batches = PATHS[name]
    prepared = image_stage
    method = merge_config(prepared.ctx.builder.method, changes)
    settings = {k: v for k, v in changes.items() if k.startswith("kl_")}
    b = dataclasses.replace(
        prepared.ctx.builder,
        method=method,
        loss=dataclasses.replace(prepared.ctx.builder.loss, **settings),
        micro_batch=micro_batch,
    )
    reference = jax.tree.map(lambda x: x * 1.5, prepared.params) if method.kl_coef else None
    graded = sample(prepared, b)
    once = (1, micro_batches, micro_batches)
    assert (counts["collations"], counts["filled"], counts["images"]) == once
    counts["fetched"] = 0
    found = stage_fixtures.rollout_step_batch(b, prepared.params, graded, reference, 1, 1)
    updates = list(found.updates)
    assert (counts["collations"], counts["filled"], counts["images"]) == once
    assert (counts["fetched"] > 0) == (name == "kl in the reward")
    assert len(updates) == method.updates_per_batch * method.passes

    # The same numbers as a separate scoring of rows that are collated for it.
    batches = [batch for update in updates[: method.updates_per_batch] for batch in update]
    assert len(batches) == micro_batches
    size = 4 // len(batches)
    for i, batch in enumerate(batches):
        p, r = slice(i * size, (i + 1) * size), slice(i * size * 2, (i + 1) * size * 2)
        prompts = b.model_ctx.place_prompts([item.encoded for item in graded.items[p]])
        jax.tree.map(np.testing.assert_array_equal, batch.prompts, prompts)
        cut = r, slice(batch.targets.shape[1])
        tokens, mask = graded.samples.tokens[cut], graded.samples.mask[cut]
        alone = device_batches.group_batch(b.model_ctx, prompts, tokens, mask, extra={})
        np.testing.assert_array_equal(batch.targets, alone.targets)
        np.testing.assert_array_equal(batch.mask, alone.mask)
        own = b.score(prepared.params, alone)
        assert ("old_logps" in batch.extra) == (len(updates) > 1)
        is_first = len(updates) > 1 == method.passes and i < micro_batches // len(updates)
        if is_first:  # the update itself computes them
            assert np.isnan(batch.extra["old_logps"]).all()
        elif len(updates) > 1:
            np.testing.assert_array_equal(batch.extra["old_logps"], own)
        want = graded.rewards[p].reshape(-1)
        if name.startswith("greedy baseline"):
            want = want - np.repeat(graded.greedy_rewards[p], 2)
        if name == "kl in the reward":
            kl = np.where(alone.mask, own - b.score(reference, alone), 0)
            np.testing.assert_allclose(batch.extra["advantages"], want - 0.1 * kl.sum(1), rtol=1e-5)
        else:
            np.testing.assert_array_equal(batch.extra["advantages"], want)
            assert ("ref_logps" in batch.extra) == (reference is not None)
        if "ref_logps" in batch.extra:
            np.testing.assert_array_equal(batch.extra["ref_logps"], b.score(reference, alone))


def test_the_first_update_needs_no_scores_of_the_policy_that_sampled(image_stage):
    """It computes them itself; its ratios are 1, and the update is the same as with the scores."""
    prepared, scored = image_stage, []

    def score(params, batch):
        scored.append(batch)
        return prepared.ctx.builder.score(params, batch)

    b = builder(prepared, updates_per_batch=2)
    graded = sample(prepared, b)
    found = stage_fixtures.rollout_step_batch(
        dataclasses.replace(b, score=score), prepared.params, graded, None, 1, 1
    )
    (first,), (second,) = found.updates
    assert len(scored) == 1 and np.isfinite(second.extra["old_logps"]).all()
    state, metrics = prepared.update([first])
    assert metrics["ratio_min"] == metrics["ratio_max"] == 1 and metrics["mismatch_max"] < 1e-5
    known = first.extra | {"old_logps": b.score(prepared.params, first)}
    same, same_metrics = prepared.update([first.replace(extra=known)])
    assert same_metrics == pytest.approx(metrics, abs=1e-5)
    start = jax.tree.leaves(prepared.state.params)
    for x, a, c in zip(
        start, jax.tree.leaves(state.params), jax.tree.leaves(same.params), strict=True
    ):
        np.testing.assert_allclose(a, c, atol=2e-5)
        assert np.abs(np.asarray(x - a)).max() > 1e-5
    # Half a forward pass for the scores, and three for the update.
    twice = builder(prepared, updates_per_batch=2, passes=2)
    more = stage_fixtures.rollout_step_batch(twice, prepared.params, graded, None, 1, 1)
    cfg = b.model_ctx.cfg
    forward = rollouts._text_flops(cfg, graded) + rollouts._vision_flops(cfg, graded)
    assert b.tower is None
    assert more.cost.flops - found.cost.flops == pytest.approx((1 + 6 - 0.5 - 3) * forward)


def test_a_reference_of_another_size_counts_with_its_own_config(image_stage):
    prepared = image_stage
    b = builder(prepared, kl_coef=0.1)
    graded = sample(prepared, b)
    larger = dataclasses.replace(b, reference_cfg=PRESETS["3b"])
    costs = [
        stage_fixtures.rollout_step_batch(x, prepared.params, graded, prepared.params, 1, 1).cost
        for x in (b, larger)
    ]
    forward = [
        rollouts._text_flops(cfg, graded) + rollouts._vision_flops(cfg, graded)
        for cfg in (b.model_ctx.cfg, PRESETS["3b"])
    ]
    assert costs[1].flops - costs[0].flops == pytest.approx(forward[1] - forward[0])
    assert forward[1] > 1000 * forward[0]


def check_micro_batches_sample_the_same(prepared, micro_batch, counts):
    whole = sample(prepared)
    assert counts["images"] == 1
    cut = sample(prepared, dataclasses.replace(prepared.ctx.builder, micro_batch=micro_batch))
    assert counts["images"] == 1 + len(cut.prompts) and counts["collations"] == 2
    assert len(cut.prompts) == len(cut.items) // micro_batch > 1
    assert cut.samples.texts == whole.samples.texts and len(set(whole.samples.texts)) > 2
    assert cut.reward_parts == whole.reward_parts and cut.cost == whole.cost
    for name in ("tokens", "mask", "finished"):
        np.testing.assert_array_equal(getattr(cut.samples, name), getattr(whole.samples, name))
    for name in ("logps", "policy_logps"):
        a, b = getattr(cut.samples, name), getattr(whole.samples, name)
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_rollouts_do_not_depend_on_micro_batches(image_stage, counts):
    check_micro_batches_sample_the_same(image_stage, 1, counts)


def test_rollouts_of_a_mesh_do_not_depend_on_micro_batches(tmp_path, counts):
    """Each shard joins its own rows and tower states, so the sampler has them in another order."""
    c = stage_fixtures.tiny(
        method_config("grpo", method=dict(kl_coef=0.0)), batch=8, family="shape", side=32
    )
    c.data.template = "none"
    c.mesh.update(data=2, fsdp=2, model=2)
    c.model.freeze = ("vision",)
    with stage_fixtures.prepare_stage(c, tmp_path) as prepared:
        check_micro_batches_sample_the_same(prepared, 4, counts)


def test_filtered_groups_are_collated_once_more(image_stage, counts, monkeypatch):
    """Groups of several batches have no common arrays on the device."""
    prepared = image_stage
    b = builder(prepared, online_filter=dict(lo=0.0, hi=1.0, max_refills=30))
    keep = lambda accuracy, lo, hi: np.arange(len(accuracy)) < 2
    monkeypatch.setattr(rollouts.prompt_filters, "keep_groups", keep)
    with prepared.ctx.open_stream(0) as stream:
        graded, _, batches_taken = rollouts.sample_filtered_rollouts(
            b, prepared.params, stream, prepared.ctx.step_key(0), 0
        )
    assert batches_taken == counts["collations"] == counts["images"] == 2
    stage_fixtures.rollout_step_batch(b, prepared.params, graded, None, 1, 1)
    assert counts["collations"] == counts["images"] == 3


def test_a_micro_batch_is_as_long_as_its_own_longest_response(tmp_path):
    """The reward, with its KL term, and the update are those of the uncut batch."""
    method = dict(kl_place="reward", kl_coef=0.5, kl_estimator="k1", advantage="reinforce")
    c = method_config("grpo", method=method, rollout=dict(max_new_tokens=24))
    with stage_fixtures.prepare_stage(c, tmp_path) as prepared:
        builder, graded = prepared.ctx.builder, sample(prepared)
        count, rows = len(graded.items), len(graded.samples.mask)
        lengths = np.where(np.arange(rows) < rows // 2, 5, 20)
        samples = dataclasses.replace(
            graded.samples, mask=np.arange(24) < np.minimum(lengths, 24)[:, None]
        )
        graded = dataclasses.replace(graded, samples=samples, prompts=None)
        reference = jax.tree.map(lambda x: x * 1.5, prepared.params)
        found = {}
        for micro_batch in (0, count // 2):
            cut = dataclasses.replace(builder, micro_batch=micro_batch)
            step = stage_fixtures.rollout_step_batch(cut, prepared.params, graded, reference, 0, 1)
            update = next(step.updates)
            _, metrics = prepared.update(update)
            found[micro_batch] = [x.targets.shape[1] for x in update], step.metrics["kl"], metrics
        (one, kl, metrics), (two, cut_kl, cut_metrics) = found.values()
        assert (one, two) == ([24], [8, 24])
        assert cut_kl == pytest.approx(kl, rel=1e-5) and abs(kl) > 1e-4
        for name in ("loss", "grad_norm"):
            assert cut_metrics[name] == pytest.approx(metrics[name], rel=1e-4)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("grpo", dict(kl_coef=0.1, ratio="token", updates_per_batch=2)),
        ("grpo", dict(kl_coef=0.1, kl_place="reward", kl_estimator="k1", updates_per_batch=1)),
        ("sdft", {}),  # the teacher's prompts are others
    ],
)
def test_moved_responses_and_joined_micro_batches_give_the_same_updates(
    name, settings, tmp_path, monkeypatch
):
    c = method_config(
        name, batch=8, method=settings, mesh=dict(fsdp=2), rollout=dict(max_new_tokens=32)
    )
    c.data.update(prompt_limit=128, buckets=(128,))
    with stage_fixtures.prepare_stage(c, tmp_path) as prepared:
        graded, ctx = sample(prepared), prepared.ctx
        # With the policy as its own reference, gradients would be rounding, which Adam amplifies.
        reference = jax.tree.map(lambda x: 1.2 * x, ctx.reference)
        # The first shard has the longest responses.
        lengths = np.array([32, 32, 31, 32, *[1, 2, 1, 3] * 3])
        mask = np.arange(32) < lengths[:, None]
        samples = dataclasses.replace(graded.samples, mask=mask, finished=np.ones(16, bool))
        graded = dataclasses.replace(graded, samples=samples, prompts=None)

        def update(builder=ctx.builder):
            found = stage_fixtures.rollout_step_batch(
                *(builder, prepared.params, graded, reference, 0, 1), teacher=ctx.teacher
            )
            numbers = {k: v for k, v in found.metrics.items() if not k.startswith("seconds")}
            updates, tokens = list(found.updates), 0
            state = prepared.state
            for batches in updates:
                state, more = dataclasses.replace(prepared, state=state).update(batches, lr=1e-2)
                numbers |= more
                tokens += sum(batch.tokens_with_padding for batch in batches)
            return state.params, numbers, tokens

        def saved(builder=ctx.builder):  # in a checkpoint, and read from it
            scored = rollouts.score_rollouts(builder, prepared.params, graded, reference)
            assert scored.graded.prompts is None  # the passes have them on the device
            arrays = rollouts.rollouts_to_arrays(builder, scored)
            again = rollouts.restore_rollouts(
                builder, prepared.params, graded.items, reference, arrays
            )
            return arrays, rollouts.rollouts_to_arrays(builder, again)

        monkeypatch.setattr(packing, "SMALLEST", 4)
        monkeypatch.setattr(balance, "_place_cost", lambda *_: 1e9)
        params, numbers, tokens = update()
        stored, _ = saved()
        monkeypatch.setattr(balance, "_place_cost", lambda *_: 0)
        moved = update()
        # Micro-batches of one prompt on a shard, joined; the shards have them in another order.
        monkeypatch.setattr(device_passes, "_largest_pass_bytes", lambda *_: 1e12)
        cut = dataclasses.replace(ctx.builder, micro_batch=2)
        joined = update(cut)
        for arrays in (*saved(), *saved(cut)):
            for name, want in stored.items():
                got = np.asarray(arrays[name])
                if name == "old_logps":
                    got, want = np.where(mask, got, 0), np.where(mask, want, 0)
                np.testing.assert_allclose(got, want, atol=1e-5)
    for other, of_other, fewer in (moved, joined):
        assert fewer < 0.9 * tokens
        assert of_other == pytest.approx(numbers, rel=1e-4, abs=1e-5)
        for want, got in zip(jax.tree.leaves(params), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(got, want, atol=1e-4)
