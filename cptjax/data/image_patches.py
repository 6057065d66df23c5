"""Cut images into patches exactly as Hugging Face's processor with Pillow does, without torch."""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from cptjax.common.images import Grid, ImageSettings


def count_image_tokens(grid: Grid, merge: int) -> int:
    """Return the number of tokens that an image or a video takes."""
    return math.prod(grid) // merge**2


def cut_patches(
    frames: Sequence[Image.Image], pixels: ImageSettings, is_video: bool = False
) -> tuple[np.ndarray, Grid]:
    """Resize RGB frames of one size, and return them as patches of bytes with their grid.

    The patches are [t * h * w, channels * temporal * patch * patch]. A still image is one frame
    repeated `temporal` times; the last frame of a video is repeated to fill its patches.
    """
    sizes = {frame.size for frame in frames}
    if len(sizes) != 1:
        raise ValueError(
            f"the frames of a video differ in size: {sorted(sizes)[:2]}; resize them to one size"
        )
    h, w = pixels.size(*frames[0].size, len(frames) if is_video else None)
    arrays = [
        np.asarray(f if f.size == (w, h) else f.resize((w, h), pixels.resample)) for f in frames
    ]
    arrays += [arrays[-1]] * (-len(arrays) % pixels.temporal)
    m, p, tp = pixels.merge, pixels.patch, pixels.temporal
    grid = (len(arrays) // tp, h // p, w // p)
    x = np.stack(arrays).reshape(grid[0], tp, grid[1] // m, m, p, grid[2] // m, m, p, 3)
    x = np.ascontiguousarray(x.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7))
    return x.reshape(math.prod(grid), -1), grid
