"""Fills the two pages: one run, or several arms side by side."""

import json
import time
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import jinja2

from cptjax.common import console, run_log
from cptjax.evaluation import matrix, summary
from cptjax.evaluation.report import charts, expect, words
from cptjax.evaluation.report.read import (
    Arm,
    ReportRun,
    nested_value,
    prompt_text,
    read_rollouts,
    rollout_thumbnail,
)

FIRST, LAST = (
    ("avg_acc", "learned_gain", "fm_diagonal", "general_delta"),
    ("intransigence", "learned_acc", "fm_peak"),
)
FORCED_COLUMNS = (
    "fm_forced",
    "general_delta_forced",
)  # columns of the comparison, groups of general tasks before and among these
HEADLINE_TILES = (
    ("avg_acc", "average accuracy", "%"),
    ("learned_acc", "right after learning", "%"),
    ("fm_diagonal", "kept since (FM)", "points"),
    ("general_delta", "general abilities", "points"),
)
GALLERY_GROUPS = 4  # groups of answers shown per stage
GALLERY_RESPONSES = 4  # answers shown of a group


@cache
def jinja_environment() -> jinja2.Environment:
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("cptjax.evaluation.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "percent": words.format_percent,
        "points": words.format_points,
        "amount": words.format_amount,
        "duration": console.format_duration,
    }
    made.globals |= {
        "shown": words.format_metric,
        "interval": words.format_interval,
        "spread": words.format_spread,
        "LEVELS": words.LEVEL_METRICS,
        "DISTANCES": words.KL_METRICS,
    }
    made.globals |= {
        "title_of": words.metric_title,
        "pretty": pretty_json,
        "written": time.strftime("%Y-%m-%d %H:%M"),
    }
    return made


def pretty_json(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False)


def render_run_page(run: ReportRun) -> str:
    titled, other = charts.training_panels(run)
    pictures = {
        "curves": charts.accuracy_chart(run),
        "plasticity": charts.plasticity_chart(run),
        "general": charts.general_chart(run),
    }
    pictures["drift"] = charts.base_kl_chart([(run.label, 0, run)])
    return (
        jinja_environment()
        .get_template("run.html.jinja")
        .render(
            title=run.label,
            run=run,
            headline=words.run_headline(run),
            tiles=headline_tiles(run),
            heat=heatmap_rows(run),
            pictures=pictures,
            panels=titled,
            other=other,
            gallery=rollout_gallery(run, GALLERY_GROUPS),
            versions=read_versions(run),
            works=run_cost_rows(run.summary["cost"]),
        )
    )


def render_comparison_page(
    arms: Sequence[Arm], title: str, verdicts: Sequence[expect.Verdict]
) -> str:
    pictures = {
        "plasticity": charts.arms_plasticity_chart(arms),
        "format": charts.arms_format_chart(arms),
        "general": charts.arms_general_chart(arms),
        "average": charts.arms_average_chart(arms),
        "reward": charts.arms_reward_chart(arms),
        "drift": charts.base_kl_chart([(a.label, k, a.runs[0]) for k, a in enumerate(arms)]),
    }
    tasks = list(dict.fromkeys(t for a in arms for r in a.runs for t in r.table.tasks))
    general = list(
        dict.fromkeys(t for a in arms for r in a.runs for t in r.table.general if t not in tasks)
    )
    groups = list(dict.fromkeys(g for a in arms for r in a.runs for g in r.table.groups))
    formulas = {
        name: formula
        for a in arms
        for r in a.runs
        for name, formula in matrix.formulas_of_table(r.table).items()
    }
    wanted = (*FIRST, *groups, *FORCED_COLUMNS, *(f"{g}_forced" for g in groups), *LAST)
    columns = [name for name in wanted if any(a.spread(name) for a in arms)]
    said = words.comparison_headline(arms)
    return (
        jinja_environment()
        .get_template("compare.html.jinja")
        .render(
            title=title,
            arms=arms,
            headline=[*said[:1], *expect.verdict_sentences(verdicts), *said[1:]],
            pictures=pictures,
            tasks=tasks,
            general=general,
            columns=columns,
            formulas=formulas,
            base=base_model_row(arms, tasks, general),
            verdicts=verdicts,
            groups=[(g, charts.arms_general_chart(arms, g)) for g in groups],
            spent=arm_cost_rows(arms),
            best={name: best_arm(arms, name, formulas[name].better) for name in columns},
            heats=[(k, a, heatmap_rows(a.runs[0])) for k, a in enumerate(arms)],
            galleries=[(a, rollout_gallery(a.runs[0], 1)) for a in arms],
            differences=setting_differences(arms),
        )
    )


def headline_tiles(run: ReportRun) -> list[dict[str, str]]:
    """The four numbers at the top."""
    numbers = [(name, label, unit, run.number(name)) for name, label, unit in HEADLINE_TILES]
    return [
        {
            "label": label,
            "value": words.format_metric(name, n["value"]),
            "unit": unit,
            "interval": words.format_interval(n),
            "formula": n["formula"],
        }
        for name, label, unit, n in numbers
        if words.is_known(n["value"])
    ]


def heatmap_rows(run: ReportRun) -> list[dict[str, Any]]:
    """The matrix, row by row, for a table whose cells are tinted by their value."""
    t, rows = run.table, []
    for i, tasks in enumerate([("base",), *t.stages]):
        short = " + ".join(tasks) if len(tasks) < 3 else f"{len(tasks)} tasks"
        cells = [
            _heatmap_cell(t.cells.get((i, j)), i > 0 and j in tasks) for j in (*t.tasks, *t.general)
        ]
        rows.append(
            {"name": f"{i} · {short}" if i else short, "tip": " + ".join(tasks), "cells": cells}
        )
    return rows


def _heatmap_cell(cell: matrix.Cell | None, trained: bool) -> dict[str, Any]:
    if cell is None:
        return {"text": "", "tint": 0, "trained": trained, "tip": "not measured"}
    tip = f"{words.format_percent(cell.value)}% {words.format_interval({'stderr': cell.stderr})} (95 %), n = {cell.n}"
    tint = (
        0.04 + 0.9 * min(max(cell.value, 0.0), 1.0) ** 2
    )  # squared: differences near the top are what a reader looks for
    return {
        "text": words.format_percent(cell.value),
        "tint": round(tint, 3),
        "trained": trained,
        "tip": tip,
    }


def rollout_gallery(run: ReportRun, count: int) -> list[dict[str, Any]]:
    """Picks prompts with their answers from early to late in each stage; those with an image first."""
    made = []
    for stage in range(1, len(run.table.stages) + 1):
        groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        for row in read_rollouts(run, stage):
            groups.setdefault((row.get("step"), row.get("task"), row.get("id")), []).append(row)
        candidates = [g for g in groups.values() if any(r.get("image") for r in g)] or list(
            groups.values()
        )
        step = max(1, (len(candidates) - 1) // max(1, count - 1)) if count > 1 else 1
        chosen = candidates[::step][: count - 1] + candidates[-1:] if count > 1 else candidates[-1:]
        made += [_gallery_card(run, stage, group) for group in {id(g): g for g in chosen}.values()]
    return made


def _gallery_card(run: ReportRun, stage: int, group: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    first = group[0]
    source = next((r["image"] for r in group if r.get("image")), None)
    ranked = sorted(group, key=lambda r: -(r.get("reward") or 0))
    spaced = (
        ranked
        if len(ranked) <= GALLERY_RESPONSES
        else [*ranked[: GALLERY_RESPONSES // 2], *ranked[-GALLERY_RESPONSES // 2 :]]
    )
    facts = {
        "stage": stage,
        "prompt": prompt_text(first.get("prompt")),
        **{key: first.get(key) for key in ("step", "task", "answer")},
    }
    return {
        **facts,
        "image": rollout_thumbnail(run, source),
        "answers": spaced,
        "drawn": len(group),
    }


def read_versions(run: ReportRun) -> str:
    path = run.path / "versions.json"
    return path.read_text(encoding="utf-8") if path.exists() else ""


def run_cost_rows(cost: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [part for part in cost["parts"] if any(part[k] for k in run_log.COST_KEYS)]


def arm_cost_rows(arms: Sequence[Arm]) -> list[dict[str, Any]]:
    """Cost of each arm by kind of work, mean per run; what lies on the disk beside the first."""
    rows = []
    for k, arm in enumerate(arms):
        works = {w for run in arm.runs for w in run.summary["cost"]["works"]}
        for i, work in enumerate(sorted(works, key=lambda w: (w != "train", w))):
            mean = {
                name: arm.over("cost", "works", work, name)["mean"] for name in run_log.COST_KEYS
            }
            stored = arm.over("cost", "bytes")["mean"]
            rows.append(
                {
                    "color": k,
                    "label": "" if i else arm.label,
                    "work": work,
                    "stored": None if i else stored,
                    **mean,
                }
            )
    return rows


def base_model_row(
    arms: Sequence[Arm], tasks: Sequence[str], general: Sequence[str]
) -> dict[str, Any]:
    """The base model's numbers: a spread over seeds; from least to greatest where the arms of a seed start from different bases."""
    keys = {("tasks", t): ("tasks", t, "base") for t in tasks} | {
        ("general", t): ("general", t, "base") for t in general
    }
    found = {
        cell: base_model_number(arms, *path)
        for cell, path in {**keys, "avg_acc": ("metrics", "base_acc", "value")}.items()
    }
    return {
        "cells": {cell: text for cell, (text, _) in found.items()},
        "differ": any(apart for _, apart in found.values()),
    }


def base_model_number(arms: Sequence[Arm], *path: str) -> tuple[str, bool]:
    """A base number of all runs as text, and whether runs of one seed disagree on it."""
    found: dict[str, list[float]] = {}
    for run in (run for arm in arms for run in arm.runs):
        if words.is_known(value := nested_value(run.summary, path)):
            found.setdefault(run.variant, []).append(value)
    apart = any(max(values) - min(values) > 1e-9 for values in found.values())
    if not apart:
        return words.format_spread(
            summary.mean_and_sd(values[0] for values in found.values())
        ), False
    every = [value for values in found.values() for value in values]
    return f"{words.format_percent(min(every))} to {words.format_percent(max(every))}", True


def best_arm(arms: Sequence[Arm], name: str, better: str) -> str | None:
    """Names the best arm of a column; joint training is the upper bound and does not compete."""
    found = {a.label: a.spread(name)["mean"] for a in arms if a.spread(name) and not a.joint}
    sign = -1 if better == "lower" else 1
    return max(found, key=lambda label: sign * found[label]) if len(found) > 1 else None


def flatten_settings(config: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(config, Mapping) and config:
        return {
            k: v
            for name, part in config.items()
            for k, v in flatten_settings(part, f"{prefix}.{name}" if prefix else name).items()
        }
    return {prefix: config}


def setting_differences(arms: Sequence[Arm]) -> list[tuple[str, list[str]]]:
    """Lists the settings in which the arms differ."""
    configs = [flatten_settings(a.runs[0].config) for a in arms]
    keys = list(dict.fromkeys(k for c in configs for k in c if k not in ("stages", "seed")))
    rows = [
        (k, [json.dumps(c[k], ensure_ascii=False) if k in c else "–" for c in configs])
        for k in keys
    ]
    return [(k, values) for k, values in rows if len(set(values)) > 1]
