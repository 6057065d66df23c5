"""The numbers of a run on their way to disk: sums with their counts, growing files that survive a kill.

Files of a workdir that only ever grow: metrics.jsonl, evals.csv, rollouts/stage{K}.jsonl, predictions/stage{K}.jsonl.
A checkpoint stores `Log.positions()`; `Log.rewind(positions)` cuts whatever a killed run wrote after it.
"""

import csv
import io
import itertools
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

EVAL_COLUMNS = ("stage", "stage_name", "step", "task", "metric", "value", "n", "stderr", "scorer", "template", "pixels", "decoding")
ACCURACY = "accuracy"  # the task's main score in [0, 1] at a stage's end: a cell of the matrix
MINI = "accuracy_mini"  # the same inside a stage, on the fixed small set
FORCED = "accuracy_forced"  # the same with the expected prefix forced: knowledge without format
DRIFT = "kl_base"  # KL(base || now) per token, on this task's prompts
GROWING = ("metrics.jsonl", "evals.csv", "rollouts/stage*.jsonl", "predictions/stage*.jsonl")
# keys of a metrics.jsonl line, each what was spent since the last: tokens of drawn answers; tokens learned from, padding left out
COSTS = ("seconds", "tokens", "trained", "rollouts", "flops")


class Mean(NamedTuple):
    """A mean as its sum and count, so that micro-batches, padding and devices can not change it."""

    sum: Any
    count: Any

    def __add__(self, other: "Mean") -> "Mean":
        return self if isinstance(other, int) else Mean(self.sum + other.sum, self.count + other.count)

    __radd__ = __add__  # lets the built-in sum() start at 0

    @property
    def value(self) -> float:
        return float(self.sum) / float(self.count) if float(self.count) else math.nan


def add(parts: Iterable[Mapping[str, Mean]]) -> dict[str, Mean]:
    """Adds up the means of several micro-batches by name."""
    total: dict[str, Mean] = {}
    for part in parts:
        for name, mean in part.items():
            total[name] = mean + total.get(name, 0)
    return total


def plain(value: Any) -> Any:
    """Turns arrays, means and paths into what JSON can hold; a number that is not finite becomes null."""
    if isinstance(value, Mean):
        return plain(value.value)
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def write_text(path: Path | str, text: str) -> None:
    """Replaces a file in one step: a reader, or a kill, sees the old text or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with draft.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def write_json(path: Path | str, value: Any) -> None:
    write_text(path, json.dumps(plain(value), indent=1, ensure_ascii=False) + "\n")


def csv_text(rows: Iterable[Iterable[Any]]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(["" if v is None else v for v in plain(list(row))] for row in rows)
    return out.getvalue()


class Lines:
    """A file of whole lines that only grows; a half line that a kill left at its end is cut off."""

    def __init__(self, path: Path | str, columns: tuple[str, ...] = ()):
        self.path, self.columns = Path(path), columns
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = self.path.open("a+b")
        self._cut_half_line()

    def _cut_half_line(self) -> None:
        end = self.file.seek(0, os.SEEK_END)
        while end and not self._ends_line(end):
            end -= 1
        self.file.truncate(end)

    def _ends_line(self, end: int) -> bool:
        self.file.seek(end - 1)
        return self.file.read(1) == b"\n"

    def append(self, *rows: Mapping[str, Any]) -> None:
        text = "".join(self._text(row) for row in rows)
        if self.columns and self.file.seek(0, os.SEEK_END) == 0:
            text = csv_text([self.columns]) + text
        self.file.write(text.encode())
        self.file.flush()

    def _text(self, row: Mapping[str, Any]) -> str:
        if not self.columns:
            return json.dumps(plain(row), ensure_ascii=False) + "\n"
        if set(row) != set(self.columns):
            raise ValueError(f"{self.path.name}: a row needs exactly {', '.join(self.columns)}; got {', '.join(row)}")
        return csv_text([[row[c] for c in self.columns]])

    def position(self) -> int:
        """Returns the length in bytes, after everything up to it is on the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())
        return self.file.seek(0, os.SEEK_END)

    def truncate(self, position: int) -> None:
        if (size := self.position()) < position:
            raise ValueError(f"{self.path}: the checkpoint expects at least {position} bytes, the file has {size}; restore the file")
        self.file.truncate(position)

    def close(self) -> None:
        self.file.close()


class Log:
    """The growing files of one workdir and what else its numbers go to (see `trackers`)."""

    def __init__(self, workdir: Path | str, sinks: Sequence[Any] = ()):
        self.workdir, self.sinks = Path(workdir), tuple(sinks)
        self.files: dict[str, Lines] = {}

    def _sink(self, values: Mapping[str, Any], at: int, stage: int, step: int) -> None:
        """Gives numbers to the sinks; `at` is their place on the axis of their curves: the step in a stage, or the stage."""
        numbers = {k: v for k, v in plain(values).items() if isinstance(v, (int, float))}
        for sink in self.sinks:
            sink.log(numbers, at, stage, step)

    def lines(self, name: str) -> Lines:
        if name not in self.files:
            self.files[name] = Lines(self.workdir / name, EVAL_COLUMNS if name == "evals.csv" else ())
        return self.files[name]

    def step(self, stage: int, step: int, values: Mapping[str, Any]) -> None:
        """Appends one line to metrics.jsonl; `event` in values marks a line that is no training step (evaluate, filter, ...)."""
        self.lines("metrics.jsonl").append({"stage": stage, "step": step, **values})
        self._sink({f"stage{stage}/{k}": v for k, v in values.items()}, step, stage, step)

    def evals(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self.lines("evals.csv").append(*rows)
        for row in rows:
            stage, step, inside = row["stage"], row["step"], row["metric"] == MINI
            name = f"eval/{row['task']}/{row['metric']}/{row['template']}"
            self._sink({f"stage{stage}/{name}" if inside else name: row["value"]}, step if inside else stage, stage, step)

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
        return sorted(str(p.relative_to(self.workdir)) for pattern in GROWING for p in self.workdir.glob(pattern))

    def close(self) -> None:
        for opened in (*self.files.values(), *self.sinks):
            opened.close()
        self.files, self.sinks = {}, ()


def read_lines(path: Path | str) -> list[dict[str, Any]]:
    """Reads a jsonl file, without the half line that a running or killed writer may have at its end."""
    path = Path(path)
    return parse_lines(path.read_bytes(), path) if path.exists() else []


def parse_lines(text: bytes, path: Path) -> list[dict[str, Any]]:
    rows = []
    for line in text[: text.rfind(b"\n") + 1].splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            raise ValueError(f"{path}: expected one JSON object a line, got {line[:60]!r}; delete that line or restore the file") from None
    return rows


def read_evals(path: Path | str) -> list[dict[str, Any]]:
    """Reads evals.csv with its numbers as numbers; an empty value is NaN."""
    path = Path(path)
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    rows = list(csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1])))
    if rows and (missing := set(EVAL_COLUMNS[:9]) - set(rows[0])):
        raise ValueError(f"{path}: columns {', '.join(sorted(missing))} are missing; expected {','.join(EVAL_COLUMNS)}")
    number = lambda text: float(text) if text else math.nan
    kinds = {"stage": int, "step": int, "value": number, "stderr": number, "n": lambda t: int(float(t or 0))}
    return [{k: kinds.get(k, str)(v) for k, v in row.items()} for row in rows]


def bytes_under(folder: Path | str) -> int:
    return sum(p.stat().st_size for p in Path(folder).rglob("*") if p.is_file())


def waiting(lines: Iterable[Mapping[str, Any]]) -> float | None:
    """The share of training steps' time in which rows were awaited and no device worked; a stage's first step, which compiles, is out."""
    steps = [line for line in lines if "seconds/data" in line]
    later = [line for before, line in itertools.pairwise(steps) if line["stage"] == before["stage"]]
    total = sum(line["seconds/lesson"] + line["seconds/update"] for line in later)
    return sum(line["seconds/data"] for line in later) / total if total else None


def cost(workdir: Path | str) -> dict[str, Any]:
    """Adds up what metrics.jsonl says was spent, by stage and kind of work, and what lies on the disk."""
    rows: dict[tuple[int, str], dict[str, float]] = {}
    lines = read_lines(Path(workdir) / "metrics.jsonl")
    for line in lines:
        row = rows.setdefault((line["stage"], line.get("event") or "train"), dict.fromkeys(COSTS, 0))
        for name in COSTS:
            row[name] += line.get(name) or 0
    parts = [{"stage": stage, "work": work, **spent} for (stage, work), spent in sorted(rows.items())]
    total = lambda some: {name: sum(p[name] for p in some) for name in COSTS}
    works = {work: total([p for p in parts if p["work"] == work]) for work in dict.fromkeys(p["work"] for p in parts)}
    stored = {"bytes": bytes_under(workdir), "checkpoint_bytes": bytes_under(Path(workdir) / "checkpoints")}
    return {**total(parts), "waiting_for_data": waiting(lines), **stored, "works": works, "parts": parts}
