"""Fills the two pages: one run, or several arms side by side."""

import json
import time
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import jinja2

from cptjax import console, matrix, metrics, summary
from cptjax.report import charts, expect, published, words
from cptjax.report.read import Arm, Run, dig, picture, rollouts, spoken

FIRST, LAST = ("avg_acc", "learned_gain", "fm_diagonal", "general_delta"), ("intransigence", "learned_acc", "fm_peak")
FORCED = ("fm_forced", "general_delta_forced")  # columns of the comparison, groups of general tasks before and among these
TILES = (
    ("avg_acc", "average accuracy", "%"), ("learned_acc", "right after learning", "%"), ("fm_diagonal", "kept since (FM)", "points"),
    ("general_delta", "general abilities", "points"),
)  # fmt: skip
GALLERY = 4  # groups of answers shown per stage
ANSWERS = 4  # answers shown of a group


@cache
def environment() -> jinja2.Environment:
    made = jinja2.Environment(loader=jinja2.PackageLoader("cptjax.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    made.filters |= {"percent": words.percent, "points": words.points, "amount": words.amount, "duration": console.duration}
    made.globals |= {name: getattr(words, name) for name in ("shown", "interval", "spread", "LEVELS", "DISTANCES")}
    made.globals |= {"title_of": words.title, "published": published, "pretty": pretty, "written": time.strftime("%Y-%m-%d %H:%M")}
    return made


def pretty(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False)


def run_page(run: Run) -> str:
    titled, other = charts.panels(run)
    pictures = {"curves": charts.curves(run), "plasticity": charts.plasticity(run), "general": charts.general(run)}
    pictures["drift"] = charts.drift([(run.label, 0, run)])
    return environment().get_template("run.html.jinja").render(
        title=run.label, run=run, headline=words.run_headline(run), tiles=tiles(run), heat=heat(run), pictures=pictures, panels=titled,
        other=other, gallery=gallery(run, GALLERY), versions=versions(run), works=works(run.summary["cost"]),
    )  # fmt: skip


def compare_page(arms: Sequence[Arm], title: str, verdicts: Sequence[expect.Verdict]) -> str:
    pictures = {
        "plasticity": charts.arms_plasticity(arms), "format": charts.arms_format(arms), "general": charts.arms_general(arms),
        "average": charts.arms_average(arms), "reward": charts.arms_reward(arms),
        "drift": charts.drift([(a.label, k, a.runs[0]) for k, a in enumerate(arms)]),
    }  # fmt: skip
    tasks = list(dict.fromkeys(t for a in arms for r in a.runs for t in r.table.tasks))
    general = list(dict.fromkeys(t for a in arms for r in a.runs for t in r.table.general if t not in tasks))
    groups = list(dict.fromkeys(g for a in arms for r in a.runs for g in r.table.groups))
    formulas = {name: formula for a in arms for r in a.runs for name, formula in matrix.formulas(r.table).items()}
    wanted = (*FIRST, *groups, *FORCED, *(f"{g}_forced" for g in groups), *LAST)
    columns = [name for name in wanted if any(a.spread(name) for a in arms)]
    said = words.compare_headline(arms)
    return environment().get_template("compare.html.jinja").render(
        title=title, arms=arms, headline=[*said[:1], *expect.sentences(verdicts), *said[1:]], pictures=pictures, tasks=tasks,
        general=general, columns=columns, formulas=formulas, base=base_row(arms, tasks, general), verdicts=verdicts,
        groups=[(g, charts.arms_general(arms, g)) for g in groups], spent=spent(arms),
        best={name: best(arms, name, formulas[name].better) for name in columns},
        heats=[(k, a, heat(a.runs[0])) for k, a in enumerate(arms)],
        galleries=[(a, gallery(a.runs[0], 1)) for a in arms], differences=differences(arms),
    )  # fmt: skip


def tiles(run: Run) -> list[dict[str, str]]:
    """The four numbers at the top."""
    numbers = [(name, label, unit, run.number(name)) for name, label, unit in TILES]
    return [{"label": label, "value": words.shown(name, n["value"]), "unit": unit, "interval": words.interval(n), "formula": n["formula"]}
            for name, label, unit, n in numbers if words.known(n["value"])]  # fmt: skip


def heat(run: Run) -> list[dict[str, Any]]:
    """The matrix, row by row, for a table whose cells are tinted by their value."""
    t, rows = run.table, []
    for i, tasks in enumerate([("base",), *t.stages]):
        short = " + ".join(tasks) if len(tasks) < 3 else f"{len(tasks)} tasks"
        cells = [_tinted(t.cells.get((i, j)), i > 0 and j in tasks) for j in (*t.tasks, *t.general)]
        rows.append({"name": f"{i} · {short}" if i else short, "tip": " + ".join(tasks), "cells": cells})
    return rows


def _tinted(cell: matrix.Cell | None, trained: bool) -> dict[str, Any]:
    if cell is None:
        return {"text": "", "tint": 0, "trained": trained, "tip": "not measured"}
    tip = f"{words.percent(cell.value)}% {words.interval({'stderr': cell.stderr})} (95 %), n = {cell.n}"
    tint = 0.04 + 0.9 * min(max(cell.value, 0.0), 1.0) ** 2  # squared: differences near the top are what a reader looks for
    return {"text": words.percent(cell.value), "tint": round(tint, 3), "trained": trained, "tip": tip}


def gallery(run: Run, count: int) -> list[dict[str, Any]]:
    """Picks prompts with their answers from early to late in each stage; those with an image first."""
    made = []
    for stage in range(1, len(run.table.stages) + 1):
        groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        for row in rollouts(run, stage):
            groups.setdefault((row.get("step"), row.get("task"), row.get("id")), []).append(row)
        candidates = [g for g in groups.values() if any(r.get("image") for r in g)] or list(groups.values())
        step = max(1, (len(candidates) - 1) // max(1, count - 1)) if count > 1 else 1
        chosen = candidates[::step][: count - 1] + candidates[-1:] if count > 1 else candidates[-1:]
        made += [_card(run, stage, group) for group in {id(g): g for g in chosen}.values()]
    return made


def _card(run: Run, stage: int, group: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    first = group[0]
    source = next((r["image"] for r in group if r.get("image")), None)
    ranked = sorted(group, key=lambda r: -(r.get("reward") or 0))
    spaced = ranked if len(ranked) <= ANSWERS else [*ranked[: ANSWERS // 2], *ranked[-ANSWERS // 2 :]]
    facts = {"stage": stage, "prompt": spoken(first.get("prompt")), **{key: first.get(key) for key in ("step", "task", "answer")}}
    return {**facts, "image": picture(run, source), "answers": spaced, "drawn": len(group)}


def versions(run: Run) -> str:
    path = run.path / "versions.json"
    return path.read_text(encoding="utf-8") if path.exists() else ""


def works(cost: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [part for part in cost["parts"] if any(part[k] for k in metrics.COSTS)]


def spent(arms: Sequence[Arm]) -> list[dict[str, Any]]:
    """Cost of each arm by kind of work, mean per run; what lies on the disk beside the first."""
    rows = []
    for k, arm in enumerate(arms):
        works = {w for run in arm.runs for w in run.summary["cost"]["works"]}
        for i, work in enumerate(sorted(works, key=lambda w: (w != "train", w))):
            mean = {name: arm.over("cost", "works", work, name)["mean"] for name in metrics.COSTS}
            stored = arm.over("cost", "bytes")["mean"]
            rows.append({"color": k, "label": "" if i else arm.label, "work": work, "stored": None if i else stored, **mean})
    return rows


def base_row(arms: Sequence[Arm], tasks: Sequence[str], general: Sequence[str]) -> dict[str, Any]:
    """The base model's numbers: a spread over seeds; from least to greatest where the arms of a seed start from different bases."""
    keys = {("tasks", t): ("tasks", t, "base") for t in tasks} | {("general", t): ("general", t, "base") for t in general}
    found = {cell: start(arms, *path) for cell, path in {**keys, "avg_acc": ("metrics", "base_acc", "value")}.items()}
    return {"cells": {cell: text for cell, (text, _) in found.items()}, "differ": any(apart for _, apart in found.values())}


def start(arms: Sequence[Arm], *path: str) -> tuple[str, bool]:
    """A base number of all runs as text, and whether runs of one seed disagree on it."""
    found: dict[str, list[float]] = {}
    for run in (run for arm in arms for run in arm.runs):
        if words.known(value := dig(run.summary, path)):
            found.setdefault(run.variant, []).append(value)
    apart = any(max(values) - min(values) > 1e-9 for values in found.values())
    if not apart:
        return words.spread(summary.spread(values[0] for values in found.values())), False
    every = [value for values in found.values() for value in values]
    return f"{words.percent(min(every))} to {words.percent(max(every))}", True


def best(arms: Sequence[Arm], name: str, better: str) -> str | None:
    """Names the best arm of a column; joint training is the upper bound and does not compete."""
    found = {a.label: a.spread(name)["mean"] for a in arms if a.spread(name) and not a.joint}
    sign = -1 if better == "lower" else 1
    return max(found, key=lambda label: sign * found[label]) if len(found) > 1 else None


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(config, Mapping) and config:
        return {k: v for name, part in config.items() for k, v in flat(part, f"{prefix}.{name}" if prefix else name).items()}
    return {prefix: config}


def differences(arms: Sequence[Arm]) -> list[tuple[str, list[str]]]:
    """Lists the settings in which the arms differ."""
    configs = [flat(a.runs[0].config) for a in arms]
    keys = list(dict.fromkeys(k for c in configs for k in c if k not in ("stages", "seed")))
    rows = [(k, [json.dumps(c[k], ensure_ascii=False) if k in c else "–" for c in configs]) for k in keys]
    return [(k, values) for k, values in rows if len(set(values)) > 1]
