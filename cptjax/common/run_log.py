"""Record the metrics of a run in append-only files, and read evals.csv.

The append-only files of a workdir are metrics.jsonl, evals.csv, rollouts/stage{K}.jsonl and
predictions/stage{K}.jsonl. A checkpoint stores `RunLog.positions()`; `RunLog.rewind(positions)`
removes what a killed run wrote after its last checkpoint.
"""

import csv
import io
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cptjax.common.files import LineFile, folder_bytes, to_jsonable
from cptjax.common.trackers import Tracker

EVAL_COLUMNS = (
    "stage",
    "stage_name",
    "step",
    "task",
    "metric",
    "value",
    "n",
    "stderr",
    "scorer",
    "template",
    "pixels",
    "decoding",
)

# Metrics of evals.csv.
ACCURACY = "accuracy"  # the task's main score in [0, 1] at a stage's end: a cell of the matrix
ACCURACY_MINI = "accuracy_mini"  # the same during a stage, on a fixed small set of rows
ACCURACY_FORCED = (
    "accuracy_forced"  # with the expected prefix forced, so the format is always right
)
KL_BASE = "kl_base"  # KL(base || current model) per token, on this task's prompts
KL_BASE_SEQUENCE = "kl_base_sequence"  # the same, summed over the tokens of a response

APPEND_ONLY_FILES = (
    "metrics.jsonl",
    "evals.csv",
    "rollouts/stage*.jsonl",
    "predictions/stage*.jsonl",
)
# The cost since the previous line of metrics.jsonl: seconds, generated tokens, trained tokens
# (without padding), responses, floating-point operations.
COST_KEYS = ("seconds", "tokens", "trained", "rollouts", "flops")


class RunLog:
    """The append-only files of one workdir, and the trackers that get the same numbers."""

    def __init__(self, workdir: Path | str, trackers: Sequence[Tracker] = ()):
        self.workdir, self.trackers = Path(workdir), tuple(trackers)
        self.files: dict[str, LineFile] = {}

    def lines(self, name: str) -> LineFile:
        """Return an append-only file by its name in the workdir, opened on first use."""
        if name not in self.files:
            columns = EVAL_COLUMNS if name == "evals.csv" else ()
            self.files[name] = LineFile(self.workdir / name, columns)
        return self.files[name]

    def step(self, stage: int, step: int, values: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl.

        `event` in values marks a line that is not a training step: evaluate, filter, ...
        """
        self.lines("metrics.jsonl").append({"stage": stage, "step": step, **values})
        self._track({f"stage{stage}/{k}": v for k, v in values.items()}, step, stage, step)

    def evals(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows to evals.csv."""
        self.lines("evals.csv").append(*rows)
        for row in rows:
            stage, step = row["stage"], row["step"]
            name = f"eval/{row['task']}/{row['metric']}/{row['template']}"
            if row["metric"] == ACCURACY_MINI:  # a curve over the steps of this stage
                self._track({f"stage{stage}/{name}": row["value"]}, step, stage, step)
            else:  # a curve over the stages
                self._track({name: row["value"]}, stage, stage, step)

    def rollouts(self, stage: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows to the rollouts file of a stage."""
        self.lines(f"rollouts/stage{stage}.jsonl").append(*rows)

    def predictions(self, stage: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows to the predictions file of a stage."""
        self.lines(f"predictions/stage{stage}.jsonl").append(*rows)

    def _track(self, values: Mapping[str, Any], x: int, stage: int, step: int) -> None:
        """Send numbers to the trackers; `x` is their position on the x axis."""
        numbers = {k: v for k, v in to_jsonable(values).items() if isinstance(v, (int, float))}
        for tracker in self.trackers:
            tracker.log(numbers, x, stage, step)

    def positions(self) -> dict[str, int]:
        """Return the length of every append-only file, to be stored in a checkpoint."""
        return {name: self.lines(name).position() for name in self._names()}

    def rewind(self, positions: Mapping[str, int]) -> None:
        """Cut every append-only file back to its length in a checkpoint; {} removes all of them."""
        for name in {*self._names(), *positions}:
            self.lines(name).truncate(positions.get(name, 0))
            if not positions.get(name, 0):
                self.files.pop(name).close()
                (self.workdir / name).unlink()

    def _names(self) -> list[str]:
        paths = [p for pattern in APPEND_ONLY_FILES for p in self.workdir.glob(pattern)]
        return sorted(str(path.relative_to(self.workdir)) for path in paths)

    def close(self) -> None:
        """Close the files and the trackers."""
        for opened in (*self.files.values(), *self.trackers):
            opened.close()
        self.files, self.trackers = {}, ()


def read_evals(path: Path | str) -> list[dict[str, Any]]:
    """Read the complete lines of evals.csv, with numbers converted; an empty value is NaN."""
    path = Path(path)
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    rows = list(csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1])))
    if rows and (missing := set(EVAL_COLUMNS[:9]) - set(rows[0])):
        raise ValueError(
            f"{path}: columns {', '.join(sorted(missing))} are missing; "
            f"expected {','.join(EVAL_COLUMNS)}"
        )
    for row in rows:
        row |= {key: int(row[key]) for key in ("stage", "step")}
        row |= {key: float(row[key]) if row[key] else math.nan for key in ("value", "stderr")}
        row["n"] = int(float(row["n"] or 0))
    return rows


def data_wait_share(lines: Iterable[Mapping[str, Any]]) -> float | None:
    """Return the share of training time that was spent waiting for rows.

    The first step of a stage, which compiles, is left out.
    """
    parts = {"seconds/data", "seconds/batch", "seconds/update"}
    steps = [line for line in lines if parts <= line.keys()]
    later = [line for before, line in itertools.pairwise(steps) if line["stage"] == before["stage"]]
    total = sum(line["seconds/batch"] + line["seconds/update"] for line in later)
    return sum(line["seconds/data"] for line in later) / total if total else None


def summarise_cost(lines: Sequence[Mapping[str, Any]], workdir: Path | str) -> dict[str, Any]:
    """Sum the cost in lines of metrics.jsonl by stage and kind of work; add the workdir's size."""
    spent: dict[tuple[int, str], dict[str, float]] = {}
    for line in lines:
        part = (line["stage"], line.get("event") or "train")
        cost = spent.setdefault(part, dict.fromkeys(COST_KEYS, 0))
        for key in COST_KEYS:
            cost[key] += line.get(key) or 0
    parts = [
        {"stage": stage, "work": work, **cost} for (stage, work), cost in sorted(spent.items())
    ]
    works = {}
    for work in dict.fromkeys(part["work"] for part in parts):
        works[work] = _total_cost([part for part in parts if part["work"] == work])
    return {
        **_total_cost(parts),
        "waiting_for_data": data_wait_share(lines),
        "bytes": folder_bytes(workdir),
        "checkpoint_bytes": folder_bytes(Path(workdir) / "checkpoints"),
        "works": works,
        "parts": parts,
    }


def _total_cost(parts: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    return {key: sum(part[key] for part in parts) for key in COST_KEYS}
