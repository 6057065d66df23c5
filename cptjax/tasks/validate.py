"""What is wrong with a split, told before step 0: rows that can not be read, and whatever else a check finds in them."""

import concurrent.futures
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from PIL import Image

from cptjax import console
from cptjax.patches import MAX_RATIO
from cptjax.tasks.tables import BadRow
from cptjax.types import Example

SHOWN = 100
Problem = Callable[[Sequence[Example], int], BadRow | None]


def validate(examples: Sequence[Example], problem: Problem | None = None, title: str = "check rows") -> list[BadRow]:
    """Returns every bad row of a split; without another `problem`, a row whose images do not open. Threads decode them."""
    problem, found = problem or unopened, []
    with console.progress(title, len(examples)) as bar, concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
        for row in threads.map(lambda index: problem(examples, index), range(len(examples))):
            found += [row] if row else []
            bar.advance()
    return [*getattr(examples, "bad", ()), *found]


def check(examples: Sequence[Example], allowed: int = 0, say: Callable[[str], Any] = print) -> Sequence[Example]:
    """Prints the bad rows of a split and returns the good ones; more bad rows than `allowed` are a ValueError."""
    return without(examples, validate(examples), allowed, say)


def without(examples: Sequence[Example], bad: Sequence[BadRow], allowed: int, say: Callable[[str], Any]) -> Sequence[Example]:
    """As `check`, with the bad rows known."""
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
    good = [index for index in range(len(examples)) if examples.where(index) not in places]
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
        return self.examples.where(self.indices[index])


def unopened(examples: Sequence[Example], index: int) -> BadRow | None:
    """Tells of a row that can not be read, or whose images do not open."""
    file, row = examples.where(index)
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
