"""Open any image as upright RGB, and compute the size to which it is resized for the model."""

import base64
import contextlib
import dataclasses
import io
import logging
import math
import os
import threading
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

_log = logging.getLogger("cptjax")

# Only formats that Pillow decodes itself: its EPS reader, for example, would start Ghostscript.
Image.init()
KNOWN_FORMATS = "JPEG PNG WEBP GIF BMP DIB TIFF PPM ICO AVIF JPEG2000 TGA"
IMAGE_FORMATS = tuple(f for f in KNOWN_FORMATS.split() if f in Image.OPEN)
MAX_FILE_PIXELS = 89_478_485  # 256 MiB of RGB, the size above which Pillow warns
# Of all images that the threads of this process decode at a time; more wait. One image may have
# more: it is then decoded alone.
MAX_DECODED_PIXELS = 1 << 26
SIXTEEN_BIT_MODES = ("I;16", "I;16B", "I;16L", "I;16N")
EXIF_ORIENTATION = 0x0112
ROTATED_ORIENTATIONS = (5, 6, 7, 8)  # EXIF orientations that swap width and height

DEFAULT_MIN_PIXELS = 56 * 56  # as in transformers, like the next two
DEFAULT_MAX_PIXELS = 28 * 28 * 1280
MAX_ASPECT_RATIO = 200
THUMBNAIL_SIDE = 160  # pixels
MOST_THUMBNAILS = 8  # of a prompt

# PIL.Image | path | bytes | uint8 array [height width 3] | {"bytes", "path"} of `datasets`
ImageSource = Any
Grid = tuple[int, int, int]  # time, height, width in patches


def open_image(source: ImageSource, base: str | os.PathLike = "") -> Image.Image:
    """Open any image as upright RGB; a relative path starts at `base`.

    An image that cannot be opened raises a ValueError that names it.
    """
    if isinstance(source, Image.Image):
        return _to_rgb(source)
    if isinstance(source, np.ndarray):
        return _to_rgb(Image.fromarray(source))
    stream, name = _open_stream(source, base)
    try:
        image = Image.open(stream, formats=IMAGE_FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{name}: {_too_large_message(str(error))}") from error
    except Exception as error:
        raise ValueError(
            f"{name}: not an image that can be read ({_one_line_reason(error)})"
        ) from error
    if image.width * image.height > MAX_FILE_PIXELS:
        raise ValueError(f"{name}: {_too_large_message(f'{image.width} x {image.height} pixels')}")
    # An MPO file has several frames but is one photo with previews.
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
        _log.warning("%s: an animation of %d frames, the first one is used", name, image.n_frames)
    try:
        return _to_rgb(image)
    except Exception as error:
        raise ValueError(f"{name}: cut short or corrupt ({_one_line_reason(error)})") from error


def find_file(path: str | os.PathLike, base: str | os.PathLike = "") -> Path:
    """Return the file that a data row names; a relative path starts at `base`."""
    text = os.fspath(path)
    if text.startswith(("http://", "https://", "s3://", "gs://")):
        raise ValueError(f"{text}: addresses are not fetched; download the file and give its path")
    path = Path(base, text.removeprefix("file://")).expanduser()
    # A name with accents has two normal forms; archives made on a Mac use the decomposed one.
    spellings = [unicodedata.normalize(form, str(path)) for form in ("NFC", "NFD")]
    for spelling in (str(path), *spellings):
        if Path(spelling).is_file():
            return Path(spelling)
    raise ValueError(f"{path}: {'a folder, not a file' if path.is_dir() else 'no such file'}")


def _open_stream(source: ImageSource, base: str | os.PathLike) -> tuple[Any, str]:
    """Return the path or stream for Pillow to open, and the name of the image for messages."""
    if isinstance(source, dict):
        if source.get("bytes"):
            return io.BytesIO(source["bytes"]), source.get("path") or "image"
        source = source.get("path") or source.get("image") or ""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return io.BytesIO(source), "image"
    if isinstance(source, (str, os.PathLike)) and os.fspath(source):
        text = os.fspath(source)
        if text.startswith("data:image/"):
            return io.BytesIO(base64.b64decode(text.partition(",")[2])), "image"
        path = find_file(text, base)
        return path, str(path)
    raise ValueError(f"image: expected a path, bytes or a PIL image, got {source!r:.80}")


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert any colour mode to upright RGB: white behind transparency, 16 bits scaled to 8."""
    with _decoding.reserve(image.width * image.height):
        image.load()
        return _convert_to_rgb(image)


def _convert_to_rgb(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode in SIXTEEN_BIT_MODES or image.mode in ("I", "F"):
        image = _to_eight_bit(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    # Copy an RGB image too, so that the caller owns the pixels and no file stays open.
    return image.copy() if image.mode == "RGB" else image.convert("RGB")


def _to_eight_bit(image: Image.Image) -> Image.Image:
    """Scale 16-bit, 32-bit and float grey levels to 0-255, by the range of the mode or values."""
    values = np.asarray(image)
    peak = float(values.max(initial=0.0))
    if image.mode in SIXTEEN_BIT_MODES or peak > 255:
        top = max(65535.0, peak)
    else:
        top = 1.0 if image.mode == "F" and peak <= 1 else 255.0
    scaled = np.empty(values.shape, np.uint8)
    for row, line in zip(scaled, values, strict=True):  # 8 bytes per pixel only of one line
        row[:] = np.clip(line.astype(np.float64) / top * 255 + 0.5, 0, 255)
    return Image.fromarray(scaled)


class _DecodingLimit:
    """Bounds the pixels of all images that are decoded at a time, so that many threads need no
    more memory than a few."""

    def __init__(self) -> None:
        self._freed, self._pixels = threading.Condition(), 0

    @contextlib.contextmanager
    def reserve(self, pixels: int) -> Iterator[None]:
        """Wait until the pixels fit, or until no other image is being decoded."""
        with self._freed:
            self._freed.wait_for(
                lambda: not self._pixels or self._pixels + pixels <= MAX_DECODED_PIXELS
            )
            self._pixels += pixels
        try:
            yield
        finally:
            with self._freed:
                self._pixels -= pixels
                self._freed.notify_all()


_decoding = _DecodingLimit()


def _too_large_message(what: str) -> str:
    return f"{what}: more than the {MAX_FILE_PIXELS} pixels allowed; shrink the image"


def _one_line_reason(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__


@dataclasses.dataclass(frozen=True)
class ImageSettings:
    """How images become patches in training, sampling and evaluation; saved with checkpoints."""

    min_pixels: int = DEFAULT_MIN_PIXELS
    max_pixels: int = DEFAULT_MAX_PIXELS
    # (min, max) of all frames of a video together; None = each frame has the limits of an image.
    video_pixels: tuple[int, int] | None = None
    patch: int = 14
    temporal: int = 2
    merge: int = 2
    resample: int = int(Image.Resampling.BICUBIC)

    def __post_init__(self):
        least = (self.patch * self.merge) ** 2
        if not least <= self.min_pixels <= self.max_pixels:
            raise ValueError(
                f"min_pixels={self.min_pixels} max_pixels={self.max_pixels}; expected {least} <= "
                f"min_pixels <= max_pixels, as one merged patch has {least} pixels"
            )

    def size(self, width: int, height: int, frames: int | None = None) -> tuple[int, int]:
        """Return (height, width) after resizing an image, or the frames of a video.

        Both are multiples of the side of a merged patch, and their area is within the limits. The
        aspect ratio is kept as closely as these conditions allow.
        """
        if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
            raise ValueError(
                f"an image of {width} x {height} pixels is too narrow; expected an aspect ratio of "
                f"at most {MAX_ASPECT_RATIO}"
            )
        unit, sides = self.patch * self.merge, (height, width)
        low, high, count, padded = self.min_pixels, self.max_pixels, 1, 1
        if frames is not None and self.video_pixels is not None:
            count, padded = frames, max(round(frames / self.temporal), 1) * self.temporal
            high = min(self.video_pixels[1], self.max_pixels * padded)
            low = min(self.video_pixels[0], high)
            grow = max(1, unit / min(sides))
            sides = tuple(int(side * grow) for side in sides)
        h, w = (round(side / unit) * unit for side in sides)
        if padded * h * w > high:
            shrink = math.sqrt(count * math.prod(sides) / high)
            h, w = (max(unit, math.floor(side / shrink / unit) * unit) for side in sides)
        elif padded * h * w < low:
            grow = math.sqrt(low / (count * math.prod(sides)))
            h, w = (math.ceil(side * grow / unit) * unit for side in sides)
        return h, w

    def grid(self, width: int, height: int, frames: int | None = None) -> Grid:
        """Return the patch grid of an image, or of the frames of a video."""
        h, w = self.size(width, height, frames)
        return -(-(frames or 1) // self.temporal), h // self.patch, w // self.patch


def image_size(source: Any) -> tuple[int, int]:
    """Return the upright (width, height) of an image, read from its header alone."""
    if isinstance(source, dict):
        source = source.get("bytes") or source.get("path")
    try:
        if isinstance(source, Image.Image):
            image = source
        elif isinstance(source, (bytes, bytearray)):
            image = Image.open(io.BytesIO(source), formats=IMAGE_FORMATS)
        elif isinstance(source, (str, os.PathLike)) and not str(source).startswith("data:"):
            image = Image.open(find_file(source), formats=IMAGE_FORMATS)
        else:
            image = open_image(source)
        # Without this check, Pillow would decode a whole PNG to search for orientation data.
        has_exif = image.format != "PNG" or "exif" in image.info
        rotated = has_exif and image.getexif().get(EXIF_ORIENTATION) in ROTATED_ORIENTATIONS
    except (OSError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning):
        image, rotated = open_image(source), False  # raises the error that names the image
    return image.size[::-1] if rotated else image.size


def thumbnail_uri(source: ImageSource, side: int = THUMBNAIL_SIDE) -> str:
    """Return a data URI of an image, shrunk to at most `side` pixels on each side."""
    image = open_image(source)
    image.thumbnail((side, side))
    out = io.BytesIO()
    image.save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
