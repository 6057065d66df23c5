"""Which example stands where in a stage: one endless order, in which any place can be looked up without the ones before.

It follows from (seed, stage, position) alone, so a restorable position is one integer, the step:

    position n = step * batch + row      0 1 2 3 | 4 5 6 7 | ...     batch = 4
    process                              0 0 1 1 | 0 0 1 1 | ...     two processes, each with a block of every batch
    lane                                 a a a r | a a a r | ...     replay fraction 1/4: exact after any number of rows

A lane is one or several example lists shuffled together, epoch after epoch; nothing of it repeats before all was seen.
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
    """Where an example comes from: which list, which of its rows, and how often its lane was passed before."""

    source: int
    index: int
    epoch: int
    replay: bool = False


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Says which example stands at every position of a stage; replayed lists are numbered after the stage's own."""

    sizes: tuple[int, ...]  # examples of each of the stage's lists
    batch: int  # rows of a step, over all processes
    weights: tuple[float, ...] = ()  # of the lists; () = by size, all shuffled as one
    replay: tuple[int, ...] = ()  # sizes of earlier stages' lists, shuffled as one
    fraction: float = 0.0  # of all rows, from `replay`; without earlier lists it has no effect
    seed: int = 0
    stage: int = 0

    def __post_init__(self) -> None:
        if not self.sizes or min(self.sizes + self.replay) < 1:
            raise ValueError(
                f"a stage needs example lists with at least one row each, but their sizes are {self.sizes + self.replay}"
            )
        if self.weights and (len(self.weights) != len(self.sizes) or min(self.weights) <= 0):
            raise ValueError(
                f"data.weights: expected {len(self.sizes)} numbers > 0, one per task of the stage, got {self.weights}"
            )
        if self.batch < 1 or not 0 <= self.fraction < 1:
            raise ValueError(
                f"expected train.batch >= 1 and 0 <= method.replay.fraction < 1, got {self.batch} and {self.fraction}"
            )

    @property
    def kept(self) -> Fraction:
        """The share of rows that are the stage's own."""
        return 1 - _fraction(self.fraction) if self.replay else Fraction(1)

    @cached_property
    def lanes(self) -> tuple["Component", ...]:
        """The lists that are shuffled together, each with its share of all rows; replay first."""
        own = range(len(self.sizes))
        groups = (
            [([i], _fraction(w)) for i, w in zip(own, self.weights, strict=True)]
            if self.weights
            else [(list(own), Fraction(1))]
        )
        total = sum(share for _, share in groups)
        groups = [(g, self.kept * share / total) for g, share in groups]
        if self.kept < 1:
            groups.insert(0, (list(range(len(own), len(own) + len(self.replay))), 1 - self.kept))
        sizes = self.sizes + self.replay
        seeds = [(self.seed, self.stage, lane) for lane in range(len(groups))]
        return tuple(
            Component(tuple(g), tuple(sizes[i] for i in g), share, s)
            for (g, share), s in zip(groups, seeds, strict=True)
        )

    @cached_property
    def parts(self) -> tuple[Fraction, ...]:
        """Each lane's part of the rows that the lanes before it leave; the last takes the rest."""
        shares = [lane.share for lane in self.lanes]
        return tuple(share / sum(shares[i:]) for i, share in enumerate(shares[:-1]))

    def place(self, n: int) -> RowRef:
        """Returns what stands at position n of the stage."""
        lane, k = component_at(n, self.parts)
        place = self.lanes[lane].place(k)
        return dataclasses.replace(place, replay=place.source >= len(self.sizes))

    def rows(self, step: int, shard: tuple[int, int] = (0, 1)) -> list[RowRef]:
        """Returns the rows of one step that shard (index, count) reads: a block, so that groups stay whole."""
        index, count = shard
        if self.batch % count or not 0 <= index < count:
            raise ValueError(
                f"train.batch={self.batch} cannot be cut into {count} equal blocks for the processes; change train.batch"
            )
        mine = self.batch // count
        start = step * self.batch + index * mine
        return [self.place(n) for n in range(start, start + mine)]

    def steps(self, epochs: float) -> int:
        """Returns the steps after which as many of the stage's own rows were seen as `epochs` passes have."""
        return math.ceil(_fraction(epochs) * sum(self.sizes) / (self.batch * self.kept))


@dataclasses.dataclass(frozen=True)
class Component:
    """Example lists shuffled as one, each epoch anew."""

    sources: tuple[int, ...]
    sizes: tuple[int, ...]
    share: Fraction
    seed: tuple[int, ...]

    @cached_property
    def ends(self) -> np.ndarray:
        return np.cumsum(self.sizes)

    def place(self, k: int) -> RowRef:
        """Returns the k-th example of the lane."""
        epoch, within = divmod(k, int(self.ends[-1]))
        at = int(permutation(int(self.ends[-1]), (*self.seed, epoch))[within])
        i = int(np.searchsorted(self.ends, at, side="right"))
        return RowRef(self.sources[i], at - int(self.ends[i]) + self.sizes[i], epoch)


def component_at(n: int, parts: Sequence[Fraction]) -> tuple[int, int]:
    """Returns the lane of position n and how many of its rows stand before; `parts` are shares of what earlier lanes leave."""
    for lane, part in enumerate(parts):
        before = n * part.numerator // part.denominator
        if (n + 1) * part.numerator // part.denominator > before:
            return lane, before
        n -= before
    return len(parts), n


def component_counts(n: int, parts: Sequence[Fraction]) -> list[int]:
    """Returns how many of the first n positions are each lane's."""
    counts = []
    for part in parts:
        counts.append(n * part.numerator // part.denominator)
        n -= counts[-1]
    return [*counts, n]


def _fraction(x: float) -> Fraction:
    """The fraction that was meant: 0.1 is one tenth, not the nearest binary number."""
    return Fraction(x).limit_denominator(1_000_000)
