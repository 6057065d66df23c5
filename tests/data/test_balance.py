"""Responses that move between batch shards: the plan, the tokens saved, and equal results."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_qwen3_vl
from length_distributions import DISTRIBUTIONS, lengths_of
from tiny import Image

from cptjax import sharding
from cptjax.data import balance, packing
from cptjax.data.balance import Subgroup, plan_places, to_places, to_prompts
from cptjax.data.device_batches import group_batch
from cptjax.data.model_context import ModelContext
from cptjax.models import logprobs, packed_groups
from cptjax.models.families import PRESETS

G, R = 3, 8
IMAGE = [3, Image(4, 4), 2]
PROMPTS = [[5], IMAGE, [6, Image(4, 8)], [9], IMAGE, [7], [4, Image(4, 4), 3, Image(4, 4)], [5]]
# Shards of two prompts each. The first and the fifth have the longest responses.
LENGTHS = [*[8, 8, 8, 8, 8, 7], *[1, 0, 1, 1, 1, 1], *[2, 1, 1, 8, 1, 8], *[1, 1, 1, 0, 0, 0]]


def as_tuples(plan: list[Subgroup]) -> list[tuple]:
    return [(prompt, sorted(chosen.tolist()), shard) for prompt, chosen, shard in plan]


def test_the_plan_of_the_docstring():
    prompts, responses = np.array([[2], [2]]), np.array([[[5, 5]], [[1, 1]]])
    assert plan_places(prompts, responses, 10, 1) is None  # 4 + 2 + 5 tokens on the second shard
    plan = as_tuples(plan_places(prompts, responses, 11, 1))
    assert sorted(plan) == [(0, [0], 0), (0, [1], 1), (1, [0, 1], 1)]
    # Whole groups that fit stay at home.
    assert as_tuples(plan_places(prompts, responses, 12, 1)) == [(0, [0, 1], 0), (1, [0, 1], 1)]


@pytest.mark.parametrize("seed", range(6))
def test_each_response_has_one_place_and_no_shard_has_more_than_the_limit(seed):
    rng = np.random.default_rng(seed)
    shards, q, group = (4, 2, 3) if seed % 2 else (6, 3, 4)
    p, r = rng.integers(1, 20, (shards, q)), rng.integers(0, 40, (shards, q, group))
    mean = (p.sum() + r.sum()) / shards
    found = [
        plan_places(p, r, int(mean * more), shards // 2) for more in (0.9, 1.0, 1.1, 1.2, 1.5, 3.0)
    ]
    assert found[0] is None and found[-1] is not None
    for plan, more in zip(found, (0.9, 1.0, 1.1, 1.2, 1.5, 3.0), strict=True):
        if plan is None:
            continue
        load, places = np.zeros(shards), np.zeros(shards)
        at = np.zeros((shards * q, group), int)
        for prompt, chosen, shard in plan:
            load[shard] += p.reshape(-1)[prompt] + r.reshape(-1, group)[prompt, chosen].sum()
            places[shard] += 1
            at[prompt, chosen] += 1
        assert (load <= int(mean * more)).all() and (places <= q + 1).all()
        assert (at == (r.reshape(at.shape) > 0)).all()
        moved = {prompt for prompt, _, shard in plan if shard != prompt // q}
        assert len(moved) <= shards // 2


@pytest.mark.parametrize("shards", [8, 64])
@pytest.mark.parametrize(("prompts", "most"), [(1, 1.35), (2, 1.1), (4, 1.1), (8, 1.07)])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_padding_with_few_prompts_on_each_shard(name, prompts, most, shards):
    """Tokens processed per real token, where shards have 1 to 8 prompts in a micro-batch."""
    prompt, group, mean, limit = DISTRIBUTIONS[name]
    cfg = PRESETS["7b"].with_compute(attention="splash")
    copied = balance.max_copied(cfg, shards, prompts, prompt)
    processed = before = real = 0
    for seed in range(3):
        r = lengths_of(mean, limit, (shards, prompts, group), seed)
        p = np.full((shards, prompts), prompt)
        capacity, tokens = prompts * (prompt + group * limit), p.sum(1) + r.sum((1, 2))
        sizes = balance.balanced_row_sizes(
            cfg,
            *(prompts, prompt, group, limit),
            longest=int(tokens.max()),
            mean=tokens.mean(),
        )
        size = packing.row_size(int(tokens.max()), capacity)
        before += size * shards
        processed += shards * next((n for n in sizes if plan_places(p, r, n, copied)), size)
        real += tokens.sum()
    assert processed / real <= most
    assert before >= processed


def abstract(prompts):
    """Return the shapes of prompts, equal only if their shardings are."""
    place = lambda x: sharding.canonical_sharding(x.sharding)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place(x)), prompts
    )


@functools.cache
def groups(family: str, sizes: tuple[int, int, int]):
    """Return (context, parameters, prompts on a mesh, responses, mask, an array by token)."""
    if family == "qwen3_vl":
        cfg = tiny_qwen3_vl.our_config()
    else:
        cfg = tiny.our_config(family=family)
    shards, rng = sizes[0] * sizes[1], np.random.default_rng(0)
    mesh = sharding.make_mesh(*sizes, devices=jax.devices()[: shards * sizes[2]])
    rows = [tiny.random_row(row, cfg, rng) for row in (PROMPTS if cfg.vision else [[9], [5]] * 4)]
    prompts = sharding.place_prompts(tiny.prompts(rows, cfg, shards=shards), mesh)
    mask = np.arange(R) < np.array(LENGTHS)[:, None]
    tokens = rng.integers(10, 300, mask.shape).astype(np.int32)
    ctx = ModelContext(cfg, None, mesh, jnp.float32, (64,))
    return ctx, tiny.random_params(cfg), prompts, tokens, mask, rng.random(mask.shape, np.float32)


@pytest.mark.parametrize(
    ("family", "sizes", "slices"),
    [("qwen3_vl", (2, 2, 2), 2), ("qwen2", (1, 4, 1), 1)],
)
def test_moved_responses_have_equal_values_and_gradients(family, sizes, slices, monkeypatch):
    monkeypatch.setattr(balance, "slice_count", lambda _: slices)
    monkeypatch.setattr(packing, "SMALLEST", 4)  # shorter rows than those of a real batch
    monkeypatch.setattr(balance, "_place_cost", lambda *_: 4)
    ctx, params, prompts, tokens, mask, weights = groups(family, sizes)
    extra = {"weights": weights}
    plain = group_batch(ctx, prompts, tokens, mask, extra=extra)
    moved, placement = tiny.balanced_group_batch(ctx, prompts, tokens, mask, extra)
    assert placement is not None and (placement.copied >= 0).any()
    assert moved.packing.source.shape[1] < 0.85 * plain.packing.source.shape[1]
    assert (moved.prompts.pool is not None) == (family != "qwen2")
    assert placement.copied.shape == (slices, 4 // slices)
    planned = balance.abstract_moved_prompts(ctx.cfg, ctx.mesh, abstract(prompts))
    assert abstract(planned) == abstract(moved.prompts)
    np.testing.assert_array_equal(
        to_prompts(placement, sharding.local_rows(moved.targets))[mask], tokens[mask]
    )
    again = to_prompts(placement, to_places(placement, weights))
    np.testing.assert_array_equal(again, np.where(mask.any(1)[:, None], weights, 0))

    @jax.jit
    def run(params, batch):
        def loss(params):
            states = logprobs.predicting_states(params, batch, ctx.cfg, jnp.float32)
            out = packed_groups.by_target(batch, states.reshape(-1, states.shape[-1]))
            weighted = batch.extra["weights"] * jnp.sin(3 * out).sum(-1)
            return jnp.sum(jnp.where(batch.mask, weighted, 0)), out

        return jax.value_and_grad(loss, has_aux=True)(params)

    with jax.set_mesh(ctx.mesh):
        (total, states), gradient = run(params, plain)
        (found, at_places), of_moved = run(params, moved)
    assert found == pytest.approx(float(total), rel=1e-5)
    at_home = to_prompts(placement, sharding.local_rows(at_places))
    np.testing.assert_allclose(
        at_home[mask], sharding.local_rows(states)[mask], rtol=1e-5, atol=1e-5
    )
    for want, got in zip(jax.tree.leaves(gradient), jax.tree.leaves(of_moved), strict=True):
        scale = max(np.abs(want).max(), 1e-6)
        np.testing.assert_allclose(got / scale, want / scale, atol=1e-5)


def test_responses_move_only_to_shorter_rows(monkeypatch):
    monkeypatch.setattr(packing, "SMALLEST", 4)
    monkeypatch.setattr(balance, "_place_cost", lambda *_: 0)
    ctx, _, prompts, tokens, _, _ = groups("qwen2", (2, 2, 1))
    rows_of = lambda batch: batch.packing.source.shape[1]
    moved = []
    for seed in range(12):
        lengths = np.random.default_rng(seed).integers(0, R + 1, len(tokens))
        mask = np.arange(R) < lengths[:, None]
        plain = group_batch(ctx, prompts, tokens, mask, extra={})
        batch, placement = tiny.balanced_group_batch(ctx, prompts, tokens, mask, {})
        assert placement is None or rows_of(batch) < rows_of(plain)
        moved.append(placement is not None)
    assert any(moved)


def test_planned_shapes_hold_more_targets_than_full_groups():
    """A shard with full groups of short prompts may get another response."""
    p, r = np.array([[50, 50], [2048, 50]]), np.full((2, 2, 8), 1024)
    plan = plan_places(p, r, 18432, 1)
    targets = [0, 0]
    for _, chosen, shard in plan:
        targets[shard] += 1024 * len(chosen)
    assert max(targets) > r[0].sum()
    _, planned = packing.packing_shapes((6, 2048), (48, 1024), 2, longest=18432)
    assert planned.real.shape[1] >= packing.target_size(max(targets), 3 * 8 * 1024)


def test_a_shard_gets_a_limited_number_of_image_features():
    copied = lambda name, prompt: balance.max_copied(PRESETS[name], 64, 1, prompt)
    assert copied("qwen2.5-7b", 4096) == copied("7b", 1024) == 32
    assert copied("7b", 4096) == 18  # features of 3,584 values in 2 bytes
    assert copied("qwen3-vl-8b", 4096) == 4  # 4,096 values, of 4 layers
