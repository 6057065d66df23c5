"""Encoded conversations -> rows of fixed shapes: padded or packed text, pictures packed in window order."""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Sequence

import numpy as np

from cptjax.common.images import Grid, ImageSettings
from cptjax.data.image_patches import normalise_patches
from cptjax.models.config import ModelConfig
from cptjax.models.positions import FrameLayout, frame_layout
from cptjax.types import Prompts, Vision


@dataclasses.dataclass(frozen=True)
class Media:
    """An image, or a video of t frame pairs, as patches in processor order."""

    patches: np.ndarray  # [t * h * w, C] bytes
    grid: Grid
    pixels: ImageSettings
    seconds: float = 0.0  # from one frame pair of a video to the next

    @functools.cached_property
    def key(self) -> bytes:
        """Equal for equal pictures."""
        return hashlib.blake2b(
            self.patches.tobytes() + repr(self.grid).encode(), digest_size=16
        ).digest()


@dataclasses.dataclass(frozen=True)
class EncodedConversation:
    """One conversation, ready to be put into rows."""

    tokens: np.ndarray  # [T]
    types: np.ndarray  # [T] 0 text, 1 image, 2 video
    positions: np.ndarray  # [3 T]
    loss_mask: np.ndarray  # [T] the assistants' words and the end of each of their turns
    media: tuple[Media, ...]  # in order of appearance
    cfg: ModelConfig

    def __len__(self) -> int:
        return len(self.tokens)


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """What the compiler sees of a batch; every size is one of a few buckets."""

    rows: int
    length: int
    patches: int  # of a vision row; 0 = no vision
    vision_rows: int


def length_buckets(limit: int, first: int = 64) -> tuple[int, ...]:
    """Powers of two from `first`, ending with the limit itself."""
    return (*(first << i for i in range(limit.bit_length()) if first << i < limit), limit)


def smallest_bucket(n: int, sizes: Sequence[int]) -> int:
    """The smallest size that holds n."""
    fitting = [size for size in sizes if size >= n]
    if not fitting:
        raise ValueError(
            f"a row of {n} tokens is longer than the largest bucket of {max(sizes)}; raise data.prompt_limit"
        )
    return min(fitting)


def round_up_size(n: int) -> int:
    """The smallest 2^k or 3 * 2^k that holds n: at most half is padding, and sizes below N number 2 log2 N."""
    power = 1 << max(n - 1, 0).bit_length()
    return power * 3 // 4 if power >= 4 and n <= power * 3 // 4 else power


@functools.lru_cache(maxsize=64)
def max_image_slots(cfg: ModelConfig, max_pixels: int) -> int:
    """Slots of the vision tower that a picture of so many pixels takes at most, with sides up to 4 : 1."""
    v = cfg.vision
    units = max(max_pixels // (v.patch * v.merge) ** 2, 1)
    sides = range(max(1, math.isqrt(units) // 2), math.isqrt(units) + 1)
    return max(len(frame_layout(h * v.merge, units // h * v.merge, v).order) for h in sides)


def first_fit(sizes: Sequence[int], capacity: int) -> list[tuple[int, int]]:
    """(bin, offset) of each size; the largest are placed first, each in the first bin with room."""
    filled: list[int] = []
    places = [(0, 0)] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        b = next((b for b, used in enumerate(filled) if used + sizes[i] <= capacity), len(filled))
        if b == len(filled):
            filled.append(0)
        places[i] = (b, filled[b])
        filled[b] += sizes[i]
    return places


@dataclasses.dataclass(frozen=True)
class _PlacedFrame:
    """A frame of a picture of one batch shard, and where it goes."""

    media: Media
    time: int
    layout: FrameLayout
    row: int
    offset: int


PlacedFrames = dict[tuple[bytes, int], _PlacedFrame]  # by picture and time


def _unique_frames(
    shard: Sequence[EncodedConversation],
) -> list[tuple[bytes, Media, int, FrameLayout]]:
    """Every frame of a shard once, however often its picture appears."""
    pictures = {m.key: (m, e.cfg.vision) for e in shard for m in e.media}
    return [
        (key, m, t, frame_layout(*m.grid[1:], cfg))
        for key, (m, cfg) in pictures.items()
        for t in range(m.grid[0])
    ]


def fit_vision_rows(shards: Sequence[Sequence[int]], most: int) -> tuple[int, int]:
    """(size of a vision row, vision rows) that hold frames of these sizes; `most` is the size of the largest picture allowed.

    One row of any step up to the largest picture's, else several rows of its step or the one below, whichever pads less: a batch of
    many small pictures has the shape of one of few large ones.

        most 96 (steps ... 48 64 96)    8 frames of 11 -> 1 x 96      8 of 16 -> 2 x 64      3 of 81 -> 3 x 96
    """
    largest, total = max(max(s, default=0) for s in shards), round_up_size(max(map(sum, shards)))
    top = round_up_size(max(most, largest))
    if total <= top:
        return total, 1
    widths = sorted(
        n for n in {round_up_size(n) for n in range(top // 2 + 1, top + 1)} if n >= largest
    )
    rows = [
        round_up_size(max(1 + row for s in shards for row, _ in first_fit(s, width)))
        for width in widths
    ]
    return min(zip(widths, rows, strict=True), key=math.prod)


def _pack_frames(
    shards: Sequence[Sequence[EncodedConversation]], window: int
) -> tuple[int, int, list[PlacedFrames]]:
    """(patches of a vision row, vision rows, frames of each shard)."""
    frames = [_unique_frames(shard) for shard in shards]
    pixels = {(e.cfg, m.pixels.max_pixels) for shard in shards for e in shard for m in e.media}
    if not pixels:
        return 0, 0, [{} for _ in shards]
    sizes = [[len(f[3].order) // window for f in shard] for shard in frames]
    width, rows = fit_vision_rows(sizes, max(max_image_slots(*p) for p in pixels) // window)
    placed = []
    for shard, each in zip(frames, sizes, strict=True):
        where = [(row, at * window) for row, at in first_fit(each, width)]
        placed.append(
            {
                (key, t): _PlacedFrame(m, t, layout, *at)
                for (key, m, t, layout), at in zip(shard, where, strict=True)
            }
        )
    return width * window, rows, placed


def _fill_vision(
    placed: Sequence[PlacedFrames], shape: BatchShape, cfg: ModelConfig, dtype: np.dtype
) -> Vision:
    lead = (len(placed), shape.vision_rows, shape.patches)
    out = Vision(
        np.zeros((*lead, cfg.vision.patch_dim), dtype),
        np.zeros((*lead, 2), np.int32),
        np.zeros(lead, np.int32),
    )
    for s, frames in enumerate(placed):
        numbers = [0] * shape.vision_rows
        for f in frames.values():
            numbers[f.row] += 1
            here = slice(f.offset, f.offset + len(f.layout.order))
            real = f.layout.order >= 0
            n = math.prod(f.media.grid[1:])
            values = normalise_patches(
                f.media.patches[f.time * n : (f.time + 1) * n], f.media.pixels
            )
            out.patches[s, f.row, here][real] = values[f.layout.order[real]]
            out.positions[s, f.row, here] = f.layout.positions
            out.frames[s, f.row, here] = real * numbers[f.row]
    return out


def _feature_slots(e: EncodedConversation, placed: PlacedFrames, patches: int) -> np.ndarray:
    """[T] which merged feature of the shard stands at each token; -1 for text."""
    out = np.full(len(e), -1, np.int32)
    area = e.cfg.vision.merge**2
    frames = [placed[m.key, t] for m in e.media for t in range(m.grid[0])]
    if frames:
        out[e.types > 0] = np.concatenate(
            [(f.row * patches + f.offset) // area + f.layout.units for f in frames]
        )
    return out


@dataclasses.dataclass(frozen=True)
class _Placement:
    """Where a conversation goes."""

    shard: int
    row: int  # within the shard
    start: int
    segment: int


def _place_rows(
    encoded: Sequence[EncodedConversation],
    shards: int,
    rows: int,
    length: int,
    pack: bool,
    side: str,
) -> tuple[list[_Placement], int]:
    """(seats, rows of a shard): in order, a contiguous block of the batch to each shard; packed rows are dealt out in turn."""
    if not pack:
        each = rows // shards or -(-len(encoded) // shards)
        return [
            _Placement(*divmod(i, each), length - len(e) if side == "left" else 0, 1)
            for i, e in enumerate(encoded)
        ], each
    places = first_fit([len(e) for e in encoded], length)
    segments = [1 + sum(row == r and at < start for r, at in places) for row, start in places]
    seats = [
        _Placement(row % shards, row // shards, start, n)
        for (row, start), n in zip(places, segments, strict=True)
    ]
    return seats, rows // shards or round_up_size(1 + max(seat.row for seat in seats))


def _fill_prompts(
    encoded: Sequence[EncodedConversation],
    seats: Sequence[_Placement],
    placed: Sequence[PlacedFrames],
    shape: BatchShape,
) -> tuple[Prompts, np.ndarray]:
    size = (shape.rows, shape.length)
    ints = lambda value, lead=(): np.full((*lead, *size), value, np.int32)
    out, mask = (
        Prompts(ints(encoded[0].cfg.pad), ints(0, (3,)), ints(0), ints(-1)),
        np.zeros(size, bool),
    )
    each = shape.rows // len(placed)
    for e, seat in zip(encoded, seats, strict=True):
        at = seat.shard * each + seat.row, slice(seat.start, seat.start + len(e))
        out.tokens[at], out.segments[at], mask[at] = e.tokens, seat.segment, e.loss_mask
        out.positions[:, *at] = e.positions
        out.slots[at] = _feature_slots(e, placed[seat.shard], shape.patches)
    return out, mask


def collate_rows(
    encoded: Sequence[EncodedConversation],
    *,
    buckets: Sequence[int],
    side: str = "left",
    shards: int = 1,
    pack: bool = False,
    rows: int = 0,
    dtype: np.dtype | type = np.float32,
    agree: Callable[[BatchShape], BatchShape] | None = None,
) -> tuple[Prompts, np.ndarray]:
    """(Prompts of numpy arrays, loss mask [B T]).

    pack: several conversations in a row, for SFT; else one, padded on `side`.
    rows: pad the batch with empty rows to this number; 0 = to a multiple of the shards (packed: to a step of it).
    agree: where several processes make one batch, takes the own Shape to the largest of all of them (`widest`).
    """
    if side not in ("left", "right") or not encoded:
        raise ValueError(
            f"side={side!r} and {len(encoded)} conversations came; expected left or right and at least one conversation"
        )
    cfg, longest = encoded[0].cfg, max(len(e) for e in encoded)
    length = smallest_bucket(
        max(longest, min(sum(map(len, encoded)), max(buckets))) if pack else longest, buckets
    )
    seats, each = _place_rows(encoded, shards, rows, length, pack, side)
    if (
        rows % shards
        or max(seat.shard for seat in seats) >= shards
        or max(seat.row for seat in seats) >= each
    ):
        raise ValueError(
            f"rows={rows}; expected a multiple of the {shards} shards, with room for {len(encoded)} conversations"
        )
    parts = [
        [e for e, seat in zip(encoded, seats, strict=True) if seat.shard == s]
        for s in range(shards)
    ]
    patches, vision_rows, placed = _pack_frames(parts, cfg.vision.window_slots)
    shape = BatchShape(shards * each, length, patches, vision_rows)
    if agree is not None:
        shape = agree(shape)
    if side == "left" and not pack:
        seats = [
            dataclasses.replace(seat, start=seat.start + shape.length - length) for seat in seats
        ]
    prompts, mask = _fill_prompts(encoded, seats, placed, shape)
    vision = _fill_vision(placed, shape, cfg, np.dtype(dtype)) if shape.patches else None
    return prompts.replace(vision=vision), mask


def widest_shape(shapes: Sequence[BatchShape]) -> BatchShape:
    """The shape that holds all of these."""
    return BatchShape(
        *(max(getattr(s, f.name) for s in shapes) for f in dataclasses.fields(BatchShape))
    )
