"""Answers that take long to draw, kept piece by piece beside the file that they will make: a killed run draws only what is missing."""

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from cptjax import lessons, metrics, multihost, settings
from cptjax.lessons import Spent
from cptjax.settings import Stage

DECIDES = ("seed", "model", "tasks", "data", "method", "rewards", "rollout", "train")  # sections that drawn answers follow from


class Stopped(Exception):
    """SIGTERM came between two pieces; all that was drawn is kept."""


def mark(which: Stage) -> str:
    """What decides the answers that a stage draws, in short."""
    return f"{settings.fingerprint(which.config, DECIDES)} {which.number} {which.name} {which.steps} {which.epochs}"


class Drafts:
    """The pieces of one file. Each process keeps its own, and a run goes on from what all of them have."""

    def __init__(self, path: Path, which: Stage, mesh: Mesh, stopping: Callable[[], bool] = bool):
        self.path, self.stopping, self.mark = path, stopping, mark(which)
        self.file = path.with_name(f".{path.name}.draft{jax.process_index()}")
        self.of = {"mark": self.mark, "processes": jax.process_count(), "mesh": list(mesh.devices.shape)}
        self.kept: list[dict[str, Any]] = []
        self.lines: metrics.Lines | None = None
        self.seconds = 0.0  # that the pieces took

    def made(self) -> bool:
        """Whether the file is there, as the first process sees it; one that another config's stage drew is taken away."""
        if multihost.first() and self.path.exists() and lessons.cost_file(self.path).get("mark") != self.mark:
            self.path.unlink()
        return multihost.gather(self.path.exists())[0]

    def piece(self, draw: Callable[[], tuple[list, Spent]]) -> tuple[list, Spent]:
        """The next piece: as a killed run left it, or drawn now."""
        if self.lines is None:
            self._open()
        if self.kept:
            row = self.kept.pop(0)
        else:
            if self.stopping():
                raise Stopped
            began = time.perf_counter()
            value, spent = draw()
            row = {"value": value, "spent": dataclasses.asdict(spent), "seconds": time.perf_counter() - began}
            self.lines.append(row)
        self.seconds += row["seconds"]
        return row["value"], Spent(**row["spent"])

    def _open(self) -> None:
        head, *rows = metrics.read_lines(self.file) or [None]
        rows = rows if head == self.of else []
        self.kept = rows[: min(multihost.gather(len(rows)))]
        metrics.write_text(self.file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in (self.of, *self.kept)))
        self.lines = metrics.Lines(self.file)

    def clear(self) -> None:
        """The file is written: the pieces are needed no more."""
        if self.lines is not None:
            self.lines.close()
        self.file.unlink(missing_ok=True)
