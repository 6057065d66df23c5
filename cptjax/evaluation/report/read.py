"""Find the runs under the given folders, and read what the report shows."""

import base64
import dataclasses
import io
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cptjax.common import files
from cptjax.common.images import open_image
from cptjax.evaluation import summary
from cptjax.evaluation.matrix import AccuracyTable
from cptjax.evaluation.summary import RunTables

SEED_FOLDER = re.compile(r"(seed|order)\d+(_(seed|order)\d+)?")
IGNORED_FOLDERS = {
    "base",  # the pre-stage that made the base model
    "hf",
    "checkpoints",
    "rollouts",
    "predictions",
    "tensorboard",
    "wandb",
}
STOPPED_AFTER_SECONDS = 300  # an unfinished run that has written nothing for this long has stopped
ROLLOUT_BYTES = 400_000  # read at the start and at the end of a rollouts file
THUMBNAIL_PIXELS = 320  # longest side


@dataclasses.dataclass(frozen=True)
class ReportRun:
    """One run: its parsed result files and its summary."""

    label: str
    tables: RunTables
    summary: dict[str, Any]

    @property
    def path(self) -> Path:
        return self.tables.workdir

    @property
    def config(self) -> dict[str, Any]:
        return self.tables.config

    @property
    def table(self) -> AccuracyTable:
        return self.tables.accuracy

    @property
    def state(self) -> str:
        if self.table.finished:
            return "finished"
        seconds = time.time() - last_write_time(self.path)
        return "running" if seconds < STOPPED_AFTER_SECONDS else "stopped"

    @property
    def is_joint(self) -> bool:
        """Whether a single stage trains all tasks, so that no trained task can be forgotten."""
        return len(self.table.stages) == 1 and len(self.table.tasks) > 1

    @property
    def variant(self) -> str:
        """The seed or order that distinguishes the run from the other runs of its arm."""
        name = self.path.resolve().name
        return name if SEED_FOLDER.fullmatch(name) else f"seed{self.config.get('seed', 0)}"

    def metric(self, name: str) -> dict[str, Any]:
        """Return a metric of the summary; its value is None if the run lacks the metric's group."""
        return self.summary["metrics"].get(name, {"value": None, "stderr": None})


@dataclasses.dataclass(frozen=True)
class Arm:
    """One method: a run, or the same config under several seeds or task orders."""

    label: str
    runs: tuple[ReportRun, ...]

    def spread(self, metric: str) -> dict[str, Any] | None:
        """Return mean, deviation and count of a metric over the runs."""
        return self.spread_of("metrics", metric, "value")

    def spread_of(self, *keys: str) -> dict[str, Any] | None:
        """Return the spread of a summary entry, as in spread_of("tasks", "colour", "final")."""
        return summary.mean_and_sd(nested_value(run.summary, keys) for run in self.runs)

    @property
    def is_joint(self) -> bool:
        return self.runs[0].is_joint


def nested_value(value: Any, keys: Sequence[str]) -> Any:
    """Return the value under nested keys, or None if a key is missing."""
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def last_write_time(folder: Path) -> float:
    """Return the time of the last write to a file of the run other than the report."""
    paths = [*folder.glob("*"), *folder.glob("rollouts/*")]
    return max((p.stat().st_mtime for p in paths if p.name != "report.html"), default=0.0)


def is_run_folder(folder: Path) -> bool:
    """Return whether a run was started in a folder.

    An exported model also has a config.json, but without stages.
    """
    path = folder / "config.json"
    return path.is_file() and '"stages"' in path.read_text(encoding="utf-8")


def find_arm_folders(folder: Path) -> list[tuple[str, list[Path]]]:
    """Return (label, workdirs) of each arm in a folder, which holds a run, seeds or arms."""
    if not folder.is_dir():
        return []
    label = folder.resolve().name
    arms = [(label, [folder])] if is_run_folder(folder) else []
    inner: dict[Path, list[tuple[str, list[Path]]]] = {}
    for path in sorted(folder.iterdir()):
        if path.is_dir() and path.name not in IGNORED_FOLDERS and path.name[0] not in "._":
            if found := find_arm_folders(path):
                inner[path] = found
    inner_arms = [arm for found in inner.values() for arm in found]
    if inner and all(SEED_FOLDER.fullmatch(path.name) for path in inner):
        return [*arms, (label, [path for _, paths in inner_arms for path in paths])]
    return arms + inner_arms


def read_arms(folders: Sequence[Path | str]) -> list[Arm]:
    """Read all arms under the given folders, in the order of paper A: SFT, the others, joint.

    Joint training is the reference for the intransigence of the other arms.
    """
    folders_by_arm: list[tuple[str, list[Path]]] = []
    for folder in map(Path, folders):
        arms_of_folder = find_arm_folders(folder)
        if not arms_of_folder:
            raise ValueError(
                f"{folder} is not a run: "
                "expected a workdir with config.json, or a folder of such workdirs"
            )
        folders_by_arm += arms_of_folder
    labels = _distinct_labels(folders_by_arm)
    arms = [
        Arm(label, tuple(read_run(path, label) for path in paths))
        for label, (_, paths) in zip(labels, folders_by_arm, strict=True)
    ]
    arms = [add_joint_reference(arm, arms) for arm in arms]
    return sorted(arms, key=lambda arm: (arm.is_joint, not arm.label.startswith("sft")))


def _distinct_labels(arms: Sequence[tuple[str, list[Path]]]) -> list[str]:
    """Return the folder names of the arms, with the parent's name where names are equal."""
    names = [name for name, _ in arms]
    return [
        name if names.count(name) == 1 else f"{paths[0].resolve().parent.name}/{name}"
        for name, paths in arms
    ]


def read_run(path: Path, label: str) -> ReportRun:
    tables = summary.load_run_tables(path)
    return ReportRun(label, tables, summary.summarise_run(tables))


def add_joint_reference(arm: Arm, others: Sequence[Arm]) -> Arm:
    """Add the intransigence to an arm's runs, if a joint run has the same tasks and seed."""
    tasks = set(arm.runs[0].table.tasks)
    joint = next((o for o in others if o.is_joint and set(o.runs[0].table.tasks) == tasks), None)
    if joint is None or arm.is_joint:
        return arm
    joint_tables = {run.config.get("seed"): run.table for run in joint.runs}
    runs = []
    for run in arm.runs:
        totals = summary.summarise_table(run.table, joint_tables.get(run.config.get("seed")))
        totals = files.to_jsonable(totals)
        runs.append(dataclasses.replace(run, summary=run.summary | totals))
    return Arm(arm.label, tuple(runs))


def read_rollouts(run: ReportRun, stage: int) -> list[dict[str, Any]]:
    """Read the first and the last responses of a stage; the middle of a large file is not read."""
    path = run.path / "rollouts" / f"stage{stage}.jsonl"
    if not path.exists():
        return []
    with path.open("rb") as file:
        head, size = file.read(ROLLOUT_BYTES), path.stat().st_size
        file.seek(max(len(head), size - ROLLOUT_BYTES))
        tail = file.read()
    if size <= 2 * ROLLOUT_BYTES:
        return files.parse_jsonl(head + tail, path)
    return files.parse_jsonl(head, path) + files.parse_jsonl(tail.partition(b"\n")[2], path)


def prompt_text(prompt: Any) -> str:
    """Return the text of a prompt: a string, or a conversation in the chat form."""
    if not isinstance(prompt, list):
        return str(prompt or "")
    contents = [m.get("content", "") for m in prompt if isinstance(m, Mapping)]
    parts = [part for c in contents for part in ([{"text": c}] if isinstance(c, str) else c)]
    return "\n".join(part["text"] for part in parts if part.get("text"))


def rollout_thumbnail(run: ReportRun, source: str | None) -> str | None:
    """Return a thumbnail as a data URI, or None.

    None is returned for a file that is not in the workdir or is not an image that can be read.
    """
    if not source or source.startswith("data:image/"):
        return source
    path = (run.path / source).resolve()
    if not path.is_relative_to(run.path.resolve()) or not path.is_file():
        return None
    try:
        image = open_image(path)
    except ValueError:
        return None
    if max(image.size) > THUMBNAIL_PIXELS:
        image.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    kind = "png" if max(image.size) <= 160 else "jpeg"
    encoded = io.BytesIO()
    image.save(encoded, kind.upper())
    return f"data:image/{kind};base64,{base64.b64encode(encoded.getvalue()).decode()}"
