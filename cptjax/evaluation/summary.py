"""Load the result files of a run and write its matrix.csv and summary.json."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cptjax.common import files, phases, run_log
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
    """Count per task the examples that changed from right to wrong, and from wrong to right.

    Right means a score of at least one half.
    """
    names = {(1, 0): "lost", (0, 1): "gained", (1, 1): "kept", (0, 0): "never"}
    counts: dict[str, dict[str, int]] = {}
    for key in before.keys() & after.keys():
        name = names[before[key] >= 0.5, after[key] >= 0.5]
        row = counts.setdefault(key[0], dict.fromkeys(("lost", "gained", "kept", "never", "n"), 0))
        row[name] += 1
        row["n"] += 1
    return dict(sorted(counts.items()))


def mean_and_sd(values: Iterable[float | None]) -> dict[str, Any] | None:
    """Return mean and sample standard deviation over seeds, or None if no seed has the number."""
    known = [v for v in values if v is not None and math.isfinite(v)]
    if not known:
        return None
    return {
        "mean": float(np.mean(known)),
        "sd": float(np.std(known, ddof=1)) if len(known) > 1 else None,
        "n": len(known),
    }


def tasks_by_stage(config: Mapping[str, Any]) -> tuple[tuple[str, ...], ...]:
    """Return the tasks that each stage of a run trains."""
    tasks = [stage["task"] for stage in config["stages"]]
    return tuple((t,) if isinstance(t, str) else tuple(t) for t in tasks)


def evaluation_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of AccuracyTable for evaluated tasks and groups of general tasks."""
    settings = config.get("eval", {})
    names = settings.get("tasks", "all")
    return {
        "evaluated": None if names == "all" else (*names.split(","), *settings["general"]),
        "groups": {name: tuple(tasks) for name, tasks in settings.get("groups", {}).items()},
    }


def build_accuracy_table(
    rows: Iterable[Mapping[str, Any]],
    stages: Sequence[Sequence[str]],
    evaluated: tuple[str, ...] | None = None,
    groups: Mapping[str, tuple[str, ...]] | None = None,
) -> AccuracyTable:
    """Build the accuracy table from rows of evals.csv.

    If a task has rows with several templates, those with the first template count; of repeated
    rows, the last one counts.
    """
    rows = [row for row in rows if not math.isnan(row["value"])]
    template = {
        row["task"]: row.get("template")
        for row in reversed(rows)
        if row["metric"] == run_log.ACCURACY
    }
    cells: dict[str, Cells] = {
        run_log.ACCURACY: {},
        run_log.ACCURACY_FORCED: {},
        run_log.GOLD_PROBABILITY: {},
        run_log.KL_BASE: {},
        run_log.KL_BASE_SEQUENCE: {},
    }
    within_stage: dict[tuple[int, int, str], float] = {}
    for row in rows:
        stage, task, metric = row["stage"], row["task"], row["metric"]
        is_first_template = row.get("template") == template.get(task, row.get("template"))
        is_kl = metric in (run_log.KL_BASE, run_log.KL_BASE_SEQUENCE)
        if not is_kl and not is_first_template:
            continue
        if metric in cells:
            cells[metric][stage, task] = Cell(row["value"], _stderr(row), row["n"])
        elif metric == run_log.ACCURACY_MINI:
            within_stage[stage, row["step"], task] = row["value"]
    return AccuracyTable(
        tuple(map(tuple, stages)),
        cells[run_log.ACCURACY],
        forced=cells[run_log.ACCURACY_FORCED],
        gold=cells[run_log.GOLD_PROBABILITY],
        base_kl=cells[run_log.KL_BASE],
        base_kl_sequence=cells[run_log.KL_BASE_SEQUENCE],
        within_stage=tuple((*key, value) for key, value in within_stage.items()),
        evaluated=evaluated,
        groups=groups or {},
    )


def _stderr(row: Mapping[str, Any]) -> float:
    """Return the standard error of a row, or that of a share of n if the row has none."""
    if math.isfinite(row["stderr"]):
        return row["stderr"]
    p, n = row["value"], row["n"]
    return math.sqrt(max(p * (1 - p), 0) / n) if n else math.nan


def load_config(workdir: Path | str) -> dict[str, Any]:
    """Load config.json of a run; refuse a folder without one."""
    path = Path(workdir) / "config.json"
    try:
        config = files.read_json(path, dict)
        tasks_by_stage(config)
    except FileNotFoundError:
        raise ValueError(f"{workdir} is not a run: it has no config.json") from None
    except (KeyError, TypeError) as error:
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
    """Read predictions/stage{K}.jsonl: the mean score of each test example, by (task, id)."""
    scores: dict[tuple[str, str], list[float]] = {}
    for row in files.read_jsonl(Path(workdir) / "predictions" / f"stage{stage}.jsonl"):
        if row["score"] is not None:
            scores.setdefault((row["task"], str(row["id"])), []).append(row["score"])
    return {key: sum(values) / len(values) for key, values in scores.items()}


@dataclasses.dataclass(frozen=True)
class RunTables:
    """The parsed result files of a run, from which summary, console line and report are made."""

    workdir: Path
    config: dict[str, Any]
    accuracy: AccuracyTable
    metrics_lines: list[dict[str, Any]]  # of metrics.jsonl
    # by stage, for the stages that `count_run_transitions` compares
    prediction_scores: dict[int, dict[tuple[str, str], float]]
    scores: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # of `collect_scores`


def load_run_tables(workdir: Path | str) -> RunTables:
    """Load the result files of a finished, running or crashed run."""
    with files.explain_errors(f"the result files in {workdir}"):
        return _load_run_tables(workdir)


def _load_run_tables(workdir: Path | str) -> RunTables:
    config = load_config(workdir)
    rows = run_log.read_evals(Path(workdir) / "evals.csv")
    table = build_accuracy_table(rows, tasks_by_stage(config), **evaluation_fields(config))
    compared = {0, table.final, *(table.last(task) for task in table.old())}
    return RunTables(
        Path(workdir),
        config,
        table,
        files.read_jsonl(Path(workdir) / "metrics.jsonl"),
        {stage: read_prediction_scores(workdir, stage) for stage in sorted(compared)},
        collect_scores(rows, table.final),
    )


def collect_scores(rows: Iterable[Mapping[str, Any]], final: int) -> list[dict[str, Any]]:
    """Return every metric of every scorer on every task, for the base model and after stage S.

    A metric that was not measured there is None. The order is that of evals.csv.
    """
    left_out = (run_log.ACCURACY_MINI, run_log.KL_BASE, run_log.KL_BASE_SEQUENCE)
    scores: dict[tuple, dict[str, Any]] = {}
    for row in rows:
        if row["metric"] in left_out or row["stage"] not in (0, final):
            continue
        key = tuple(row.get(name) for name in ("task", "template", "scorer", "metric"))
        score = scores.setdefault(
            key,
            {
                **dict(zip(("task", "template", "scorer", "metric"), key, strict=True)),
                "base": None,
                "final": None,
            },
        )
        score["n"] = row["n"]
        if row["stage"] == 0:
            score["base"] = row["value"]
        if final and row["stage"] == final:
            score["final"] = row["value"]
    return list(scores.values())


def count_run_transitions(tables: RunTables) -> dict[str, Any]:
    """Count the examples whose score changed between right and wrong up to stage S.

    Old tasks are compared with their last stage, and all tasks with the base model.
    """
    table, scores = tables.accuracy, tables.prediction_scores
    final, last_stage = scores[table.final], {task: table.last(task) for task in table.old()}
    since_learned: dict[str, dict[str, int]] = {}
    for stage in sorted(set(last_stage.values())):
        learned = {key: v for key, v in scores[stage].items() if last_stage.get(key[0]) == stage}
        since_learned |= count_transitions(learned, final)
    return {"since_learned": since_learned, "since_base": count_transitions(scores[0], final)}


def describe_coverage(t: AccuracyTable) -> str:
    """Describe which part of the schedule the numbers cover."""
    has_base = any((0, task) in t.cells for task in t.tasks)
    missing = [] if has_base else ["the base model"]
    missing += [f"{task} at stage {i}" for i, task in t.missing(has_base) if i <= t.final]
    text = f"{t.final} of {len(t.stages)} stages so far"
    if t.finished:
        text = f"all {len(t.stages)} stages" if len(t.stages) > 1 else "its one stage"
    return text + (f"; not measured: {', '.join(missing)}" if missing else "")


def _summarise_task(t: AccuracyTable, task: str) -> dict[str, Any]:
    def value(cells: Cells, row: int | None) -> float:
        return cells.get((row, task), NO_CELL).value

    learned, final = t.last(task), t.final or None  # the base model is no result of the run
    return {
        "learned_at": learned,
        "learned": value(t.cells, learned) if learned else None,
        "base": value(t.cells, 0),
        "final": value(t.cells, final),
        "stderr": t.cells.get((final, task), NO_CELL).stderr,
        "base_forced": value(t.forced, 0),
        "forced": value(t.forced, final),
        "base_gold": value(t.gold, 0),
        "gold": value(t.gold, final),
    }


def _summarise_group(t: AccuracyTable, tasks: tuple[str, ...]) -> dict[str, Any]:
    base, final = (
        float(np.mean([t.cells.get((row, task), NO_CELL).value for task in tasks]))
        for row in (0, t.final or None)
    )
    return {"tasks": list(tasks), "base": base, "final": final}


def summarise_table(
    t: AccuracyTable, joint: AccuracyTable | None = None, fresh: Cells | None = None
) -> dict[str, Any]:
    """Compute the part of the summary that needs only the evaluations.

    `joint` is the table of a joint run; `fresh` has cells of models that trained one stage only.
    """
    return {
        "finished": t.finished,
        "covers": describe_coverage(t),
        "stage": t.final,
        "stages": [list(tasks) for tasks in t.stages],
        "unit": "fraction of 1",
        "metrics": forgetting_metrics(t, joint, fresh),
        "format_share": measure_format_share(t),
        "per_stage": per_stage_metrics(t),
        "tasks": {task: _summarise_task(t, task) for task in t.tasks},
        "general": {task: _summarise_task(t, task) for task in t.general},
        "groups": {name: _summarise_group(t, tasks) for name, tasks in t.groups.items()},
    }


def summarise_run(tables: RunTables) -> dict[str, Any]:
    """Compute the summary of a run, with transitions and cost."""
    return files.to_jsonable(
        {
            "name": tables.config.get("name", ""),
            **summarise_table(tables.accuracy),
            "transitions": count_run_transitions(tables),
            "goodput": phases.summarise_sessions(tables.workdir),
            "cost": run_log.summarise_cost(tables.metrics_lines, tables.workdir),
            "lost_files": [
                line["file"] for line in tables.metrics_lines if line.get("event") == "lost"
            ],
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
