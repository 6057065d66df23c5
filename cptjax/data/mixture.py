"""The order of a stage's rows: shuffled, mixed by weights, with replayed rows of earlier stages.

The order is endless and depends only on (seed, stage, position). The row at a position is computed
without the rows before it, so the state of a stage's data is one integer, the step:

    position n = step * batch + row      0 1 2 3 | 4 5 6 7 | ...     batch = 4
    process                              0 0 1 1 | 0 0 1 1 | ...     each reads a block of a batch
    component                            a a a r | a a a r | ...     replay fraction 1/4, exact
                                                                     after any number of rows

A component is one or more lists of examples that are shuffled together, in a new order each epoch:
no example repeats within an epoch.
"""

import dataclasses
import math
from collections.abc import Sequence
from fractions import Fraction
from functools import cached_property

import numpy as np

from cptjax.common.shuffle import permutation


@dataclasses.dataclass(frozen=True)
class RowRef:
    """A row: the number of its list and its index in that list."""

    source: int
    index: int


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Maps every position of a stage to a row.

    The lists are numbered: first the stage's own lists, then those that it replays.
    """

    sizes: tuple[int, ...]  # examples of each of the stage's own lists
    batch: int  # rows of a step, over all processes
    weights: tuple[float, ...] = ()  # of the own lists; () = by size, all shuffled as one
    replay: tuple[int, ...] = ()  # sizes of earlier stages' lists, shuffled as one
    fraction: float = 0.0  # share of replayed rows; without earlier lists it has no effect
    seed: int = 0
    stage: int = 0

    def __post_init__(self) -> None:
        if not self.sizes or min(self.sizes + self.replay) < 1:
            raise ValueError(
                "a stage needs example lists with at least one row each, got sizes "
                f"{self.sizes + self.replay}"
            )
        if self.weights and (len(self.weights) != len(self.sizes) or min(self.weights) <= 0):
            raise ValueError(
                f"data.weights: expected {len(self.sizes)} numbers > 0, one per task of the stage, "
                f"got {self.weights}"
            )
        if self.batch < 1 or not 0 <= self.fraction < 1:
            raise ValueError(
                "expected train.batch >= 1 and 0 <= method.replay.fraction < 1, "
                f"got {self.batch} and {self.fraction}"
            )

    @property
    def own_share(self) -> Fraction:
        """The share of rows that are not replayed."""
        return 1 - _exact_fraction(self.fraction) if self.replay else Fraction(1)

    @cached_property
    def components(self) -> tuple["Component", ...]:
        """The groups of lists that are shuffled together; replayed lists are the first group."""
        own_lists = range(len(self.sizes))
        groups = [(list(own_lists), Fraction(1))]
        if self.weights:
            groups = [([i], _exact_fraction(self.weights[i])) for i in own_lists]
        total = sum(weight for _, weight in groups)
        groups = [(lists, self.own_share * weight / total) for lists, weight in groups]
        if self.own_share < 1:
            replayed = [len(own_lists) + i for i in range(len(self.replay))]
            groups.insert(0, (replayed, 1 - self.own_share))
        sizes = self.sizes + self.replay
        return tuple(
            Component(
                sources=tuple(lists),
                sizes=tuple(sizes[i] for i in lists),
                share=share,
                seed=(self.seed, self.stage, number),
            )
            for number, (lists, share) in enumerate(groups)
        )

    @cached_property
    def remaining_shares(self) -> tuple[Fraction, ...]:
        """The share that each component takes of the rows that the components before it leave.

        The last component takes the rest and has no entry.
        """
        shares = [component.share for component in self.components]
        return tuple(share / sum(shares[i:]) for i, share in enumerate(shares[:-1]))

    def row_at(self, n: int) -> RowRef:
        """Return the row at position n of the stage."""
        component, k = component_at(n, self.remaining_shares)
        return self.components[component].row_at(k)

    def rows(self, step: int, shard: tuple[int, int] = (0, 1)) -> list[RowRef]:
        """Return the rows of one step that the process shard = (index, count) reads.

        They are a contiguous block of the batch, so that groups of responses stay on one process.
        """
        index, count = shard
        if self.batch % count or not 0 <= index < count:
            raise ValueError(
                f"train.batch={self.batch} cannot be cut into {count} equal blocks for the "
                "processes; change train.batch"
            )
        rows = self.batch // count
        start = step * self.batch + index * rows
        return [self.row_at(n) for n in range(start, start + rows)]

    def steps(self, epochs: float, rows: int = 0) -> int:
        """Return the number of steps that `epochs` passes over the stage's own rows take.

        `rows` replaces their number, for example by that of the responses to them.
        """
        rows = rows or sum(self.sizes)
        return math.ceil(_exact_fraction(epochs) * rows / (self.batch * self.own_share))


@dataclasses.dataclass(frozen=True)
class Component:
    """Example lists that are shuffled as one, in a new order each epoch."""

    sources: tuple[int, ...]
    sizes: tuple[int, ...]
    share: Fraction
    seed: tuple[int, ...]

    @cached_property
    def ends(self) -> np.ndarray:
        return np.cumsum(self.sizes)

    def row_at(self, k: int) -> RowRef:
        """Return the k-th row of the component."""
        total = int(self.ends[-1])
        epoch, position = divmod(k, total)
        shuffled = int(permutation(total, (*self.seed, epoch))[position])
        i = int(np.searchsorted(self.ends, shuffled, side="right"))
        return RowRef(self.sources[i], shuffled - int(self.ends[i]) + self.sizes[i])


def component_at(n: int, remaining_shares: Sequence[Fraction]) -> tuple[int, int]:
    """Return the component of position n, and how many of its rows are before that position."""
    for component, share in enumerate(remaining_shares):
        before = n * share.numerator // share.denominator
        if (n + 1) * share.numerator // share.denominator > before:
            return component, before
        n -= before
    return len(remaining_shares), n


def component_counts(n: int, remaining_shares: Sequence[Fraction]) -> list[int]:
    """Return how many of the first n positions belong to each component."""
    counts = []
    for share in remaining_shares:
        counts.append(n * share.numerator // share.denominator)
        n -= counts[-1]
    return [*counts, n]


def _exact_fraction(x: float) -> Fraction:
    """Return the fraction that the user meant: 0.1 is one tenth, not the nearest binary number."""
    return Fraction(x).limit_denominator(1_000_000)
