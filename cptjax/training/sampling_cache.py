"""A cache of sampled responses in parts, so that a killed run samples only the missing parts."""

import dataclasses
import hashlib
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from cptjax.common import distributed, files, phases
from cptjax.common.signals import SamplingStopped
from cptjax.config import Stage, config_fingerprint
from cptjax.data.cost import WorkCost

# The sections of a config on which sampled responses depend.
CACHE_SECTIONS = ("seed", "model", "tasks", "data", "method", "rewards", "rollout", "train")


def write_samples(
    path: Path, text: str, cost: WorkCost, fingerprint: str, seconds: float = 0.0
) -> None:
    """Write sampled responses to a file; before that, their cost and settings next to it."""
    values = {**dataclasses.asdict(cost), "seconds": seconds, "fingerprint": fingerprint}
    digest = hashlib.sha256(text.encode()).hexdigest()
    files.write_checked_json(path.with_suffix(".cost.json"), values | {"samples_sha256": digest})
    files.write_text(path, text)


def read_cost_file(path: Path) -> dict[str, Any]:
    """Read the values that `write_samples` wrote; refuse samples that were changed since."""
    values = files.read_checked_json(path.with_suffix(".cost.json"))
    if files.file_position(path)["sha256"] != values["samples_sha256"]:
        raise ValueError(f"{path} was changed since it was written; restore it")
    return values


def read_sampling_cost(path: Path) -> tuple[WorkCost, float]:
    """Return the cost of sampled responses, and the seconds that sampling took."""
    values = read_cost_file(path)
    cost = WorkCost(**{f.name: values[f.name] for f in dataclasses.fields(WorkCost)})
    return cost, values["seconds"]


def cache_fingerprint(stage: Stage) -> str:
    """Return a short text that differs if a stage would sample other responses."""
    settings = config_fingerprint(stage.config, CACHE_SECTIONS)
    return f"{settings} {stage.number} {stage.name} {stage.steps} {stage.epochs}"


class SamplingCache:
    """The parts of one file of sampled responses.

    Each process stores its own parts; a resumed run continues after the parts that all processes
    have.
    """

    def __init__(
        self,
        path: Path,
        stage: Stage,
        mesh: Mesh,
        stopping: Callable[[], bool] = bool,
        more: str = "",  # what the responses depend on beside the stage
    ):
        self.path = path
        self.stopping = stopping
        self.fingerprint = f"{cache_fingerprint(stage)} {more}".rstrip()
        self.seconds = 0.0  # spent on sampling, over all parts
        self._file = path.with_name(f".{path.name}.partial{jax.process_index()}")
        self._header = {
            "fingerprint": self.fingerprint,
            "processes": jax.process_count(),
            "mesh": list(mesh.devices.shape),
        }
        self._stored: list[dict[str, Any]] = []
        self._lines: files.LineFile | None = None

    def is_complete(self) -> bool:
        """Return whether the file exists; first remove a file that has other settings.

        The main process decides for all processes.
        """

        def check() -> bool:
            if not self.path.exists():
                return False
            if read_cost_file(self.path).get("fingerprint") == self.fingerprint:
                return True
            self.path.unlink()
            return False

        return distributed.decide_on_main(check)

    def next_part(self, sample: Callable[[], tuple[list, WorkCost]]) -> tuple[list, WorkCost]:
        """Return the next part: the stored one of a killed run, or a new one from `sample`."""
        if self._lines is None:
            self._open()
        if self._stored:
            row = self._stored.pop(0)
        else:
            if self.stopping():
                raise SamplingStopped
            began = time.perf_counter()
            with phases.phase("rollout"):
                value, cost = sample()
            spent = {"cost": dataclasses.asdict(cost), "seconds": time.perf_counter() - began}
            row = files.add_hash(files.to_jsonable({"value": value, **spent}))
            self._lines.append(row)
        self.seconds += row["seconds"]
        return row["value"], WorkCost(**row["cost"])

    def _open(self) -> None:
        header, *rows = distributed.run_on_all(lambda: files.read_jsonl(self._file)) or [None]
        rows = rows if header == self._header else []
        rows = list(itertools.takewhile(files.has_valid_hash, rows))
        self._stored = rows[: min(distributed.gather_objects(len(rows)))]
        lines = [json.dumps(row, ensure_ascii=False) for row in (self._header, *self._stored)]
        files.write_text(self._file, "".join(f"{line}\n" for line in lines))
        self._lines = files.LineFile(self._file)

    def discard(self) -> None:
        """Delete the parts; call it after the file is written."""
        if self._lines is not None:
            self._lines.close()
        self._file.unlink(missing_ok=True)
