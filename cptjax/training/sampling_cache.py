"""Answers that take long to draw, kept piece by piece beside the file that they will make: a killed run draws only what is missing."""

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from cptjax.common import distributed, files
from cptjax.common.signals import SamplingStopped
from cptjax.config import Stage, config_fingerprint
from cptjax.data.cost import WorkCost


def write_sampling_cost(path: Path, spent: WorkCost, mark: str, seconds: float = 0.0) -> None:
    """Puts the cost of drawn answers, and the mark of the settings they follow from, beside their file, before the file is written."""
    files.write_json(
        path.with_suffix(".cost.json"),
        {**dataclasses.asdict(spent), "seconds": seconds, "mark": mark},
    )


def read_cost_file(path: Path) -> dict[str, Any]:
    """What stands beside the file of drawn answers."""
    return json.loads(path.with_suffix(".cost.json").read_text())


def read_sampling_cost(path: Path) -> tuple[WorkCost, float]:
    """Returns the cost of drawn answers, and the seconds it took."""
    kept = read_cost_file(path)
    return WorkCost(**{f.name: kept[f.name] for f in dataclasses.fields(WorkCost)}), kept["seconds"]


CACHE_SECTIONS = (
    "seed",
    "model",
    "tasks",
    "data",
    "method",
    "rewards",
    "rollout",
    "train",
)  # sections that drawn answers follow from


def cache_fingerprint(stage: Stage) -> str:
    """What decides the answers that a stage draws, in short."""
    return f"{config_fingerprint(stage.config, CACHE_SECTIONS)} {stage.number} {stage.name} {stage.steps} {stage.epochs}"


class SamplingCache:
    """The pieces of one file. Each process keeps its own, and a run goes on from what all of them have."""

    def __init__(self, path: Path, stage: Stage, mesh: Mesh, stopping: Callable[[], bool] = bool):
        self.path, self.stopping, self.mark = path, stopping, cache_fingerprint(stage)
        self.file = path.with_name(f".{path.name}.draft{jax.process_index()}")
        self.of = {
            "mark": self.mark,
            "processes": jax.process_count(),
            "mesh": list(mesh.devices.shape),
        }
        self.kept: list[dict[str, Any]] = []
        self.lines: files.LineFile | None = None
        self.seconds = 0.0  # that the pieces took

    def made(self) -> bool:
        """Whether the file is there, as the first process sees it; one that another config's stage drew is taken away."""
        if (
            distributed.is_main_process()
            and self.path.exists()
            and read_cost_file(self.path).get("mark") != self.mark
        ):
            self.path.unlink()
        return distributed.gather_objects(self.path.exists())[0]

    def piece(self, draw: Callable[[], tuple[list, WorkCost]]) -> tuple[list, WorkCost]:
        """The next piece: as a killed run left it, or drawn now."""
        if self.lines is None:
            self._open()
        if self.kept:
            row = self.kept.pop(0)
        else:
            if self.stopping():
                raise SamplingStopped
            began = time.perf_counter()
            value, spent = draw()
            row = {
                "value": value,
                "spent": dataclasses.asdict(spent),
                "seconds": time.perf_counter() - began,
            }
            self.lines.append(row)
        self.seconds += row["seconds"]
        return row["value"], WorkCost(**row["spent"])

    def _open(self) -> None:
        head, *rows = files.read_jsonl(self.file) or [None]
        rows = rows if head == self.of else []
        self.kept = rows[: min(distributed.gather_objects(len(rows)))]
        files.write_text(
            self.file,
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in (self.of, *self.kept)),
        )
        self.lines = files.LineFile(self.file)

    def clear(self) -> None:
        """The file is written: the pieces are needed no more."""
        if self.lines is not None:
            self.lines.close()
        self.file.unlink(missing_ok=True)
