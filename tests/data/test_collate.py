"""Encoded conversations as rows: buckets, padding, packing, shapes that processes agree on."""

import dataclasses
import functools
import math
from itertools import product

import jax
import numpy as np
import pytest
from conversation_helpers import TINY, fails, make_image, says, user
from flax import traverse_util
from PIL import Image

from cptjax.data import collate, processor
from cptjax.data.collate import collate_rows
from cptjax.models.config import ModelConfig
from cptjax.models.vision_qwen2_5 import Qwen25VisionConfig, frame_layout, normalise_patches
from cptjax.types import Prompts


def test_buckets():
    assert collate.length_buckets(1000, 128) == (128, 192, 256, 384, 512, 768, 1000)
    assert collate.length_buckets(64) == (64,)
    assert collate.smallest_bucket(129, (512, 128, 256)) == 256
    fails(lambda: collate.smallest_bucket(600, (128, 512)), "600", "512")
    assert [collate.round_up_size(n) for n in (0, 1, 2, 3, 4, 5, 6, 7, 9, 13)] == [
        1,
        1,
        2,
        3,
        4,
        6,
        6,
        8,
        12,
        16,
    ]
    assert len({collate.round_up_size(n) for n in range(1, 10_000)}) < 30


def test_vision_rows_are_few_and_pad_little():
    """Frames of many sizes share the shapes of the largest, with less padding."""
    rng, most, shapes = np.random.default_rng(0), 81, set()
    now, before = [], []
    for _ in range(2000):
        frames = rng.integers(16, most + 1, rng.integers(1, 9)).tolist()
        width, rows = collate.fit_vision_rows([frames], most)
        shapes.add((width, rows))
        assert max(row for row, _ in collate.first_fit(frames, width)) < rows and width >= max(
            frames
        )
        own = collate.round_up_size(max(frames))
        now.append(width * rows / sum(frames))
        before.append(
            own
            * collate.round_up_size(1 + max(row for row, _ in collate.first_fit(frames, own)))
            / sum(frames)
        )
    assert np.mean(now) < 1.4 and np.mean(now) < np.mean(before)
    assert len(shapes) <= 7 + 2 * 5  # one row of 16 24 32 48 64 96; 2 3 4 6 8 rows of 64 or 96
    for size in range(1, most + 1):
        for n in (1, 2, 4, 8, 16):
            assert (
                math.prod(collate.fit_vision_rows([[size] * n], most))
                <= collate.round_up_size(size) * n
            ), (size, n)
    assert collate.fit_vision_rows([[300], [5, 5]], most) == (
        384,
        1,
    )  # a picture larger than the limit's has a row of its own step


def test_first_fit_places_each_once_without_overlap():
    sizes = np.random.default_rng(0).integers(1, 50, 200).tolist()
    places = collate.first_fit(sizes, 64)
    used = set()
    for size, (row, at) in zip(sizes, places, strict=True):
        for cell in range(at, at + size):
            assert cell < 64 and (row, cell) not in used
            used.add((row, cell))
    assert 1 + max(row for row, _ in places) <= sum(sizes) / 64 * 1.1 + 1


ROWS = [
    [user("what colour is the shape?", make_image(64, 32, 1), make_image(40, 40, 2))],
    [user("what is 1 plus 2?")],
    [user(make_image(64, 32, 1), "the same picture again")],
    [
        user(
            {"type": "video", "video": [make_image(48, 32, i) for i in range(4)]}, "what happens?"
        ),
        says("red"),
    ],
]


def features(prompts: Prompts, row: int, cfg: ModelConfig) -> np.ndarray:
    """The patches of each image token of a row, which the vision tower would merge into it."""
    shards = prompts.vision.patches.shape[0]
    shard = row // (len(prompts.tokens) // shards)
    units = prompts.vision.patches[shard].reshape(-1, cfg.vision.merge**2 * cfg.vision.patch_dim)
    return units[prompts.slots[row][prompts.slots[row] >= 0]]


def direct(e) -> np.ndarray:
    values = np.concatenate([m.patches for m in e.media])
    return values.reshape(-1, 4 * values.shape[1])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shards", [1, 2, 4])
def test_every_token_finds_its_own_patches(tiny, side, shards):
    rows = [tiny.encode(m) for m in ROWS]
    prompts, mask = collate_rows(rows, buckets=(32, 64, 128), side=side, shards=shards)
    assert (
        prompts.tokens.shape == (4, 64)
        and prompts.positions.shape == (3, 4, 64)
        and prompts.vision.patches.shape[0] == shards
        and prompts.vision.patches.dtype == np.uint8
    )
    for i, e in enumerate(rows):
        here = slice(64 - len(e), None) if side == "left" else slice(0, len(e))
        assert np.flatnonzero(prompts.segments[i]).tolist() == np.arange(64)[here].tolist()
        assert prompts.tokens[i, here].tolist() == e.tokens.tolist() and np.array_equal(
            prompts.positions[:, i, here], e.positions
        )
        assert mask[i, here].tolist() == e.loss_mask.tolist() and mask[i].sum() == e.loss_mask.sum()
        assert ((prompts.slots[i, here] >= 0) == (e.types > 0)).all()
        if e.media:
            assert np.array_equal(features(prompts, i, TINY), direct(e))


def test_frames_are_in_window_order_with_their_positions(tiny):
    e = tiny.encode([user(make_image(64, 48, 1))])
    vision = collate_rows([e], buckets=(64,))[0].vision
    (t, h, w), layout = e.media[0].grid, frame_layout(*e.media[0].grid[1:], TINY.vision)
    real, n = layout.order >= 0, len(layout.order)
    assert (
        vision.frames[0, 0].tolist()[:n] == real.astype(int).tolist()
        and not vision.frames[0, 0, n:].any()
    )
    assert np.array_equal(vision.positions[0, 0, :n], layout.positions)
    assert n % TINY.vision.window_slots == 0 and (t, h * w) == (1, real.sum())


def test_frames_that_share_a_row_have_their_own_numbers_and_slots(tiny):
    e = tiny.encode([user(make_image(32, 32, 1), make_image(64, 64, 2), make_image(32, 32, 3))])
    prompts, _ = collate_rows([e], buckets=(64,))
    (row,) = prompts.vision.frames[0]
    assert row.tolist() == [2] * 64 + [1] * 16 + [3] * 16  # the largest is placed first
    assert np.array_equal(features(prompts, 0, TINY), direct(e))


def test_images_of_the_same_bytes_in_another_shape_are_two(tiny):
    e = tiny.encode([user(Image.new("RGB", (64, 32)), Image.new("RGB", (32, 64)))])
    assert e.media[0].key != e.media[1].key and set(
        collate_rows([e], buckets=(64,))[0].vision.frames.flat
    ) == {1, 2}


def test_an_image_that_appears_twice_in_a_shard_is_encoded_once(tiny):
    rows = [tiny.encode(ROWS[0]), tiny.encode(ROWS[2])]
    count = lambda prompts: sum(
        len(set(row.tolist()) - {0}) for shard in prompts.vision.frames for row in shard
    )
    assert count(collate_rows(rows, buckets=(64,))[0]) == 2
    assert count(collate_rows(rows, buckets=(64,), shards=2)[0]) == 3


def test_packed_rows_hold_whole_conversations_and_their_masks(tiny):
    rows = [
        tiny.encode([*m, says("it is red")] if m[-1]["role"] == "user" else m) for m in ROWS * 3
    ]
    prompts, mask = collate_rows(rows, buckets=(64, 128), pack=True, shards=2)
    assert prompts.tokens.shape[0] < len(rows) and prompts.tokens.shape[1] == 128
    found = []
    for r in range(len(prompts.tokens)):
        for segment in range(1, prompts.segments[r].max() + 1):
            at = np.flatnonzero(prompts.segments[r] == segment)
            assert np.array_equal(at, np.arange(at[0], at[-1] + 1)) and prompts.positions[
                :, r, at[0]
            ].tolist() == [0, 0, 0]
            found.append(
                (
                    tuple(prompts.tokens[r, at]),
                    tuple(mask[r, at]),
                    (prompts.slots[r, at] >= 0).sum(),
                )
            )
    assert sorted(found) == sorted(
        (tuple(e.tokens), tuple(e.loss_mask), (e.types > 0).sum()) for e in rows
    )
    assert mask.sum() == sum(e.loss_mask.sum() for e in rows)


def test_a_stream_of_batches_has_few_shapes(tiny):
    rng = np.random.default_rng(0)
    shapes = set()
    for _ in range(60):
        rows = [
            tiny.encode(
                [
                    user(
                        *[
                            make_image(*rng.integers(16, 80, 2), 1)
                            for _ in range(rng.integers(0, 3))
                        ],
                        "x" * rng.integers(1, 60),
                    )
                ]
            )
            for _ in range(4)
        ]
        seen = []
        collate_rows(rows, buckets=(64, 128), shards=2, agree=lambda s: seen.append(s) or s)
        shapes |= set(seen)
    # two lengths; no vision, a row of 1 2 3 4 6 windows (a picture may have 6), or 2 3 4 rows of 4 or 6
    assert len(shapes) <= 2 * (1 + 5 + 3 * 2)
    assert {
        (s.patches // TINY.vision.window_slots, s.vision_rows) for s in shapes if s.vision_rows > 1
    } <= set(product((4, 6), (2, 3, 4)))


def test_a_batch_without_images(tiny):
    rows = [tiny.encode(ROWS[1])] * 3
    assert collate_rows(rows, buckets=(64,))[0].vision is None
    empty = collate.BatchShape(
        4, 64, 2 * TINY.vision.window_slots, 3
    )  # together with another process's images
    prompts, _ = collate_rows(rows, buckets=(64,), shards=2, agree=lambda _: empty)
    assert prompts.tokens.shape[0] == 4 and prompts.vision.patches.shape[:3] == (
        2,
        3,
        2 * TINY.vision.window_slots,
    )
    assert (
        not prompts.vision.frames.any()
        and (prompts.slots < 0).all()
        and not prompts.segments[3].any()
    )


def test_rows_are_padded_to_a_fixed_number(tiny):
    rows = [tiny.encode(m) for m in ROWS[:3]]
    prompts, mask = collate_rows(rows, buckets=(64,), rows=8, shards=4)
    assert prompts.tokens.shape[0] == 8 and not prompts.segments[3:].any() and not mask[3:].any()
    fails(lambda: collate_rows(rows, buckets=(64,), rows=2), "rows=2")
    fails(lambda: collate_rows(rows, buckets=(64,), rows=6, shards=4), "rows=6", "4 shards")
    fails(lambda: collate_rows([], buckets=(64,)), "at least one")
    fails(lambda: collate_rows(rows, buckets=(16,)), "longer than the largest bucket")


def test_processes_agree_on_one_shape(tiny):
    halves = [
        [tiny.encode(ROWS[0]), tiny.encode(ROWS[1])],
        [tiny.encode(ROWS[1]), tiny.encode(ROWS[1])],
    ]
    seen = []
    for half in halves:
        collate_rows(half, buckets=(16, 64), agree=lambda s: seen.append(s) or s)
    both = collate.widest_shape(seen)
    assert [shape.length for shape in seen] == [64, 16] and [
        bool(shape.patches) for shape in seen
    ] == [True, False]
    for half in halves:
        prompts, _ = collate_rows(half, buckets=(16, 64), agree=lambda _: both)
        assert prompts.tokens.shape == (both.rows, both.length) and prompts.vision.patches.shape[
            1:3
        ] == (both.vision_rows, both.patches)
        assert prompts.segments[:, -1].all(), "left padding reaches the common length"
    assert np.array_equal(
        features(collate_rows(halves[0], buckets=(16, 64), agree=lambda _: both)[0], 0, TINY),
        direct(halves[0][0]),
    )


def test_micro_batches_of_prompts_get_one_shape_by_one_agreement(tiny):
    parts = [[tiny.encode(ROWS[0]), tiny.encode(ROWS[1])], [tiny.encode(ROWS[1])] * 2]
    seen = []
    collate_prompts = functools.partial(
        collate.collate_prompts, buckets=(16, 64), shards=2, agree=lambda s: seen.append(s) or s
    )
    prompts = collate_prompts(parts)
    assert len(seen) == 1 and seen[0].length == 64 and seen[0].patches
    for got, part in zip(prompts, parts, strict=True):
        alone, _ = collate_rows(part, buckets=(16, 64), shards=2, agree=lambda _: seen[0])
        jax.tree.map(np.testing.assert_array_equal, got, alone)
    fails(lambda: collate_prompts([parts[0], parts[1][:1]]), "[2, 1]", "equal numbers")


def test_vision_of_odd_configs():
    cfg = dataclasses.replace(
        TINY,
        vision=Qwen25VisionConfig(
            depth=1, width=48, mlp=96, heads=4, patch=8, window=48, full_blocks=()
        ),
    )
    p = processor.load_processor(None, cfg, 256, 64 * 64)
    e = p.encode([user(make_image(70, 50))])
    prompts, _ = collate_rows([e], buckets=(64,))
    assert np.array_equal(features(prompts, 0, cfg), direct(e))


@pytest.mark.parametrize("pack", [False, True])
def test_rows_mean_to_our_model_what_they_mean_to_transformers(monkeypatch, pack):
    """From images to logits: processor, rows and model equal transformers on each conversation."""
    torch = pytest.importorskip("torch")
    import tiny as models

    from cptjax import sharding
    from cptjax.models import causal_lm, decoder, hf_checkpoint

    for name, token in (("IMAGE", 5), ("VIDEO", 6), ("START", 3), ("END", 4)):
        monkeypatch.setattr(models, name, token)
    model, cfg = models.torch_model(), models.our_config()
    p = processor.load_processor(None, cfg, 56 * 56, 140 * 140)
    rows = [p.encode([*m, says("it is red")] if m[-1]["role"] == "user" else m) for m in ROWS]
    prompts, _ = collate_rows(
        rows, buckets=(64, 128), shards=1 if pack else 2, side="right", pack=pack
    )
    flat = {
        hf_checkpoint.released_name(n, cfg): x.detach().numpy() for n, x in model.named_parameters()
    }
    params, declared = {}, hf_checkpoint.declared_leaves(cfg)
    for path, d in declared.items():
        parts = [
            flat[n].reshape(e.shape[0], -1)
            for n, e in hf_checkpoint.tensor_table(cfg).items()
            if e.path == path
        ]
        params[path] = np.stack([x.T if d.inputs else x for x in parts]).reshape(d.shape)
    params = traverse_util.unflatten_dict(params)
    assert sharding.abstract_params(causal_lm.declare_params(cfg), np.float32) == jax.eval_shape(
        lambda: params
    )
    logits = np.asarray(
        jax.jit(lambda p, x: causal_lm.forward(p, x, cfg) @ decoder.unembedding(p["text"]))(
            params, prompts
        )
    )
    for e in rows:
        inputs = {
            "input_ids": torch.tensor(e.tokens[None]).long(),
            "mm_token_type_ids": torch.tensor(e.types[None]).int(),
        }
        for kind, pixels, grid in (
            (False, "pixel_values", "image_grid_thw"),
            (True, "pixel_values_videos", "video_grid_thw"),
        ):
            if mine := [m for m in e.media if bool(m.seconds) == kind]:
                inputs[pixels] = torch.tensor(
                    np.concatenate([normalise_patches(m.patches, cfg.vision) for m in mine])
                )
                inputs[grid] = torch.tensor([m.grid for m in mine])
                inputs |= (
                    {"second_per_grid_ts": torch.tensor([m.seconds for m in mine])} if kind else {}
                )
        with torch.no_grad():
            wanted = (
                model(**inputs, attention_mask=torch.ones_like(inputs["input_ids"]))
                .logits[0]
                .numpy()
            )
        found = [
            logits[r][prompts.segments[r] == s]
            for r in range(len(logits))
            for s in range(1, prompts.segments[r].max() + 1)
            if np.array_equal(prompts.tokens[r][prompts.segments[r] == s], e.tokens)
        ]
        assert len(found) == 1
        np.testing.assert_allclose(found[0], wanted, atol=2e-4, rtol=0)
