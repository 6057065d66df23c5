"""Record the metrics of a run in append-only files, and read evals.csv.

The append-only files of a workdir are metrics.jsonl, evals.csv, rollouts/stage{K}.jsonl and
predictions/stage{K}.jsonl. A checkpoint stores `RunLog.positions()`; `RunLog.rewind(positions)`
removes what a killed run wrote after its last checkpoint, if what was written before is intact.
"""

import csv
import io
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cptjax.common import console, files
from cptjax.common.buckets import stored_bytes
from cptjax.common.files import LineFile, to_jsonable
from cptjax.common.runs import FRESH_FOLDER
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
# The probability of the gold answer after the forced prefix: knowledge without format or decoding.
GOLD_PROBABILITY = "gold_probability"
KL_BASE = "kl_base"  # KL(base || current model) per token, on this task's prompts
KL_BASE_SEQUENCE = "kl_base_sequence"  # the same, summed over the tokens of a response

APPEND_ONLY_FILES = (
    "metrics.jsonl",
    "evals.csv",
    "rollouts/stage*.jsonl",
    "predictions/stage*.jsonl",
)
# Written once and read again by a stage that continues.
SAMPLE_FILES = ("corpus/stage*.jsonl", "filters/stage*.jsonl")
NEEDED_FILES = ("metrics.jsonl", "evals.csv")

Positions = Mapping[str, Mapping[str, Any]]  # file -> {"bytes", "sha256"}, see LineFile.position

ARRAY_BYTES, DEVICE_BYTES = "perf/array_bytes", "perf/device_bytes"
# The cost since the previous line of metrics.jsonl: seconds, generated tokens, trained tokens
# (without padding), responses, floating-point operations.
COST_KEYS = ("seconds", "tokens", "trained", "rollouts", "flops")


class RecordsDamaged(ValueError):
    """A file of results that is missing or was changed since it was recorded."""


def check_records(workdir: Path, positions: Positions, stage: int = 0) -> dict[str, str]:
    """Compare the files of a workdir with recorded positions; write nothing but line ends.

    Return how the files differ that the run can do without, and raise RecordsDamaged for another;
    `stage` is the stage that continues.
    """
    lost = {}
    for name, position in sorted(positions.items()):
        path = workdir / name
        change = files.describe_change(path, position)
        if not change:
            continue
        if files.restore_line_ends(path, position):
            console.print_warning(f"{path}: line ends restored, which a spreadsheet had changed")
        elif name in NEEDED_FILES or f"/stage{stage}_" in name:
            raise RecordsDamaged(change)
        else:
            lost[name] = change
    return lost


class RunLog:
    """The append-only files of one workdir, and the trackers that get the same numbers."""

    def __init__(self, workdir: Path | str, trackers: Sequence[Tracker] = ()):
        self.workdir, self.trackers = Path(workdir), tuple(trackers)
        self.files: dict[str, LineFile] = {}
        self._samples: dict[str, tuple[Any, Mapping[str, Any]]] = {}

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

    def positions(self) -> Positions:
        """Return the length and hash of every append-only file, to be stored in a checkpoint.

        Sampled responses and filter decisions, which are written once, are included.
        """
        append_only = {name: self.lines(name).position() for name in self._names()}
        return append_only | {
            name: self._sample_position(name) for name in self._names(SAMPLE_FILES)
        }

    def _sample_position(self, name: str) -> Mapping[str, Any]:
        """Return the position of a file that is written once; it is read again only if replaced."""
        stat = (self.workdir / name).stat()
        version, position = self._samples.get(name, (None, {}))
        if version != (stat.st_mtime_ns, stat.st_size):
            position = files.file_position(self.workdir / name)
            self._samples[name] = (stat.st_mtime_ns, stat.st_size), position
        return position

    def rewind(self, positions: Positions, stage: int = 0) -> None:
        """Cut every append-only file back to its length in a checkpoint; {} removes all of them.

        Before any file is cut, all are compared with their hashes. A lost or changed file is
        refused if the run reads it again: the metrics, the evaluations, and the samples of
        `stage`, the one that continues. Any other is only warned of and recorded.
        """
        lost = check_records(self.workdir, positions, stage)
        for name in self._names():
            size = positions[name]["bytes"] if name in positions else 0
            self.lines(name).truncate(size)
            if not size:
                self.files.pop(name).close()
                (self.workdir / name).unlink()
        for name, change in lost.items():
            console.print_warning(f"{change}; the run continues without it")
            self.step(stage, 0, {"event": "lost", "file": name})

    def _names(self, patterns: Sequence[str] = APPEND_ONLY_FILES) -> list[str]:
        paths = [p for pattern in patterns for p in self.workdir.glob(pattern)]
        return sorted(str(path.relative_to(self.workdir)) for path in paths)

    def close(self) -> None:
        """Close the files and the trackers."""
        for opened in (*self.files.values(), *self.trackers):
            opened.close()
        self.files, self.trackers = {}, ()


def read_evals(path: Path | str) -> list[dict[str, Any]]:
    """Read the complete lines of evals.csv, with numbers converted; an empty value is NaN."""
    path = Path(path)
    try:
        text = files.read_bytes(path).decode() if path.exists() else ""
        reader = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]))
        rows, columns = list(reader), reader.fieldnames or ()
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not a CSV file in UTF-8 ({error}); restore it") from None
    if columns and (missing := set(EVAL_COLUMNS[:9]) - set(columns)):
        raise ValueError(
            f"{path}: columns {', '.join(sorted(missing))} are missing; "
            f"expected {','.join(EVAL_COLUMNS)}"
        )
    for number, row in enumerate(rows, 1):
        try:
            row |= {key: int(row[key]) for key in ("stage", "step")}
            row |= {key: float(row[key]) if row[key] else math.nan for key in ("value", "stderr")}
            row["n"] = int(float(row["n"] or 0))
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{path}: row {number}: {error}; restore the file") from None
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
    """Sum the cost in lines of metrics.jsonl by stage and kind of work; add sizes.

    bytes, checkpoint_bytes: on the disk
    kept_bytes: the most that the continual-learning methods kept after a stage, over all devices
    array_bytes, device_bytes: the largest `perf/array_bytes` and `perf/device_bytes` of a step
    """
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
        "bytes": stored_bytes(workdir) - stored_bytes(Path(workdir) / FRESH_FOLDER),
        "checkpoint_bytes": stored_bytes(Path(workdir) / "checkpoints"),
        "kept_bytes": most_kept_bytes(lines),
        **{
            name: max((line[key] for line in lines if key in line), default=None)
            for name, key in (("array_bytes", ARRAY_BYTES), ("device_bytes", DEVICE_BYTES))
        },
        "works": works,
        "parts": parts,
    }


def most_kept_bytes(lines: Sequence[Mapping[str, Any]]) -> int:
    """Return the most bytes that continual-learning methods kept after a stage."""
    kept: dict[str, int] = {}  # by method; what it keeps stays until it is replaced
    most = 0
    for line in lines:
        if line.get("event") == "stage_end":
            kept[line["method"]] = line["kept_bytes"]
            most = max(most, sum(kept.values()))
    return most


def _total_cost(parts: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    return {key: sum(part[key] for part in parts) for key in COST_KEYS}
