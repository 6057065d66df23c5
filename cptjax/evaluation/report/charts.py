"""Build each chart of the report from runs and arms."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from cptjax.common.run_log import COST_KEYS
from cptjax.evaluation import summary
from cptjax.evaluation.report import svg
from cptjax.evaluation.report.read import Arm, ReportRun
from cptjax.evaluation.report.svg import DumbbellPair, Point, Series
from cptjax.evaluation.report.words import format_percent, format_points, is_known

# Keys of metrics.jsonl with a title, in the order of the report. All other keys are plotted under
# "everything logged".
CURVE_TITLES = {
    "reward": "Reward",
    "reward/overall": "Reward",
    "reward/accuracy": "Accuracy of sampled responses",
    "reward/format": "Responses in the right format",
    "loss": "Loss",
    "response_length/mean": "Response length (tokens)",
    "completions/mean_length": "Response length (tokens)",
    "kl": "KL to the reference",
    "actor/kl": "KL to the reference",
    "entropy": "Entropy of the policy (nats)",
    "frac_reward_zero_std": "Groups with equal rewards",
    "grad_norm": "Gradient norm",
    "actor/grad_norm": "Gradient norm",
}
NOT_PLOTTED = {"stage", "step", "event", "time", *COST_KEYS}
CURVE_POINTS = 300  # largest number of points of a curve

Curve = list[tuple[int, float]]  # (position in the run, value)


# ---- one run -------------------------------------------------------------------------------------


def stage_lengths(run: ReportRun) -> dict[int, int]:
    """Return the length of each stage in steps, planned or logged."""
    lengths = {s: config.get("steps") or 0 for s, config in enumerate(run.config["stages"], 1)}
    logged = [(line["stage"], line["step"]) for line in run.tables.metrics_lines]
    logged += [(stage, step) for stage, step, _, _ in run.table.within_stage]
    for stage, step in logged:
        lengths[stage] = max(lengths.get(stage, 0), step)
    return lengths


def accuracy_chart(run: ReportRun) -> Markup | None:
    """Plot each task's accuracy over the stages and within them.

    A ring marks a stage that trained the task.
    """
    table, lengths, series = run.table, stage_lengths(run), []
    for k, task in enumerate(table.tasks):
        ends = [
            Point(
                i,
                100 * table.cells[i, task].value,
                f"{task}, stage {i}: {100 * table.cells[i, task].value:.1f}%",
                ring=i > 0 and task in table.stages[i - 1],
            )
            for i in range(len(table.stages) + 1)
            if (i, task) in table.cells
        ]
        within = [
            Point(stage - 1 + step / lengths[stage], 100 * value)
            for stage, step, t, value in table.within_stage
            if t == task and 0 < step < lengths[stage]
        ]
        line = sorted([*ends, *within], key=lambda point: point.x)
        series += [Series(task, line, k, dots=False), Series(task, ends, k, line=False)]
    ticks = [(i, str(i) if i else "base") for i in range(len(table.stages) + 1)]
    return svg.line_chart(
        series,
        "accuracy of each task over the stages",
        "after stage",
        "accuracy, %",
        x_ticks=ticks,
        borders=range(1, len(table.stages) + 1),
        include=(0, 100),
    )


def plasticity_chart(run: ReportRun) -> Markup | None:
    """Plot for each old task its accuracy right after learning against the change since then."""
    series = []
    for k, task in enumerate(run.table.tasks):
        row = run.summary["tasks"][task]
        if task in run.table.old() and is_known(row["learned"]) and is_known(row["final"]):
            point = Point(100 * row["learned"], 100 * (row["final"] - row["learned"]), task)
            series.append(Series(task, [point], k, named=True))
    return svg.line_chart(
        series,
        "stability against plasticity",
        "accuracy right after learning, %",
        "change since, points",
        include=(0,),
        span=(20, 20),
        most=100,
    )


def general_chart(run: ReportRun) -> Markup | None:
    """Plot the accuracy on each general task and group before and after training."""
    rows = dict(run.summary["general"])
    rows |= {f"{name}, mean": group for name, group in run.summary["groups"].items()}
    pairs = [
        DumbbellPair(name, 100 * row["base"], 100 * row["final"])
        for name, row in rows.items()
        if is_known(row["base"]) and is_known(row["final"])
    ]
    return svg.dumbbell_chart(
        pairs, "general abilities before and after", "accuracy, %", "before", "after", (0, 100)
    )


def base_kl_chart(runs: Sequence[tuple[str, int, ReportRun]]) -> Markup | None:
    """Plot the distance from the base model against the loss on other tasks, a point per stage.

    The distance is measured on the prompts of the stage.
    """
    series = []
    for label, color, run in runs:
        points = [
            Point(
                row["kl_new"],
                100 * row["loss"],
                f"{label}, stage {row['stage']} ({'+'.join(row['tasks'])})",
            )
            for row in run.evaluated_stages
            if is_known(row["kl_new"]) and is_known(row["loss"])
        ]
        named = len(runs) > 1
        series.append(Series(label if named else "", points, color, named=named))
    return svg.line_chart(
        series,
        "KL against forgetting",
        "KL(base || current) per token, on the stage's prompts",
        "loss on other tasks, points",
        include=(0,),
        span=(0, 10),
    )


def training_lines(run: ReportRun) -> list[dict[str, Any]]:
    return [line for line in run.tables.metrics_lines if not line.get("event")]


def logged_curves(run: ReportRun) -> dict[str, Curve]:
    """Return a curve for each logged number that changes; positions continue over the stages."""
    curves: dict[str, Curve] = {}
    for position, line in enumerate(training_lines(run)):
        for key, value in line.items():
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if is_number and key not in NOT_PLOTTED:
                curves.setdefault(key, []).append((position, value))
    return {key: curve for key, curve in curves.items() if len({v for _, v in curve}) > 1}


def training_panels(run: ReportRun) -> tuple[list[tuple[str, Markup]], list[tuple[str, Markup]]]:
    """Return the training curves with titles of their own, and all others."""
    curves, lines = logged_curves(run), training_lines(run)
    borders = [i for i in range(1, len(lines)) if lines[i]["stage"] != lines[i - 1]["stage"]]
    titled = [
        (title, _training_panel(curves[key], title, borders))
        for key, title in CURVE_TITLES.items()
        if key in curves
    ]
    other = [
        (key, _training_panel(curve, key, borders))
        for key, curve in sorted(curves.items())
        if key not in CURVE_TITLES
    ]
    return titled, other


def _training_panel(curve: Curve, title: str, borders: Sequence[int]) -> Markup:
    """Plot a logged number as a thin line and its moving average as a thick one.

    The average restarts with each stage.
    """
    series = []
    for low, high in zip([0, *borders], [*borders, math.inf], strict=True):
        part = [(position, value) for position, value in curve if low <= position < high]
        if part:
            xs, ys = thin_curve(part, max(10, CURVE_POINTS * len(part) // len(curve)))
            series.append(Series("", make_points(xs, ys), 0, dots=False, faint=True))
            series.append(Series("", make_points(xs, smooth_curve(ys)), 0, dots=False))
    return svg.line_chart(series, title, "logged step", "", borders=borders, size=svg.SMALL_CHART)


def make_points(xs: Iterable[float], ys: Iterable[float]) -> list[Point]:
    return [Point(x, y) for x, y in zip(xs, ys, strict=True)]


def thin_curve(curve: Curve, most: int) -> tuple[list[float], list[float]]:
    """Average neighbouring points until at most `most` remain; return their x and y."""
    parts = np.array_split(np.array(curve, float), min(len(curve), most))
    return [part[:, 0].mean() for part in parts], [part[:, 1].mean() for part in parts]


def smooth_curve(values: Sequence[float]) -> list[float]:
    """Compute a bias-corrected exponential moving average over about a twelfth of the curve."""
    keep = 1 - 1 / max(2.0, len(values) / 12)
    total, weight, averages = 0.0, 0.0, []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        averages.append(total / weight)
    return averages


# ---- several arms --------------------------------------------------------------------------------


def arms_plasticity_chart(arms: Sequence[Arm]) -> Markup | None:
    """Plot learned accuracy against FM: a faint dot per seed, a labelled dot per arm's mean."""
    series = []
    for k, arm in enumerate(arms):
        metrics = [
            (run.metric("learned_acc")["value"], run.metric("fm_diagonal"))
            for run in arm.counted_runs
        ]
        points = [
            Point(100 * learned, 100 * fm["value"], error=196 * (fm["stderr"] or 0))
            for learned, fm in metrics
            if is_known(learned) and is_known(fm["value"])
        ]
        if not points:
            continue
        if len(points) > 1:
            seeds = make_points([p.x for p in points], [p.y for p in points])
            series.append(Series("", seeds, k, line=False, faint=True))
        x = sum(p.x for p in points) / len(points)
        y = sum(p.y for p in points) / len(points)
        tip = f"{arm.label}: learned {x:.1f} %, FM {format_points(y / 100)}"
        error = points[0].error if len(points) == 1 else None
        series.append(Series(arm.label, [Point(x, y, tip, error)], k, named=True))
    return svg.line_chart(
        series,
        "stability against plasticity",
        "learned accuracy, %",
        "FM, points",
        include=(0,),
        span=(20, 20),
        most=100,
    )


def arms_format_chart(arms: Sequence[Arm]) -> Markup | None:
    """Plot the loss on earlier and general tasks, with a forced prefix (ring) and without (dot).

    Joint training has no earlier tasks and is left out.
    """

    def change(arm: Arm, key: str) -> float:
        spread = arm.spread_of("format_share", key)
        return -100 * spread["mean"] if spread else math.nan

    pairs = [
        DumbbellPair(arm.label, change(arm, "loss_forced"), change(arm, "loss"), k)
        for k, arm in enumerate(arms)
        if not arm.is_joint
    ]
    return svg.dumbbell_chart(
        pairs,
        "how much is only format",
        "change on earlier and general tasks, points",
        "prefix forced",
        "free",
        (0,),
    )


def arms_general_chart(arms: Sequence[Arm], group: str = "") -> Markup | None:
    """Plot the mean accuracy on general tasks or a group, before (ring) and after (dot)."""
    pairs = []
    for k, arm in enumerate(arms):
        before, after = (
            summary.mean_and_sd(_general_level(run, key, group) for run in arm.counted_runs)
            for key in ("base", "final")
        )
        if before and after:
            pairs.append(DumbbellPair(arm.label, 100 * before["mean"], 100 * after["mean"], k))
    return svg.dumbbell_chart(
        pairs,
        f"{group or 'general abilities'} before and after",
        f"mean accuracy on {group or 'general tasks'}, %",
        "before",
        "after",
        (0, 100),
    )


def _general_level(run: ReportRun, key: str, group: str) -> float | None:
    if group:
        return run.summary["groups"].get(group, {}).get(key)
    values = [row[key] for row in run.summary["general"].values()]
    return float(np.mean(values)) if values and all(map(is_known, values)) else None


def arms_average_chart(arms: Sequence[Arm]) -> Markup | None:
    """Plot the mean accuracy over all tasks and seeds after each stage."""
    series = []
    for k, arm in enumerate(arms):
        matrices = [run.table.array() for run in arm.counted_runs]
        if arm.is_joint or any(m.shape != matrices[0].shape for m in matrices):
            continue
        means = np.mean(matrices, axis=0).mean(1)
        points = [
            Point(i, 100 * mean, f"{arm.label}, stage {i}: {format_percent(mean)}%")
            for i, mean in enumerate(means)
        ]
        series.append(Series(arm.label, points, k))
    longest = max((len(s.points) for s in series), default=0)
    return svg.line_chart(
        series,
        "average accuracy over the stages",
        "after stage",
        "accuracy over all tasks, %",
        x_ticks=[(i, str(i) if i else "base") for i in range(longest)],
    )


def arms_reward_chart(arms: Sequence[Arm]) -> Markup | None:
    """Plot the moving average of the reward during the run, for each arm that has one."""
    series = []
    for k, arm in enumerate(arms):
        curves = logged_curves(arm.runs[0])
        curve = curves.get("reward") or curves.get("reward/overall")
        if curve:
            xs, ys = thin_curve(curve, CURVE_POINTS)
            points = make_points(xs, smooth_curve(ys))
            series.append(Series(arm.label, points, k, dots=False, named=True))
    return svg.line_chart(series, "reward during training", "logged step", "reward, moving average")
