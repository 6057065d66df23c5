"""Evaluate a stage again, or any Hugging Face model (the library of launch/evaluate.py)."""

import contextlib
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from cptjax.common import buckets, console, distributed, files, run_log
from cptjax.common.config_checks import check_config
from cptjax.common.runs import prestage_runs, select_runs
from cptjax.config import merge_config
from cptjax.continual import fingerprints, progress, stage_evaluation
from cptjax.continual.model_state import newest_stage, restore_stage_params
from cptjax.continual.open_run import Run, open_run_readonly
from cptjax.continual.stage_model import check_folder_kind
from cptjax.continual.workdir import (
    changed_inputs,
    lock_workdir,
    refuse_changed_config,
    refuse_changed_inputs,
)
from cptjax.evaluation import evaluate, summary
from cptjax.types import Params

PRINTED_COLUMNS = ("task", "metric", "value", "stderr", "n", "scorer", "template")


def reevaluate_stage(
    config: ConfigDict,
    workdir: str | Path,
    stage: int | None = None,
    model: str = "",
    tasks: tuple[str, ...] = (),
    record: bool = False,
) -> list[dict[str, Any]]:
    """Evaluate a stage, or the Hugging Face folder or hub id `model`; return rows of evals.csv.

    `stage` None means the newest finished stage. `record` appends the rows to evals.csv.
    """
    if model and (stage is not None or record):
        raise ValueError("--model is not a stage of the workdir: leave out --stage and --record")
    check_config(config)
    target, workdir = buckets.write_path(workdir, distributed.process_index()), fetch_run(workdir)
    single = select_run(config, workdir)
    if model:
        single = merge_config(single, {"model": {"path": model}})
    else:
        check_folder_kind("--workdir", workdir, "run")
        refuse_changed_config(single, workdir)
        check_inputs(single, workdir, record)
    lock = lock_workdir(target) if record else contextlib.nullcontext()
    with lock, open_run_readonly(single, target if record else workdir) as run:
        checkpoints = run.files.checkpoints
        if model:
            stage = 0
        elif stage is None:
            stage = newest_stage(workdir, checkpoints)
        names = stage_evaluation.select_tasks(run, tasks, "--tasks")
        params = restore_stage_params(single, run.model_ctx, checkpoints, stage)
        step = checkpoints.stage_end(stage) if stage else 0
        rows = []
        for task in names:
            rows += reevaluate_task(run, stage, params, task, step)
        if record:
            append_evals(run, rows)
    return rows


def check_inputs(config: ConfigDict, workdir: Path, record: bool) -> None:
    """Warn of input files that changed since the run's start; with `record`, refuse them."""
    changed = changed_inputs(workdir, fingerprints.file_hashes(config))
    if record:
        refuse_changed_inputs(config, workdir, changed)
    for line in changed:
        console.print_warning(f"since the run was started, {line}")


def fetch_run(workdir: str | Path) -> Path:
    """Return the folder of a run to read; all processes read the same."""
    folder = files.local_folder(workdir) if not buckets.is_address(workdir) else workdir
    return distributed.run_on_all(lambda: buckets.fetch(folder))


def select_run(config: ConfigDict, workdir: Path) -> ConfigDict:
    """Return the config of the run in a workdir, with its pre-stage's base model.

    runs/demo/grpo/seed1 is the run grpo/seed1 of runs/demo.
    """
    workdir, bases = workdir.absolute(), prestage_runs(config)
    names = [name for name, _ in select_runs(config) if name not in bases]
    fitting = [
        name
        for name in names
        if not name or workdir.parts[-len(Path(name).parts) :] == Path(name).parts
    ]
    if not fitting:
        raise ValueError(
            f"the config describes {len(names)} runs; "
            f"expected --workdir to end with one of {', '.join(names)}"
        )
    name = max(fitting, key=len)
    root = workdir.parents[len(Path(name).parts) - 1] if name else workdir
    selected = dict(select_runs(config, workdir=root))[name]
    buckets.fetch_model(selected.model.path or "")
    return selected


def reevaluate_task(
    run: Run, stage: int, params: Params, task: str, step: int
) -> list[dict[str, Any]]:
    """Evaluate a task with each of its templates; return rows of evals.csv."""
    columns, rows = stage_evaluation.shared_eval_columns(run, stage, step), []
    when, e = stage_evaluation.describe_stage(stage), run.config.eval
    for template in stage_evaluation.templates_of_task(run, task):
        result = stage_evaluation.evaluate_with_template(
            run,
            stage,
            params,
            task,
            template,
            when,
            forced=e.forced_prefix,
            gold=e.gold_probability,
        )
        rows += evaluate.eval_rows(result, columns)
    return rows


def append_evals(run: Run, rows: list[dict[str, Any]]) -> None:
    """Append rows to evals.csv of a finished run.

    An unfinished run is refused, since it would cut the rows off when it continues.
    """
    workdir = run.files.workdir
    if stage_evaluation.finished_positions(run.config, workdir) is None:
        raise ValueError(
            f"--record: expected a finished run, got {workdir}, which would cut the rows off "
            "when it continues; leave out --record"
        )
    if distributed.is_main_process():
        log = run_log.RunLog(workdir)
        log.evals(rows)
        recorded = progress.read_evaluation(workdir) | {"positions": log.positions()}
        progress.record_evaluation(workdir, **recorded)
        log.close()
        summary.write_summary(summary.load_run_tables(workdir))


def format_eval_rows(rows: list[dict[str, Any]]) -> str:
    """Format rows of evals.csv as a text table."""
    lines: list[tuple[str, ...]] = [PRINTED_COLUMNS]
    for row in rows:
        values = [row[column] for column in PRINTED_COLUMNS]
        lines.append(
            tuple(
                f"{v:.4f}" if isinstance(v, float) else "" if v is None else str(v) for v in values
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
