"""The vision tower of Qwen2.5-VL: which patches each kind of block mixes, empty slots."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cptjax import sharding
from cptjax.models import vision_qwen2_5
from cptjax.models.families import PRESETS

CFG = PRESETS["tiny"]  # windows of 16 slots


@pytest.mark.parametrize("full", [False, True])
def test_a_window_block_mixes_windows_and_a_full_block_frames(full):
    """Two frames of two windows; the last window of each is half empty."""
    declared = vision_qwen2_5.vision_params(CFG.vision)["blocks"]
    params = sharding.init_params(declared, jax.random.key(0), jnp.float32)
    layer = jax.tree.map(lambda x: x[0], params)
    frames = np.repeat([[1, 1, 1, 0, 2, 2, 2, 0]], 8, 1)
    x = jax.random.normal(jax.random.key(1), (1, 64, CFG.vision.width))
    rope = vision_qwen2_5.vision_cos_sin(jnp.zeros((1, 64, 2), jnp.int32), CFG.vision)
    block = lambda x: vision_qwen2_5.vision_block(layer, x, rope, frames, full, CFG)
    changed = np.abs(block(x) - block(x.at[0, 20].add(1.0)))[0].max(-1) > 0
    expected = frames[0] == 1
    if not full:
        expected &= np.arange(64) // CFG.vision.window_slots == 1
    real = frames[0] > 0
    assert np.array_equal(changed[real], expected[real])


@pytest.mark.parametrize("preset", ["tiny", "tiny_qwen3_vl"])
def test_the_device_normalises_every_byte_as_transformers_does(preset):
    """transformers multiplies by 1 / 255 in float64, and rounds before it subtracts and divides."""
    v = PRESETS[preset].vision
    patches = np.broadcast_to(np.arange(256, dtype=np.uint8)[:, None], (256, v.patch_dim))
    scaled = (np.arange(256) * v.pixel_scale).astype(np.float32)[:, None]
    wanted = (scaled - np.float32(v.pixel_mean)) / np.float32(v.pixel_std)
    wanted = np.repeat(wanted, v.patch_dim // v.channels, 1)
    assert np.array_equal(vision_qwen2_5.normalise_patches(patches, v), wanted)
    ours = jax.jit(lambda x: vision_qwen2_5.normalise_patches(x, v))(patches)
    np.testing.assert_allclose(ours, wanted, rtol=3e-7, atol=3e-7)


def test_the_tower_declares_what_its_config_says():
    tree = vision_qwen2_5.declare_tower(CFG)
    v = CFG.vision
    assert tree["vision"]["blocks"]["qkv"]["w"].shape == (v.depth, v.width, 3, v.heads, v.head_dim)
    assert tree["merger"]["fc1"]["w"].shape == (4 * v.width, 4 * v.width)
    assert tree["merger"]["fc2"]["w"].shape == (4 * v.width, CFG.text.width)
    assert (v.window_side, v.window_slots) == (2, 16)
