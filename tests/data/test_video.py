"""Frames of videos are sampled as transformers samples them, and get positions by their rate."""

import sys

import numpy as np
import pytest
from conversation_helpers import QWEN, TINY, fails, make_image, user
from PIL import Image

from cptjax.models.family import choose_even_frames
from cptjax.models.vision_qwen2_5 import token_positions


def test_frames_are_sampled_as_transformers_does():
    cases = [
        (300, 30.0),
        (47, 23.976),
        (1000, 25.0),
        (5, 10.0),
        (2, 1.0),
        (1, 30.0),
        (100_000, 60.0),
    ]
    for total, native in cases:
        indices = choose_even_frames(total, native, 2.0, 2)
        n = len(indices)
        assert n == 1 or n % 2 == 0
        assert (
            n <= 768
            and indices[0] == 0
            and indices[-1] < total
            and list(indices) == sorted(set(indices))
        )
    many = choose_even_frames(300, 30.0, 2.0, 2)
    assert len(many) == 20 and many[:3] == (0, 15, 30)
    assert len(choose_even_frames(5, 10.0, 2.0, 2)) == 4, "at least four frames"


def test_frames_of_a_video_equal_stills_where_they_do_not_move(qwen):
    """transformers' video processor needs torchvision.

    A video without motion is a repeated image.
    """
    image = make_image(150, 110)
    clip = qwen.encode([user({"type": "video", "video": [image] * 5}, "What happens?")])
    still = qwen.encode([user(image)])
    (t, h, w), (_, sh, sw) = clip.media[0].grid, still.media[0].grid
    assert (t, h, w) == (3, sh, sw) and clip.types.max() == 2
    assert np.array_equal(clip.media[0].patches, np.concatenate([still.media[0].patches] * 3))
    assert (clip.tokens == QWEN.video_token).sum() == 3 * sh * sw // 4


def test_video_positions_follow_the_frame_rate(tiny):
    frames = [make_image(32, 32, i) for i in range(6)]
    for fps in (1.0, 2.0):
        e = tiny.encode([user({"type": "video", "video": frames, "fps": fps})])
        assert np.array_equal(
            e.positions, token_positions(e.types, [e.media[0].grid], [2 / fps], TINY.vision)
        )
        times = sorted(set(e.positions[0][e.types == 2].tolist()))
        assert np.diff(times).tolist() == [TINY.vision.tokens_per_second * 2 / fps] * 2


def test_a_video_file_without_its_reader_is_one_line(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "a.mp4").write_bytes(b"x")
    fails(
        lambda: tiny.encode([user({"type": "video", "video": str(tmp_path / "a.mp4")})]),
        "pip install",
        "av",
    )


def test_a_video_file(tiny, tmp_path):
    av = pytest.importorskip("av")
    path = str(tmp_path / "a.mp4")
    with av.open(path, "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(30):
            frame = av.VideoFrame.from_image(Image.new("RGB", (64, 48), (8 * i, 8 * i, 8 * i)))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    messages = [user({"type": "video", "video": path}, "what happens?")]
    e = tiny.encode(messages)
    assert e.media[0].grid == (3, 6, 8) and e.media[0].seconds == pytest.approx(1.0)
    brightness = e.media[0].patches.reshape(3, -1).mean(1)
    assert np.allclose(brightness, [20, 100, 180], atol=12), "frames 0, 5, 10, ... in pairs"
    assert tiny.measure(messages) == (len(e), [(3, 6, 8)])
    (tmp_path / "b.mp4").write_bytes((tmp_path / "a.mp4").read_bytes()[:100])
    fails(lambda: tiny.encode([user({"type": "video", "video": str(tmp_path / "b.mp4")})]), "b.mp4")
