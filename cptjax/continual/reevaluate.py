"""One evaluation by hand: the model of a stage of a run, or any Hugging Face folder, on some of the config's tasks."""

import contextlib
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from cptjax.common import distributed, files, run_log
from cptjax.config import check_config_values, expand_runs, merge_config
from cptjax.continual import open_run, resume, stage_evaluation
from cptjax.continual.open_run import Run
from cptjax.continual.workdir import local_folder, lock_workdir, refuse_changed_config
from cptjax.evaluation import evaluate, summary

PRINTED_COLUMNS = ("task", "metric", "value", "stderr", "n", "scorer", "template")


def reevaluate_stage(
    config: ConfigDict,
    workdir: str | Path,
    stage: int | None = None,
    model: str = "",
    tasks: tuple[str, ...] = (),
    record: bool = False,
) -> list[dict[str, Any]]:
    """The rows of evals.csv for a stage (None = the newest finished one), or for `model`; `record` appends those of a stage to it."""
    if model and (stage is not None or record):
        raise ValueError("--model is not a stage of the workdir: leave out --stage and --record")
    workdir = local_folder(workdir)
    single = select_run(config, workdir)
    check_config_values(single)
    if model:
        single = merge_config(single, {"model": {"path": model}})
    else:
        refuse_changed_config(single, workdir)
    alone = (
        lock_workdir(split_run_folder(config, workdir)[0]) if record else contextlib.nullcontext()
    )
    with alone, open_run.open_run_readonly(single, workdir) as run:
        number = 0 if model else newest_finished_stage(run) if stage is None else stage
        names = stage_evaluation.select_tasks(run, tasks, "--tasks")
        run.params = run.at_stage(number)
        step = run.checkpoints.stage_end(number) if number else 0
        rows = [row for task in names for row in reevaluate_task(run, number, task, step)]
        if record:
            append_evals(run, number, rows)
    return rows


def select_run(config: ConfigDict, workdir: Path) -> ConfigDict:
    """The one run of the config that the workdir belongs to, on the base model that its pre-stage made."""
    root, sub = split_run_folder(config, workdir)
    return dict(expand_runs(config, root))[sub]


def split_run_folder(config: ConfigDict, workdir: Path) -> tuple[Path, str]:
    """The workdir of all runs of the config, and the sub-folder of the one that is asked for."""
    found = expand_runs(config)
    subs = [
        sub
        for sub, _ in found
        if workdir.absolute().parts[-len(Path(sub).parts) :] == Path(sub).parts or not sub
    ]
    if len(subs) != 1:
        names = ", ".join(sub for sub, _ in found)
        raise ValueError(
            f"the config describes {len(found)} runs; expected --workdir to end with one of {names}"
        )
    return workdir.absolute().parents[len(Path(subs[0]).parts) - 1] if subs[
        0
    ] else workdir.absolute(), subs[0]


def newest_finished_stage(run: Run) -> int:
    """The newest finished stage; 0 before the first."""
    return (
        max((n for n, _, kind in run.checkpoints.found() if kind == "stages"), default=0)
        if run.checkpoints
        else 0
    )


def reevaluate_task(run: Run, number: int, task: str, step: int) -> list[dict[str, Any]]:
    e, about = run.config.eval, stage_evaluation.shared_eval_columns(run, number, step)
    taken = [
        stage_evaluation.evaluate_current_model(
            run, number, task, t, e.forced_prefix, stage_evaluation.describe_stage(number)
        )
        for t in stage_evaluation.templates_of_task(run, task)
    ]
    return [row for result in taken for row in evaluate.eval_rows(result, about)]


def append_evals(run: Run, number: int, rows: list[dict[str, Any]]) -> None:
    """Put the rows behind a finished run's; an unfinished one would cut them off when it goes on."""
    marks = resume.read_eval_progress(run)
    if marks.get("stage") != len(run.stages) or set(marks["done"]) != {
        t for part in stage_evaluation.tasks_to_evaluate(run) for t in part
    }:
        raise ValueError(
            f"{run.workdir} is not finished, and going on with it would cut the rows off; leave out --record"
        )
    if distributed.is_main_process():
        log = run_log.RunLog(run.workdir)
        log.evals(rows)
        files.write_json(resume.eval_progress_file(run), marks | {"positions": log.positions()})
        log.close()
        summary.write_summary(summary.load_run_tables(run.workdir))


def format_eval_rows(rows: list[dict[str, Any]]) -> str:
    """The rows as text in columns."""
    said = [
        [
            f"{row[k]:.4f}"
            if isinstance(row[k], float)
            else str(row[k] if row[k] is not None else "")
            for k in PRINTED_COLUMNS
        ]
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(PRINTED_COLUMNS, *said, strict=True)]
    return "\n".join(
        "  ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)).rstrip()
        for line in (PRINTED_COLUMNS, *said)
    )
