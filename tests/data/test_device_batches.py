"""Rows for the device: targets are at the positions that predict them.

Micro-batches change nothing.
"""

import math

import jax
import numpy as np
import pytest
import stage_fixtures
from PIL import Image

from configs import base
from cptjax import sharding
from cptjax.data import device_batches, model_context, processor
from cptjax.training.stage_context import StageProgress
from cptjax.training.train_loop import next_step_batch


def config(name: str, **sections):
    c = base.get_config()
    c.stages = (dict(task="first", steps=2),)
    c.method.update(base.METHODS[name])
    c = stage_fixtures.tiny(c, batch=8)
    for section, values in sections.items():
        c[section].update(values)
    return c


def first_update(settings, folder):
    """The parameters and metrics after the first update."""
    with (
        stage_fixtures.prepare_stage(settings, folder) as prepared,
        prepared.ctx.open_stream(0) as stream,
    ):
        found = next_step_batch(prepared.ctx, prepared.params, stream, StageProgress())
        update = next(found.updates)
        state, metrics = prepared.update(update)
        return jax.device_get(state.params), metrics, update


def same(a, b, atol):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), a, b)


def test_response_tokens_are_predicted_by_the_token_before(tmp_path):
    _, _, (batch,) = first_update(config("sft"), tmp_path)
    tokens, where, targets, mask = (
        np.asarray(x) for x in (batch.prompts.tokens, batch.where, batch.targets, batch.mask)
    )
    found = np.take_along_axis(tokens, where + 1, 1)
    assert (found[mask] == targets[mask]).all() and mask.any(1).all() and not targets[~mask].any()


def test_micro_batches_of_groups_leave_the_update_alone(tmp_path):
    changes = dict(method=dict(kl_coef=0.1, ratio="token", normalise="sequence"))
    whole, metrics, one = first_update(config("grpo", **changes), tmp_path / "a")
    parts, told_parts, several = first_update(
        config("grpo", train=dict(micro_batch=2), **changes), tmp_path / "b"
    )
    assert (len(one), len(several)) == (1, 4)
    assert several[0].targets.shape[0] == 2 * 2  # whole groups
    for key in ("grad_norm", "entropy", "kl", "mismatch_max"):
        assert told_parts[key] == pytest.approx(metrics[key], rel=1e-4, abs=1e-6)
    same(whole, parts, 1e-5)


def test_rows_of_a_device_pass():
    assert device_batches.micro_batch_layout(8, 0, 4, fill=False) == (
        8,
        1,
    ) and device_batches.micro_batch_layout(8, 4, 4, fill=False) == (4, 2)
    assert device_batches.micro_batch_layout(24, 0, 16, fill=True) == (
        32,
        1,
    ) and device_batches.micro_batch_layout(24, 6, 4, fill=True) == (8, 4)
    with pytest.raises(ValueError, match="train.micro_batch must divide it"):
        device_batches.micro_batch_layout(8, 3, 1, fill=True)
    with pytest.raises(ValueError, match="6 prompts.*4 shards"):
        device_batches.micro_batch_layout(6, 0, 4, fill=False)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)])
def test_joined_micro_batches_have_the_rows_and_images_of_each(sizes):
    """Two micro-batches of four prompts; some have no image, and images have several sizes."""
    mesh = sharding.make_mesh(*sizes, devices=jax.devices()[: math.prod(sizes)])
    cfg, rng = stage_fixtures.SMALL, np.random.default_rng(0)
    reader = processor.load_processor(None, cfg, 256, 64 * 64)
    ctx = model_context.ModelContext(cfg, reader, mesh, np.float32, (16, 64))
    image = lambda *size: Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
    contents = [
        [
            *({"type": "image", "image": image(*size)} for size in images),
            {"type": "text", "text": text},
        ]
        for images, text in zip(
            (
                [(32, 32)],
                [],
                [(48, 32), (16, 16)],
                [(40, 40)],
                [(64, 64)],
                [(16, 48)],
                [],
                [(32, 64)],
            ),
            ("red", "a b", "", "blue or red", "x", "y", "z", "red"),
            strict=True,
        )
    ]
    encoded = [reader.encode([{"role": "user", "content": c}], generation=True) for c in contents]
    parts = ctx.place_prompt_batches([encoded[:4], encoded[4:]])
    joined, order = device_batches.join_prompts(ctx, parts)
    assert joined.vision.patches.sharding == parts[0].vision.patches.sharding
    assert order.tolist() == ([0, 4, 1, 5, 2, 6, 3, 7] if sizes[0] == 2 else list(range(8)))
    assert joined.vision.frames.shape[1] == 2 * parts[0].vision.frames.shape[1]
    for name, axis in (("tokens", 0), ("positions", 1), ("segments", 0)):
        rows = np.concatenate([getattr(p, name) for p in parts], axis)
        np.testing.assert_array_equal(getattr(joined, name), np.take(rows, order, axis))

    def patches(prompts):
        """The patches [B T 4 C] of each token's image feature; 0 for text."""
        values = np.asarray(prompts.vision.patches)
        values = values.reshape(len(values), -1, cfg.vision.merge**2 * values.shape[-1])
        slots = np.asarray(prompts.slots).reshape(len(values), -1)
        taken = np.take_along_axis(values, np.maximum(slots, 0)[..., None], 1)
        return (taken * (slots >= 0)[..., None]).reshape(len(prompts.tokens), -1)

    np.testing.assert_array_equal(
        patches(joined), np.concatenate([patches(p) for p in parts])[order]
    )


def test_pieces_and_trimmed():
    assert [(p.start, p.stop) for p in device_batches.batch_slices(5, 2)] == [
        (0, 2),
        (2, 4),
        (4, 5),
    ]
    assert [(p.start, p.stop) for p in device_batches.batch_slices(3, 0)] == [(0, 3)]
    mask = np.zeros((2, 64), bool)
    mask[1, :9] = True
    assert device_batches.response_buckets([mask, mask[:1]], 64) == [12, 8]
    assert device_batches.response_buckets([mask], 10) == [10]
