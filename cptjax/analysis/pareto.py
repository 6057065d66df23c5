"""Compare methods at matched accuracy on the new tasks: which forgets least for what it learns?

A method learns more and forgets more with a higher learning rate, so runs at one rate do not
compare methods. Each arm (the mean over its seeds) is one point:

    accuracy    mean over trained tasks of R[last(j), j], right after their stages
    loss        mean over old and general tasks of their loss at the end of the run

    frontier    the arms of a method that no other arm of it beats in both
    matched     the highest accuracy that every method reaches, but for those that never rise above
                the base model; a method's loss at it is read off its frontier, with straight lines
                between the arms
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from cptjax.analysis.finding import Finding, FindingChart, FindingTable
from cptjax.evaluation import summary
from cptjax.evaluation.report import read, svg
from cptjax.evaluation.report.svg import Point, Series
from cptjax.evaluation.report.words import METRIC_TITLES, format_metric, is_known

# Definitions of forgetting, shown for every arm; see evaluation/matrix.py.
FORGETTING_METRICS = ("fm_diagonal", "fm_peak", "fm_peak_own", "forgetting", "drop")
LEVELS = (0.25, 0.5, 0.75)  # of the way from the base model to the matched accuracy


@dataclasses.dataclass(frozen=True)
class ArmPoint:
    """One arm: what it learned, and what that cost."""

    method: str
    arm: str
    accuracy: float
    loss: float
    sd: float | None = None  # of the loss over the seeds


def analyze(folders: Sequence[str]) -> Finding:
    """Draw each method's frontier over its arms, and compare the losses at matched accuracy."""
    arms = read.read_arms(folders)
    pairs = [(arm, point) for arm in arms if (point := point_of_arm(arm))]
    if len({point.method for _, point in pairs}) < 2:
        raise ValueError(
            f"{len(pairs)} arms have an accuracy and a loss on other tasks, of fewer than two "
            "methods: expected at least two values of method.name, each at several learning rates"
        )
    base = summary.mean_and_sd(arm.runs[0].metric("base_acc")["value"] for arm, _ in pairs)
    finding = pareto_finding([point for _, point in pairs], base and base["mean"])
    table = FindingTable(
        "Forgetting of each arm by each definition, in points",
        ("arm", "accuracy", *(METRIC_TITLES[name] for name in FORGETTING_METRICS)),
        [(p.arm, f"{100 * p.accuracy:.1f}", *definitions_of_arm(arm)) for arm, p in pairs],
    )
    return dataclasses.replace(finding, tables=[*finding.tables, table])


def point_of_arm(arm: read.Arm) -> ArmPoint | None:
    """Return the means over an arm's finished runs, or None if a number is unknown."""
    accuracy = arm.spread("learned_acc")
    last_stages = [run.summary["per_stage"][-1] for run in arm.runs if run.table.finished]
    losses = [row["loss"] for row in last_stages if is_known(row["loss"])]
    if accuracy is None or not losses:
        return None
    sd = float(np.std(losses, ddof=1)) if len(losses) > 1 else None
    return ArmPoint(method_of_run(arm.runs[0]), arm.label, accuracy["mean"], np.mean(losses), sd)


def method_of_run(run: read.ReportRun) -> str:
    """Return method.name of the last stage."""
    last = run.config["stages"][-1].get("method", {})
    return last.get("name") or run.config["method"]["name"]


def definitions_of_arm(arm: read.Arm) -> list[str]:
    spreads = [(name, arm.spread(name)) for name in FORGETTING_METRICS]
    return [format_metric(name, spread and spread["mean"]) for name, spread in spreads]


# ---- frontiers -----------------------------------------------------------------------------------


def frontier(points: Sequence[ArmPoint]) -> list[ArmPoint]:
    """Return the points that no other beats in accuracy and loss, by rising accuracy."""
    best: list[ArmPoint] = []
    for point in sorted(points, key=lambda p: (-p.accuracy, p.loss)):
        if not best or point.loss < best[-1].loss:
            best.append(point)
    return best[::-1]


def loss_at(points: Sequence[ArmPoint], accuracy: float) -> float | None:
    """Return the loss at an accuracy on the frontier; None if no point reaches the accuracy."""
    best = frontier(points)
    if accuracy > best[-1].accuracy:
        return None
    return float(np.interp(accuracy, [p.accuracy for p in best], [p.loss for p in best]))


def matched_accuracy(by_method: dict[str, list[ArmPoint]]) -> float:
    """Return the highest accuracy that every method reaches."""
    return min(max(p.accuracy for p in points) for points in by_method.values())


def pareto_finding(points: Sequence[ArmPoint], base: float | None) -> Finding:
    """Compare methods at accuracies between that of the base model and the matched one.

    If that of the base model is not known, they are compared only at the matched one.
    """
    by_method: dict[str, list[ArmPoint]] = {}
    for point in points:
        by_method.setdefault(point.method, []).append(point)
    learning = {
        name: of_method
        for name, of_method in by_method.items()
        if base is None or max(p.accuracy for p in of_method) > base
    }
    matched = matched_accuracy(learning or by_method)
    shares = LEVELS if learning and base is not None else ()
    # Not computed from the base, as a level that rounding lifts is one that no arm reaches.
    levels = [*(base + share * (matched - base) for share in shares), matched]
    losses = {
        name: [loss_at(of_method, level) for level in levels]
        for name, of_method in by_method.items()
    }
    compared = [name for name in by_method if losses[name][-1] is not None]
    compared.sort(key=lambda name: losses[name][-1])
    ordered = [*compared, *(name for name in by_method if name not in compared)]
    changes = [f"{name} {-100 * losses[name][-1]:+.1f}" for name in compared]
    base_clause = "" if base is None else f" (base model: {100 * base:.1f} %)"
    sentence = (
        f"At {100 * matched:.1f} % on the new tasks{base_clause}, the others "
        f"change by these points: {', '.join(changes)}."
    )
    if len(learning) < len(by_method):
        names = ", ".join(name for name in by_method if name not in learning)
        sentence += f" Not above the base model on the new tasks: {names}."
    header = ("method", "arms", "on the frontier", "best accuracy", "loss there")
    table = FindingTable(
        "Loss on the other tasks at matched accuracy on the new ones, in points",
        (*header, *(f"loss at {100 * level:.1f} %" for level in levels)),
        [
            (
                name,
                str(len(by_method[name])),
                str(len(frontier(by_method[name]))),
                f"{100 * frontier(by_method[name])[-1].accuracy:.1f}",
                f"{100 * frontier(by_method[name])[-1].loss:.1f}",
                *("" if loss is None else f"{100 * loss:.1f}" for loss in losses[name]),
            )
            for name in ordered
        ],
    )
    note = (
        "One dot per arm; lines join the arms that no arm of the same method beats. The dashed "
        "line is the matched accuracy."
    )
    numbers: dict[str, Any] = {
        "matched_accuracy": matched,
        "loss_at_matched_accuracy": {name: losses[name][-1] for name in ordered},
        "levels": levels,
        "losses": losses,
        "points": [dataclasses.asdict(point) for point in points],
    }
    chart = pareto_chart(by_method, matched)
    return Finding(
        "Forgetting at matched accuracy",
        [sentence],
        [table],
        [FindingChart("What each method forgets for what it learns", note, chart)],
        numbers,
    )


def pareto_chart(by_method: dict[str, list[ArmPoint]], matched: float) -> Markup | None:
    """Plot the loss against the accuracy, with the frontier of each method."""
    series = []
    for k, (name, points) in enumerate(by_method.items()):
        dots = [
            Point(100 * p.accuracy, 100 * p.loss, p.arm, None if p.sd is None else 100 * p.sd)
            for p in sorted(points, key=lambda p: p.accuracy)
        ]
        edge = [Point(100 * p.accuracy, 100 * p.loss) for p in frontier(points)]
        series += [Series("", edge, k, dots=False), Series(name, dots, k, line=False, named=True)]
    return svg.line_chart(
        series,
        "forgetting against learning",
        "accuracy on the new tasks, %",
        "loss on the others, points",
        borders=(100 * matched,),
        include=(0,),
    )
