"""Forgetting against distance: one point per stage of any number of runs, and how much of the loss each distance explains.

RL's Razor claims a law: what a model loses on others follows from KL(base || now) on the *new* task's prompts alone, whatever trained it.
Here loss is what earlier and general tasks have lost, and the rival predictors are the KL on those tasks' own prompts and distances of
weights. Sparsity is counted in float32 and above rounding: in bfloat16, small updates vanish and look sparse.
"""

import collections
import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from cptjax import console
from cptjax.analysis import probe
from cptjax.analysis.finding import Finding, Picture, Table
from cptjax.model import trainable
from cptjax.report import read, svg
from cptjax.report.svg import Point, Series
from cptjax.report.words import known
from cptjax.types import Params

DEGREE = 2  # of the fit, as in the paper
MOVED = 1e-5  # of a weight's own size: it counts as changed


@dataclasses.dataclass(frozen=True)
class Stand:
    """Where a run stood after a stage: its loss, and how far it had gone by each measure."""

    arm: str
    run: str
    stage: int
    loss: float
    far: dict[str, float]
    parts: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)  # of the model


@dataclasses.dataclass(frozen=True)
class Fit:
    """A quadratic in one measure."""

    measure: str
    n: int
    curve: tuple[float, ...]  # coefficients, highest power first
    r2: float
    pearson: float


def find(folders: Sequence[str], weights: bool = False) -> Finding:
    stands = [stand for arm in read.arms(folders) for run in arm.runs for stand in stands_of(run, weights)]
    if len(stands) < DEGREE + 2:
        raise ValueError(
            f"{len(stands)} stages have a loss and KL(base || now): a fit of degree {DEGREE} needs at least {DEGREE + 2}. Expected runs "
            "with eval.drift > 0 and, where a run has one stage, tasks in eval.general"
        )
    measures = dict.fromkeys(m for s in stands for m in s.far)
    fits = [f for m in measures if (f := fitted(m, [s for s in stands if m in s.far]))]
    if not fits:
        raise ValueError(f"all {len(stands)} stages have lost the same, or moved as far: there is nothing to explain")
    first = fits[0]
    said = [f"{first.measure} explains {100 * first.r2:.0f} % of the variance of the loss over {first.n} stages (quadratic fit, R²)."]
    table = Table("How much of the loss follows from", ("measure", "stages", "R², quadratic", "Pearson r"),
                  [(f.measure, str(f.n), f"{f.r2:.2f}", f"{f.pearson:.2f}") for f in fits])  # fmt: skip
    pictures = [Picture(f.measure, "A dot per stage; the line is the fit over all.", chart(f, stands)) for f in fits]
    numbers = {"fits": [dataclasses.asdict(f) for f in fits], "stages": [dataclasses.asdict(s) for s in stands]}
    return Finding("Loss against distance from the base", said, [table, *parts_table(stands)], pictures, numbers)


def stands_of(run: read.Run, weights: bool) -> list[Stand]:
    """The stages of a run whose loss and KL are known."""
    rows = [r for r in run.summary["per_stage"] if known(r["kl_new"]) and known(r["loss"])]
    names = {"kl_new": "KL on the new task", "kl_old": "KL on the others"}
    found = [Stand(run.label, run.variant, r["stage"], r["loss"], {n: r[k] for k, n in names.items() if known(r[k])}) for r in rows]
    return weighed(run, found) if weights and found else found


def fitted(measure: str, stands: Sequence[Stand]) -> Fit | None:
    """None where there are too few different points."""
    x, y = np.array([(s.far[measure], s.loss) for s in stands]).T
    if len(set(x.tolist())) < DEGREE + 2 or not np.ptp(y):
        return None
    curve = np.polyfit(x, y, DEGREE)
    left = float(np.square(y - np.polyval(curve, x)).sum() / np.square(y - y.mean()).sum())
    return Fit(measure, len(x), tuple(curve.tolist()), 1 - left, float(np.corrcoef(x, y)[0, 1]))


def chart(fit: Fit, stands: Sequence[Stand]) -> svg.Markup | None:
    arms = list(dict.fromkeys(s.arm for s in stands))
    series = []
    for k, arm in enumerate(arms):
        dots = [Point(s.far[fit.measure], 100 * s.loss, f"{arm}, {s.run}, stage {s.stage}")
                for s in stands if s.arm == arm and fit.measure in s.far]  # fmt: skip
        series.append(Series(arm, sorted(dots, key=lambda p: p.x), k, line=False, named=True))
    ends = [p.x for s in series for p in s.points]
    line = [Point(x, 100 * np.polyval(fit.curve, x)) for x in np.linspace(min(ends), max(ends), 60).tolist()]
    law = Series("", line, len(arms), dots=False, faint=True)
    return svg.chart([law, *series], fit.measure, fit.measure, "loss on others, points", include=(0,))


# ---- weights -------------------------------------------------------------------------------------------------------------


def weighed(run: read.Run, stands: Sequence[Stand]) -> list[Stand]:
    """The stands with distances of weights from the base, adapters merged."""
    with probe.visited(run.path, "float32") as current, console.progress(f"weights of {run.label} {run.variant}", len(stands)) as bar:
        merged = lambda number: trainable.merge_lora(current.at_stage(number), current.rt.cfg.lora_scale)
        base, out = merged(0), []
        for stand in stands:
            parts = distances(base, merged(stand.stage))
            whole = collections.Counter()
            for part in parts.values():
                whole.update(part)
            out.append(dataclasses.replace(stand, far=stand.far | told(whole, "weights, "), parts={n: told(p) for n, p in parts.items()}))
            bar.advance()
    return out


def told(sums: dict[str, float], prefix: str = "") -> dict[str, float]:
    """Distances from sums over weights."""
    return {
        f"{prefix}L2": sums["square"] ** 0.5, f"{prefix}relative L2": (sums["square"] / sums["size"]) ** 0.5,
        f"{prefix}L1": sums["absolute"], f"{prefix}share moved": sums["moved"] / sums["count"],
    }  # fmt: skip


def distances(base: Params, now: Params) -> dict[str, dict[str, float]]:
    """Sums over the weights of each part of the model that moved at all, or may have."""
    parts: dict[str, collections.Counter] = {}
    now = trainable.flatten(now)
    for path, b in trainable.flatten(base).items():
        sums = jax.device_get(_sums(b, now[path]))
        parts.setdefault(path[0], collections.Counter()).update({k: float(v) for k, v in sums.items()} | {"count": b.size})
    return {name: dict(sums) for name, sums in parts.items()}


@jax.jit
def _sums(base: jax.Array, now: jax.Array) -> dict[str, jax.Array]:
    base, now = base.astype(jnp.float32), now.astype(jnp.float32)
    gone = jnp.abs(now - base)
    return {"square": jnp.square(gone).sum(), "absolute": gone.sum(), "size": jnp.square(base).sum(),
            "moved": jnp.sum(gone > MOVED * jnp.abs(base), dtype=jnp.float32)}  # fmt: skip


def parts_table(stands: Sequence[Stand]) -> list[Table]:
    found = [(f"{s.arm} {s.run}, stage {s.stage}", name, part) for s in stands for name, part in s.parts.items()]
    rows = [(after, name, *(f"{v:.3g}" for v in part.values())) for after, name, part in found]
    return [Table("Where the weights moved", ("after", "part", *found[0][2]), rows)] if found else []
