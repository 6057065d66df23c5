"""Rows of a split that cannot be used: collect, print and drop them before step 0."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from cptjax.tasks.task import Subset
from cptjax.types import Example

MAX_SHOWN_ROWS = 100


@dataclasses.dataclass(frozen=True)
class BadRow:
    """A row that cannot be used, and the reason."""

    file: str
    row: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.row}: {self.reason}"


def make_bad_row(examples: Sequence[Example], index: int, error: Exception) -> BadRow:
    """Return a BadRow for an example that raised an error, with the message on one line."""
    file, row = examples.where(index)
    reason = " ".join(str(error).split())
    # BadRow prints the file and the row itself.
    for place in (f"{file}:{row}: ", f"{file}, row {row}: "):
        reason = reason.removeprefix(place)
    return BadRow(file, row, reason)


def drop_bad_rows(
    examples: Sequence[Example],
    bad: Sequence[BadRow],
    allowed: int,
    print_line: Callable[[str], Any],
) -> Sequence[Example]:
    """Print the bad rows of a split and return its good rows.

    Raise a ValueError if more than `allowed` are bad.
    """
    if not bad:
        return examples
    places = {(row.file, row.row) for row in bad}
    good = [index for index in range(len(examples)) if examples.where(index) not in places]
    print_line(f"{len(bad)} bad row(s) and {len(good)} good ones:")
    for row in bad[:MAX_SHOWN_ROWS]:
        print_line(f"  {row}")
    if len(bad) > MAX_SHOWN_ROWS:
        print_line(f"  and {len(bad) - MAX_SHOWN_ROWS} more")
    if len(bad) > allowed:
        raise ValueError(
            f"{len(bad)} bad row(s), {allowed} allowed by data.bad_rows; the first: {bad[0]}"
        )
    if not good:
        raise ValueError(f"no good row is left; the first bad one: {bad[0]}")
    return Subset(examples, good)
