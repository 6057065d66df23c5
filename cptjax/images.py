"""The one way an image is opened: whatever it is stored as, an upright RGB picture or one clear line comes back."""

import base64
import io
import logging
import os
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

log = logging.getLogger("cptjax")

# Only formats that decode without an outside program: Pillow's EPS reader would start Ghostscript on a user's file.
Image.init()
FORMATS = tuple(f for f in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "ICO", "AVIF", "JPEG2000", "TGA") if f in Image.OPEN)
MAX_PIXELS = 89_478_485  # a quarter of a GiB of RGB, Pillow's own warning line
SIXTEEN_BIT = ("I;16", "I;16B", "I;16L", "I;16N")

Source = Any  # PIL.Image | path | bytes | {"bytes", "path"} as datasets stores images | uint8 array [height width 3]


def open_image(source: Source, base: str | os.PathLike = "") -> Image.Image:
    """Opens any image as RGB, upright; a relative path is looked up under `base`; what cannot be opened is a ValueError."""
    if isinstance(source, Image.Image):
        return _rgb(source, "image")
    if isinstance(source, np.ndarray):
        return _rgb(Image.fromarray(source), "image")
    stream, name = _stream(source, base)
    try:
        image = Image.open(stream, formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # a filter of warnings may make it an error
        raise ValueError(f"{name}: {_too_large(str(error))}") from error
    except Exception as error:
        raise ValueError(f"{name}: not an image that can be read ({_reason(error)})") from error
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{name}: {_too_large(f'{image.width} x {image.height} pixels')}")
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # an MPO is one photo with a preview beside it
        log.warning("%s: an animation of %d frames, the first one is used", name, image.n_frames)
    try:
        image.load()
        return _rgb(image, name)
    except Exception as error:
        raise ValueError(f"{name}: cut short or corrupt ({_reason(error)})") from error


def find_file(path: str | os.PathLike, base: str | os.PathLike = "") -> Path:
    """Returns the file that a data row names, looked up under `base` when relative."""
    text = os.fspath(path)
    if text.startswith(("http://", "https://", "s3://", "gs://")):
        raise ValueError(f"{text}: addresses are not fetched; download the file and give its path")
    found = Path(base, text.removeprefix("file://")).expanduser()
    # An accented name may be spelled in either normal form: archives made on a Mac hold the decomposed one.
    for spelling in (str(found), *(unicodedata.normalize(form, str(found)) for form in ("NFC", "NFD"))):
        if Path(spelling).is_file():
            return Path(spelling)
    raise ValueError(f"{found}: {'a folder, not a file' if found.is_dir() else 'no such file'}")


def _stream(source: Source, base: str | os.PathLike) -> tuple[Any, str]:
    """Returns what Pillow opens and the name that messages use."""
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
    raise ValueError(f"an image is a path, bytes or a PIL image, but {source!r:.80} came")


def _rgb(image: Image.Image, name: str) -> Image.Image:
    """Converts every colour mode as a person expects: transparency on white, 16 bits scaled to 8."""
    image = ImageOps.exif_transpose(image)
    if image.mode in SIXTEEN_BIT or image.mode in ("I", "F"):
        image = _eight_bit(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    # A copy even of RGB: the caller owns the pixels and no file stays open.
    return image.copy() if image.mode == "RGB" else image.convert("RGB")


def _eight_bit(image: Image.Image) -> Image.Image:
    """Scales 16-bit, 32-bit and float grey levels to 0-255 by the range that their mode or content implies."""
    values = np.asarray(image).astype(np.float64)
    peak = values.max(initial=0.0)
    if image.mode in SIXTEEN_BIT or peak > 255:
        top = max(65535.0, peak)
    else:
        top = 1.0 if image.mode == "F" and peak <= 1 else 255.0
    return Image.fromarray(np.clip(values / top * 255 + 0.5, 0, 255).astype(np.uint8))


def _too_large(what: str) -> str:
    return f"{what}: more than the {MAX_PIXELS} pixels allowed; shrink the image"


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__
