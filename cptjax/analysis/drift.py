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
from markupsafe import Markup

from cptjax.analysis import probe
from cptjax.analysis.finding import Finding, FindingChart, FindingTable
from cptjax.common import console
from cptjax.continual.model_state import restore_stage_params
from cptjax.evaluation.report import read, svg
from cptjax.evaluation.report.svg import Point, Series
from cptjax.evaluation.report.words import is_known
from cptjax.models import lora, trainable
from cptjax.types import Params

FIT_DEGREE = 2  # of the fit, as in the paper
MOVED_SHARE = 1e-5  # of a weight's own size: it counts as changed


@dataclasses.dataclass(frozen=True)
class StageDrift:
    """Where a run stood after a stage: its loss, and how far it had gone by each measure."""

    arm: str
    run: str
    stage: int
    loss: float
    far: dict[str, float]
    parts: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)  # of the model


@dataclasses.dataclass(frozen=True)
class QuadraticFit:
    """A quadratic in one measure."""

    measure: str
    n: int
    curve: tuple[float, ...]  # coefficients, highest power first
    r2: float
    pearson: float


def analyze(folders: Sequence[str], weights: bool = False) -> Finding:
    stands = [
        stand
        for arm in read.read_arms(folders)
        for run in arm.runs
        for stand in drift_of_stages(run, weights)
    ]
    if len(stands) < FIT_DEGREE + 2:
        raise ValueError(
            f"{len(stands)} stages have a loss and KL(base || now): a fit of degree {FIT_DEGREE} needs at least {FIT_DEGREE + 2}. Expected runs "
            "with eval.drift > 0 and, where a run has one stage, tasks in eval.general"
        )
    measures = dict.fromkeys(m for s in stands for m in s.far)
    fits = [f for m in measures if (f := fit_quadratic(m, [s for s in stands if m in s.far]))]
    if not fits:
        raise ValueError(
            f"all {len(stands)} stages have lost the same, or moved as far: there is nothing to explain"
        )
    first = fits[0]
    said = [
        f"{first.measure} explains {100 * first.r2:.0f} % of the variance of the loss over {first.n} stages (quadratic fit, R²)."
    ]
    table = FindingTable(
        "How much of the loss follows from",
        ("measure", "stages", "R², quadratic", "Pearson r"),
        [(f.measure, str(f.n), f"{f.r2:.2f}", f"{f.pearson:.2f}") for f in fits],
    )
    pictures = [
        FindingChart(
            f.measure, "A dot per stage; the line is the fit over all.", drift_chart(f, stands)
        )
        for f in fits
    ]
    numbers = {
        "fits": [dataclasses.asdict(f) for f in fits],
        "stages": [dataclasses.asdict(s) for s in stands],
    }
    return Finding(
        "Loss against distance from the base",
        said,
        [table, *parts_table(stands)],
        pictures,
        numbers,
    )


def drift_of_stages(run: read.ReportRun, weights: bool) -> list[StageDrift]:
    """The stages of a run whose loss and KL are known."""
    rows = [r for r in run.summary["per_stage"] if is_known(r["kl_new"]) and is_known(r["loss"])]
    names = {"kl_new": "KL on the new task", "kl_old": "KL on the others"}
    found = [
        StageDrift(
            run.label,
            run.variant,
            r["stage"],
            r["loss"],
            {n: r[k] for k, n in names.items() if is_known(r[k])},
        )
        for r in rows
    ]
    return add_weight_distances(run, found) if weights and found else found


def fit_quadratic(measure: str, stands: Sequence[StageDrift]) -> QuadraticFit | None:
    """None where there are too few different points."""
    x, y = np.array([(s.far[measure], s.loss) for s in stands]).T
    if len(set(x.tolist())) < FIT_DEGREE + 2 or not np.ptp(y):
        return None
    curve = np.polyfit(x, y, FIT_DEGREE)
    left = float(np.square(y - np.polyval(curve, x)).sum() / np.square(y - y.mean()).sum())
    return QuadraticFit(
        measure, len(x), tuple(curve.tolist()), 1 - left, float(np.corrcoef(x, y)[0, 1])
    )


def drift_chart(fit: QuadraticFit, stands: Sequence[StageDrift]) -> Markup | None:
    arms = list(dict.fromkeys(s.arm for s in stands))
    series = []
    for k, arm in enumerate(arms):
        dots = [
            Point(s.far[fit.measure], 100 * s.loss, f"{arm}, {s.run}, stage {s.stage}")
            for s in stands
            if s.arm == arm and fit.measure in s.far
        ]
        series.append(Series(arm, sorted(dots, key=lambda p: p.x), k, line=False, named=True))
    ends = [p.x for s in series for p in s.points]
    line = [
        Point(x, 100 * np.polyval(fit.curve, x))
        for x in np.linspace(min(ends), max(ends), 60).tolist()
    ]
    law = Series("", line, len(arms), dots=False, faint=True)
    return svg.line_chart(
        [law, *series], fit.measure, fit.measure, "loss on others, points", include=(0,)
    )


# ---- weights -------------------------------------------------------------------------------------------------------------


def add_weight_distances(run: read.ReportRun, stands: Sequence[StageDrift]) -> list[StageDrift]:
    """The stands with distances of weights from the base, adapters merged."""
    with (
        probe.visit_run(run.path, "float32") as current,
        console.progress_bar(f"weights of {run.label} {run.variant}", len(stands)) as bar,
    ):
        merged = lambda number: lora.merge_lora(
            restore_stage_params(
                current.config, current.model_ctx, current.files.checkpoints, number
            ),
            current.model_ctx.cfg.lora_scale,
        )
        base, out = merged(0), []
        for stand in stands:
            parts = weight_distances(base, merged(stand.stage))
            whole = collections.Counter()
            for part in parts.values():
                whole.update(part)
            out.append(
                dataclasses.replace(
                    stand,
                    far=stand.far | distance_metrics(whole, "weights, "),
                    parts={n: distance_metrics(p) for n, p in parts.items()},
                )
            )
            bar.advance()
    return out


def distance_metrics(sums: dict[str, float], prefix: str = "") -> dict[str, float]:
    """Distances from sums over weights."""
    return {
        f"{prefix}L2": sums["square"] ** 0.5,
        f"{prefix}relative L2": (sums["square"] / sums["size"]) ** 0.5,
        f"{prefix}L1": sums["absolute"],
        f"{prefix}share moved": sums["moved"] / sums["count"],
    }


def weight_distances(base: Params, now: Params) -> dict[str, dict[str, float]]:
    """Sums over the weights of each part of the model that moved at all, or may have."""
    parts: dict[str, collections.Counter] = {}
    now = trainable.flatten_params(now)
    for path, b in trainable.flatten_params(base).items():
        sums = jax.device_get(_sums(b, now[path]))
        parts.setdefault(path[0], collections.Counter()).update(
            {k: float(v) for k, v in sums.items()} | {"count": b.size}
        )
    return {name: dict(sums) for name, sums in parts.items()}


@jax.jit
def _sums(base: jax.Array, now: jax.Array) -> dict[str, jax.Array]:
    base, now = base.astype(jnp.float32), now.astype(jnp.float32)
    gone = jnp.abs(now - base)
    return {
        "square": jnp.square(gone).sum(),
        "absolute": gone.sum(),
        "size": jnp.square(base).sum(),
        "moved": jnp.sum(gone > MOVED_SHARE * jnp.abs(base), dtype=jnp.float32),
    }


def parts_table(stands: Sequence[StageDrift]) -> list[FindingTable]:
    found = [
        (f"{s.arm} {s.run}, stage {s.stage}", name, part)
        for s in stands
        for name, part in s.parts.items()
    ]
    rows = [(after, name, *(f"{v:.3g}" for v in part.values())) for after, name, part in found]
    return (
        [FindingTable("Where the weights moved", ("after", "part", *found[0][2]), rows)]
        if found
        else []
    )
