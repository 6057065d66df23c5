"""Check the results in a workdir before any is cut, and copy them before a run starts over."""

import csv
import shutil
import time
from pathlib import Path

from cptjax.common import console, distributed, files, run_log
from cptjax.common.run_log import Positions
from cptjax.continual import progress
from cptjax.continual.checkpoint import (
    Checkpoints,
    StateLost,
    checkpoint_order,
    has_checkpoints,
)

OTHER_RECORDS = ("progress.json", "inputs.json", "matrix.csv", "summary.json", "report.html")


def refuse_lost_checkpoint(workdir: Path, checkpoints: Checkpoints) -> None:
    """Raise StateLost if the newest checkpoint is older than one that has existed.

    progress.json names the newest that was saved. Without it, the results show which stages ended.
    """
    newest, saved = checkpoints.newest_name(), progress.read_progress(workdir).get("saved")
    holds = f"{checkpoints.folder} holds none"
    if newest:
        holds = f"the newest in {checkpoints.folder} is {describe_checkpoint(*newest)}"
    if saved:
        wanted = (saved["stage"], saved["step"], saved["kind"])
        if newest is None or checkpoint_order(newest) < checkpoint_order(wanted):
            raise StateLost(
                f"progress.json records the checkpoint {describe_checkpoint(*wanted)}, but {holds}"
            )
    ended = distributed.decide_on_main(lambda: count_ended_stages(workdir))
    newest_end = (newest[0] if newest[2] == "stages" else newest[0] - 1) if newest else 0
    if ended > newest_end:
        raise StateLost(
            f"evals.csv and metrics.jsonl hold results after the end of stage {ended}, but {holds}"
        )


def describe_checkpoint(stage: int, step: int, kind: str) -> str:
    return f"{kind} of stage {stage}, step {step}"


def count_ended_stages(workdir: Path) -> int:
    """Return the newest stage whose end must have been saved, by the results after it.

    The end is on disk before the next stage trains, and before a second task is recorded.
    """
    lines = files.read_jsonl(workdir / "metrics.jsonl")
    trained = max((line.get("stage", 0) for line in lines if "event" not in line), default=0)
    by_stage: dict[int, set[str]] = {}
    for row in _accuracy_rows(workdir / "evals.csv", 0):
        by_stage.setdefault(int(row["stage"]), set()).add(row["task"])
    evaluated = max((stage for stage, tasks in by_stage.items() if len(tasks) > 1), default=0)
    return max(trained - 1, evaluated, 0)


def _accuracy_rows(path: Path, start: int) -> list[dict[str, str]]:
    """Return the rows of the evaluations after stages in evals.csv from a position on."""
    text = path.read_bytes()[start:] if path.is_file() else b""
    lines = text[: text.rfind(b"\n") + 1].decode(errors="replace").splitlines()
    rows = csv.DictReader(lines, fieldnames=run_log.EVAL_COLUMNS)
    return [r for r in rows if r["metric"] == run_log.ACCURACY and (r["stage"] or "").isdigit()]


def refuse_lost_evaluation(workdir: Path, stage: int, positions: Positions) -> None:
    """Raise StateLost if progress.json is lost and the run would cut finished evaluations."""
    start = positions["evals.csv"]["bytes"] if "evals.csv" in positions else 0
    tasks = distributed.decide_on_main(
        lambda: sorted({row["task"] for row in _accuracy_rows(workdir / "evals.csv", start)})
    )
    if len(tasks) > 1:
        raise StateLost(
            f"progress.json is missing or damaged, although evals.csv holds the evaluation of "
            f"{', '.join(tasks)} after {f'stage {stage}' if stage else 'no stage'}"
        )


def refuse_changed_records(workdir: Path, positions: Positions, stage: int = 0) -> None:
    """Raise StateLost if a file that the run reads again is missing or was changed."""

    def problem() -> str:
        try:
            run_log.check_records(workdir, positions, stage)
        except run_log.RecordsDamaged as error:
            return str(error)
        return ""

    if change := distributed.decide_on_main(problem):
        raise StateLost(change)


def warn_of_changed_records(workdir: Path, positions: Positions) -> bool:
    """Print the changes of a finished run's files; return whether its results are intact."""

    def intact() -> bool:
        try:
            for change in run_log.check_records(workdir, positions).values():
                console.print_warning(change)
        except run_log.RecordsDamaged:
            return False
        return True

    return distributed.decide_on_main(intact)


def step_was_taken(workdir: Path) -> bool:
    """Return whether a run has trained; before that, another config may replace its config."""
    lines = files.read_jsonl(workdir / "metrics.jsonl")
    return has_checkpoints(workdir) or any("event" not in line for line in lines)


def copy_records(workdir: Path, move: bool = False) -> Path:
    """Copy the results of a run to a new folder in old/, or move them; return the folder."""

    def copy() -> Path:
        folder = workdir / "old" / time.strftime("%Y-%m-%d_%H%M%S")
        for pattern in (*run_log.APPEND_ONLY_FILES, *run_log.SAMPLE_FILES, *OTHER_RECORDS):
            for path in workdir.glob(pattern):
                target = folder / path.relative_to(workdir)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, target)
                if move:
                    path.unlink()
        return folder

    return distributed.decide_on_main(copy)
