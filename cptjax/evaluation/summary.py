"""What a workdir's evaluations amount to: matrix.csv and summary.json, for finished, running and crashed runs."""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cptjax.common import files, run_log
from cptjax.evaluation.matrix import (
    NO_CELL,
    AccuracyTable,
    Cell,
    Cells,
    forgetting_metrics,
    measure_format_share,
    per_stage_metrics,
)


def count_transitions(
    before: Mapping[tuple[str, str], float], after: Mapping[tuple[str, str], float]
) -> dict[str, dict[str, int]]:
    """Counts per task the examples that went from right to wrong and back; right is a score of at least a half."""
    counts: dict[str, dict[str, int]] = {}
    for key in before.keys() & after.keys():
        name = {(1, 0): "lost", (0, 1): "gained", (1, 1): "kept", (0, 0): "never"}[
            before[key] >= 0.5, after[key] >= 0.5
        ]
        row = counts.setdefault(key[0], dict.fromkeys(("lost", "gained", "kept", "never", "n"), 0))
        row[name] += 1
        row["n"] += 1
    return dict(sorted(counts.items()))


def mean_and_sd(values: Iterable[float | None]) -> dict[str, Any] | None:
    """Returns mean and sample standard deviation over seeds; None where no seed has the number."""
    known = [v for v in values if v is not None and math.isfinite(v)]
    if not known:
        return None
    return {
        "mean": float(np.mean(known)),
        "sd": float(np.std(known, ddof=1)) if len(known) > 1 else None,
        "n": len(known),
    }


def tasks_by_stage(config: Mapping[str, Any]) -> tuple[tuple[str, ...], ...]:
    """Reads which tasks each stage trains from a run's config."""
    tasks = [stage["task"] for stage in config["stages"]]
    return tuple((t,) if isinstance(t, str) else tuple(t) for t in tasks)


def evaluation_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Reads which tasks a run evaluates and which groups of general ones it names, as fields of a Table."""
    asked = config.get("eval", {})
    named = asked.get("tasks", "all")
    tasks = None if named == "all" else (*named.split(","), *asked["general"])
    return {
        "examined": tasks,
        "groups": {name: tuple(tasks) for name, tasks in asked.get("groups", {}).items()},
    }


def build_accuracy_table(
    rows: Iterable[Mapping[str, Any]], stages: Sequence[Sequence[str]], **more: Any
) -> AccuracyTable:
    """Sorts rows of evals.csv into a Table, with `more` fields; of several templates a task's first counts, of repeats the last."""
    rows = [row for row in rows if not math.isnan(row["value"])]
    template = {
        row["task"]: row.get("template")
        for row in reversed(rows)
        if row["metric"] == run_log.ACCURACY
    }
    found: dict[str, Cells] = {
        run_log.ACCURACY: {},
        run_log.ACCURACY_FORCED: {},
        run_log.KL_BASE: {},
    }
    inside: dict[tuple[int, int, str], float] = {}
    for row in rows:
        stage, task, metric = row["stage"], row["task"], row["metric"]
        if metric != run_log.KL_BASE and row.get("template") != template.get(
            task, row.get("template")
        ):
            continue
        if metric in found:
            found[metric][stage, task] = Cell(row["value"], _stderr(row), row["n"])
        elif metric == run_log.ACCURACY_MINI:
            inside[stage, row["step"], task] = row["value"]
    cells = (found[m] for m in (run_log.ACCURACY, run_log.ACCURACY_FORCED, run_log.KL_BASE))
    return AccuracyTable(
        tuple(map(tuple, stages)), *cells, tuple((*k, v) for k, v in inside.items()), **more
    )


def _stderr(row: Mapping[str, Any]) -> float:
    p, n = row["value"], row["n"]
    return (
        row["stderr"]
        if math.isfinite(row["stderr"])
        else math.sqrt(max(p * (1 - p), 0) / n)
        if n
        else math.nan
    )


def load_config(workdir: Path | str) -> dict[str, Any]:
    """Load config.json of a run; refuse a folder without one."""
    path = Path(workdir) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        tasks_by_stage(config)
    except FileNotFoundError:
        raise ValueError(f"{workdir} is no run: it has no config.json") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: expected a run's config with stages, each with a task: {error!r}"
        ) from None
    return config


def load_accuracy_table(workdir: Path | str, config: Mapping[str, Any]) -> AccuracyTable:
    """Load evals.csv of a finished, running or crashed run."""
    return build_accuracy_table(
        run_log.read_evals(Path(workdir) / "evals.csv"),
        tasks_by_stage(config),
        **evaluation_fields(config),
    )


def read_prediction_scores(workdir: Path | str, stage: int) -> dict[tuple[str, str], float]:
    """Read predictions/stage{K}.jsonl: the score of each test example, by (task, id)."""
    rows = files.read_jsonl(Path(workdir) / "predictions" / f"stage{stage}.jsonl")
    return {(row["task"], str(row["id"])): row["score"] for row in rows if row["score"] is not None}


@dataclasses.dataclass(frozen=True)
class RunTables:
    """The result files of a run, each parsed once; summary, console line and report all take this record."""

    workdir: Path
    config: dict[str, Any]
    accuracy: AccuracyTable
    metrics_lines: list[dict[str, Any]]  # of metrics.jsonl
    prediction_scores: dict[
        int, dict[tuple[str, str], float]
    ]  # by stage: those whose examples `count_run_transitions` compares


def load_run_tables(workdir: Path | str) -> RunTables:
    """Load the result files of a finished, running or crashed run."""
    config = load_config(workdir)
    table = load_accuracy_table(workdir, config)
    compared = {0, table.final, *(table.last(task) for task in table.old())}
    return RunTables(
        Path(workdir),
        config,
        table,
        files.read_jsonl(Path(workdir) / "metrics.jsonl"),
        {stage: read_prediction_scores(workdir, stage) for stage in sorted(compared)},
    )


def count_run_transitions(tables: RunTables) -> dict[str, Any]:
    """Count right/wrong changes up to S: of old tasks since their last stage, of all tasks since the base model."""
    table, scores = tables.accuracy, tables.prediction_scores
    final, last_stage = scores[table.final], {task: table.last(task) for task in table.old()}
    since_learned: dict[str, dict[str, int]] = {}
    for stage in sorted(set(last_stage.values())):
        learned = {key: v for key, v in scores[stage].items() if last_stage.get(key[0]) == stage}
        since_learned |= count_transitions(learned, final)
    return {"since_learned": since_learned, "since_base": count_transitions(scores[0], final)}


def describe_coverage(t: AccuracyTable) -> str:
    """Says in words which part of the schedule the numbers are about."""
    based = any((0, task) in t.cells for task in t.tasks)
    missing = ["the base model"] * (not based) + [
        f"{task} at stage {i}" for i, task in t.missing(based) if i <= t.final
    ]
    whole = f"all {len(t.stages)} stages" if len(t.stages) > 1 else "its one stage"
    text = whole if t.finished else f"{t.final} of {len(t.stages)} stages so far"
    return text + (f"; not measured: {', '.join(missing)}" if missing else "")


def _summarise_task(t: AccuracyTable, task: str) -> dict[str, Any]:
    value = lambda cells, row: cells.get((row, task), NO_CELL).value
    S, learned = t.final, t.last(task)
    free = {
        "base": value(t.cells, 0),
        "final": value(t.cells, S),
        "stderr": t.cells.get((S, task), NO_CELL).stderr,
    }
    forced = {"base_forced": value(t.forced, 0), "forced": value(t.forced, S)}
    return {
        "learned_at": learned,
        "learned": value(t.cells, learned) if learned else None,
        **free,
        **forced,
    }


def _summarise_group(t: AccuracyTable, tasks: tuple[str, ...]) -> dict[str, Any]:
    mean = lambda row: float(np.mean([t.cells.get((row, j), NO_CELL).value for j in tasks]))
    return {"tasks": list(tasks), "base": mean(0), "final": mean(t.final)}


def summarise_table(t: AccuracyTable, joint: AccuracyTable | None = None) -> dict[str, Any]:
    """Returns everything that follows from the evaluations alone."""
    state = {
        "finished": t.finished,
        "covers": describe_coverage(t),
        "stage": t.final,
        "stages": [list(a) for a in t.stages],
        "unit": "fraction of 1",
    }
    parts = {
        "metrics": forgetting_metrics(t, joint),
        "format_share": measure_format_share(t),
        "per_stage": per_stage_metrics(t),
    }
    columns = {
        "tasks": {j: _summarise_task(t, j) for j in t.tasks},
        "general": {j: _summarise_task(t, j) for j in t.general},
    }
    return {
        **state,
        **parts,
        **columns,
        "groups": {name: _summarise_group(t, tasks) for name, tasks in t.groups.items()},
    }


def summarise_run(tables: RunTables) -> dict[str, Any]:
    """Compute the summary of a run, with transitions and cost."""
    return files.to_jsonable(
        {
            "name": tables.config.get("name", ""),
            **summarise_table(tables.accuracy),
            "transitions": count_run_transitions(tables),
            "cost": run_log.summarise_cost(tables.metrics_lines, tables.workdir),
        }
    )


def write_summary(tables: RunTables) -> dict[str, Any]:
    """Write matrix.csv and summary.json next to evals.csv; return the summary."""
    table = tables.accuracy
    names = ["base", *("+".join(tasks) for tasks in table.stages)]
    rows = [
        [i, name, *row]
        for i, (name, row) in enumerate(zip(names, table.array().tolist(), strict=True))
    ]
    files.write_text(
        tables.workdir / "matrix.csv",
        files.csv_text([["stage", "stage_name", *table.tasks], *rows]),
    )
    summary = summarise_run(tables)
    files.write_json(tables.workdir / "summary.json", summary)
    return summary
