"""What is wrong with a split, told before step 0: rows that can not be read, and whatever else a check finds in them."""

import concurrent.futures
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from PIL import Image

from cptjax.common import console
from cptjax.common.images import MAX_ASPECT_RATIO
from cptjax.types import Example


@dataclasses.dataclass(frozen=True)
class BadRow:
    """A row that can not be used, and why."""

    file: str
    row: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.row}: {self.reason}"


MAX_SHOWN_ROWS = 100
RowCheck = Callable[[Sequence[Example], int], BadRow | None]


def collect_bad_rows(
    examples: Sequence[Example], problem: RowCheck | None = None, title: str = "check rows"
) -> list[BadRow]:
    """Returns every bad row of a split; without another `problem`, a row whose images do not open. Threads decode them."""
    problem, found = problem or find_unreadable_image, []
    with (
        console.progress_bar(title, len(examples)) as bar,
        concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads,
    ):
        for row in threads.map(lambda index: problem(examples, index), range(len(examples))):
            found += [row] if row else []
            bar.advance()
    return [*getattr(examples, "bad", ()), *found]


def check_and_drop_rows(
    examples: Sequence[Example], allowed: int = 0, say: Callable[[str], Any] = print
) -> Sequence[Example]:
    """Prints the bad rows of a split and returns the good ones; more bad rows than `allowed` are a ValueError."""
    return drop_bad_rows(examples, collect_bad_rows(examples), allowed, say)


def drop_bad_rows(
    examples: Sequence[Example], bad: Sequence[BadRow], allowed: int, say: Callable[[str], Any]
) -> Sequence[Example]:
    """As `check`, with the bad rows known."""
    if not bad:
        return examples
    say(
        f"{len(bad)} bad row(s) beside {len(examples) + len(getattr(examples, 'bad', ())) - len(bad)} good ones:"
    )
    for row in bad[:MAX_SHOWN_ROWS]:
        say(f"  {row}")
    if len(bad) > MAX_SHOWN_ROWS:
        say(f"  and {len(bad) - MAX_SHOWN_ROWS} more")
    if len(bad) > allowed:
        raise ValueError(
            f"{len(bad)} bad row(s), {allowed} allowed by data.bad_rows; the first: {bad[0]}"
        )
    places = {(row.file, row.row) for row in bad}
    good = [index for index in range(len(examples)) if examples.where(index) not in places]
    if not good:
        raise ValueError(f"no good row is left; the first bad one: {bad[0]}")
    return Subset(examples, good)


class Subset(Sequence[Example]):
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


def find_unreadable_image(examples: Sequence[Example], index: int) -> BadRow | None:
    """Tells of a row that can not be read, or whose images do not open."""
    file, row = examples.where(index)
    try:
        for image in example_images(examples[index]):
            if max(image.size) > MAX_ASPECT_RATIO * min(image.size):
                raise ValueError(
                    f"an image of {image.width} x {image.height} pixels: one side is over {MAX_ASPECT_RATIO} times the other"
                )
    except (ValueError, OSError) as error:
        return BadRow(
            file,
            row,
            str(error).removeprefix(f"{file}:{row}: ").removeprefix(f"{file}, row {row}: "),
        )
    return None


def example_images(example: Example) -> Iterator[Image.Image]:
    """Yields an example's images and the frames that are given as such."""
    for turn in example.messages:
        for part in turn["content"] if isinstance(turn["content"], list) else ():
            if part["type"] == "image":
                yield part["image"]
            elif part["type"] == "video" and isinstance(part["video"], list):
                yield from part["video"]
