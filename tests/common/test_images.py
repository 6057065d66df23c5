"""Decoding images: how much memory many threads need, and formats that need another program."""

import concurrent.futures
import os
import threading
import time

import numpy as np
import pytest
from PIL import Image

from cptjax.common import images


def test_threads_decode_no_more_pixels_at_a_time_than_allowed(tmp_path, monkeypatch):
    """A larger image than that is decoded alone."""
    sizes = [(40, 10)] * 8 + [(100, 100)] + [(40, 10)] * 8
    for i, size in enumerate(sizes):
        Image.new("RGB", size).save(tmp_path / f"{i}.png")
    decoding, seen, lock = [], [], threading.Lock()
    convert = images._convert_to_rgb

    def slow_convert(image):
        with lock:
            decoding.append(image.width * image.height)
            seen.append(tuple(decoding))
        time.sleep(0.01)
        with lock:
            decoding.remove(image.width * image.height)
        return convert(image)

    monkeypatch.setattr(images, "_convert_to_rgb", slow_convert)
    monkeypatch.setattr(images, "MAX_DECODED_PIXELS", 1000)
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        opened = threads.map(lambda i: images.open_image(tmp_path / f"{i}.png"), range(17))
        assert [image.size for image in opened] == sizes
    assert max(map(len, seen)) == 2 and max(sum(s) for s in seen if len(s) > 1) == 800
    assert (10_000,) in seen


def test_a_damaged_image_frees_its_pixels(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MAX_DECODED_PIXELS", 1)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(
        tmp_path / "a.png"
    )
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:5000])
    for _ in range(2):
        with pytest.raises(ValueError, match="cut.png: cut short or corrupt"):
            images.open_image(tmp_path / "cut.png")
    assert images.open_image(tmp_path / "a.png").size == (64, 64)


@pytest.mark.parametrize("kind, top", [(np.uint16, 65535), (np.float32, 1), (np.int32, 65535)])
def test_grey_levels_are_scaled_as_in_float64(kind, top):
    values = (np.random.default_rng(0).random((30, 20)) * top).astype(kind)
    want = np.clip(values.astype(np.float64) / top * 255 + 0.5, 0, 255).astype(np.uint8)
    got = np.asarray(images.open_image(Image.fromarray(values)))
    assert np.array_equal(got, np.stack([want] * 3, -1))


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n"


@pytest.mark.parametrize("content", [EPS, b"%PDF-1.4\n1 0 obj\n<< >>\nendobj\n"])
def test_no_other_program_is_started_to_decode_an_image(tmp_path, monkeypatch, content):
    """Pillow would start Ghostscript for EPS, whatever the name of the file says."""
    gs = tmp_path / "bin" / "gs"
    gs.parent.mkdir()
    gs.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    gs.chmod(0o755)
    monkeypatch.setenv("PATH", f"{gs.parent}:{os.environ['PATH']}")
    (tmp_path / "a.png").write_bytes(content)
    for read in (images.open_image, images.image_size, images.thumbnail_uri):
        for source in (tmp_path / "a.png", content):
            with pytest.raises(ValueError, match="not an image that can be read"):
                read(source)
    assert not (tmp_path / "started").exists()
