"""What each picture of the report shows, from runs and arms to `svg`."""

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

CURVE_TITLES = {  # keys of metrics.jsonl with a title, in the order of the report; all others follow in "everything logged"
    "reward": "Reward",
    "reward/overall": "Reward",
    "reward/accuracy": "Accuracy of answers drawn",
    "reward/format": "Answers in format",
    "loss": "Loss",
    "response_length/mean": "Answer length (tokens)",
    "completions/mean_length": "Answer length (tokens)",
    "kl": "KL to the reference",
    "actor/kl": "KL to the reference",
    "entropy": "Entropy of the policy (nats)",
    "frac_reward_zero_std": "Groups without a signal",
    "grad_norm": "Gradient norm",
    "actor/grad_norm": "Gradient norm",
}
NOT_PLOTTED = {"stage", "step", "event", "time", *COST_KEYS}
CURVE_POINTS = 300  # points of a curve


def stage_ticks(run: ReportRun) -> list[tuple[float, str]]:
    return [(i, "base" if i == 0 else str(i)) for i in range(len(run.table.stages) + 1)]


def stage_lengths(run: ReportRun) -> dict[int, int]:
    """Returns the length of each stage in steps, as planned or, failing that, as far as it came."""
    steps = {s: config.get("steps") or 0 for s, config in enumerate(run.config["stages"], 1)}
    for stage, step in [(row["stage"], row["step"]) for row in run.log] + [
        (s, step) for s, step, _, _ in run.table.inside
    ]:
        steps[stage] = max(steps.get(stage, 0), step)
    return steps


def accuracy_chart(run: ReportRun) -> Markup | None:
    """Each task's accuracy over the stages, points within a stage in between; a ring marks a stage that trained the task."""
    t, steps, series = run.table, stage_lengths(run), []
    for k, task in enumerate(t.tasks):
        rows = [
            (i, 100 * t.cells[i, task].value)
            for i in range(len(t.stages) + 1)
            if (i, task) in t.cells
        ]
        ends = [
            Point(i, v, f"{task}, stage {i}: {v:.1f}%", ring=i > 0 and task in t.stages[i - 1])
            for i, v in rows
        ]
        inside = [
            Point(s - 1 + step / steps[s], 100 * v)
            for s, step, j, v in t.inside
            if j == task and 0 < step < steps[s]
        ]
        series.append(Series(task, sorted([*ends, *inside], key=lambda p: p.x), k, dots=False))
        series.append(Series(task, ends, k, line=False))
    borders = range(1, len(t.stages) + 1)
    return svg.line_chart(
        series,
        "accuracy of each task over the stages",
        "after stage",
        "accuracy, %",
        stage_ticks(run),
        borders,
        (0, 100),
    )


def plasticity_chart(run: ReportRun) -> Markup | None:
    t, series = run.table, []
    for k, task in enumerate(t.tasks):
        row = run.summary["tasks"][task]
        if task in t.old() and is_known(row["learned"]) and is_known(row["final"]):
            series.append(
                Series(
                    task,
                    [Point(100 * row["learned"], 100 * (row["final"] - row["learned"]), task)],
                    k,
                    named=True,
                )
            )
    names = ("accuracy right after learning, %", "change since, points")
    return svg.line_chart(
        series, "stability against plasticity", *names, include=(0,), span=(20, 20), most=100
    )


def general_chart(run: ReportRun) -> Markup | None:
    rows = [
        *run.summary["general"].items(),
        *((f"{name}, mean", g) for name, g in run.summary["groups"].items()),
    ]
    pairs = [
        DumbbellPair(j, 100 * g["base"], 100 * g["final"])
        for j, g in rows
        if is_known(g["base"]) and is_known(g["final"])
    ]
    return svg.dumbbell_chart(
        pairs, "general abilities before and after", "accuracy, %", "before", "after", (0, 100)
    )


def base_kl_chart(runs: Sequence[tuple[str, int, ReportRun]]) -> Markup | None:
    """One point per stage: distance from the base on the stage's own prompts, against what earlier and general tasks lost."""
    series = []
    for label, color, run in runs:
        rows = [
            r for r in run.summary["per_stage"] if is_known(r["kl_new"]) and is_known(r["loss"])
        ]
        dots = [
            Point(
                r["kl_new"],
                100 * r["loss"],
                f"{label}, stage {r['stage']} ({'+'.join(r['tasks'])})",
            )
            for r in rows
        ]
        series.append(
            Series(label if len(runs) > 1 else "", dots, color, line=True, named=len(runs) > 1)
        )
    names = ("KL(base || now) per token, on the stage's prompts", "loss on others, points")
    return svg.line_chart(series, "KL against forgetting", *names, include=(0,), span=(0, 10))


def logged_numbers(run: ReportRun) -> dict[str, list[tuple[int, float]]]:
    """Returns each logged number as (position in the run, value), positions running on over the stages."""
    found: dict[str, list[tuple[int, float]]] = {}
    for place, row in enumerate(training_lines(run)):
        for key, value in row.items():
            if (
                key not in NOT_PLOTTED
                and isinstance(value, (int, float))
                and not isinstance(value, bool)
            ):
                found.setdefault(key, []).append((place, value))
    return {key: values for key, values in found.items() if len({v for _, v in values}) > 1}


def training_lines(run: ReportRun) -> list[dict[str, Any]]:
    return [row for row in run.log if not row.get("event")]


def training_panels(run: ReportRun) -> tuple[list[tuple[str, Markup]], list[tuple[str, Markup]]]:
    """Returns the training curves with a name of their own, and all the others."""
    found, rows = logged_numbers(run), training_lines(run)
    borders = [i for i in range(1, len(rows)) if rows[i]["stage"] != rows[i - 1]["stage"]]
    titled = [
        (CURVE_TITLES[k], _training_panel(found[k], CURVE_TITLES[k], borders))
        for k in CURVE_TITLES
        if k in found
    ]
    return titled, [
        (k, _training_panel(v, k, borders))
        for k, v in sorted(found.items())
        if k not in CURVE_TITLES
    ]


def _training_panel(values: list[tuple[int, float]], title: str, borders: Sequence[int]) -> Markup:
    """Draws a logged number thin, and its moving average, which starts anew with each stage, thick."""
    series = []
    for low, high in zip([0, *borders], [*borders, math.inf], strict=True):
        if part := [v for v in values if low <= v[0] < high]:
            places, heights = thin_curve(part, max(10, CURVE_POINTS * len(part) // len(values)))
            series.append(
                Series(
                    "",
                    [Point(x, y) for x, y in zip(places, heights, strict=True)],
                    0,
                    dots=False,
                    faint=True,
                )
            )
            series.append(
                Series(
                    "",
                    [Point(x, y) for x, y in zip(places, smooth_curve(heights), strict=True)],
                    0,
                    dots=False,
                )
            )
    return svg.line_chart(series, title, "logged step", "", borders=borders, size=svg.SMALL_CHART)


def thin_curve(values: list[tuple[int, float]], most: int) -> tuple[list[float], list[float]]:
    """Averages neighbours so that at most `most` points remain."""
    parts = np.array_split(np.array(values, float), min(len(values), most))
    return [p[:, 0].mean() for p in parts], [p[:, 1].mean() for p in parts]


def smooth_curve(heights: Iterable[float]) -> list[float]:
    """Exponential moving average over about a twelfth of the curve, without the pull of its start."""
    heights = list(heights)
    keep, total, weight, out = 1 - 1 / max(2.0, len(heights) / 12), 0.0, 0.0, []
    for h in heights:
        total, weight = keep * total + h, keep * weight + 1
        out.append(total / weight)
    return out


def arms_plasticity_chart(arms: Sequence[Arm]) -> Markup | None:
    """Learned accuracy against FM, a small dot per seed and a named one for the arm's mean."""
    series = []
    for k, arm in enumerate(arms):
        xy = [(r.number("learned_acc")["value"], r.number("fm_diagonal")) for r in arm.runs]
        xy = [
            (100 * x, 100 * fm["value"], 196 * (fm["stderr"] or 0))
            for x, fm in xy
            if is_known(x) and is_known(fm["value"])
        ]
        if not xy:
            continue
        if len(xy) > 1:
            series.append(Series("", [Point(x, y) for x, y, _ in xy], k, line=False, faint=True))
        x, y = (sum(v[i] for v in xy) / len(xy) for i in (0, 1))
        error = xy[0][2] if len(xy) == 1 else None
        series.append(
            Series(
                arm.label,
                [
                    Point(
                        x, y, f"{arm.label}: learned {x:.1f} %, FM {format_points(y / 100)}", error
                    )
                ],
                k,
                named=True,
            )
        )
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
    """Loss on earlier and general tasks: ring with the answer's prefix forced, dot as the model answers; joint has none earlier."""
    change = lambda arm, key: (
        -100 * found["mean"] if (found := arm.over("format_share", key)) else math.nan
    )
    pairs = [
        DumbbellPair(a.label, change(a, "loss_forced"), change(a, "loss"), k)
        for k, a in enumerate(arms)
        if not a.joint
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
    """Mean accuracy on general tasks, or on a group of them: ring before, dot after."""
    pairs = []
    for k, arm in enumerate(arms):
        found = [
            summary.mean_and_sd(_general_level(run, key, group) for run in arm.runs)
            for key in ("base", "final")
        ]
        pairs.append(
            DumbbellPair(arm.label, *(100 * f["mean"] if f else math.nan for f in found), k)
        )
    about = f"mean accuracy on {group or 'general tasks'}, %"
    return svg.dumbbell_chart(
        pairs,
        f"{group or 'general abilities'} before and after",
        about,
        "before",
        "after",
        (0, 100),
    )


def _general_level(run: ReportRun, key: str, group: str) -> float | None:
    if group:
        return run.summary["groups"].get(group, {}).get(key)
    values = [g[key] for g in run.summary["general"].values()]
    return float(np.mean(values)) if values and all(map(is_known, values)) else None


def arms_average_chart(arms: Sequence[Arm]) -> Markup | None:
    """Mean accuracy over all tasks after each stage, mean over seeds."""
    series = []
    for k, arm in enumerate(arms):
        if arm.joint or any(
            r.table.array().shape != arm.runs[0].table.array().shape for r in arm.runs
        ):
            continue
        rows = np.mean([r.table.array() for r in arm.runs], axis=0).mean(1)
        series.append(
            Series(
                arm.label,
                [
                    Point(i, 100 * v, f"{arm.label}, stage {i}: {format_percent(v)}%")
                    for i, v in enumerate(rows)
                ],
                k,
            )
        )
    longest = max((len(s.points) for s in series), default=0)
    marks = [(i, "base" if not i else str(i)) for i in range(longest)]
    return svg.line_chart(
        series,
        "average accuracy over the stages",
        "after stage",
        "accuracy over all tasks, %",
        marks,
    )


def arms_reward_chart(arms: Sequence[Arm]) -> Markup | None:
    """Moving average of the reward over the run, stages one after the other, of each arm that draws answers."""
    series = []
    for k, arm in enumerate(arms):
        found = logged_numbers(arm.runs[0])
        if values := next(
            (found[key] for key in ("reward", "reward/overall") if key in found), None
        ):
            places, heights = thin_curve(values, CURVE_POINTS)
            smooth = [Point(x, y) for x, y in zip(places, smooth_curve(heights), strict=True)]
            series.append(Series(arm.label, smooth, k, dots=False, named=True))
    return svg.line_chart(series, "reward during training", "logged step", "reward, moving average")
