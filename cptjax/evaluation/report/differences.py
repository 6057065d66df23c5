"""Compare arms with one of them, the baseline, seed by seed: the differences and their intervals.

A pair is a finished run of the arm and one of the baseline with the same seed and order, so that
what the seed changes in both cancels. With the differences d[1..n] of the pairs:

    mean      m = sum_i d[i] / n
    sd        s = sqrt(sum_i (d[i] - m)^2 / (n - 1))
    interval  m - t s / sqrt(n) ... m + t s / sqrt(n)

t is the 0.975 quantile of Student's t distribution with n - 1 degrees of freedom. If differences
are independent and normal, such an interval contains the true mean in 95 of 100 comparisons. It
tests one metric of one arm; of many such intervals, 5 in 100 exclude a true mean of 0 by chance.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from scipy.special import stdtrit

from cptjax.evaluation.report import words
from cptjax.evaluation.report.expect import refuse_unknown
from cptjax.evaluation.report.read import Arm, report_setting

MIN_PAIRS = 3  # fewer pairs have no interval: with two, t is 12.7
FEW_PAIRS = 5  # fewer pairs have an interval that is wide because of t


@dataclasses.dataclass(frozen=True)
class Difference:
    """The differences of a metric between an arm and the baseline, by seed or order."""

    pairs: dict[str, float]

    @property
    def n(self) -> int:
        return len(self.pairs)

    @property
    def mean(self) -> float:
        return float(np.mean(list(self.pairs.values())))

    @property
    def sd(self) -> float | None:
        return float(np.std(list(self.pairs.values()), ddof=1)) if self.n > 1 else None

    @property
    def half_width(self) -> float | None:
        """Half the width of the 95 % interval; None if there are too few pairs."""
        return self.half_width_among(1) if self.n >= MIN_PAIRS else None

    def half_width_among(self, comparisons: int) -> float:
        """Return half the width of one of several intervals that together hold in 95 of 100 cases.

        By Bonferroni's inequality, each has to hold in 100 - 5 / comparisons of 100 cases.
        """
        return student_quantile(self.n, comparisons) * self.sd / math.sqrt(self.n)

    @property
    def is_clear(self) -> bool:
        """Whether the interval excludes 0."""
        return self.half_width is not None and abs(self.mean) > self.half_width

    def to_dict(self) -> dict[str, Any]:
        """Return the difference as an entry of the report's JSON."""
        width = self.half_width
        interval = None if width is None else [self.mean - width, self.mean + width]
        return {
            "mean": self.mean,
            "sd": self.sd,
            "n": self.n,
            "ci95": interval,
            "pairs": self.pairs,
        }


def student_quantile(n: int, comparisons: int = 1) -> float:
    """Return the 0.975 quantile of Student's t distribution for n pairs, or that of Bonferroni."""
    return float(stdtrit(n - 1, 1 - 0.025 / comparisons))


def choose_baseline(arms: Sequence[Arm], name: str = "") -> Arm | None:
    """Return the arm that the others are compared with.

    It is the named one, or the one that the runs' config names (None if it has no run yet), or
    the first.
    """
    labels = [arm.label for arm in arms]
    if name:
        refuse_unknown(name, labels, "the baseline is the arm")
    name = name or report_setting(arms, "baseline") or labels[0]
    return arms[labels.index(name)] if name in labels else None


def compare_with_baseline(
    arms: Sequence[Arm], baseline: Arm | None, metrics: Iterable[str]
) -> dict[str, dict[str, Difference]]:
    """Return the differences from the baseline by arm and metric, where there is a pair."""
    compared, names = {}, list(metrics)
    for arm in arms:
        found = {n: paired_difference(arm, baseline, n) for n in names} if baseline else {}
        found = {name: difference for name, difference in found.items() if difference.n}
        if found and arm is not baseline:
            compared[arm.label] = found
    return compared


def paired_difference(arm: Arm, baseline: Arm, metric: str) -> Difference:
    """Return the differences of a metric over all pairs of finished runs that both have it."""
    ours, theirs = (
        {run.variant: run.metric(metric)["value"] for run in a.runs if run.table.finished}
        for a in (arm, baseline)
    )
    return Difference(
        {
            variant: ours[variant] - theirs[variant]
            for variant in ours
            if words.is_known(ours[variant]) and words.is_known(theirs.get(variant))
        }
    )


def too_few_pairs(differences: Iterable[Difference]) -> str:
    """Return a sentence if there are too few seeds for an interval or for a narrow one."""
    n = min((difference.n for difference in differences), default=FEW_PAIRS)
    if n < MIN_PAIRS:
        pairs = "is one pair" if n == 1 else f"are {n} pairs"
        return (
            f"There {pairs} of runs with the same seed: too few for an interval, which needs at "
            f"least {MIN_PAIRS} seeds."
        )
    if n < FEW_PAIRS:
        return (
            f"With {n} pairs the intervals are wide: {student_quantile(n):.1f} standard errors to "
            f"each side, where many pairs need 2.0; {FEW_PAIRS} or more seeds make them narrower."
        )
    return ""
