"""Collate encoded conversations into rows of fixed shapes, with their images in window order."""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Sequence

import jax
import numpy as np

from cptjax.common.images import Grid, ImageSettings
from cptjax.models.config import ModelConfig
from cptjax.models.families import find_family
from cptjax.models.positions import FrameLayout
from cptjax.types import Prompts, Vision


@dataclasses.dataclass(frozen=True)
class Media:
    """An image, or a video of t frame pairs, as patches in processor order."""

    patches: np.ndarray  # [t * h * w, C] bytes
    grid: Grid
    pixels: ImageSettings
    seconds: float = 0.0  # from one frame pair of a video to the next
    times: tuple[float, ...] = ()  # the second of each frame pair of a video

    @functools.cached_property
    def key(self) -> bytes:
        """Equal for equal images."""
        content = self.patches.tobytes() + repr(self.grid).encode()
        return hashlib.blake2b(content, digest_size=16).digest()


@dataclasses.dataclass(frozen=True)
class EncodedConversation:
    """One conversation as arrays, ready to be placed in a row."""

    tokens: np.ndarray  # [T]
    types: np.ndarray  # [T] 0 text, 1 image, 2 video
    positions: np.ndarray  # [3 T]
    loss_mask: np.ndarray  # [T] True for the assistant's tokens, including the end of each turn
    media: tuple[Media, ...]  # in order of appearance
    cfg: ModelConfig

    def __len__(self) -> int:
        return len(self.tokens)

    def append_tokens(self, tokens: Sequence[int], trained: int) -> "EncodedConversation":
        """Return the conversation with more text tokens, of which the mask has the first."""
        n, start = len(tokens), self.positions.max() + 1
        positions = start + np.arange(n, dtype=self.positions.dtype)
        return dataclasses.replace(
            self,
            tokens=np.concatenate([self.tokens, np.array(tokens, np.int32)]),
            types=np.concatenate([self.types, np.zeros(n, np.int8)]),
            positions=np.concatenate([self.positions, np.broadcast_to(positions, (3, n))], 1),
            loss_mask=np.concatenate([self.loss_mask, np.arange(n) < trained]),
        )


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """The shape of a batch, for which programs are compiled; each size takes only a few values."""

    rows: int
    length: int
    patches: int  # of a vision row; 0 = no vision
    vision_rows: int


def length_buckets(limit: int, first: int = 64) -> tuple[int, ...]:
    """Return first * 2^k and first * 3/2 * 2^k, and the limit itself as the last bucket.

    64 96 128 192 256 384 ... for first=64: a row has at most a third of padding.
    """
    sizes = (n << i for i in range(limit.bit_length()) for n in (first, first * 3 // 2))
    return (*(n for n in sizes if n < limit), limit)


def extend_buckets(buckets: Sequence[int], added: int) -> tuple[int, ...]:
    """Return the buckets of rows that may be `added` tokens longer."""
    if not added:
        return tuple(buckets)
    longest = max(buckets)
    return (*buckets, *length_buckets(longest + added, 2 * longest))


def smallest_bucket(n: int, sizes: Sequence[int]) -> int:
    """Return the smallest size that holds n."""
    fitting = [size for size in sizes if size >= n]
    if not fitting:
        raise ValueError(
            f"a row of {n} tokens is longer than the largest bucket of {max(sizes)}; "
            "raise data.prompt_limit"
        )
    return min(fitting)


def round_up_size(n: int) -> int:
    """Return the smallest 2^k or 3 * 2^k that holds n.

    At most half of a size is padding, and there are only 2 log2 N sizes below N.
    """
    power = 1 << max(n - 1, 0).bit_length()
    return power * 3 // 4 if power >= 4 and n <= power * 3 // 4 else power


@functools.lru_cache(maxsize=64)
def max_image_slots(cfg: ModelConfig, max_pixels: int) -> int:
    """Return the most vision slots that an image of `max_pixels` takes, with sides up to 4 : 1.

    It is 0 if the model takes no images.
    """
    v, tower = cfg.vision, find_family(cfg).tower
    if tower is None:
        return 0
    units = max(max_pixels // (v.patch * v.merge) ** 2, 1)
    sides = range(max(1, math.isqrt(units) // 2), math.isqrt(units) + 1)
    return max(len(tower.frame_layout(h * v.merge, units // h * v.merge, v).order) for h in sides)


def first_fit(sizes: Sequence[int], capacity: int) -> list[tuple[int, int]]:
    """Return the (bin, offset) of each size by first-fit decreasing bin packing."""
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
    """A frame of an image of one batch shard, and where it is placed."""

    media: Media
    time: int
    layout: FrameLayout
    row: int
    offset: int


PlacedFrames = dict[tuple[bytes, int], _PlacedFrame]  # by key of the image and time


def _unique_frames(
    shard: Sequence[EncodedConversation],
) -> list[tuple[bytes, Media, int, FrameLayout]]:
    """Return every frame of a shard once, even if its image appears several times."""
    unique = {m.key: (m, e.cfg) for e in shard for m in e.media}
    return [
        (key, m, t, find_family(cfg).tower.frame_layout(*m.grid[1:], cfg.vision))
        for key, (m, cfg) in unique.items()
        for t in range(m.grid[0])
    ]


def fit_vision_rows(shards: Sequence[Sequence[int]], most: int) -> tuple[int, int]:
    """Return (size of a vision row, vision rows) that hold frames of these sizes.

    `most` is the size of the largest image allowed. If one row of at most that size is enough, the
    result is one row. Otherwise it is several rows of that size or of the next smaller one,
    whichever pads less. So a batch of many small images has the same shape as a batch of a few
    large images.

        most = 96 (row sizes ... 48 64 96)      8 frames of 11    1 row of 96
                                                8 frames of 16    2 rows of 64
                                                3 frames of 81    3 rows of 96
    """
    largest = max(max(s, default=0) for s in shards)
    total = round_up_size(max(map(sum, shards)))
    top = round_up_size(max(most, largest))
    if total <= top:
        return total, 1
    widths = {round_up_size(n) for n in range(top // 2 + 1, top + 1)}
    shapes = [
        (width, round_up_size(max(1 + row for s in shards for row, _ in first_fit(s, width))))
        for width in sorted(widths)
        if width >= largest
    ]
    return min(shapes, key=math.prod)


def _pack_frames(
    shards: Sequence[Sequence[EncodedConversation]],
) -> tuple[int, int, list[PlacedFrames]]:
    """Return (patches of a vision row, vision rows, placed frames of each shard)."""
    limits = {(e.cfg, m.pixels.max_pixels) for shard in shards for e in shard for m in e.media}
    if not limits:
        return 0, 0, [{} for _ in shards]
    frames = [_unique_frames(shard) for shard in shards]
    window = next(iter(limits))[0].vision.window_slots
    sizes = [[len(layout.order) // window for *_, layout in shard] for shard in frames]
    most = max(max_image_slots(*limit) for limit in limits) // window
    width, rows = fit_vision_rows(sizes, most)
    placed: list[PlacedFrames] = []
    for shard, shard_sizes in zip(frames, sizes, strict=True):
        placed.append({})
        places = first_fit(shard_sizes, width)
        for (key, media, t, layout), (row, offset) in zip(shard, places, strict=True):
            placed[-1][key, t] = _PlacedFrame(media, t, layout, row, offset * window)
    return width * window, rows, placed


def largest_batch_shape(
    cfg: ModelConfig, max_pixels: int, rows: int, shards: int, length: int
) -> BatchShape:
    """Return the shape of a batch whose rows have an image of `max_pixels` each."""
    if cfg.vision is None:
        return BatchShape(rows, length, 0, 0)
    window = cfg.vision.window_slots
    largest = max_image_slots(cfg, max_pixels) // window
    width, vision_rows = fit_vision_rows([[largest] * (rows // shards)], largest)
    return BatchShape(rows, length, width * window, vision_rows)


def prompt_arrays(shape: BatchShape, shards: int, cfg: ModelConfig) -> Prompts:
    """Return the shapes and types of the arrays of collated rows, as jax.ShapeDtypeStruct."""
    ints = jax.ShapeDtypeStruct((shape.rows, shape.length), np.int32)
    vision = None
    if shape.patches:
        lead = (shards, shape.vision_rows, shape.patches)
        vision = Vision(
            patches=jax.ShapeDtypeStruct((*lead, cfg.vision.patch_dim), np.uint8),
            positions=jax.ShapeDtypeStruct((*lead, cfg.vision.position_values), np.int32),
            frames=jax.ShapeDtypeStruct(lead, np.int32),
        )
    return Prompts(
        tokens=ints,
        positions=jax.ShapeDtypeStruct((3, *ints.shape), np.int32),
        segments=ints,
        slots=ints,
        vision=vision,
    )


def _fill_vision(vision: Vision, placed: Sequence[PlacedFrames]) -> None:
    for s, frames in enumerate(placed):
        frames_in_row = [0] * vision.frames.shape[1]
        for f in frames.values():
            frames_in_row[f.row] += 1
            slots = slice(f.offset, f.offset + len(f.layout.order))
            real = f.layout.order >= 0
            n = math.prod(f.media.grid[1:])
            patches = f.media.patches[f.time * n : (f.time + 1) * n]
            vision.patches[s, f.row, slots][real] = patches[f.layout.order[real]]
            vision.positions[s, f.row, slots] = f.layout.positions
            vision.frames[s, f.row, slots] = real * frames_in_row[f.row]


def _feature_slots(e: EncodedConversation, placed: PlacedFrames, patches: int) -> np.ndarray:
    """Return the number [T] of the vision feature that each token takes; -1 for text."""
    slots = np.full(len(e), -1, np.int32)
    frames = [placed[m.key, t] for m in e.media for t in range(m.grid[0])]
    if frames:
        area = e.cfg.vision.merge**2
        slots[e.types > 0] = np.concatenate(
            [(f.row * patches + f.offset) // area + f.layout.units for f in frames]
        )
    return slots


@dataclasses.dataclass(frozen=True)
class _Placement:
    """The position of a conversation in the batch."""

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
    """Return the placement of each conversation and the rows of a shard.

    Without packing, each shard takes a contiguous block of the batch. Packed rows are assigned to
    the shards in turn.
    """
    if not pack:
        shard_rows = rows // shards or -(-len(encoded) // shards)
        placements = []
        for i, e in enumerate(encoded):
            start = length - len(e) if side == "left" else 0
            placements.append(_Placement(i // shard_rows, i % shard_rows, start, 1))
        return placements, shard_rows
    places = first_fit([len(e) for e in encoded], length)
    placements = []
    for row, start in places:
        segment = 1 + sum(other == row and at < start for other, at in places)
        placements.append(_Placement(row % shards, row // shards, start, segment))
    return placements, rows // shards or round_up_size(1 + max(p.row for p in placements))


@dataclasses.dataclass(frozen=True)
class _BatchPlan:
    """Where the conversations and images of a batch are placed, and the shape that holds them."""

    encoded: Sequence[EncodedConversation]
    placements: Sequence[_Placement]
    placed: Sequence[PlacedFrames]  # of each shard
    shape: BatchShape
    pad_left: bool

    def fill(self, shape: BatchShape) -> tuple[Prompts, np.ndarray]:
        """Return (Prompts of numpy arrays, loss mask [B T]) in a shape that may be larger."""
        cfg = self.encoded[0].cfg
        prompts: Prompts = jax.tree.map(
            lambda x: np.zeros(x.shape, x.dtype), prompt_arrays(shape, len(self.placed), cfg)
        )
        prompts.tokens[:] = cfg.pad
        prompts.slots[:] = -1
        if prompts.vision is not None:
            _fill_vision(prompts.vision, self.placed)
        mask = np.zeros(prompts.tokens.shape, bool)
        shard_rows = shape.rows // len(self.placed)
        added = shape.length - self.shape.length if self.pad_left else 0
        for e, p in zip(self.encoded, self.placements, strict=True):
            start = p.start + added
            at = p.shard * shard_rows + p.row, slice(start, start + len(e))
            prompts.tokens[at] = e.tokens
            prompts.segments[at] = p.segment
            prompts.positions[:, *at] = e.positions
            prompts.slots[at] = _feature_slots(e, self.placed[p.shard], shape.patches)
            mask[at] = e.loss_mask
        return prompts, mask


def _plan_batch(
    encoded: Sequence[EncodedConversation],
    buckets: Sequence[int],
    side: str,
    shards: int,
    pack: bool = False,
    rows: int = 0,
) -> _BatchPlan:
    if not encoded:
        raise ValueError("got no conversations; expected at least one")
    longest = max(len(e) for e in encoded)
    if pack:
        longest = max(longest, min(sum(map(len, encoded)), max(buckets)))
    length = smallest_bucket(longest, buckets)
    placements, shard_rows = _place_rows(encoded, shards, rows, length, pack, side)
    too_few = any(p.shard >= shards or p.row >= shard_rows for p in placements)
    if rows % shards or too_few:
        raise ValueError(
            f"rows={rows}; expected a multiple of the {shards} shards, with room for "
            f"{len(encoded)} conversations"
        )
    by_shard: list[list[EncodedConversation]] = [[] for _ in range(shards)]
    for e, p in zip(encoded, placements, strict=True):
        by_shard[p.shard].append(e)
    patches, vision_rows, placed = _pack_frames(by_shard)
    shape = BatchShape(shards * shard_rows, length, patches, vision_rows)
    return _BatchPlan(encoded, placements, placed, shape, side == "left" and not pack)


def collate_rows(
    encoded: Sequence[EncodedConversation],
    *,
    buckets: Sequence[int],
    side: str = "left",
    shards: int = 1,
    pack: bool = False,
    rows: int = 0,
    agree: Callable[[BatchShape], BatchShape] | None = None,
) -> tuple[Prompts, np.ndarray]:
    """Return (Prompts of numpy arrays, loss mask [B T]).

    pack: put several conversations into a row, for SFT; otherwise one, padded on `side`.
    rows: pad the batch with empty rows to this number; 0 = to a multiple of the shards, or with
        `pack` to `round_up_size` rows per shard.
    agree: if several processes build one batch, a function from this process's shape to one that
        holds the shapes of all processes.
    """
    if side not in ("left", "right"):
        raise ValueError(f"side: expected left or right, got {side!r}")
    plan = _plan_batch(encoded, buckets, side, shards, pack, rows)
    return plan.fill(plan.shape if agree is None else agree(plan.shape))


def collate_prompts(
    batches: Sequence[Sequence[EncodedConversation]],
    *,
    buckets: Sequence[int],
    shards: int,
    agree: Callable[[BatchShape], BatchShape],
) -> list[Prompts]:
    """Return the left-padded prompts of each micro-batch, all in one shape.

    The micro-batches have equally many prompts. `agree` is called once, as in `collate_rows`.
    """
    counts = [len(encoded) for encoded in batches]
    if len(set(counts)) > 1:
        raise ValueError(f"got micro-batches of {counts} prompts; expected equal numbers")
    plans = [_plan_batch(encoded, buckets, "left", shards) for encoded in batches]
    shape = agree(widest_shape([plan.shape for plan in plans]))
    return [plan.fill(shape)[0] for plan in plans]


def widest_shape(shapes: Sequence[BatchShape]) -> BatchShape:
    """Return the smallest shape that holds all of `shapes`."""
    return BatchShape(
        *(max(getattr(s, f.name) for s in shapes) for f in dataclasses.fields(BatchShape))
    )
