"""Pictures -> patches in the order of Hugging Face's processor; equal to its PIL back end, without torch."""

import dataclasses
import functools
import io
import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from cptjax.images import find_file, open_image

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's
MIN_PIXELS, MAX_PIXELS = 56 * 56, 28 * 28 * 1280  # transformers' defaults
TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
EXIF_ORIENTATION = 0x0112
MAX_RATIO = 200  # of the sides, as in transformers

Grid = tuple[int, int, int]  # time, height, width in patches


@dataclasses.dataclass(frozen=True)
class Pixels:
    """How pictures become patches: one setting for training, sampling and evaluation, saved with every checkpoint."""

    min_pixels: int = MIN_PIXELS
    max_pixels: int = MAX_PIXELS
    patch: int = 14
    temporal: int = 2
    merge: int = 2
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    scale: float = 1 / 255
    resample: int = int(Image.Resampling.BICUBIC)

    def __post_init__(self):
        least = (self.patch * self.merge) ** 2
        if not least <= self.min_pixels <= self.max_pixels:
            raise ValueError(
                f"min_pixels={self.min_pixels} max_pixels={self.max_pixels}; expected {least} <= min_pixels <= max_pixels, "
                f"as one merged patch has {least} pixels"
            )

    def size(self, width: int, height: int) -> tuple[int, int]:
        """(height, width) after resizing: multiples of a merged patch, area within the limits, nearly the same shape."""
        if max(width, height) > MAX_RATIO * min(width, height):
            raise ValueError(f"an image of {width} x {height} pixels is too narrow; the sides may differ {MAX_RATIO} times at most")
        unit, sides = self.patch * self.merge, (height, width)
        h, w = (round(side / unit) * unit for side in sides)
        if h * w > self.max_pixels:
            shrink = math.sqrt(height * width / self.max_pixels)
            h, w = (max(unit, math.floor(side / shrink / unit) * unit) for side in sides)
        elif h * w < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (height * width))
            h, w = (math.ceil(side * grow / unit) * unit for side in sides)
        return h, w

    def grid(self, width: int, height: int, frames: int = 1) -> Grid:
        h, w = self.size(width, height)
        return -(-frames // self.temporal), h // self.patch, w // self.patch


def merged(grid: Grid, merge: int) -> int:
    """How many tokens stand for a picture: the only count there is."""
    return math.prod(grid) // merge**2


def cut(frames: Sequence[Image.Image], pixels: Pixels) -> tuple[np.ndarray, Grid]:
    """RGB frames of one size -> patches [t * h * w, channels * temporal * patch * patch] as bytes, and the grid.

    A still is one frame, shown `temporal` times; so is the last frame of a video that does not fill its patches.
    """
    sizes = {frame.size for frame in frames}
    if len(sizes) != 1:
        raise ValueError(f"the frames of a video differ in size: {sorted(sizes)[:2]}; resize them to one size")
    h, w = pixels.size(*frames[0].size)
    shown = [np.asarray(f if f.size == (w, h) else f.resize((w, h), pixels.resample)) for f in frames]
    shown += [shown[-1]] * (-len(shown) % pixels.temporal)
    m, p, tp = pixels.merge, pixels.patch, pixels.temporal
    grid = (len(shown) // tp, h // p, w // p)
    x = np.stack(shown).reshape(grid[0], tp, grid[1] // m, m, p, grid[2] // m, m, p, 3)
    return np.ascontiguousarray(x.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)).reshape(math.prod(grid), -1), grid


def normalise(patches: np.ndarray, pixels: Pixels) -> np.ndarray:
    """Bytes -> float32, by a table of the 256 values of each channel: the same roundings as transformers at a fraction of the time."""
    tables = _levels(pixels)
    return np.concatenate([t[part] for t, part in zip(tables, np.split(patches, len(tables), 1), strict=True)], 1)


@functools.lru_cache(maxsize=8)
def _levels(pixels: Pixels) -> list[np.ndarray]:
    values = (np.arange(256, dtype=np.float64) * pixels.scale).astype(np.float32)
    return [(values - np.float32(mean)) / np.float32(std) for mean, std in zip(pixels.mean, pixels.std, strict=True)]


def dimensions(source: Any) -> tuple[int, int]:
    """(width, height) of an image, upright, from its header alone."""
    if isinstance(source, dict):
        source = source.get("bytes") or source.get("path")
    try:
        if isinstance(source, Image.Image):
            image = source
        elif isinstance(source, (bytes, bytearray)):
            image = Image.open(io.BytesIO(source))
        elif isinstance(source, (str, os.PathLike)) and not str(source).startswith("data:"):
            image = Image.open(find_file(source))
        else:
            image = open_image(source)
        unread = image.format == "PNG" and "exif" not in image.info  # Pillow would decode the whole PNG to look for it
        turned = not unread and image.getexif().get(EXIF_ORIENTATION) in TURNED
    except (OSError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning):
        image, turned = open_image(source), False  # which says what is wrong
    return image.size[::-1] if turned else image.size
