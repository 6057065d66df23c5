"""What is wrong with a split, told before step 0: rows that can not be read, and images that do not open.

Every image is decoded, so a public dataset of a million rows takes hours; only a user's own sequences carry `where` and `bad`,
by which a run knows which to check.
"""

import concurrent.futures
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from PIL import Image

from cptjax.patches import MAX_RATIO
from cptjax.tasks.tables import BadRow
from cptjax.tasks.task import Examples
from cptjax.types import Example

SHOWN = 100


def validate(examples: Sequence[Example], workers: int = 0) -> list[BadRow]:
    """Returns every bad row of a split, with all its images opened; `workers` threads decode (0 = one a core)."""
    with concurrent.futures.ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        found = pool.map(lambda index: _problem(examples, index), range(len(examples)))
        return [*getattr(examples, "bad", ()), *(row for row in found if row)]


def check(examples: Sequence[Example], allowed: int = 0, say: Callable[[str], Any] = print) -> Sequence[Example]:
    """Prints the bad rows of a split and returns the good ones; more bad rows than `allowed` are a ValueError."""
    bad = validate(examples)
    if not bad:
        return examples
    say(f"{len(bad)} bad row(s) beside {len(examples) + len(getattr(examples, 'bad', ())) - len(bad)} good ones:")
    for row in bad[:SHOWN]:
        say(f"  {row}")
    if len(bad) > SHOWN:
        say(f"  and {len(bad) - SHOWN} more")
    if len(bad) > allowed:
        raise ValueError(f"{len(bad)} bad row(s), {allowed} allowed by data.bad_rows; the first: {bad[0]}")
    places = {(row.file, row.row) for row in bad}
    good = [index for index in range(len(examples)) if origin(examples, index) not in places]
    if not good:
        raise ValueError(f"no good row is left; the first bad one: {bad[0]}")
    return Chosen(examples, good)


class Chosen(Sequence[Example]):
    """Some of the examples of a sequence."""

    def __init__(self, examples: Sequence[Example], indices: Sequence[int]):
        self.examples, self.indices = examples, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Example:
        return self.examples[self.indices[index]]

    def where(self, index: int) -> tuple[str, int]:
        """Returns the file and row of an example."""
        return origin(self.examples, self.indices[index])


def origin(examples: Sequence[Example], index: int) -> tuple[str, int]:
    """Returns the file and row of an example; a public dataset's is the task and split."""
    if isinstance(examples, Examples):
        return f"{examples.task}/{examples.split}", int(examples.order[index])
    return examples.where(index) if hasattr(examples, "where") else ("examples", index)


def _problem(examples: Sequence[Example], index: int) -> BadRow | None:
    file, row = origin(examples, index)
    try:
        for image in images_of(examples[index]):
            if max(image.size) > MAX_RATIO * min(image.size):
                raise ValueError(f"an image of {image.width} x {image.height} pixels: one side is over {MAX_RATIO} times the other")
    except (ValueError, OSError) as error:
        return BadRow(file, row, str(error).removeprefix(f"{file}:{row}: ").removeprefix(f"{file}, row {row}: "))
    return None


def images_of(example: Example) -> Iterator[Image.Image]:
    """Yields an example's images and the frames that are given as such."""
    for turn in example.messages:
        for part in turn["content"] if isinstance(turn["content"], list) else ():
            if part["type"] == "image":
                yield part["image"]
            elif part["type"] == "video" and isinstance(part["video"], list):
                yield from part["video"]
