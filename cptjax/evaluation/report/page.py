"""Render the two report pages from their templates: one run, or several arms compared."""

import json
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from cptjax.common import console, files, run_log
from cptjax.evaluation import matrix, summary
from cptjax.evaluation.report import charts, differences, expect, words
from cptjax.evaluation.report.differences import Difference
from cptjax.evaluation.report.headline import comparison_headline
from cptjax.evaluation.report.read import (
    Arm,
    ReportRun,
    nested_value,
    prompt_text,
    read_rollouts,
    report_setting,
    rollout_thumbnail,
)

# The columns of the comparison are, in this order: FIRST_COLUMNS, the groups of general tasks,
# FORCED_COLUMNS and the groups with a forced prefix, GOLD_COLUMNS and the groups with probabilities
# of gold answers, and LAST_COLUMNS.
FIRST_COLUMNS = ("avg_acc", "learned_gain", "fm_diagonal", "general_delta")
FORCED_COLUMNS = ("fm_forced", "general_delta_forced")
GOLD_COLUMNS = ("fm_gold", "general_delta_gold")
LAST_COLUMNS = ("intransigence", "learned_acc", "fm_peak")
TRANSFER_COLUMNS = ("fwt", "plasticity", "mft", "mfn", "maa", "bwt")
HEADLINE_TILES = (
    ("avg_acc", "average accuracy", "%"),
    ("learned_acc", "right after learning", "%"),
    ("fm_diagonal", "kept since (FM)", "points"),
    ("general_delta", "general abilities", "points"),
)
GALLERY_GROUPS = 4  # prompts shown per stage
GALLERY_RESPONSES = 4  # responses shown per prompt
ROUNDING = 1e-9  # a larger difference between base numbers means different base models


@cache
def jinja_environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("cptjax.evaluation.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": words.format_percent,
        "points": words.format_points,
        "score": words.format_score,
        "amount": words.format_amount,
        "duration": console.format_duration,
    }
    environment.globals |= {
        "shown": words.format_metric,
        "interval": words.format_interval,
        "spread": words.format_spread,
        "difference": words.format_difference,
        "title_of": words.metric_title,
        "LEVELS": words.LEVEL_METRICS,
        "DISTANCES": words.KL_METRICS,
        "pretty": pretty_json,
        "written": lambda: time.strftime("%Y-%m-%d %H:%M"),
    }
    return environment


def pretty_json(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False)


def read_versions(path: Path) -> dict[str, Any]:
    """Return the software of the newest start of a run, and the number of starts."""
    if not path.is_file():
        return {}
    versions = files.read_json(path, dict)
    starts = versions.get("starts", [versions])
    if not isinstance(starts, list) or not all(isinstance(start, dict) for start in starts):
        raise ValueError(f"{path}: expected a list of starts; delete the file, or restore it")
    return {"starts": len(starts), **starts[-1]}


def render_run_page(run: ReportRun, is_live: bool = False) -> str:
    """Render the page on one run; `is_live` makes it load itself again every minute."""
    panels, other_panels = charts.training_panels(run)
    versions = read_versions(run.path / "versions.json")
    return (
        jinja_environment()
        .get_template("run.html.jinja")
        .render(
            title=run.label,
            is_live=is_live,
            run=run,
            headline=words.run_headline(run),
            tiles=headline_tiles(run),
            heat=heatmap_rows(run),
            figures={
                "curves": charts.accuracy_chart(run),
                "plasticity": charts.plasticity_chart(run),
                "general": charts.general_chart(run),
                "base_kl": charts.base_kl_chart([(run.label, 0, run)]),
            },
            panels=panels,
            other_panels=other_panels,
            gallery=rollout_gallery(run, GALLERY_GROUPS),
            versions=pretty_json(versions) if versions else "",
            cost_rows=[
                part
                for part in run.summary["cost"]["parts"]
                if any(part[key] for key in run_log.COST_KEYS)
            ],
        )
    )


def render_comparison_page(
    arms: Sequence[Arm],
    title: str,
    verdicts: Sequence[expect.Verdict],
    baseline: Arm | None,
    compared: Mapping[str, Mapping[str, Difference]],
    missing: Sequence[str],
) -> str:
    """Render the page on several arms.

    `compared` has the differences of the other arms from the baseline, `missing` the runs of the
    config that have not started.
    """
    runs = [run for arm in arms for run in arm.runs]
    tasks = list(dict.fromkeys(t for run in runs for t in run.table.tasks))
    general = list(dict.fromkeys(t for run in runs for t in run.table.general if t not in tasks))
    groups = list(dict.fromkeys(name for run in runs for name in run.table.groups))
    formulas = {
        name: formula
        for run in runs
        for name, formula in matrix.formulas_of_table(run.table).items()
    }
    forced = [*FORCED_COLUMNS, *(f"{name}_forced" for name in groups)]
    gold = [*GOLD_COLUMNS, *(f"{name}_gold" for name in groups)]
    columns = [
        name
        for name in (*FIRST_COLUMNS, *groups, *forced, *gold, *LAST_COLUMNS)
        if any(arm.spread(name) for arm in arms)
    ]
    first, *others = comparison_headline(arms) or [None]
    headline = [s for s in (first, *expect.verdict_sentences(verdicts), *others) if s]
    return (
        jinja_environment()
        .get_template("compare.html.jinja")
        .render(
            title=title,
            arms=arms,
            headline=headline,
            figures={
                "plasticity": charts.arms_plasticity_chart(arms),
                "format": charts.arms_format_chart(arms),
                "general": charts.arms_general_chart(arms),
                "average": charts.arms_average_chart(arms),
                "reward": charts.arms_reward_chart(arms),
                "base_kl": charts.base_kl_chart(
                    [(arm.label, k, arm.runs[0]) for k, arm in enumerate(arms)]
                ),
            },
            group_figures=[(name, charts.arms_general_chart(arms, name)) for name in groups],
            tasks=tasks,
            general=general,
            columns=columns,
            transfer_columns=[n for n in TRANSFER_COLUMNS if any(arm.spread(n) for arm in arms)],
            baseline=baseline.label if baseline else report_setting(arms, "baseline"),
            compared=compared,
            few_pairs=differences.too_few_pairs(
                difference for found in compared.values() for difference in found.values()
            ),
            missing=missing,
            formulas=formulas,
            base=base_model_row(arms, tasks, general),
            best={name: best_arm(arms, name, formulas[name].better) for name in columns},
            verdicts=verdicts,
            heatmaps=[(k, arm, heatmap_rows(arm.runs[0])) for k, arm in enumerate(arms)],
            galleries=[(arm, rollout_gallery(arm.runs[0], 1)) for arm in arms],
            method_costs=method_cost_rows(arms, baseline),
            cost_rows=arm_cost_rows(arms),
            differences=setting_differences(arms),
            uneven=[(arm.label, names) for arm in arms if (names := uneven_settings(arm))],
        )
    )


def headline_tiles(run: ReportRun) -> list[dict[str, str]]:
    """Return the four numbers at the top of the page."""
    metrics = [(name, label, unit, run.metric(name)) for name, label, unit in HEADLINE_TILES]
    return [
        {
            "label": label,
            "value": words.format_metric(name, metric["value"]),
            "unit": unit,
            "interval": words.format_interval(metric),
            "formula": metric["formula"],
        }
        for name, label, unit, metric in metrics
        if words.is_known(metric["value"])
    ]


def heatmap_rows(run: ReportRun) -> list[dict[str, Any]]:
    """Return the accuracy matrix by row, for a table whose cells are tinted by their value."""
    table, rows = run.table, []
    for i, tasks in enumerate([("base",), *table.stages]):
        short = " + ".join(tasks) if len(tasks) < 3 else f"{len(tasks)} tasks"
        cells = [
            _heatmap_cell(table.cells.get((i, task)), i > 0 and task in tasks)
            for task in (*table.tasks, *table.general)
        ]
        name = f"{i} · {short}" if i else short
        rows.append({"name": name, "tip": " + ".join(tasks), "cells": cells})
    return rows


def _heatmap_cell(cell: matrix.Cell | None, trained: bool) -> dict[str, Any]:
    if cell is None:
        return {"text": "", "tint": 0, "trained": trained, "tip": "not measured"}
    percent = words.format_percent(cell.value)
    interval = words.format_interval({"stderr": cell.stderr})
    # Squared, so that differences at high accuracy are easier to see.
    tint = 0.04 + 0.9 * min(max(cell.value, 0.0), 1.0) ** 2
    tip = f"{percent}% {interval} (95 %), n = {cell.n}"
    return {"text": percent, "tint": round(tint, 3), "trained": trained, "tip": tip}


def rollout_gallery(run: ReportRun, count: int) -> list[dict[str, Any]]:
    """Choose `count` prompts with their responses, from early to late in each stage.

    Prompts with an image are preferred.
    """
    cards = []
    for stage in range(1, len(run.table.stages) + 1):
        groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        for row in read_rollouts(run, stage):
            groups.setdefault((row.get("step"), row.get("task"), row.get("id")), []).append(row)
        with_image = [g for g in groups.values() if any(r.get("image") for r in g)]
        candidates = with_image or list(groups.values())
        chosen = candidates[-1:]
        if count > 1:
            step = max(1, (len(candidates) - 1) // (count - 1))
            chosen = candidates[::step][: count - 1] + chosen
        distinct = {id(group): group for group in chosen}
        cards += [_gallery_card(run, stage, group) for group in distinct.values()]
    return cards


def _gallery_card(run: ReportRun, stage: int, group: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    first = group[0]
    images = next((row.get("images") or [row["image"]] for row in group if row.get("image")), [])
    ranked = sorted(group, key=lambda row: -(row.get("reward") or 0))
    half = GALLERY_RESPONSES // 2
    return {
        "stage": stage,
        "step": first.get("step"),
        "task": first.get("task"),
        "prompt": prompt_text(first.get("prompt")),
        "answer": first.get("answer"),
        "images": [uri for uri in (rollout_thumbnail(run, image) for image in images) if uri],
        "responses": ranked
        if len(ranked) <= GALLERY_RESPONSES
        else [*ranked[:half], *ranked[-half:]],
        "sampled": len(group),
    }


def arm_cost_rows(arms: Sequence[Arm]) -> list[dict[str, Any]]:
    """Return the mean cost per run of each arm, by kind of work.

    The first row of an arm also has its size on disk.
    """
    rows = []
    for k, arm in enumerate(arms):
        works = {work for run in arm.counted_runs for work in run.summary["cost"]["works"]}
        for i, work in enumerate(sorted(works, key=lambda w: (w != "train", w))):
            row = {
                key: arm.spread_of("cost", "works", work, key)["mean"] for key in run_log.COST_KEYS
            }
            row |= {"color": k, "label": "" if i else arm.label, "work": work}
            row["stored"] = None if i else arm.spread_of("cost", "bytes")["mean"]
            rows.append(row)
    return rows


def method_cost_rows(arms: Sequence[Arm], baseline: Arm | None) -> list[dict[str, Any]]:
    """Return what the training of each arm costs: bytes, FLOPs, seconds, and its difference.

    The means are per run, without evaluations. A number that no run of the arm has is None.
    """
    totals = [{key: _training_cost(arm, key) for key in ("flops", "seconds")} for arm in arms]
    of_baseline = totals[list(arms).index(baseline)] if baseline else {}
    rows = []
    for k, (arm, total) in enumerate(zip(arms, totals, strict=True)):
        row = {"color": k, "label": arm.label, **total}
        for key in ("kept_bytes", "array_bytes", "device_bytes"):
            spread = arm.spread_of("cost", key)
            row[key] = spread and spread["mean"]
        for key, value in total.items():
            other = of_baseline.get(key)
            row[f"extra_{key}"] = None if other is None or value is None else value - other
        rows.append(row)
    return rows


def _training_cost(arm: Arm, key: str) -> float | None:
    """Return the mean cost of the runs of an arm, without that of evaluations."""
    costs = [
        sum(part[key] for part in run.summary["cost"]["parts"] if part["work"] != "evaluate")
        for run in arm.counted_runs
    ]
    return sum(costs) / len(costs) if costs else None


def base_model_row(
    arms: Sequence[Arm], tasks: Sequence[str], general: Sequence[str]
) -> dict[str, Any]:
    """Return the base model's numbers by column, and whether arms of one seed differ in them."""
    paths: dict[Any, tuple[str, ...]] = {"avg_acc": ("metrics", "base_acc", "value")}
    paths |= {("tasks", task): ("tasks", task, "base") for task in tasks}
    paths |= {("general", task): ("general", task, "base") for task in general}
    numbers = {column: base_model_number(arms, *path) for column, path in paths.items()}
    return {
        "cells": {column: text for column, (text, _) in numbers.items()},
        "differ": any(differ for _, differ in numbers.values()),
    }


def base_model_number(arms: Sequence[Arm], *path: str) -> tuple[str, bool]:
    """Return a number of the base model as text, and whether runs of one seed differ in it."""
    by_variant: dict[str, list[float]] = {}
    for arm in arms:
        for run in arm.runs:
            value = nested_value(run.summary, path)
            if words.is_known(value):
                by_variant.setdefault(run.variant, []).append(value)
    if any(max(values) - min(values) > ROUNDING for values in by_variant.values()):
        values = [value for values in by_variant.values() for value in values]
        return f"{words.format_percent(min(values))} to {words.format_percent(max(values))}", True
    spread = summary.mean_and_sd(values[0] for values in by_variant.values())
    return words.format_spread(spread), False


def best_arm(arms: Sequence[Arm], name: str, better: str) -> str | None:
    """Return the best arm of a column, except joint training, which is the upper bound."""
    spreads = {arm.label: arm.spread(name) for arm in arms if not arm.is_joint}
    means = {label: spread["mean"] for label, spread in spreads.items() if spread}
    sign = -1 if better == "lower" else 1
    return max(means, key=lambda label: sign * means[label]) if len(means) > 1 else None


def flatten_settings(config: Any, prefix: str = "") -> dict[str, Any]:
    """Return the settings of a nested config by dotted name."""
    if not isinstance(config, Mapping) or not config:
        return {prefix: config}
    settings: dict[str, Any] = {}
    for name, part in config.items():
        settings |= flatten_settings(part, f"{prefix}.{name}" if prefix else name)
    return settings


def uneven_settings(arm: Arm) -> list[str]:
    """Return the settings, other than the seed and the order, in which an arm's runs differ."""
    configs = []
    for run in arm.runs:
        settings = flatten_settings(run.config)
        stages = settings.get("stages") or ()
        configs.append(settings | {"stages": sorted(json.dumps(s, sort_keys=True) for s in stages)})
    names = dict.fromkeys(name for config in configs for name in config)
    varying = ("seed", "seeds", "orders", "model.path")  # the path of a pre-stage has the seed
    return [
        name
        for name in names
        if name not in varying and any(c.get(name) != configs[0].get(name) for c in configs)
    ]


def setting_differences(arms: Sequence[Arm]) -> list[tuple[str, list[str]]]:
    """Return the settings in which the arms differ, with the value in each arm."""
    configs = [flatten_settings(arm.runs[0].config) for arm in arms]
    names = dict.fromkeys(n for config in configs for n in config if n not in ("stages", "seed"))
    rows = [
        (n, [json.dumps(c[n], ensure_ascii=False) if n in c else "–" for c in configs])
        for n in names
    ]
    return [(name, values) for name, values in rows if len(set(values)) > 1]
