"""Mixtures of Gaussians: which divergence forgets (Retaining by Doing, section on the simulation). Plain numpy, seconds.

The target has an old mode and a new one; the policy has the old mode nearly right and must find the new one.

    forward KL, as SFT     samples of the target's new mode; gradient of -log q
    reverse KL, as RL      samples of the policy's new mode; gradient of the reward log(p_new / (beta q_new)), by its score

A policy of two modes can move the new one and keep the old; one of a single mode has to leave. `overlap` of a mode is how much of the
target's is covered; gain is what the new one has won, drop what the old one has lost since the start.
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
SLOW_LR = 0.005  # of the learning rate, for the parameters of the old mode: they are trained on nothing of their own
ENOUGH_GAIN = 0.9  # gain at which drops are compared


@dataclasses.dataclass(frozen=True)
class MixtureSetting:
    """One policy, one divergence."""

    modes: int  # 2 = one for each of the target's, 1 = a single one
    divergence: str  # forward | reverse
    lr: float
    steps: int
    new: float = NEW_MODE[0]  # mean of the target's new mode
    samples: int = 1000

    @property
    def start(self) -> np.ndarray:
        """Share of the old mode, its mean and deviation, mean and deviation of the new one; a single mode has share 0."""
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
    """Gain and drop after every step, the start included, and the share of the old mode at the end."""

    setting: MixtureSetting
    gain: np.ndarray
    drop: np.ndarray
    share: float

    @property
    def enough(self) -> int | None:
        """The first step with enough gain."""
        found = np.flatnonzero(self.gain >= ENOUGH_GAIN)
        return int(found[0]) if len(found) else None


def normal_density(x: np.ndarray, mean: float, deviation: float) -> np.ndarray:
    return np.exp(-0.5 * ((x - mean) / deviation) ** 2) / (deviation * np.sqrt(2 * np.pi))


def density_and_score(x: np.ndarray, q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Density [n] of the policy, and the gradient [5 n] of its logarithm."""
    share, m1, s1, m2, s2 = q
    one, two = normal_density(x, m1, s1), normal_density(x, m2, s2)
    density = share * one + (1 - share) * two + 1e-12
    slope = lambda weight, n, m, s: (
        weight * n * (x - m) / s**2 / density,
        weight * n * (((x - m) ** 2 - s**2) / s**3) / density,
    )
    return density, np.stack(
        [(one - two) / density, *slope(share, one, m1, s1), *slope(1 - share, two, m2, s2)]
    )


def ascent_direction(
    setting: MixtureSetting, q: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """The direction of learning, from samples."""
    if setting.divergence == "forward":
        return density_and_score(rng.normal(setting.new, NEW_MODE[1], setting.samples), q)[1].mean(
            1
        )
    x = rng.normal(q[3], q[4], setting.samples)
    density, slope = density_and_score(x, q)
    own = (1 - q[0]) * normal_density(x, q[3], q[4])
    reward = np.log(normal_density(x, setting.new, NEW_MODE[1]) / (own * KL_WEIGHT) + 1e-12)
    return (density / own * reward * slope).mean(1)


def mode_overlaps(setting: MixtureSetting, q: np.ndarray) -> tuple[float, float]:
    """How much of the target's old and of its new mode the policy covers; a single mode may cover either."""
    x, (share, m1, s1, m2, s2) = setting.grid, q
    old, new = (
        OLD_SHARE * normal_density(x, *OLD_MODE),
        (1 - OLD_SHARE) * normal_density(x, setting.new, NEW_MODE[1]),
    )
    two = (1 - share) * normal_density(x, m2, s2)
    one = share * normal_density(x, m1, s1) if setting.modes == 2 else two
    return tuple(float(np.minimum(p, own).sum() / p.sum()) for p, own in ((old, one), (new, two)))


def simulate_mixture(setting: MixtureSetting, seed: int = 0) -> Trajectory:
    rng, q, found = np.random.default_rng(seed), setting.start, []
    rates = setting.lr * (
        np.array([SLOW_LR, SLOW_LR, SLOW_LR, 1, 1])
        if setting.modes == 2
        else np.array([0, 0, 0, 1, 1])
    )
    for step in range(setting.steps + 1):
        if step:
            q = q + rates * ascent_direction(setting, q, rng)
            q[[2, 4]] = np.maximum(q[[2, 4]], 1e-3)
            q[0] = np.clip(q[0], 1e-3, 1 - 1e-3) if setting.modes == 2 else 0
        found.append(mode_overlaps(setting, q))
    old, new = np.array(found).T
    return Trajectory(setting, new - new[0], old[0] - old, float(q[0]))


def analyze(seed: int = 0) -> Finding:
    """All settings of the paper, compared where they have gained enough."""
    paths = [simulate_mixture(setting, seed) for setting in (*MIXTURE_SETTINGS, *DISTANCE_SETTINGS)]
    dropped = lambda p: p.drop[p.enough] if p.enough else None
    cell = lambda value, form="{:.3f}": "–" if value is None else form.format(value)
    about = lambda s: (s.divergence, str(s.modes), str(s.lr), str(s.new))
    rows = [
        (
            *about(p.setting),
            cell(p.enough, "{}"),
            *map(cell, (dropped(p), p.gain.max(), p.drop[-1], p.share)),
        )
        for p in paths
    ]
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
    of = {
        (p.setting.modes, p.setting.divergence, p.setting.lr): dropped(p)
        for p in paths[: len(MIXTURE_SETTINGS)]
    }
    two, one = (
        (of[2, "forward", 0.15], of[2, "reverse", 0.01]),
        (of[1, "forward", 0.05], of[1, "reverse", 0.005]),
    )
    said = [
        f"With two modes, at a gain of {ENOUGH_GAIN}, forward KL has lost {two[0]:.3f} of the old mode and reverse KL {two[1]:.3f}; "
        f"with one mode {one[0]:.3f} and {one[1]:.3f}."
    ]
    pictures = [
        FindingChart(
            f"{('One mode', 'Two modes')[m - 1]}",
            "Top left is best: the new mode won, the old one kept.",
            mixture_chart(paths, m),
        )
        for m in (2, 1)
    ]
    plain = lambda p: (
        dataclasses.asdict(p.setting)
        | {"gain": p.gain, "drop": p.drop, "share": p.share, "enough": p.enough}
    )
    return Finding(
        "Forward and reverse KL on mixtures of Gaussians",
        said,
        [FindingTable("At equal gain", header, rows)],
        pictures,
        {"seed": seed, "paths": [plain(p) for p in paths]},
    )


def mixture_chart(paths: list[Trajectory], modes: int) -> Markup | None:
    """Gain against drop of the paper's main settings."""
    shown = [p for p in paths[: len(MIXTURE_SETTINGS)] if p.setting.modes == modes]
    dots = lambda p: [Point(d, g) for d, g in zip(p.drop.tolist(), p.gain.tolist(), strict=True)]
    lines = [
        Series(f"{p.setting.divergence}, lr {p.setting.lr}", dots(p), k, dots=False, named=True)
        for k, p in enumerate(shown)
    ]
    return svg.line_chart(
        lines, "gain against drop", "drop of the old mode", "gain of the new mode", include=(0, 1)
    )
