"""Fit the loss on other tasks to the distance from the base model, one point per stage.

RL's Razor claims that for any method, KL(base || current) on the prompts of the *new* task predicts
the loss on other tasks, that is, on earlier and general tasks. The other predictors are the KL on
the prompts of those tasks, and distances between weights. The share of moved weights is counted in
float32 and above rounding, since in bfloat16 small updates vanish and look sparse.
"""

import collections
import dataclasses
from collections.abc import Mapping, Sequence

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

FIT_DEGREE = 2  # as in the paper
MOVED_SHARE = 1e-5  # a weight counts as moved if it changed by more than this share of its size


@dataclasses.dataclass(frozen=True)
class StageDrift:
    """A run after a stage: its loss, and its distance from the base model by each measure."""

    arm: str
    run: str
    stage: int
    loss: float
    far: dict[str, float]  # distance by measure
    # distances between weights, by part of the model
    parts: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class QuadraticFit:
    """The loss as a quadratic function of one measure."""

    measure: str
    n: int
    curve: tuple[float, ...]  # coefficients, highest power first
    r2: float
    pearson: float


def analyze(folders: Sequence[str], weights: bool = False) -> Finding:
    """Fit the loss to each measure of distance; `weights` adds distances between weights."""
    drifts = [
        drift
        for arm in read.read_arms(folders)
        for run in arm.runs
        for drift in drift_of_stages(run, weights)
    ]
    if len(drifts) < FIT_DEGREE + 2:
        raise ValueError(
            f"{len(drifts)} stages have a loss and KL(base || current): a fit of degree "
            f"{FIT_DEGREE} needs at least {FIT_DEGREE + 2}. Expected runs with eval.drift > 0 and, "
            "if a run has one stage, tasks in eval.general"
        )
    measures = dict.fromkeys(measure for drift in drifts for measure in drift.far)
    fits = [fit for m in measures if (fit := fit_quadratic(m, [d for d in drifts if m in d.far]))]
    if not fits:
        raise ValueError(
            f"all {len(drifts)} stages have the same loss, or too few different distances: "
            "there is nothing to fit"
        )
    percent = 100 * fits[0].r2
    sentence = (
        f"{fits[0].measure} explains {percent:.0f} % of the variance of the loss over "
        f"{fits[0].n} stages (quadratic fit, R²)."
    )
    table = FindingTable(
        "Share of the loss that each measure explains",
        ("measure", "stages", "R², quadratic", "Pearson r"),
        [(f.measure, str(f.n), f"{f.r2:.2f}", f"{f.pearson:.2f}") for f in fits],
    )
    note = "One dot per stage; the line is the fit over all stages."
    return Finding(
        "Loss against distance from the base model",
        [sentence],
        [table, *parts_table(drifts)],
        [FindingChart(fit.measure, note, drift_chart(fit, drifts)) for fit in fits],
        {
            "fits": [dataclasses.asdict(fit) for fit in fits],
            "stages": [dataclasses.asdict(drift) for drift in drifts],
        },
    )


def drift_of_stages(run: read.ReportRun, weights: bool) -> list[StageDrift]:
    """Return the stages of a run whose loss and KL are known."""
    names = {
        "kl_new": "KL on the new task",
        "kl_old": "KL on the others",
        "kl_new_sequence": "KL per response on the new task",
    }
    drifts = []
    for row in run.evaluated_stages:
        if is_known(row["kl_new"]) and is_known(row["loss"]):
            far = {name: row[key] for key, name in names.items() if is_known(row[key])}
            drifts.append(StageDrift(run.label, run.variant, row["stage"], row["loss"], far))
    return add_weight_distances(run, drifts) if weights and drifts else drifts


def fit_quadratic(measure: str, drifts: Sequence[StageDrift]) -> QuadraticFit | None:
    """Fit the loss to a measure; return None if there are too few different points."""
    x, y = np.array([(drift.far[measure], drift.loss) for drift in drifts]).T
    if len(set(x.tolist())) < FIT_DEGREE + 2 or not np.ptp(y):
        return None
    curve = np.polyfit(x, y, FIT_DEGREE)
    residual = np.square(y - np.polyval(curve, x)).sum() / np.square(y - y.mean()).sum()
    pearson = float(np.corrcoef(x, y)[0, 1])
    return QuadraticFit(measure, len(x), tuple(curve.tolist()), 1 - float(residual), pearson)


def drift_chart(fit: QuadraticFit, drifts: Sequence[StageDrift]) -> Markup | None:
    arms = list(dict.fromkeys(drift.arm for drift in drifts))
    series, xs = [], []
    for k, arm in enumerate(arms):
        points = [
            Point(d.far[fit.measure], 100 * d.loss, f"{arm}, {d.run}, stage {d.stage}")
            for d in drifts
            if d.arm == arm and fit.measure in d.far
        ]
        points = sorted(points, key=lambda point: point.x)
        series.append(Series(arm, points, k, line=False, named=True))
        xs += [point.x for point in points]
    curve = [
        Point(x, 100 * np.polyval(fit.curve, x)) for x in np.linspace(min(xs), max(xs), 60).tolist()
    ]
    series.insert(0, Series("", curve, len(arms), dots=False, faint=True))
    return svg.line_chart(series, fit.measure, fit.measure, "loss on others, points", include=(0,))


# ---- weights -------------------------------------------------------------------------------------


def add_weight_distances(run: read.ReportRun, drifts: Sequence[StageDrift]) -> list[StageDrift]:
    """Add the distances between the weights and the base model's, with LoRA adapters merged."""
    with (
        probe.open_run_of_folder(run.path, "float32") as opened,
        console.progress_bar(f"weights of {run.label} {run.variant}", len(drifts)) as bar,
    ):

        def merged_params(stage: int) -> Params:
            params = restore_stage_params(
                opened.config, opened.model_ctx, opened.files.checkpoints, stage
            )
            return lora.merge_lora(params, opened.model_ctx.cfg.lora_scale)

        base, measured = merged_params(0), []
        for drift in drifts:
            parts = weight_distances(base, merged_params(drift.stage))
            whole = collections.Counter()
            for part in parts.values():
                whole.update(part)
            far = drift.far | distance_metrics(whole, "weights, ")
            by_part = {name: distance_metrics(part) for name, part in parts.items()}
            measured.append(dataclasses.replace(drift, far=far, parts=by_part))
            bar.advance()
    return measured


def distance_metrics(sums: Mapping[str, float], prefix: str = "") -> dict[str, float]:
    """Compute distances from sums over weights."""
    return {
        f"{prefix}L2": sums["square"] ** 0.5,
        f"{prefix}relative L2": (sums["square"] / sums["size"]) ** 0.5,
        f"{prefix}L1": sums["absolute"],
        f"{prefix}share moved": sums["moved"] / sums["count"],
    }


def weight_distances(base: Params, params: Params) -> dict[str, dict[str, float]]:
    """Sum the changes of the weights of each part of the model."""
    parts: dict[str, collections.Counter] = {}
    flat = trainable.flatten_params(params)
    for path, weight in trainable.flatten_params(base).items():
        sums = {k: float(v) for k, v in jax.device_get(_sums(weight, flat[path])).items()}
        parts.setdefault(path[0], collections.Counter()).update(sums | {"count": weight.size})
    return {name: dict(sums) for name, sums in parts.items()}


@jax.jit
def _sums(base: jax.Array, weight: jax.Array) -> dict[str, jax.Array]:
    base, weight = base.astype(jnp.float32), weight.astype(jnp.float32)
    change = jnp.abs(weight - base)
    return {
        "square": jnp.square(change).sum(),
        "absolute": change.sum(),
        "size": jnp.square(base).sum(),
        "moved": jnp.sum(change > MOVED_SHARE * jnp.abs(base), dtype=jnp.float32),
    }


def parts_table(drifts: Sequence[StageDrift]) -> list[FindingTable]:
    """Tabulate the distances between weights by part of the model, if they were measured."""
    rows, header = [], ()
    for drift in drifts:
        for name, part in drift.parts.items():
            header = ("after", "part", *part)
            after = f"{drift.arm} {drift.run}, stage {drift.stage}"
            rows.append((after, name, *(f"{value:.3g}" for value in part.values())))
    return [FindingTable("Where the weights moved", header, rows)] if rows else []
