"""progress.json: the newest checkpoint on disk, and which tasks of an evaluation are recorded.

    saved        {stage, step, kind} of the newest checkpoint that is completely on disk
    evaluation   {stage, done, positions, config}: after that stage, the tasks in `done` are
                 recorded in the first bytes of the append-only files, by a config of this hash

It is written after what it describes, so it never claims too much. A file that cannot be read
counts as none; `records.refuse_lost_evaluation` notices if that would cut results.
"""

import contextlib
from pathlib import Path
from typing import Any

from cptjax.common import buckets, console, distributed, files
from cptjax.common.run_log import Positions


def progress_path(workdir: Path) -> Path:
    return workdir / "progress.json"


def read_progress(workdir: Path) -> dict[str, Any]:
    """Return the content of progress.json as the main process reads it; {} = none."""
    values = {}
    if distributed.is_main_process():
        try:
            values = _read_file(workdir)
        except ValueError as error:
            console.print_warning(f"{error}; it is not used")
    return distributed.gather_objects(values)[0]


def _read_file(workdir: Path) -> dict[str, Any]:
    path = progress_path(workdir)
    values = files.read_json(path, dict) if path.is_file() else {}
    if "stage" in values:  # an older version: only an evaluation, without hashes
        positions = {name: {"bytes": size} for name, size in values["positions"].items()}
        return {"evaluation": {**values, "positions": positions, "config": ""}}
    return files.read_checked_json(path) if values else {}


def read_evaluation(workdir: Path) -> dict[str, Any]:
    """Return which part of the newest evaluation is recorded; {} = none."""
    return read_progress(workdir).get("evaluation") or {}


def record_saved(workdir: Path, stage: int, step: int, kind: str) -> None:
    """Record the newest checkpoint."""
    _update(workdir, saved={"stage": stage, "step": step, "kind": kind})


def record_evaluation(
    workdir: Path, stage: int, done: list[str], positions: Positions, config: str
) -> None:
    """Record that these tasks are evaluated after a stage."""
    values = {"stage": stage, "done": done, "positions": positions, "config": config}
    _update(workdir, evaluation=values)


def forget_evaluation(workdir: Path, stage: int, unfinished: bool) -> None:
    """Remove an evaluation that a run which continues in or after `stage` will repeat.

    It is removed before the append-only files are cut, so it never describes missing lines.
    """
    evaluated = read_evaluation(workdir)
    if evaluated and (evaluated["stage"], 0) > (stage, -1 if unfinished else 0):
        _update(workdir, evaluation=None)
    distributed.gather_objects(True)


def clear(workdir: Path) -> None:
    """Forget everything, before a run starts over."""
    if distributed.is_main_process():
        progress_path(workdir).unlink(missing_ok=True)
        buckets.push(workdir)
    distributed.gather_objects(True)


def _update(workdir: Path, **changes: Any) -> None:
    """Change some values; the main process writes the file.

    In a bucket, too, it is written after what it describes, and before that is cut.
    """
    if distributed.is_main_process():
        buckets.push(workdir)
        values: dict[str, Any] = {}
        with contextlib.suppress(ValueError):  # a damaged file is replaced
            values = _read_file(workdir)
        files.write_checked_json(progress_path(workdir), {**values, **changes})
        buckets.push(workdir)
