"""Positions of patches and tokens: window order and M-RoPE ids, computed on the host in numpy.

No function of this module is traced, so new image sizes do not cause a compilation.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class FrameLayout:
    """One frame in window order.

    A frame of 4 x 6 merge units takes two windows of 4 x 4 units; the second is half full:

        units in text order          windows (each row one window of 16 slots, four slots a unit)
         0  1  2  3 |  4  5          0 1 2 3  6 7 8 9  12 13 14 15  18 19 20 21
         6  7  8  9 | 10 11          4 5 10 11  16 17 22 23  - - - -  - - - -
        12 13 14 15 | 16 17
        18 19 20 21 | 22 23
    """

    order: np.ndarray  # [slots] number of the patch, in processor order; -1 = empty slot
    positions: np.ndarray  # [slots 2] row and column of the patch
    units: np.ndarray  # [h * w / merge^2] the unit (slot // merge^2) of each token, in text order


@functools.lru_cache(maxsize=4096)
def window_layout(h: int, w: int, merge: int, side: int) -> FrameLayout:
    """Return the order of a frame of h x w patches in windows of side x side merge units."""
    m = merge
    if h % m or w % m:
        raise ValueError(f"a frame of {h} x {w} patches: expected multiples of {m} on both sides")
    uh, uw = h // m, w // m
    wh, ww = -(-uh // side), -(-uw // side)
    grid = np.full((wh * side, ww * side), -1, np.int32)
    grid[:uh, :uw] = np.arange(uh * uw, dtype=np.int32).reshape(uh, uw)
    windows = grid.reshape(wh, side, ww, side).transpose(0, 2, 1, 3).reshape(wh * ww, side * side)
    packed = np.full_like(windows, -1)
    for row, window in zip(packed, windows, strict=True):
        row[: (window >= 0).sum()] = window[window >= 0]
    unit = packed.reshape(-1)
    patches = unit[:, None] * m * m + np.arange(m * m, dtype=np.int32)
    order = np.where(unit[:, None] < 0, -1, patches).reshape(-1).astype(np.int32)
    units = np.empty(uh * uw, np.int32)
    units[unit[unit >= 0]] = np.flatnonzero(unit >= 0)
    row, col = np.divmod(np.maximum(order, 0) // (m * m), uw)
    within = np.maximum(order, 0) % (m * m)
    positions = np.stack([row * m + within // m, col * m + within % m], -1) * (order >= 0)[:, None]
    return FrameLayout(order, positions.astype(np.int32), units)


def mrope(
    types: np.ndarray,
    grids: Sequence[tuple[int, int, int]],
    seconds_per_grid: Sequence[float],
    merge: int,
    tokens_per_second: float,
) -> np.ndarray:
    """Return the time, height and width ids [3 T] of a row.

    types: 0 text, 1 image, 2 video. `grids` lists (t, h, w) in patches, in order of appearance;
    `seconds_per_grid` has one entry per video, from one frame pair to the next, and a second adds
    `tokens_per_second` to the time ids. What follows an image or a video starts at one more than
    the highest id of any axis so far. Example with text, an image of 2 x 2 units, text:

        token    a b i i i i c d
        time     0 1 2 2 2 2 4 5
        height   0 1 2 2 3 3 4 5
        width    0 1 2 3 2 3 4 5
    """
    out = np.empty((3, len(types)), np.int32)
    start, at = 0, 0  # the next id, the next token
    grids, seconds = iter(grids), iter(seconds_per_grid)
    while at < len(types):
        kind = int(types[at])
        if kind == 0:
            n = int(np.argmax(types[at:] != 0)) or len(types) - at
            out[:, at : at + n] = np.arange(start, start + n)
            start += n
        else:
            t, h, w = next(grids)
            h, w = h // merge, w // merge
            n = t * h * w
            step = np.float32(1)
            if kind == 2:  # transformers multiplies in float32 and truncates
                step = np.float32(tokens_per_second) * np.float32(next(seconds))
            times = (np.arange(t, dtype=np.float32) * step).astype(np.int32)
            ids = times[:, None, None], np.arange(h)[:, None], np.arange(w)
            for row, axis_ids in zip(out[:, at : at + n], ids, strict=True):
                row.reshape(t, h, w)[...] = start + axis_ids
            start += max(h, w, int(times[-1]) + 1)
        at += n
    return out


def text_positions(length: int) -> np.ndarray:
    """Return the ids [3 T] of a row of text: the same three for each token."""
    return np.broadcast_to(np.arange(length, dtype=np.int32), (3, length)).copy()
