"""Paint the images of synthetic tasks in numpy: shapes, digits and gradients, in batches."""

import numpy as np

from cptjax.tasks.synthetic.random_streams import FloatArray, RandomStreams

COLOURS = {
    "red": (215, 45, 45),
    "green": (45, 190, 60),
    "blue": (50, 80, 225),
    "yellow": (225, 210, 50),
    "purple": (165, 60, 190),
    "white": (235, 235, 235),
}
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
DIGIT_GLYPHS = (
    "111101101101111",
    "010110010010111",
    "111001111100111",
    "111001111001111",
    "101101111001001",
    "111100111001111",
    "111100111101111",
    "111001010010010",
    "111101111101111",
    "111101111001111",
)
DIGIT_FONT = np.array([[int(bit) for bit in glyph] for glyph in DIGIT_GLYPHS], np.float32).reshape(
    10, 5, 3
)


def paint_background(streams: RandomStreams, side: int) -> FloatArray:
    """Return dark grey canvases, each of a slightly different grey."""
    grey = streams.uniform("background", 20, 60).astype(np.float32)[:, None, None]
    return np.broadcast_to(grey, (len(grey), side, side, 3)).copy()


def paint_shape(
    canvas: FloatArray,
    streams: RandomStreams,
    slot: int,
    grid: int,
    cell,
    shape,
    colour,
    radius=None,
    present=None,
) -> None:
    """Paint one shape per image into its cell of a grid x grid layout.

    `radius` is a fraction of the cell.
    """
    size = canvas.shape[1] // grid
    r = (streams.uniform(f"radius{slot}", 0.30, 0.42)[:, 0] if radius is None else radius) * size
    centre = (
        size / 2
        + streams.uniform(f"centre{slot}", -1, 1, size=2)
        * np.maximum(size / 2 - r, 0)[:, None]
        * 0.7
    )
    hue = np.array(list(COLOURS.values()), np.float32)[colour] + streams.uniform(
        f"hue{slot}", -22, 22, size=3
    ).astype(np.float32)
    pixel = np.arange(size, dtype=np.float32) + 0.5
    u = pixel[None, None, :] - centre[:, 0].astype(np.float32)[:, None, None]
    v = pixel[None, :, None] - centre[:, 1].astype(np.float32)[:, None, None]
    cover = shape_coverage(shape, u, v, r.astype(np.float32)[:, None, None])
    if present is not None:
        cover *= present[:, None, None]
    rows, columns = np.divmod(cell, grid)
    image = np.arange(len(canvas))[:, None, None]
    y, x = (
        (rows * size)[:, None, None] + np.arange(size)[:, None],
        (columns * size)[:, None, None] + np.arange(size),
    )
    patch = canvas[image, y, x]
    canvas[image, y, x] = patch + cover[..., None] * (hue[:, None, None] - patch)


def shape_coverage(shape: np.ndarray, u: FloatArray, v: FloatArray, r: FloatArray) -> FloatArray:
    """Compute how much of each pixel a shape covers, from its distance to the outline."""
    distance = np.empty(np.broadcast_shapes(u.shape, v.shape), np.float32)
    for kind in range(len(SHAPES)):
        chosen = shape == kind
        if chosen.any():
            distance[chosen] = outline_distance(kind, u[chosen], v[chosen], r[chosen])
    return np.clip(0.5 - distance, 0, 1)


def outline_distance(kind: int, u: FloatArray, v: FloatArray, r: FloatArray) -> FloatArray:
    """Compute the signed distance to a shape's outline, negative inside; v points down."""
    across, down = np.abs(u), np.abs(v)
    match SHAPES[kind]:
        case "circle":
            return np.hypot(u, v) - r
        case "square":
            return np.maximum(across, down) - 0.85 * r
        case "triangle":
            return np.maximum(v - 0.5 * r, 0.866 * across - 0.5 * v - 0.5 * r)
        case "diamond":
            return 0.707 * (across + down) - 0.75 * r
        case "cross":
            return np.minimum(
                np.maximum(across - r, down - r / 3), np.maximum(down - r, across - r / 3)
            )
        case _:
            return np.abs(np.hypot(u, v) - 0.72 * r) - 0.25 * r


def paint_digits(canvas: FloatArray, streams: RandomStreams, digits: np.ndarray) -> None:
    """Paint each row of digits [n, length] as one number, at a random scale and place."""
    side, length = canvas.shape[1], digits.shape[1]
    text = np.zeros((len(digits), 5, 4 * length), np.float32)
    for position in range(length):
        text[:, :, 4 * position : 4 * position + 3] = DIGIT_FONT[digits[:, position]]
    text = text[:, :, :-1]
    height, width = text.shape[1:]
    scale = streams.uniform("scale", 0.6, 0.9)[:, 0] * side / max(height, width)
    corner = streams.uniform("corner", size=2) * (side - scale[:, None] * (width, height))
    pixel = np.arange(side) + 0.5
    column = np.floor((pixel[None] - corner[:, :1]) / scale[:, None]).astype(int)
    row = np.floor((pixel[None] - corner[:, 1:]) / scale[:, None]).astype(int)
    inside = ((row >= 0) & (row < height))[:, :, None] & ((column >= 0) & (column < width))[:, None]
    image = np.arange(len(digits))[:, None, None]
    cover = (
        inside
        * text[image, row.clip(0, height - 1)[:, :, None], column.clip(0, width - 1)[:, None]]
    )
    hue = np.array(list(COLOURS.values()), np.float32)[streams.integer("ink", len(COLOURS))]
    canvas += cover[..., None] * (hue[:, None, None] - canvas)


def paint_puzzle_images(streams: RandomStreams, side: int, contrast: float = 160.0) -> FloatArray:
    """Return images in which each part shows where it belongs.

    Red grows to the right, green grows downwards, with three shapes on top.
    """
    n = len(streams.examples)
    slope = 110 + contrast * np.linspace(-0.5, 0.5, side, dtype=np.float32)
    canvas = np.empty((n, side, side, 3), np.float32)
    canvas[..., 0], canvas[..., 1] = slope[None, None], slope[None, :, None]
    canvas[..., 2] = streams.uniform("blue", 30, 190)[:, :, None]
    for slot in range(3):
        shape, colour = (
            streams.integer(f"shape{slot}", len(SHAPES)),
            streams.integer(f"colour{slot}", len(COLOURS)),
        )
        paint_shape(canvas, streams, slot, 3, streams.order("cells", 9)[:, slot], shape, colour)
    return canvas


def add_noise(
    canvas: FloatArray, streams: RandomStreams, strength: float, split: int
) -> np.ndarray:
    """Add pixel noise and return uint8 images.

    The first red value of an image modulo 4 is the split, so no image is in two splits.
    """
    n, side = canvas.shape[:2]
    # The number of ones among 32 random bits is nearly normal, with mean 16 and variance 8. A
    # 64-bit hash gives two values.
    values = side * side * 3
    halves = streams.bits("noise", (values + 1) // 2).view(np.uint32)[:, :values]
    canvas += (np.bitwise_count(halves).astype(np.float32).reshape(canvas.shape) - 16) * np.float32(
        strength / 8**0.5
    )
    images = np.clip(canvas, 0, 255, out=canvas).astype(np.uint8)
    images[:, 0, 0, 0] = images[:, 0, 0, 0] // 4 * 4 + split
    return images
