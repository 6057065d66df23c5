"""Patches and sizes of images equal those of transformers."""

import numpy as np
import pytest
from conversation_helpers import make_image, user
from PIL import Image

from cptjax.common import images
from cptjax.models.vision_qwen2_5 import normalise_patches


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "LA", "1", "CMYK"])
def test_patches_of_any_colour_mode_equal_transformers(theirs, qwen, mode):
    image = make_image(150, 110, mode="RGBA" if mode in ("RGBA", "LA", "P") else "RGB").convert(
        mode
    )
    wanted = theirs.image_processor(image, return_tensors="np")["pixel_values"]
    media = qwen.encode([user(image)]).media[0]
    assert np.array_equal(normalise_patches(media.patches, qwen.cfg.vision), wanted)


def test_sizes_equal_transformers():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    rng = np.random.default_rng(0)
    for low, high in ((3136, 12845056), (200704, 1003520), (784, 784 * 3)):
        pixels = images.ImageSettings(low, high)
        for height, width in rng.integers(10, 1800, (300, 2)).tolist():
            assert pixels.size(width, height) == smart_resize(height, width, 28, low, high)


def test_a_patch_holds_two_frames_channel_first(tiny):
    frames = [Image.new("RGB", (16, 16), (i, 10 + i, 20 + i)) for i in range(3)]
    media = tiny.encode([user({"type": "video", "video": frames})]).media[0]
    first, second = media.patches.reshape(2, 4, 3, 2, 64)[:, 0, :, :, 0].tolist()
    assert first == [[0, 1], [10, 11], [20, 21]] and second == [[2, 2], [12, 12], [22, 22]], (
        "the last frame is repeated"
    )
