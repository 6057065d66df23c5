"""Numpy drawing for the drawn tasks: counter-based random numbers, shapes, digits and pictures, many images at a time.

Every random number is a hash of (key, example, stream), so example i never depends on how many are drawn with it.
"""

import dataclasses
import functools

import numpy as np

Floats = np.ndarray
COLOURS = {
    "red": (215, 45, 45), "green": (45, 190, 60), "blue": (50, 80, 225),
    "yellow": (225, 210, 50), "purple": (165, 60, 190), "white": (235, 235, 235),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
GLYPHS = (
    "111101101101111", "010110010010111", "111001111100111", "111001111001111", "101101111001001",
    "111100111001111", "111100111101111", "111001010010010", "111101111101111", "111101111001111",
)  # fmt: skip
FONT = np.array([[int(bit) for bit in glyph] for glyph in GLYPHS], np.float32).reshape(10, 5, 3)
STEP = np.uint64(0x9E3779B97F4A7C15)


def mix(values: np.ndarray) -> np.ndarray:
    """Hashes 64-bit integers (the finaliser of splitmix64)."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@functools.lru_cache(maxsize=4096)
def key_of(*parts: int | str) -> np.uint64:
    """Folds numbers and names into one 64-bit key."""
    key = np.zeros(1, np.uint64)
    for part in parts:
        for byte in str(part).encode() + b"/":
            key = mix(key ^ np.uint64(byte + 1)) + STEP
    return key[0]


@dataclasses.dataclass(frozen=True)
class Draws:
    """The random numbers of a row of examples; each stream is used once."""

    examples: np.ndarray  # [n] hashed (key, index)

    @classmethod
    def of(cls, key: np.uint64, indices: np.ndarray) -> "Draws":
        with np.errstate(over="ignore"):
            return cls(mix(key + (indices.astype(np.uint64) + np.uint64(1)) * STEP))

    def bits(self, stream: str, size: int = 1) -> np.ndarray:
        """Returns [n, size] uniform 64-bit integers."""
        with np.errstate(over="ignore"):
            counters = key_of(stream) + np.arange(size, dtype=np.uint64) * STEP
            return mix(self.examples[:, None] ^ mix(counters)[None])

    def uniform(self, stream: str, low: float = 0.0, high: float = 1.0, size: int = 1) -> Floats:
        """Returns [n, size] numbers in [low, high)."""
        return low + (high - low) * (self.bits(stream, size) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def integer(self, stream: str, high: int) -> np.ndarray:
        """Returns [n] integers in [0, high)."""
        return (self.uniform(stream)[:, 0] * high).astype(np.int64)

    def order(self, stream: str, size: int) -> np.ndarray:
        """Returns [n, size] random permutations."""
        return np.argsort(self.bits(stream, size), axis=1)


def background(draws: Draws, side: int) -> Floats:
    """Returns dark canvases of slightly different greys."""
    grey = draws.uniform("background", 20, 60).astype(np.float32)[:, None, None]
    return np.broadcast_to(grey, (len(grey), side, side, 3)).copy()


def place(canvas: Floats, draws: Draws, slot: int, grid: int, cell, shape, colour, radius=None, present=None) -> None:
    """Paints one shape per image into its cell of a grid x grid layout; radius is a share of the cell."""
    size = canvas.shape[1] // grid
    r = (draws.uniform(f"radius{slot}", 0.30, 0.42)[:, 0] if radius is None else radius) * size
    centre = size / 2 + draws.uniform(f"centre{slot}", -1, 1, size=2) * np.maximum(size / 2 - r, 0)[:, None] * 0.7
    hue = np.array(list(COLOURS.values()), np.float32)[colour] + draws.uniform(f"hue{slot}", -22, 22, size=3).astype(np.float32)
    pixel = np.arange(size, dtype=np.float32) + 0.5
    u = pixel[None, None, :] - centre[:, 0].astype(np.float32)[:, None, None]
    v = pixel[None, :, None] - centre[:, 1].astype(np.float32)[:, None, None]
    cover = coverage(shape, u, v, r.astype(np.float32)[:, None, None])
    if present is not None:
        cover *= present[:, None, None]
    rows, columns = np.divmod(cell, grid)
    image = np.arange(len(canvas))[:, None, None]
    y, x = (rows * size)[:, None, None] + np.arange(size)[:, None], (columns * size)[:, None, None] + np.arange(size)
    patch = canvas[image, y, x]
    canvas[image, y, x] = patch + cover[..., None] * (hue[:, None, None] - patch)


def coverage(shape: np.ndarray, u: Floats, v: Floats, r: Floats) -> Floats:
    """Returns how much of each pixel a shape covers, from its distance to the outline in pixels."""
    distance = np.empty(np.broadcast_shapes(u.shape, v.shape), np.float32)
    for kind in range(len(SHAPES)):
        chosen = shape == kind
        if chosen.any():
            distance[chosen] = outline(kind, u[chosen], v[chosen], r[chosen])
    return np.clip(0.5 - distance, 0, 1)


def outline(kind: int, u: Floats, v: Floats, r: Floats) -> Floats:
    """Returns the signed distance to a shape's outline, negative inside; v points down."""
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
            return np.minimum(np.maximum(across - r, down - r / 3), np.maximum(down - r, across - r / 3))
        case _:
            return np.abs(np.hypot(u, v) - 0.72 * r) - 0.25 * r


def write_digits(canvas: Floats, draws: Draws, digits: np.ndarray) -> None:
    """Paints each row of digits [n, length] as one number, at a random scale and place."""
    side, length = canvas.shape[1], digits.shape[1]
    text = np.zeros((len(digits), 5, 4 * length), np.float32)
    for position in range(length):
        text[:, :, 4 * position : 4 * position + 3] = FONT[digits[:, position]]
    text = text[:, :, :-1]
    height, width = text.shape[1:]
    scale = draws.uniform("scale", 0.6, 0.9)[:, 0] * side / max(height, width)
    corner = draws.uniform("corner", size=2) * (side - scale[:, None] * (width, height))
    pixel = np.arange(side) + 0.5
    column = np.floor((pixel[None] - corner[:, :1]) / scale[:, None]).astype(int)
    row = np.floor((pixel[None] - corner[:, 1:]) / scale[:, None]).astype(int)
    inside = ((row >= 0) & (row < height))[:, :, None] & ((column >= 0) & (column < width))[:, None]
    image = np.arange(len(digits))[:, None, None]
    cover = inside * text[image, row.clip(0, height - 1)[:, :, None], column.clip(0, width - 1)[:, None]]
    hue = np.array(list(COLOURS.values()), np.float32)[draws.integer("ink", len(COLOURS))]
    canvas += cover[..., None] * (hue[:, None, None] - canvas)


def pictures(draws: Draws, side: int, contrast: float = 160.0) -> Floats:
    """Returns pictures whose every part tells where it belongs: red grows to the right, green downwards, over it three shapes."""
    n = len(draws.examples)
    slope = 110 + contrast * np.linspace(-0.5, 0.5, side, dtype=np.float32)
    canvas = np.empty((n, side, side, 3), np.float32)
    canvas[..., 0], canvas[..., 1] = slope[None, None], slope[None, :, None]
    canvas[..., 2] = draws.uniform("blue", 30, 190)[:, :, None]
    for slot in range(3):
        shape, colour = draws.integer(f"shape{slot}", len(SHAPES)), draws.integer(f"colour{slot}", len(COLOURS))
        place(canvas, draws, slot, 3, draws.order("cells", 9)[:, slot], shape, colour)
    return canvas


def add_noise(canvas: Floats, draws: Draws, strength: float, split: int) -> np.ndarray:
    """Adds pixel noise and returns uint8 images, in which the first red value modulo 4 is the split: no image is in two splits."""
    n, side = canvas.shape[:2]
    # The number of ones among 32 random bits is normal enough: mean 16, variance 8; a 64-bit hash serves two values.
    values = side * side * 3
    halves = draws.bits("noise", (values + 1) // 2).view(np.uint32)[:, :values]
    canvas += (np.bitwise_count(halves).astype(np.float32).reshape(canvas.shape) - 16) * np.float32(strength / 8**0.5)
    images = np.clip(canvas, 0, 255, out=canvas).astype(np.uint8)
    images[:, 0, 0, 0] = images[:, 0, 0, 0] // 4 * 4 + split
    return images
