"""A frozen vision tower runs once a step, and the models of the step see what it computed."""

import dataclasses

import jax
import numpy as np
import pytest
import stage_fixtures
from stage_fixtures import method_config

from cptjax.config import merge_config
from cptjax.models.families import PRESETS
from cptjax.training import rollouts, step_batch, tower_states


def image_config(name, freeze=("vision",), **sections):
    c = stage_fixtures.tiny(method_config(name, **sections), family="colour", side=32)
    c.data.template = "none"
    c.model.freeze = freeze
    return c


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """GRPO with KL and two passes over two micro-batches of prompts with an image each."""
    method = dict(kl_coef=0.1, ratio="token", passes=2, advantage="reinforce")
    c = image_config("grpo", method=method)
    c.train.micro_batch = 2
    with stage_fixtures.prepare_stage(c, tmp_path_factory.mktemp("stage")) as prepared:
        yield prepared


def own_towers(prepared):
    """Return the builder of a stage in which each model runs its own tower."""
    return dataclasses.replace(prepared.ctx.builder, tower=None)


def sample(prepared, builder):
    with prepared.ctx.open_stream(0) as stream:
        key = prepared.ctx.step_key(0)
        return rollouts.sample_rollouts(builder, prepared.params, next(stream), key, 0)


def step(prepared, builder, graded, reference):
    """Return the micro-batches of the first update, and the weights and metrics after it."""
    found = stage_fixtures.rollout_step_batch(builder, prepared.params, graded, reference, 1, 1)
    batches = next(found.updates)
    return batches, *prepared.update(batches), found.cost


def count_runs(monkeypatch):
    """Return a list that gets the images of every run of the tower's program."""
    seen, make = [], tower_states.make_tower_program

    def counted(cfg, dtype):
        program = make(cfg, dtype)
        return lambda params, vision: seen.append(vision) or program(params, vision)

    monkeypatch.setattr(tower_states, "make_tower_program", counted)
    return seen


def assert_close(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5, rtol=1e-4)


def test_the_tower_runs_once_and_nothing_else_changes(prepared, monkeypatch):
    runs = count_runs(monkeypatch)
    reference = jax.tree.map(lambda x: x * 1.5, prepared.params["text"])
    reference = prepared.params | {"text": reference}
    pair = []
    for builder in (prepared.ctx.builder, own_towers(prepared)):
        graded = sample(prepared, builder)
        pair.append((graded, *step(prepared, builder, graded, reference)))
        assert len(runs) == 2  # of the first builder: one of each micro-batch
    (graded, shared, state, metrics, cost), (alone, own, own_state, own_metrics, own_cost) = pair
    assert graded.samples.texts == alone.samples.texts and len(set(graded.samples.texts)) > 2
    np.testing.assert_array_equal(graded.samples.tokens, alone.samples.tokens)
    for a, b in zip(shared, own, strict=True):
        assert a.prompts.vision is None and b.prompts.tower_states is None
        assert_close(a.extra, b.extra)
        assert np.abs(np.asarray(a.extra["ref_logps"] - a.extra["old_logps"])).max() > 0.1
    assert_close(state.params, own_state.params)
    assert_close(metrics, own_metrics)
    assert (
        np.abs(
            np.asarray(state.params["merger"]["fc2"]["w"])
            - np.asarray(prepared.state.params["merger"]["fc2"]["w"])
        ).max()
        > 1e-4
    )
    # The tower of the reference, of the policy and of two passes; frozen, it has no backward pass.
    towers = own_cost.flops - cost.flops
    assert towers == pytest.approx(4 * image_flops(prepared, graded))


def image_flops(prepared, graded):
    cfg = prepared.ctx.builder.model_ctx.cfg
    return sum(rollouts.image_flops(cfg, item.encoded) for item in graded.items)


def test_groups_that_are_collated_again_get_states(prepared, monkeypatch):
    builder = prepared.ctx.builder
    graded = sample(prepared, builder)
    once = step(prepared, builder, graded, prepared.ctx.reference)
    runs = count_runs(monkeypatch)
    again = dataclasses.replace(graded, prompts=None)
    again = step(prepared, builder, again, prepared.ctx.reference)
    assert len(runs) == 2
    jax.tree.map(np.testing.assert_array_equal, once[0], again[0])


def test_a_reference_of_a_folder_runs_its_own_tower(prepared):
    builder = prepared.ctx.builder
    method = merge_config(builder.method, {"kl_reference": "models/other"})
    other = jax.tree.map(lambda x: x * 1.5, prepared.params)
    builder = dataclasses.replace(builder, method=method)
    batches, *_ = step(prepared, builder, sample(prepared, builder), other)
    for batch in batches:
        assert batch.prompts.tower_states is not None
        images = tower_states.for_other_tower(batch)
        np.testing.assert_array_equal(batch.extra["ref_logps"], builder.score(other, images))
        wrong = np.abs(batch.extra["ref_logps"] - builder.score(other, batch))
        assert wrong.max() > 1e-3


def test_the_reference_of_sft_sees_the_states_too(tmp_path, monkeypatch):
    c = image_config("sft", method=dict(kl_coef=0.1))
    with stage_fixtures.prepare_stage(c, tmp_path) as prepared:
        with prepared.ctx.open_stream(0) as stream:
            items = next(stream)
        reference = prepared.params | {
            "text": jax.tree.map(lambda x: x * 1.5, prepared.params["text"])
        }
        runs, pair = count_runs(monkeypatch), []
        for builder in (prepared.ctx.builder, own_towers(prepared)):
            found = step_batch.sft_step_batch(builder, items, reference)
            batches = next(found.updates)
            pair.append((batches[0].extra, prepared.update(batches)[0].params, found.cost.flops))
            assert len(runs) == 1
    assert_close(*(found[:2] for found in pair))
    assert pair[0][2] < pair[1][2]


def test_a_reference_of_a_folder_runs_its_own_tower_under_sft_too(tmp_path):
    """LwF's teacher shares the tower with the policy; the reference has another one."""
    c = image_config("sft", method=dict(kl_coef=0.1, loss=dict(name="lwf", coef=1.0)))
    with stage_fixtures.prepare_stage(c, tmp_path) as prepared:
        builder = prepared.ctx.builder
        method = merge_config(builder.method, {"kl_reference": "models/other"})
        builder = dataclasses.replace(builder, method=method)
        with prepared.ctx.open_stream(0) as stream:
            items = next(stream)
        other = jax.tree.map(lambda x: x * 1.5, prepared.params)
        found = step_batch.sft_step_batch(builder, items, other, prepared.ctx.teacher)
        (batch,) = next(found.updates)
    assert batch.prompts.tower_states is not None and "teacher_hidden" in batch.extra
    images = tower_states.for_other_tower(batch)
    np.testing.assert_array_equal(batch.extra["ref_logps"], builder.score(other, images))
    assert np.abs(batch.extra["ref_logps"] - builder.score(other, batch)).max() > 1e-3


@pytest.mark.parametrize(
    ("name", "changes", "shared"),
    [
        ("grpo", {"model": {"freeze": ("vision",)}}, True),
        ("grpo", {"model": {"lora": {"rank": 2}}}, True),
        ("grpo", {}, False),
        ("grpo", {"model": {"freeze": ("merger",)}}, False),
        ("grpo", {"model": {"lora": {"rank": 2, "vision": True}}}, False),
        # The tower runs once for the update, or once for each of two models that do not share it.
        ("sft", {"model": {"freeze": ("vision",)}}, False),
        (
            "sft",
            {
                "model": {"freeze": ("vision",)},
                "method": {"kl_coef": 0.1, "kl_reference": "models/other"},
            },
            False,
        ),
        ("sft", {"model": {"freeze": ("vision",)}, "method": {"kl_coef": 0.1}}, True),
    ],
    ids=str,
)
def test_a_tower_is_shared_where_it_is_frozen_and_several_models_run_it(name, changes, shared):
    config = merge_config(method_config(name), changes)
    assert tower_states.shares_tower(config, PRESETS["tiny"]) == shared
