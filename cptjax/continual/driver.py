"""The driver: for each stage train -> checkpoint -> evaluate every task -> record; every run that a config describes."""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from cptjax.common import console, distributed
from cptjax.common.signals import SigtermHandler, handle_sigterm
from cptjax.config import all_runs, check_config_values, expand_runs, prestage_runs, resolve_stages
from cptjax.continual import stage_evaluation, train_stage
from cptjax.continual.checkpoint import RunRefused
from cptjax.continual.open_run import Run, open_run, write_run_files
from cptjax.continual.resume import resume_run
from cptjax.continual.workdir import changes_since_start, format_changes, local_folder, lock_workdir
from cptjax.evaluation import report, summary
from cptjax.evaluation.report import expect
from cptjax.models import hf_checkpoint
from cptjax.training import validate_config


def run(config: ConfigDict, workdir: str | Path) -> np.ndarray:
    """Every run that the config describes, each from where it stands; the accuracy matrix, row 0 = base model.

    Several runs (arms, seeds, orders) are stacked, [run, stage, task], padded with NaN to the largest of them.
    """
    workdir = local_folder(workdir)
    check_all_runs(config)
    sigterm, matrices = SigtermHandler(), []
    with handle_sigterm(sigterm), explain_full_disk(workdir), lock_workdir(workdir):
        for sub, base in prestage_runs(config).items():
            make_base_model(base, workdir / sub, sigterm)
        found = expand_runs(config, workdir)
        for sub, single in found:
            matrices.append(run_one(single, workdir / sub, sigterm))
            if len(found) > 1 and distributed.is_main_process():
                report.write_comparison(workdir)
    return matrices[0] if len(found) == 1 else stack_matrices(matrices)


def check_all_runs(config: ConfigDict) -> None:
    """Everything that can be refused before anything is loaded."""
    expect.check_expectations(config)
    for _, single in all_runs(config):
        check_config_values(single)
        for each in resolve_stages(single):
            validate_config.validate_stage(each)


def stack_matrices(matrices: list[np.ndarray]) -> np.ndarray:
    shape = np.max([m.shape for m in matrices], axis=0)
    return np.stack(
        [
            np.pad(
                m, [(0, n - s) for n, s in zip(shape, m.shape, strict=True)], constant_values=np.nan
            )
            for m in matrices
        ]
    )


def make_base_model(config: ConfigDict, folder: Path, sigterm: SigtermHandler) -> None:
    """The base model of a pre-stage, in `hf/`; made once, and never another under the runs that stand on it."""
    if not (folder / "hf" / "config.json").is_file():
        run_one(config, folder, sigterm, export=folder / "hf")
        return
    changed = [
        line
        for line in changes_since_start(config, folder)
        if not line.startswith(("eval.", "name:"))
    ]
    if changed:
        raise RunRefused(
            f"{folder / 'hf'} was made with another config: {format_changes(changed)}. Runs stand on it; use another --workdir"
        )


def run_one(
    config: ConfigDict, workdir: Path, sigterm: SigtermHandler, export: Path | None = None
) -> np.ndarray:
    """One run to its end; `export` gets the last model as a Hugging Face folder."""
    with contextlib.closing(open_run(config, workdir, sigterm)) as current:
        place = resume_run(current)
        stage_evaluation.check_remaining_splits(current, place)
        write_run_files(current)
        for number in range(place.stage, len(current.stages) + 1):
            if number and not place.finished(number):
                train_stage.train_stage(
                    current, current.stages[number - 1], place if place.stage == number else None
                )
            if number or config.eval.before:
                stage_evaluation.evaluate_stage(current, number, place)
        current.checkpoints.wait()
        matrix = finish_run(current)
        if export is not None:
            hf_checkpoint.save_hf_checkpoint(
                current.params,
                current.model_ctx.cfg,
                export,
                current.model_ctx.processor,
                config.model.param_dtype,
            )
    return matrix


@contextlib.contextmanager
def explain_full_disk(workdir: Path) -> Iterator[None]:
    """The system's own words for a full disk name no place."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            f"{workdir}: no space left on the disk; free some and run the same command again, what is saved is whole"
        ) from error


def finish_run(current: Run) -> np.ndarray:
    """Summary, report and the matrix."""
    if current.log:
        tables = summary.load_run_tables(current.workdir)
        page = report.write_run_report(tables, summary.write_summary(tables))
        console.print_message(f"done: {page}")
    distributed.gather_objects(True)
    config = summary.load_config(current.workdir)
    return summary.load_accuracy_table(current.workdir, config).array()
