"""Simulate which KL divergence forgets, on mixtures of Gaussians (Retaining by Doing).

The target has an old mode and a new one; the policy starts near the old mode and must find the new
one. The simulation uses only numpy and takes seconds.

    forward KL, as SFT     samples from the target's new mode; gradient of -log q
    reverse KL, as RL      samples from the policy's new mode; policy gradient with the reward
                           log(p_new / (beta q_new))

A policy with two modes can move one and keep the other; a policy with a single mode must leave the
old mode. The overlap of a mode is the share of the target's mode that the policy covers. Gain is
the increase of the overlap with the new mode since the start; drop is the decrease of the overlap
with the old mode.
"""

import dataclasses

import numpy as np
from markupsafe import Markup

from cptjax.analysis.finding import Finding, FindingChart, FindingTable
from cptjax.evaluation.report import svg
from cptjax.evaluation.report.svg import Point, Series

OLD_MODE, NEW_MODE = (-3.0, 1.0), (3.5, 0.7)  # mean and standard deviation of the target's modes
OLD_SHARE = 0.75
KL_WEIGHT = 0.1
SLOW_LR = 0.005  # factor for the parameters of the old mode, which no sample trains
ENOUGH_GAIN = 0.9  # the gain at which drops are compared


@dataclasses.dataclass(frozen=True)
class MixtureSetting:
    """One policy and one divergence."""

    modes: int  # 2 = one for each mode of the target
    divergence: str  # forward | reverse
    lr: float
    steps: int
    new: float = NEW_MODE[0]  # mean of the target's new mode
    samples: int = 1000

    @property
    def start(self) -> np.ndarray:
        """Share, mean and deviation of the old mode, then mean and deviation of the new mode.

        A policy with a single mode has only the new one, and share 0.
        """
        return np.array(
            [OLD_SHARE, -3.5, 1.0, 0.5, 0.7] if self.modes == 2 else [0.0, 0.0, 1.0, -3.5, 1.0]
        )

    @property
    def grid(self) -> np.ndarray:
        return np.linspace(-8, 8, 500) if self.modes == 2 else np.linspace(-10, 10, 500)


MIXTURE_SETTINGS = (
    MixtureSetting(2, "forward", 0.15, 200),
    MixtureSetting(2, "forward", 0.01, 200),
    MixtureSetting(2, "reverse", 0.01, 200),
    MixtureSetting(1, "forward", 0.05, 1000),
    MixtureSetting(1, "reverse", 0.005, 1000),
)
DISTANCE_SETTINGS = tuple(
    MixtureSetting(2, kind, lr, 200, new)
    for new in (4.5, 5.5, 6.5)
    for kind, lr in (("forward", 0.15), ("reverse", 0.01))
)


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """Gain and drop at the start and after every step, and the old mode's share at the end."""

    setting: MixtureSetting
    gain: np.ndarray
    drop: np.ndarray
    share: float

    @property
    def enough(self) -> int | None:
        """The first step with enough gain."""
        steps = np.flatnonzero(self.gain >= ENOUGH_GAIN)
        return int(steps[0]) if len(steps) else None


def normal_density(x: np.ndarray, mean: float, deviation: float) -> np.ndarray:
    return np.exp(-0.5 * ((x - mean) / deviation) ** 2) / (deviation * np.sqrt(2 * np.pi))


def density_and_score(x: np.ndarray, q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the density [n] of the policy and the gradient [5 n] of its logarithm."""
    share, m1, s1, m2, s2 = q
    one, two = normal_density(x, m1, s1), normal_density(x, m2, s2)
    density = share * one + (1 - share) * two + 1e-12

    def score_of_mode(
        weight: float, mode: np.ndarray, mean: float, deviation: float
    ) -> tuple[np.ndarray, np.ndarray]:
        by_mean = weight * mode * (x - mean) / deviation**2 / density
        by_deviation = weight * mode * (((x - mean) ** 2 - deviation**2) / deviation**3) / density
        return by_mean, by_deviation

    scores = [*score_of_mode(share, one, m1, s1), *score_of_mode(1 - share, two, m2, s2)]
    return density, np.stack([(one - two) / density, *scores])


def ascent_direction(
    setting: MixtureSetting, q: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Estimate the direction of the parameter update from samples."""
    if setting.divergence == "forward":
        return density_and_score(rng.normal(setting.new, NEW_MODE[1], setting.samples), q)[1].mean(
            1
        )
    x = rng.normal(q[3], q[4], setting.samples)
    density, score = density_and_score(x, q)
    new = (1 - q[0]) * normal_density(x, q[3], q[4])
    reward = np.log(normal_density(x, setting.new, NEW_MODE[1]) / (new * KL_WEIGHT) + 1e-12)
    return (density / new * reward * score).mean(1)


def mode_overlaps(setting: MixtureSetting, q: np.ndarray) -> tuple[float, float]:
    """Return the shares of the target's old and new mode that the policy covers.

    A single mode may cover either.
    """
    x, (share, m1, s1, m2, s2) = setting.grid, q
    old, new = (
        OLD_SHARE * normal_density(x, *OLD_MODE),
        (1 - OLD_SHARE) * normal_density(x, setting.new, NEW_MODE[1]),
    )
    two = (1 - share) * normal_density(x, m2, s2)
    one = share * normal_density(x, m1, s1) if setting.modes == 2 else two
    return tuple(float(np.minimum(p, own).sum() / p.sum()) for p, own in ((old, one), (new, two)))


def simulate_mixture(setting: MixtureSetting, seed: int = 0) -> Trajectory:
    """Train the policy and record gain and drop after every step."""
    rng, q, overlaps = np.random.default_rng(seed), setting.start, []
    factors = [SLOW_LR, SLOW_LR, SLOW_LR, 1, 1] if setting.modes == 2 else [0, 0, 0, 1, 1]
    rates = setting.lr * np.array(factors)
    for step in range(setting.steps + 1):
        if step:
            q = q + rates * ascent_direction(setting, q, rng)
            q[[2, 4]] = np.maximum(q[[2, 4]], 1e-3)
            q[0] = np.clip(q[0], 1e-3, 1 - 1e-3) if setting.modes == 2 else 0
        overlaps.append(mode_overlaps(setting, q))
    old, new = np.array(overlaps).T
    return Trajectory(setting, new - new[0], old[0] - old, float(q[0]))


def analyze(seed: int = 0) -> Finding:
    """Simulate all settings of the paper and compare drops at equal gain."""
    paths = [simulate_mixture(setting, seed) for setting in (*MIXTURE_SETTINGS, *DISTANCE_SETTINGS)]

    def drop_at_gain(path: Trajectory) -> float | None:
        return path.drop[path.enough] if path.enough else None

    def cell(value: float | None) -> str:
        return "–" if value is None else f"{value:.3f}"

    rows = []
    for path in paths:
        s = path.setting
        steps = "–" if path.enough is None else str(path.enough)
        numbers = (drop_at_gain(path), path.gain.max(), path.drop[-1], path.share)
        rows.append((s.divergence, str(s.modes), str(s.lr), str(s.new), steps, *map(cell, numbers)))
    header = (
        "KL",
        "modes",
        "lr",
        "new at",
        f"gain {ENOUGH_GAIN} at",
        "drop there",
        "most gain",
        "last drop",
        "old share",
    )
    drops = {
        (path.setting.modes, path.setting.divergence, path.setting.lr): drop_at_gain(path)
        for path in paths[: len(MIXTURE_SETTINGS)]
    }
    sentence = (
        f"With two modes, at a gain of {ENOUGH_GAIN}, forward KL has lost "
        f"{drops[2, 'forward', 0.15]:.3f} of the old mode and reverse KL "
        f"{drops[2, 'reverse', 0.01]:.3f}; "
        f"with one mode {drops[1, 'forward', 0.05]:.3f} and {drops[1, 'reverse', 0.005]:.3f}."
    )
    note = "Top left is best: the new mode learned, the old one kept."
    return Finding(
        "Forward and reverse KL on mixtures of Gaussians",
        [sentence],
        [FindingTable("At equal gain", header, rows)],
        [
            FindingChart("Two modes", note, mixture_chart(paths, 2)),
            FindingChart("One mode", note, mixture_chart(paths, 1)),
        ],
        {
            "seed": seed,
            "paths": [
                dataclasses.asdict(path.setting)
                | {"gain": path.gain, "drop": path.drop, "share": path.share, "enough": path.enough}
                for path in paths
            ],
        },
    )


def mixture_chart(paths: list[Trajectory], modes: int) -> Markup | None:
    """Plot gain against drop for the paper's main settings."""
    series = []
    for path in paths[: len(MIXTURE_SETTINGS)]:
        if path.setting.modes == modes:
            points = [
                Point(d, g) for d, g in zip(path.drop.tolist(), path.gain.tolist(), strict=True)
            ]
            label = f"{path.setting.divergence}, lr {path.setting.lr}"
            series.append(Series(label, points, len(series), dots=False, named=True))
    return svg.line_chart(
        series, "gain against drop", "drop of the old mode", "gain of the new mode", include=(0, 1)
    )
