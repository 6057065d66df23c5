"""Jigsaw: the tiles of an image are shown in shuffled order; the answer restores the image.

Tiles and places are numbered from 1 in reading order. The answer lists, for each place of the
ORIGINAL image in reading order, which SHOWN tile belongs there:

    original        shown           place 1 (a) is shown as tile 3
     a | b           d | c          place 2 (b) is shown as tile 4
    ---+---         ---+---         place 3 (c) is shown as tile 2
     c | d           a | b          place 4 (d) is shown as tile 1     answer: 3 4 2 1

`permutation[k]` is the original place (from 0) of shown tile k: (3, 2, 0, 1) above; the answer is
its inverse, plus 1. The images are photographs: those of TextVQA by default, since paper B's own
are not known; `images` names a folder or any other task with images.
"""

import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cptjax.common import console
from cptjax.common.images import open_image
from cptjax.tasks.synthetic import dataset
from cptjax.tasks.task import (
    Examples,
    Task,
    conversation_images,
    limit_rows,
    refuse_old_name,
    user_turn,
)
from cptjax.types import Example

IMAGE_FILE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
INSTRUCTION = "The final answer is the numbers alone."
QUESTION = (
    "<image>The picture was cut into a grid of {rows} rows and {cols} columns and its tiles "
    "were shuffled. The tiles you see are numbered 1 to {count} in reading order. For each "
    "place of the original picture, in reading order, give the number of the tile that belongs "
    "there: {count} numbers separated by spaces."
)


def shuffle_tiles(
    image: Image.Image, permutation: Sequence[int], rows: int, cols: int
) -> Image.Image:
    """Return the image, cropped to the grid, with the tile of place permutation[k] as tile k."""
    image = crop_to_grid(image, rows, cols)
    boxes = _tile_boxes(image, rows, cols)
    shown = Image.new("RGB", image.size)
    for box, place in zip(boxes, permutation, strict=True):
        shown.paste(image.crop(boxes[place]), box[:2])
    return shown


def restore_tiles(shown: Image.Image, answer: Sequence[int], rows: int, cols: int) -> Image.Image:
    """Return the original of a shuffled image: place p gets shown tile answer[p]."""
    return shuffle_tiles(shown, [tile - 1 for tile in answer], rows, cols)


def answer_of_permutation(permutation: Sequence[int]) -> list[int]:
    """Return the answer to a permutation: its inverse, counted from 1."""
    return [int(tile) + 1 for tile in np.argsort(permutation)]


def crop_to_grid(image: Image.Image, rows: int, cols: int) -> Image.Image:
    """Crop to a multiple of the grid around the centre."""
    width, height = image.width // cols * cols, image.height // rows * rows
    if not width or not height:
        raise ValueError(
            f"an image of {image.width} x {image.height} pixels is too small for "
            f"{rows} x {cols} tiles"
        )
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _tile_boxes(image: Image.Image, rows: int, cols: int) -> list[tuple[int, int, int, int]]:
    w, h = image.width // cols, image.height // rows
    return [(c * w, r * h, (c + 1) * w, (r + 1) * h) for r in range(rows) for c in range(cols)]


def build_example(row: tuple[str, Any], rows: int, cols: int, seed: int) -> Example:
    """Return the puzzle of one image.

    The permutation depends only on the seed and the image name, and is never the identity.
    """
    name, source = row
    image = open_image(source)
    digest = hashlib.blake2b(f"{seed}/{rows}x{cols}/{name}".encode(), digest_size=8).digest()
    rng = np.random.default_rng(int.from_bytes(digest, "little"))
    permutation = rng.permutation(rows * cols)
    while rows * cols > 1 and (permutation == np.arange(rows * cols)).all():
        permutation = rng.permutation(rows * cols)
    answer = answer_of_permutation(permutation)
    question = QUESTION.format(rows=rows, cols=cols, count=rows * cols)
    meta = {"rows": rows, "cols": cols, "source": name}
    return Example(
        name,
        user_turn(question, [shuffle_tiles(image, permutation, rows, cols)]),
        answer,
        " ".join(map(str, answer)),
        meta=meta,
    )


class TaskImages(Sequence[tuple[str, Any]]):
    """The first image of each example of another task."""

    def __init__(self, examples: Sequence[Example]):
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> tuple[str, Any]:
        example = self.examples[index]
        image = next(conversation_images(example.messages), None)
        if image is None:
            raise ValueError(f"{example.id} has no image to make a puzzle of")
        return example.id, image


def list_folder_images(folder: Path, split: str) -> list[tuple[str, str]]:
    """List the images of a split in a folder.

    The subfolders train/ and test/ are the splits. Without them, one file in ten, chosen by the
    hash of its name, is in the test split.
    """
    if not folder.is_dir():
        raise ValueError(
            f'jigsaw: images: expected a folder, a task or "synthetic", got {str(folder)!r}'
        )
    has_split = (folder / split).is_dir()
    if not has_split and (
        split == "validation" or any((folder / other).is_dir() for other in ("train", "test"))
    ):
        raise ValueError(
            f"jigsaw: no images for split {split!r}: there is no folder {folder / split}"
        )
    base = folder / split if has_split else folder
    files = sorted(
        path.relative_to(base).as_posix()
        for path in base.rglob("*")
        if path.suffix.lower() in IMAGE_FILE_SUFFIXES
    )
    if not has_split:
        files = [name for name in files if _held_out(name) == (split == "test")]
    if not files:
        raise ValueError(f"jigsaw: no images for split {split!r} in {base}")
    return [(name, str(base / name)) for name in files]


def _held_out(name: str) -> bool:
    return hashlib.blake2b(name.encode(), digest_size=2).digest()[0] % 10 == 0


def load_split(
    name: str,
    rows: int,
    cols: int,
    images: str,
    side: int,
    find_task: Callable[[str], Task | None],
    split: str,
    root: str = "",
    limit: int | None = None,
    seed: int = 0,
) -> Examples:
    if images == "synthetic":
        console.print_message(f"task {name}: its puzzles are generated images, not photographs")
        source = dataset.PuzzleImages(split, seed, side, limit)
        order = np.arange(len(source))
    else:
        other = find_task(images)
        source = (
            TaskImages(other.load(split, root, None, seed))
            if other
            else list_folder_images(Path(images), split)
        )
        order = limit_rows(range(len(source)), limit, seed)
    return Examples(
        name,
        split,
        source,
        functools.partial(build_example, rows=rows, cols=cols, seed=seed),
        order,
    )


def no_task(name: str) -> None:
    """Return None for every name, so that `images` is read as a folder."""


def make_task(
    name: str = "jigsaw",
    rows: int = 3,
    cols: int = 3,
    images: str = "textvqa",
    side: int = 224,
    *,
    find_task: Callable[[str], Task | None] = no_task,
    **fields: Any,
) -> Task:
    """Return the task.

    `images` is a folder, the name of another task, or "synthetic" for generated images of `side`
    pixels.
    """
    if rows < 1 or cols < 1 or rows * cols < 2:
        raise ValueError(
            f"jigsaw: expected a grid of at least two tiles, got rows={rows} cols={cols}"
        )
    if not Path(images).is_dir():
        refuse_old_name(f"tasks.{name}.images", images)
    own = {
        "scorer": "jigsaw",
        "reward": "jigsaw",
        "answer_instruction": INSTRUCTION,
    }
    return Task(
        name,
        functools.partial(load_split, name, rows, cols, images, side, find_task),
        **{**own, **fields},
    )
