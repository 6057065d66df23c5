"""What each picture of the report shows, from runs and arms to `svg`."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from cptjax import summary
from cptjax.metrics import COSTS
from cptjax.report import svg
from cptjax.report.read import Arm, Run
from cptjax.report.svg import Pair, Point, Series
from cptjax.report.words import known, percent, points

KNOWN = {  # keys of metrics.jsonl with a title, in the order of the report; all others follow in "everything logged"
    "reward": "Reward", "reward/overall": "Reward", "reward/accuracy": "Accuracy of answers drawn", "reward/format": "Answers in format",
    "loss": "Loss", "response_length/mean": "Answer length (tokens)", "completions/mean_length": "Answer length (tokens)",
    "kl": "KL to the reference", "actor/kl": "KL to the reference", "entropy": "Entropy of the policy (nats)",
    "frac_reward_zero_std": "Groups without a signal", "grad_norm": "Gradient norm", "actor/grad_norm": "Gradient norm",
}  # fmt: skip
PLUMBING = {"stage", "step", "event", "time", *COSTS}
SHOWN = 300  # points of a curve


def stage_ticks(run: Run) -> list[tuple[float, str]]:
    return [(i, "base" if i == 0 else str(i)) for i in range(len(run.table.stages) + 1)]


def stage_steps(run: Run) -> dict[int, int]:
    """Returns the length of each stage in steps, as planned or, failing that, as far as it came."""
    steps = {s: config.get("steps") or 0 for s, config in enumerate(run.config["stages"], 1)}
    for stage, step in [(row["stage"], row["step"]) for row in run.log] + [(s, step) for s, step, _, _ in run.table.inside]:
        steps[stage] = max(steps.get(stage, 0), step)
    return steps


def curves(run: Run) -> Markup | None:
    """Each task's accuracy over the stages, points within a stage in between; a ring marks a stage that trained the task."""
    t, steps, series = run.table, stage_steps(run), []
    for k, task in enumerate(t.tasks):
        rows = [(i, 100 * t.cells[i, task].value) for i in range(len(t.stages) + 1) if (i, task) in t.cells]
        ends = [Point(i, v, f"{task}, stage {i}: {v:.1f}%", ring=i > 0 and task in t.stages[i - 1]) for i, v in rows]
        inside = [Point(s - 1 + step / steps[s], 100 * v) for s, step, j, v in t.inside if j == task and 0 < step < steps[s]]
        series.append(Series(task, sorted([*ends, *inside], key=lambda p: p.x), k, dots=False))
        series.append(Series(task, ends, k, line=False))
    borders = range(1, len(t.stages) + 1)
    return svg.chart(series, "accuracy of each task over the stages", "after stage", "accuracy, %", stage_ticks(run), borders, (0, 100))


def plasticity(run: Run) -> Markup | None:
    t, series = run.table, []
    for k, task in enumerate(t.tasks):
        row = run.summary["tasks"][task]
        if task in t.old() and known(row["learned"]) and known(row["final"]):
            series.append(Series(task, [Point(100 * row["learned"], 100 * (row["final"] - row["learned"]), task)], k, named=True))
    names = ("accuracy right after learning, %", "change since, points")
    return svg.chart(series, "stability against plasticity", *names, include=(0,), span=(20, 20), most=100)


def general(run: Run) -> Markup | None:
    rows = [*run.summary["general"].items(), *((f"{name}, mean", g) for name, g in run.summary["groups"].items())]
    pairs = [Pair(j, 100 * g["base"], 100 * g["final"]) for j, g in rows if known(g["base"]) and known(g["final"])]
    return svg.dumbbells(pairs, "general abilities before and after", "accuracy, %", "before", "after", (0, 100))


def drift(runs: Sequence[tuple[str, int, Run]]) -> Markup | None:
    """One point per stage: distance from the base on the stage's own prompts, against what earlier and general tasks lost."""
    series = []
    for label, color, run in runs:
        rows = [r for r in run.summary["per_stage"] if known(r["kl_new"]) and known(r["loss"])]
        dots = [Point(r["kl_new"], 100 * r["loss"], f"{label}, stage {r['stage']} ({'+'.join(r['tasks'])})") for r in rows]
        series.append(Series(label if len(runs) > 1 else "", dots, color, line=True, named=len(runs) > 1))
    names = ("KL(base || now) per token, on the stage's prompts", "loss on others, points")
    return svg.chart(series, "KL against forgetting", *names, include=(0,), span=(0, 10))


def numeric(run: Run) -> dict[str, list[tuple[int, float]]]:
    """Returns each logged number as (position in the run, value), positions running on over the stages."""
    found: dict[str, list[tuple[int, float]]] = {}
    for place, row in enumerate(training(run)):
        for key, value in row.items():
            if key not in PLUMBING and isinstance(value, (int, float)) and not isinstance(value, bool):
                found.setdefault(key, []).append((place, value))
    return {key: values for key, values in found.items() if len({v for _, v in values}) > 1}


def training(run: Run) -> list[dict[str, Any]]:
    return [row for row in run.log if not row.get("event")]


def panels(run: Run) -> tuple[list[tuple[str, Markup]], list[tuple[str, Markup]]]:
    """Returns the training curves with a name of their own, and all the others."""
    found, rows = numeric(run), training(run)
    borders = [i for i in range(1, len(rows)) if rows[i]["stage"] != rows[i - 1]["stage"]]
    titled = [(KNOWN[k], _panel(found[k], KNOWN[k], borders)) for k in KNOWN if k in found]
    return titled, [(k, _panel(v, k, borders)) for k, v in sorted(found.items()) if k not in KNOWN]


def _panel(values: list[tuple[int, float]], title: str, borders: Sequence[int]) -> Markup:
    """Draws a logged number thin, and its moving average, which starts anew with each stage, thick."""
    series = []
    for low, high in zip([0, *borders], [*borders, math.inf], strict=True):
        if part := [v for v in values if low <= v[0] < high]:
            places, heights = thinned(part, max(10, SHOWN * len(part) // len(values)))
            series.append(Series("", [Point(x, y) for x, y in zip(places, heights, strict=True)], 0, dots=False, faint=True))
            series.append(Series("", [Point(x, y) for x, y in zip(places, smoothed(heights), strict=True)], 0, dots=False))
    return svg.chart(series, title, "logged step", "", borders=borders, size=svg.SMALL)


def thinned(values: list[tuple[int, float]], most: int) -> tuple[list[float], list[float]]:
    """Averages neighbours so that at most `most` points remain."""
    parts = np.array_split(np.array(values, float), min(len(values), most))
    return [p[:, 0].mean() for p in parts], [p[:, 1].mean() for p in parts]


def smoothed(heights: Iterable[float]) -> list[float]:
    """Exponential moving average over about a twelfth of the curve, without the pull of its start."""
    heights = list(heights)
    keep, total, weight, out = 1 - 1 / max(2.0, len(heights) / 12), 0.0, 0.0, []
    for h in heights:
        total, weight = keep * total + h, keep * weight + 1
        out.append(total / weight)
    return out


def arms_plasticity(arms: Sequence[Arm]) -> Markup | None:
    """Learned accuracy against FM, a small dot per seed and a named one for the arm's mean."""
    series = []
    for k, arm in enumerate(arms):
        xy = [(r.number("learned_acc")["value"], r.number("fm_diagonal")) for r in arm.runs]
        xy = [(100 * x, 100 * fm["value"], 196 * (fm["stderr"] or 0)) for x, fm in xy if known(x) and known(fm["value"])]
        if not xy:
            continue
        if len(xy) > 1:
            series.append(Series("", [Point(x, y) for x, y, _ in xy], k, line=False, faint=True))
        x, y = (sum(v[i] for v in xy) / len(xy) for i in (0, 1))
        error = xy[0][2] if len(xy) == 1 else None
        series.append(Series(arm.label, [Point(x, y, f"{arm.label}: learned {x:.1f} %, FM {points(y / 100)}", error)], k, named=True))
    return svg.chart(series, "stability against plasticity", "learned accuracy, %", "FM, points", include=(0,), span=(20, 20), most=100)


def arms_format(arms: Sequence[Arm]) -> Markup | None:
    """Loss on earlier and general tasks: ring with the answer's prefix forced, dot as the model answers; joint has none earlier."""
    change = lambda arm, key: -100 * found["mean"] if (found := arm.over("format_share", key)) else math.nan
    pairs = [Pair(a.label, change(a, "loss_forced"), change(a, "loss"), k) for k, a in enumerate(arms) if not a.joint]
    return svg.dumbbells(pairs, "how much is only format", "change on earlier and general tasks, points", "prefix forced", "free", (0,))


def arms_general(arms: Sequence[Arm], group: str = "") -> Markup | None:
    """Mean accuracy on general tasks, or on a group of them: ring before, dot after."""
    pairs = []
    for k, arm in enumerate(arms):
        found = [summary.spread(_level(run, key, group) for run in arm.runs) for key in ("base", "final")]
        pairs.append(Pair(arm.label, *(100 * f["mean"] if f else math.nan for f in found), k))
    about = f"mean accuracy on {group or 'general tasks'}, %"
    return svg.dumbbells(pairs, f"{group or 'general abilities'} before and after", about, "before", "after", (0, 100))


def _level(run: Run, key: str, group: str) -> float | None:
    if group:
        return run.summary["groups"].get(group, {}).get(key)
    values = [g[key] for g in run.summary["general"].values()]
    return float(np.mean(values)) if values and all(map(known, values)) else None


def arms_average(arms: Sequence[Arm]) -> Markup | None:
    """Mean accuracy over all tasks after each stage, mean over seeds."""
    series = []
    for k, arm in enumerate(arms):
        if arm.joint or any(r.table.array().shape != arm.runs[0].table.array().shape for r in arm.runs):
            continue
        rows = np.mean([r.table.array() for r in arm.runs], axis=0).mean(1)
        series.append(Series(arm.label, [Point(i, 100 * v, f"{arm.label}, stage {i}: {percent(v)}%") for i, v in enumerate(rows)], k))
    longest = max((len(s.points) for s in series), default=0)
    marks = [(i, "base" if not i else str(i)) for i in range(longest)]
    return svg.chart(series, "average accuracy over the stages", "after stage", "accuracy over all tasks, %", marks)


def arms_reward(arms: Sequence[Arm]) -> Markup | None:
    """Moving average of the reward over the run, stages one after the other, of each arm that draws answers."""
    series = []
    for k, arm in enumerate(arms):
        found = numeric(arm.runs[0])
        if values := next((found[key] for key in ("reward", "reward/overall") if key in found), None):
            places, heights = thinned(values, SHOWN)
            smooth = [Point(x, y) for x, y in zip(places, smoothed(heights), strict=True)]
            series.append(Series(arm.label, smooth, k, dots=False, named=True))
    return svg.chart(series, "reward during training", "logged step", "reward, moving average")
