"""Window order and M-RoPE ids equal those of transformers, and the diagrams of the docstrings."""

import functools

import numpy as np
import pytest
import tiny
from tiny import Image, Video

from cptjax.models import vision_qwen2_5
from cptjax.models.vision_qwen2_5 import Qwen25VisionConfig

GRIDS = [(2, 2), (4, 6), (8, 8), (8, 16), (10, 4), (6, 22), (16, 18), (2, 34), (36, 20), (24, 24)]


def _window_index(h, w, cfg):
    torch = pytest.importorskip("torch")
    from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

    grid = torch.tensor([[1, h, w]])
    index, bounds = get_vision_window_index(grid, cfg.merge, cfg.window, cfg.patch)
    places = get_vision_position_ids(grid, cfg.merge)
    return index.numpy(), bounds.numpy(), places.numpy()


@pytest.mark.parametrize("window", [56, 112, 120, 168])
@pytest.mark.parametrize("h,w", GRIDS)
def test_the_window_order_is_that_of_transformers(h, w, window):
    cfg = Qwen25VisionConfig(window=window)
    layout = vision_qwen2_5.frame_layout(h, w, cfg)
    index, bounds, places = _window_index(h, w, cfg)
    real = layout.order >= 0
    patches = (index[:, None] * 4 + np.arange(4)).reshape(-1)
    np.testing.assert_array_equal(layout.order[real], patches)
    np.testing.assert_array_equal(layout.positions[real], places[patches])
    np.testing.assert_array_equal(
        np.unique(np.flatnonzero(real) // cfg.window_slots, return_counts=True)[1], np.diff(bounds)
    )
    merged = layout.order[::4] // 4  # text order of the unit in each unit slot
    np.testing.assert_array_equal(merged[layout.units], np.arange(h * w // 4))


def test_the_window_order_is_the_diagram_of_the_docstring():
    layout = vision_qwen2_5.frame_layout(8, 12, Qwen25VisionConfig())
    units = layout.order[::4].reshape(2, 16) // 4
    assert units[0].tolist() == [0, 1, 2, 3, 6, 7, 8, 9, 12, 13, 14, 15, 18, 19, 20, 21]
    assert units[1].tolist() == [4, 5, 10, 11, 16, 17, 22, 23] + [-1] * 8
    assert layout.positions[:6].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3]]


def test_a_frame_that_cannot_be_merged_is_refused():
    with pytest.raises(ValueError, match="5 x 8 patches"):
        vision_qwen2_5.frame_layout(5, 8, Qwen25VisionConfig())


def test_mrope_is_the_diagram_of_the_docstring():
    ids = vision_qwen2_5.token_positions(
        np.array([0, 0, 1, 1, 1, 1, 0, 0]), [(1, 4, 4)], [], Qwen25VisionConfig()
    )
    assert ids.tolist() == [
        [0, 1, 2, 2, 2, 2, 4, 5],
        [0, 1, 2, 2, 3, 3, 4, 5],
        [0, 1, 2, 3, 2, 3, 4, 5],
    ]


def test_text_after_a_long_video_continues_after_the_highest_id():
    """Three frame pairs, two seconds apart, of 1 x 2 tokens; then text."""
    types = np.array([0, 2, 2, 2, 2, 2, 2, 0, 0])
    ids = vision_qwen2_5.token_positions(types, [(3, 2, 4)], [2.0], Qwen25VisionConfig())
    assert ids.tolist() == [
        [0, 1, 1, 5, 5, 9, 9, 10, 11],
        [0, 1, 1, 1, 1, 1, 1, 10, 11],
        [0, 1, 2, 1, 2, 1, 2, 10, 11],
    ]


@functools.cache
def _model(per_second):
    return tiny.torch_model(vision={"tokens_per_second": per_second}).model


ROWS = [
    [[20]],
    [[3, Image(8, 12), 5]],
    [[Image(4, 10), Image(12, 18), 2, Image(6, 22)]],
    [[30], [4, Image(6, 10), 8], [5, Image(10, 4), 3, Image(4, 14), 11]],
    [
        [4, Video(3, 8, 12, 0.7), 6, Video(5, 4, 6, 2.0), 5],
        [2, Image(4, 4), 3, Video(2, 6, 6, 1 / 3), 1],
    ],
    [[1, Video(7, 4, 4, 0.1), 9]],
]


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("per_second", [2, 25])
@pytest.mark.parametrize("rows", ROWS)
def test_mrope_is_that_of_transformers(rows, per_second, left):
    cfg = tiny.our_config(vision={"tokens_per_second": per_second})
    rows = [tiny.random_row(row, cfg, np.random.default_rng(0)) for row in rows]
    ours, inputs = tiny.prompts(rows, cfg, left), tiny.hf_inputs(rows, cfg, left)
    inputs = {k: v for k, v in inputs.items() if not k.startswith("pixel")}
    theirs = tiny.released_positions(_model(per_second), inputs)
    real = ours.segments > 0
    np.testing.assert_array_equal(ours.positions[:, real], theirs.numpy()[:, real])
    for i, row in enumerate(rows):
        grids = [part.grid() for part, _ in row.media]
        seconds = [part.seconds for part, _ in row.media if isinstance(part, Video)]
        ids = vision_qwen2_5.token_positions(row.types, grids, seconds, cfg.vision)
        assert ids.max() == theirs[:, i].max()
