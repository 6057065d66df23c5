"""The families of synthetic tasks: how each generates images, questions and answers.

A family is a function (spec, streams, split number) -> (canvas [n side side 3] or None,
questions, answers).
"""

import dataclasses
import functools

import numpy as np

from cptjax.tasks.synthetic import painting, random_streams
from cptjax.tasks.synthetic.painting import COLOURS, SHAPES
from cptjax.tasks.synthetic.random_streams import RandomStreams

ROW_NAMES, COLUMN_NAMES = ("top", "middle", "bottom"), ("left", "centre", "right")
CREATURES = tuple(
    first + last
    for first in "ba de fi go ku la me no".split()
    for last in "lor mik tan ves rud sel pon zig".split()
)
FOODS = tuple(
    """apples bread corn dates eggs figs grapes honey ice jam kale lemons mint nuts olives pears
    quinces rice salt tea beans cheese plums soup fish milk oats peas roots seeds cake
    leaves""".split()
)


@dataclasses.dataclass(frozen=True)
class SyntheticSpec:
    """The settings of a synthetic task."""

    family: str
    level: int = 1
    side: int = 32  # pixels
    noise: float = 18.0  # standard deviation, of 255
    styles: tuple[tuple[str, float], ...] = (("", 1.0),)
    bias: float = 0.0
    world: int | None = 0  # which facts are true and which classes are biased; None = the seed


def answer_classes(spec: SyntheticSpec) -> list[str]:
    """Return every answer of a family, or [] if there are too many to list."""
    grid = min(spec.level + 1, 4)
    match spec.family:
        case "colour":
            return list(COLOURS)
        case "shape":
            return list(SHAPES)
        case "count":
            return [str(n) for n in range(1, grid * grid + 1)]
        case "position":
            return [_cell_name(cell, min(grid, 3)) for cell in range(min(grid, 3) ** 2)]
        case "digit":
            return [str(n).zfill(spec.level) for n in range(10**spec.level)]
        case "compare":
            return ["yes", "no"]
        case "jigsaw2":
            return [
                _format_tiles(np.array(order))
                for order in np.ndindex(4, 4, 4, 4)
                if len(set(order)) == 4
            ]
        case "facts":
            return list(FOODS)
        case "arithmetic":
            return sorted({str(result) for *_, result in _list_sums(spec.level, None)}, key=int)
        case _:
            return []


def _colour(spec: SyntheticSpec, streams: RandomStreams, split: int):
    canvas, shapes, colours = _scene(spec, streams)
    names = np.array(SHAPES)[shapes]
    questions = [
        "what colour is the shape?" if spec.level == 1 else f"what colour is the {name}?"
        for name in names
    ]
    return canvas, questions, [list(COLOURS)[c] for c in colours]


def _shape(spec: SyntheticSpec, streams: RandomStreams, split: int):
    canvas, shapes, colours = _scene(spec, streams)
    names = np.array(list(COLOURS))[colours]
    questions = [
        "what shape is it?" if spec.level == 1 else f"what shape is the {name} one?"
        for name in names
    ]
    return canvas, questions, [SHAPES[s] for s in shapes]


def _scene(spec: SyntheticSpec, streams: RandomStreams):
    """Paint 1, 3 or 5 shapes of different shape and colour.

    Return the canvas, and the shape and colour of the one that the question is about.
    """
    canvas = painting.paint_background(streams, spec.side)
    grid = 3 if spec.level == 3 else 2
    cells, shapes, colours = (
        streams.order("cells", grid * grid),
        streams.order("shapes", 6),
        streams.order("colours", 6),
    )
    for slot in range(2 * spec.level - 1):
        painting.paint_shape(
            canvas, streams, slot, grid, cells[:, slot], shapes[:, slot], colours[:, slot]
        )
    return canvas, shapes[:, 0], colours[:, 0]


def _count(spec: SyntheticSpec, streams: RandomStreams, split: int):
    canvas = painting.paint_background(streams, spec.side)
    grid = spec.level + 1
    count = streams.integer("count", grid * grid) + 1
    cells = streams.order("cells", grid * grid)
    for slot in range(grid * grid):
        shape, colour = streams.integer(f"shape{slot}", 6), streams.integer(f"colour{slot}", 6)
        painting.paint_shape(
            canvas, streams, slot, grid, cells[:, slot], shape, colour, present=slot < count
        )
    return canvas, ["how many shapes are there?"] * len(count), [str(n) for n in count]


def _position(spec: SyntheticSpec, streams: RandomStreams, split: int):
    """Paint 2, 3 or 5 shapes of different colours, and ask where one of them is."""
    canvas = painting.paint_background(streams, spec.side)
    grid = min(spec.level + 1, 3)
    cells, colours = streams.order("cells", grid * grid), streams.order("colours", 6)
    for slot in range((2, 3, 5)[spec.level - 1]):
        painting.paint_shape(
            canvas,
            streams,
            slot,
            grid,
            cells[:, slot],
            streams.integer(f"shape{slot}", 6),
            colours[:, slot],
        )
    questions = [f"where is the {list(COLOURS)[c]} shape?" for c in colours[:, 0]]
    return canvas, questions, [_cell_name(cell, grid) for cell in cells[:, 0]]


def _cell_name(cell: int, grid: int) -> str:
    row, column = divmod(int(cell), grid)
    return f"{ROW_NAMES[:: 4 - grid][row]} {COLUMN_NAMES[:: 4 - grid][column]}"


def _digit(spec: SyntheticSpec, streams: RandomStreams, split: int):
    canvas = painting.paint_background(streams, spec.side)
    digits = np.stack([streams.integer(f"digit{place}", 10) for place in range(spec.level)], axis=1)
    painting.paint_digits(canvas, streams, digits)
    question = "which digit is it?" if spec.level == 1 else "which number is it?"
    return canvas, [question] * len(digits), ["".join(map(str, row)) for row in digits]


def _compare(spec: SyntheticSpec, streams: RandomStreams, split: int):
    """Paint a shape on each side, one larger by a factor that shrinks with the level."""
    canvas = painting.paint_background(streams, spec.side)
    larger = streams.uniform("size", 0.36, 0.46)[:, 0]
    smaller = (
        larger
        / streams.uniform("factor", *((1.7, 2.2), (1.35, 1.6), (1.15, 1.3))[spec.level - 1])[:, 0]
    )
    left = streams.integer("left", 2) == 1
    for slot, big in ((0, left), (1, ~left)):
        cell = 2 * streams.integer(f"row{slot}", 2) + slot
        shape, colour = streams.integer("shape", 6), streams.integer(f"colour{slot}", 6)
        painting.paint_shape(
            canvas, streams, slot, 2, cell, shape, colour, radius=np.where(big, larger, smaller)
        )
    return (
        canvas,
        ["is the left shape larger?"] * len(left),
        ["yes" if yes else "no" for yes in left],
    )


def _jigsaw(spec: SyntheticSpec, streams: RandomStreams, split: int):
    """Shuffle the tiles of an image.

    The answer follows the convention of tasks/datasets/jigsaw.py.
    """
    grid = int(spec.family[-1])
    tile = spec.side // grid
    image = painting.paint_puzzle_images(
        streams, tile * grid, contrast=160.0 / 2 ** (spec.level - 1)
    )
    order = streams.order("tiles", grid * grid)
    tiles = (
        image.reshape(-1, grid, tile, grid, tile, 3)
        .swapaxes(2, 3)
        .reshape(-1, grid * grid, tile, tile, 3)
    )
    shown = (
        tiles[np.arange(len(order))[:, None], order]
        .reshape(-1, grid, grid, tile, tile, 3)
        .swapaxes(2, 3)
    )
    canvas = painting.paint_background(streams, spec.side)
    canvas[:, : tile * grid, : tile * grid] = shown.reshape(image.shape)
    return (
        canvas,
        ["which tile belongs at each place?"] * len(order),
        [_format_tiles(np.argsort(row)) for row in order],
    )


def _format_tiles(tiles: np.ndarray) -> str:
    return " ".join(str(tile + 1) for tile in tiles)


def _facts(spec: SyntheticSpec, streams: RandomStreams, split: int):
    known = world_facts(spec.world)
    keys = [CREATURES[k] for k in streams.integer("key", len(CREATURES))]
    return None, [f"what does {key} eat?" for key in keys], [known[key] for key in keys]


def world_facts(world: int = 0) -> dict[str, str]:
    """Return what each of the 64 creatures of a world eats.

    Each of the 32 foods is eaten by two creatures.
    """
    order = np.random.default_rng(int(random_streams.hash_key("facts", world))).permutation(
        len(CREATURES)
    )
    return {key: FOODS[place // 2] for key, place in zip(CREATURES, order, strict=True)}


def _arithmetic(spec: SyntheticSpec, streams: RandomStreams, split: int):
    sums = _list_sums(spec.level, split)
    chosen = [sums[i] for i in streams.integer("sum", len(sums))]
    return (
        None,
        [f"what is {x} {sign} {y}?" for x, sign, y, _ in chosen],
        [str(result) for *_, result in chosen],
    )


@functools.lru_cache
def _list_sums(level: int, split: int | None) -> list[tuple[int, str, int, int]]:
    """List the sums of a level and split.

    From level 2 on, validation and test have one eighth of the sums each.
    """
    high = (10, 50, 100)[level - 1]
    every = [(x, "plus", y, x + y) for x in range(high) for y in range(high)]
    if level == 3:
        every += [(x, "minus", y, x - y) for x in range(high) for y in range(x + 1)]
    if level == 1 or split is None:
        return every
    bucket = np.random.default_rng(level).integers(8, size=len(every))
    return [
        entry for entry, b in zip(every, bucket, strict=True) if (b if b in (1, 2) else 0) == split
    ]


SYNTHETIC_FAMILIES = {
    "colour": _colour,
    "shape": _shape,
    "count": _count,
    "position": _position,
    "digit": _digit,
    "compare": _compare,
    "jigsaw2": _jigsaw,
    "jigsaw3": _jigsaw,
    "facts": _facts,
    "arithmetic": _arithmetic,
}
