"""Run a config: for each stage, train -> checkpoint -> evaluate every task -> record."""

import contextlib
import errno
import platform
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from cptjax.common import buckets, console, distributed, files, phases
from cptjax.common.config_checks import check_config
from cptjax.common.runs import expand_runs, prestage_runs, select_runs
from cptjax.common.signals import StopSignals, handle_stop_signals
from cptjax.config import recorded_config, resolve_stages
from cptjax.continual import fingerprints, stage_evaluation, train_stage
from cptjax.continual.checkpoint import RunRefused, remove_checkpoints
from cptjax.continual.open_run import open_run, write_run_files
from cptjax.continual.records import copy_records, step_was_taken, warn_of_changed_records
from cptjax.continual.resume import ResumePoint, resume_run
from cptjax.continual.workdir import (
    changed_inputs,
    changes_since_start,
    format_changes,
    lock_workdir,
    refuse_changed_config,
    refuse_changed_inputs,
)
from cptjax.evaluation import report, summary
from cptjax.evaluation.report import expect
from cptjax.models import hf_checkpoint
from cptjax.training import validate_config

# Settings that the evaluation of the base model does not depend on.
TRAINING_ONLY = ("train.", "method.", "name:")


def run(
    config: ConfigDict,
    workdir: str | Path,
    start_over: bool = False,
    only: str = "",
    profile: str = "",
) -> np.ndarray:
    """Run everything that a config describes; continue runs that were stopped.

    With `only`, run a part of the runs (see `select_runs`); other processes may run other parts in
    the same workdir at the same time. One of them makes a base model, the others wait for it.
    A run whose newest state is lost is refused; with `start_over` it continues from an earlier
    one, or from the base model, after its records are copied to old/.
    `profile` names steps to profile in each of the runs (see `StepProfiler`).
    Return the accuracy matrix [stage, task]; row 0 is the base model. The matrices of several runs
    (arms, seeds, orders) are stacked as [run, stage, task] and padded with NaN.
    """
    workdir = buckets.write_path(workdir, distributed.process_index())
    check_all_runs(config)
    bases, runs = prestage_runs(config), expand_runs(config)
    names, selected = [name for name, _ in runs], select_runs(config, only, workdir)
    has_comparison = len(runs) > 1 or any(single.fresh for _, single in runs)
    stop_signals, matrices = StopSignals(), []
    with contextlib.ExitStack() as stack:
        stack.enter_context(handle_stop_signals(stop_signals))
        stack.enter_context(explain_full_disk(workdir))
        for name in [name for name, _ in selected if name not in bases]:
            stack.enter_context(lock_workdir(workdir / name))
        workdir.mkdir(parents=True, exist_ok=True)
        stack.enter_context(console.keep_log(workdir / log_name()))
        for name, single in selected:
            folder = workdir / name
            if name in bases:
                with lock_workdir(folder, wait=True), console.keep_log(folder / log_name()):
                    make_base_model(single, folder, stop_signals, start_over)
                continue
            with console.keep_log(folder / log_name()) if name else contextlib.nullcontext():
                matrix = run_one(
                    single,
                    folder,
                    stop_signals,
                    start_over=start_over,
                    profile=profile,
                    shared=workdir if has_comparison else None,
                )
            if not single.checkpoint.keep_stages and distributed.is_main_process():
                remove_checkpoints(folder)
            if name in names:
                matrices.append(matrix)
            if has_comparison:
                with lock_workdir(workdir, wait=True, name=".comparison.lock") as runs_folder:
                    if distributed.is_main_process():
                        report.write_comparison(runs_folder, names)
    return matrices[0] if len(names) == 1 and matrices else stack_matrices(matrices)


def log_name() -> str:
    """Return the name of this process's log file."""
    return f"run.{jax.process_index()}.log" if jax.process_index() else "run.log"


def run_one(
    config: ConfigDict,
    workdir: Path,
    stop_signals: StopSignals,
    export: Path | None = None,
    start_over: bool = False,
    profile: str = "",
    shared: Path | None = None,
) -> np.ndarray:
    """Run one config to its end.

    With `export`, save the last model as a Hugging Face folder. `shared` is the folder of several
    runs, which share the evaluation of their base model.
    """
    phases.restart_clock()
    hashes = fingerprints.file_hashes(config)
    refuse_different_processes(config, hashes)
    finished = stage_evaluation.finished_positions(config, workdir)
    changed = accept_changes(config, workdir, hashes, finished is not None)
    if finished is not None and not export and warn_of_changed_records(workdir, finished):
        if changed:
            console.print_warning(
                f"{workdir}: the run was finished before these changes, which config.json now has: "
                f"{format_changes(changed)}"
            )
        if distributed.is_main_process():
            files.write_json(workdir / "config.json", recorded_config(config, workdir))
        console.print_message(f"{workdir}: finished, at {ResumePoint(len(config.stages))}")
        if profile:
            console.print_warning(f"--profile={profile}: the run is finished; nothing profiled")
        return write_final_results(workdir)
    with open_run(config, workdir, stop_signals, profile, shared) as run:
        resume_point, model_state = resume_run(run, start_over)
        stage_evaluation.check_remaining_splits(run, resume_point)
        rows = fingerprints.row_hashes(run.datasets)
        if distributed.process_count() > 1:
            distributed.require_equal(rows, "give all processes the same data")
        write_run_files(run, hashes | rows, changed)
        if run.files.report:
            run.files.report.sessions.start()
        for number in range(resume_point.stage, len(run.stages) + 1):
            resumed = number == resume_point.stage
            if not resume_point.is_trained(number):
                model_state = train_stage.train_stage(
                    run,
                    run.stages[number - 1],
                    model_state,
                    resume_point.unfinished if resumed else None,
                )
            if number or config.eval.before:
                evaluated = resume_point.evaluated if resumed else ()
                stage_evaluation.evaluate_stage(run, number, model_state.params, evaluated)
        run.files.checkpoints.wait()
        if run.files.report:
            run.files.report.sessions.record()
        matrix = write_final_results(workdir)
        if export is not None:
            hf_checkpoint.save_hf_checkpoint(
                model_state.params,
                run.model_ctx.cfg,
                export,
                run.model_ctx.processor.save,
                config.model.param_dtype,
            )
    return matrix


def accept_changes(
    config: ConfigDict, workdir: Path, hashes: dict[str, str], finished: bool
) -> list[str]:
    """Return what differs from the run's start and is accepted; refuse any other change.

    Accepted are changes with `allow_change`, and those before the first training step. In a
    finished run, changed files are only reported.
    """
    settings = changes_since_start(config, workdir)
    inputs = changed_inputs(workdir, hashes)
    taken = step_was_taken(workdir)
    settings, inputs, taken = distributed.gather_objects((settings, inputs, taken))[0]
    if finished and not settings:
        for line in inputs:
            console.print_warning(f"{workdir}: since the run was started, {line}")
        return []
    if (settings or inputs) and not config.allow_change and not taken:
        where = ""
        if inputs or not all(line.startswith(TRAINING_ONLY) for line in settings):
            where = f"; the records so far are in {copy_records(workdir, move=True)}"
        console.print_message(
            f"{workdir}: started again before its first training step, with "
            f"{format_changes([*settings, *inputs])}{where}"
        )
        return [*settings, *inputs]
    distributed.decide_on_main(lambda: refuse_changed_config(config, workdir))
    refuse_changed_inputs(config, workdir, inputs)
    return [*settings, *inputs]


def write_final_results(workdir: Path) -> np.ndarray:
    """Write the summary and the report of a run; return its accuracy matrix."""
    if distributed.is_main_process():
        tables = summary.load_run_tables(workdir)
        page = report.write_run_report(tables, summary.write_summary(tables))
        console.print_message(f"done: {page}")
    return distributed.decide_on_main(
        lambda: summary.load_accuracy_table(workdir, summary.load_config(workdir)).array()
    )


def check_all_runs(config: ConfigDict) -> None:
    """Refuse every mistake that can be found in the config alone, before anything is loaded."""
    with files.explain_errors("config"):
        check_config(config)
        expect.check_expectations(config)
        for _, single in select_runs(config):
            check_config(single)
            stages = resolve_stages(single)
            for stage in stages:
                check_config(stage.config)
                validate_config.validate_stage(stage)
            validate_config.validate_tasks(single, stages)


def refuse_different_processes(config: ConfigDict, hashes: dict[str, str]) -> None:
    """Compare settings, code, packages, input files and devices over the processes of a run."""
    if distributed.process_count() == 1:
        return
    facts = {
        "kind of device": jax.local_devices()[0].device_kind,
        "number of devices of a process": jax.local_device_count(),
        "version of Python": platform.python_version(),
    }
    distributed.require_equal(
        fingerprints.process_fingerprints(config, hashes) | facts,
        "start all processes with the same command, code, packages and files",
    )


def make_base_model(
    config: ConfigDict, folder: Path, stop_signals: StopSignals, start_over: bool = False
) -> None:
    """Train the pre-stage once and save its model in `hf/`.

    If the model exists, refuse another config, since other runs start from the model.
    """
    made = distributed.decide_on_main(lambda: (folder / "hf" / "config.json").is_file())
    if not made:
        run_one(config, folder, stop_signals, folder / "hf", start_over)
        return
    changed = [
        line
        for line in distributed.decide_on_main(lambda: changes_since_start(config, folder))
        if not line.startswith(("eval.", "name:"))
    ]
    if changed:
        raise RunRefused(
            f"{folder / 'hf'} was made with another config: {format_changes(changed)}. "
            "Other runs start from this model; use another --workdir"
        )


def stack_matrices(matrices: list[np.ndarray]) -> np.ndarray:
    """Stack accuracy matrices, padded with NaN to a common shape."""
    if not matrices:
        return np.zeros((0, 0, 0))
    rows, columns = np.max([m.shape for m in matrices], axis=0)
    out = np.full((len(matrices), rows, columns), np.nan, matrices[0].dtype)
    for i, m in enumerate(matrices):
        out[i, : m.shape[0], : m.shape[1]] = m
    return out


@contextlib.contextmanager
def explain_full_disk(workdir: Path) -> Iterator[None]:
    """Turn the error of a full disk into one that names the workdir and says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            f"{workdir}: no space left on the disk; free some and run the same command again. "
            "What was saved is intact"
        ) from error
