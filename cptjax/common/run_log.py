"""The numbers of a run on their way to disk: sums with their counts, growing files that survive a kill.

Files of a workdir that only ever grow: metrics.jsonl, evals.csv, rollouts/stage{K}.jsonl, predictions/stage{K}.jsonl.
A checkpoint stores `Log.positions()`; `Log.rewind(positions)` cuts whatever a killed run wrote after it.
"""

import csv
import io
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cptjax.common.files import LineFile, folder_bytes, to_jsonable

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
ACCURACY = "accuracy"  # the task's main score in [0, 1] at a stage's end: a cell of the matrix
ACCURACY_MINI = "accuracy_mini"  # the same inside a stage, on the fixed small set
ACCURACY_FORCED = (
    "accuracy_forced"  # the same with the expected prefix forced: knowledge without format
)
KL_BASE = "kl_base"  # KL(base || now) per token, on this task's prompts
APPEND_ONLY_FILES = (
    "metrics.jsonl",
    "evals.csv",
    "rollouts/stage*.jsonl",
    "predictions/stage*.jsonl",
)
# keys of a metrics.jsonl line, each what was spent since the last: tokens of drawn answers; tokens learned from, padding left out
COST_KEYS = ("seconds", "tokens", "trained", "rollouts", "flops")


class RunLog:
    """The growing files of one workdir and what else its numbers go to (see `trackers`)."""

    def __init__(self, workdir: Path | str, sinks: Sequence[Any] = ()):
        self.workdir, self.sinks = Path(workdir), tuple(sinks)
        self.files: dict[str, LineFile] = {}

    def _sink(self, values: Mapping[str, Any], at: int, stage: int, step: int) -> None:
        """Gives numbers to the sinks; `at` is their place on the axis of their curves: the step in a stage, or the stage."""
        numbers = {k: v for k, v in to_jsonable(values).items() if isinstance(v, (int, float))}
        for sink in self.sinks:
            sink.log(numbers, at, stage, step)

    def lines(self, name: str) -> LineFile:
        if name not in self.files:
            self.files[name] = LineFile(
                self.workdir / name, EVAL_COLUMNS if name == "evals.csv" else ()
            )
        return self.files[name]

    def step(self, stage: int, step: int, values: Mapping[str, Any]) -> None:
        """Appends one line to metrics.jsonl; `event` in values marks a line that is no training step (evaluate, filter, ...)."""
        self.lines("metrics.jsonl").append({"stage": stage, "step": step, **values})
        self._sink({f"stage{stage}/{k}": v for k, v in values.items()}, step, stage, step)

    def evals(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self.lines("evals.csv").append(*rows)
        for row in rows:
            stage, step, inside = row["stage"], row["step"], row["metric"] == ACCURACY_MINI
            name = f"eval/{row['task']}/{row['metric']}/{row['template']}"
            self._sink(
                {f"stage{stage}/{name}" if inside else name: row["value"]},
                step if inside else stage,
                stage,
                step,
            )

    def rollouts(self, stage: int, rows: Iterable[Mapping[str, Any]]) -> None:
        self.lines(f"rollouts/stage{stage}.jsonl").append(*rows)

    def predictions(self, stage: int, rows: Iterable[Mapping[str, Any]]) -> None:
        self.lines(f"predictions/stage{stage}.jsonl").append(*rows)

    def positions(self) -> dict[str, int]:
        """Returns the length of every growing file, to be stored in a checkpoint."""
        return {name: self.lines(name).position() for name in self._names()}

    def rewind(self, positions: Mapping[str, int]) -> None:
        """Cuts every growing file back to what a checkpoint knows of it; {} starts afresh."""
        for name in {*self._names(), *positions}:
            self.lines(name).truncate(positions.get(name, 0))
            if not positions.get(name, 0):
                self.files.pop(name).close()
                (self.workdir / name).unlink()

    def _names(self) -> list[str]:
        return sorted(
            str(p.relative_to(self.workdir))
            for pattern in APPEND_ONLY_FILES
            for p in self.workdir.glob(pattern)
        )

    def close(self) -> None:
        for opened in (*self.files.values(), *self.sinks):
            opened.close()
        self.files, self.sinks = {}, ()


def read_evals(path: Path | str) -> list[dict[str, Any]]:
    """Reads evals.csv with its numbers as numbers; an empty value is NaN."""
    path = Path(path)
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    rows = list(csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1])))
    if rows and (missing := set(EVAL_COLUMNS[:9]) - set(rows[0])):
        raise ValueError(
            f"{path}: columns {', '.join(sorted(missing))} are missing; expected {','.join(EVAL_COLUMNS)}"
        )
    number = lambda text: float(text) if text else math.nan
    kinds = {
        "stage": int,
        "step": int,
        "value": number,
        "stderr": number,
        "n": lambda t: int(float(t or 0)),
    }
    return [{k: kinds.get(k, str)(v) for k, v in row.items()} for row in rows]


def data_wait_share(lines: Iterable[Mapping[str, Any]]) -> float | None:
    """The share of training steps' time in which rows were awaited and no device worked; a stage's first step, which compiles, is out."""
    parts = {"seconds/data", "seconds/batch", "seconds/update"}
    steps = [line for line in lines if parts <= line.keys()]
    later = [line for before, line in itertools.pairwise(steps) if line["stage"] == before["stage"]]
    total = sum(line["seconds/batch"] + line["seconds/update"] for line in later)
    return sum(line["seconds/data"] for line in later) / total if total else None


def summarise_cost(lines: Sequence[Mapping[str, Any]], workdir: Path | str) -> dict[str, Any]:
    """Sum the cost in lines of metrics.jsonl by stage and kind of work; add the size of the workdir on disk."""
    rows: dict[tuple[int, str], dict[str, float]] = {}
    for line in lines:
        row = rows.setdefault(
            (line["stage"], line.get("event") or "train"), dict.fromkeys(COST_KEYS, 0)
        )
        for name in COST_KEYS:
            row[name] += line.get(name) or 0
    parts = [
        {"stage": stage, "work": work, **spent} for (stage, work), spent in sorted(rows.items())
    ]
    total = lambda some: {name: sum(p[name] for p in some) for name in COST_KEYS}
    works = {
        work: total([p for p in parts if p["work"] == work])
        for work in dict.fromkeys(p["work"] for p in parts)
    }
    stored = {
        "bytes": folder_bytes(workdir),
        "checkpoint_bytes": folder_bytes(Path(workdir) / "checkpoints"),
    }
    return {
        **total(parts),
        "waiting_for_data": data_wait_share(lines),
        **stored,
        "works": works,
        "parts": parts,
    }
