"""Finds the runs under the folders a reader names, and reads what a report needs of them."""

import base64
import dataclasses
import io
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cptjax.common import files
from cptjax.evaluation import summary
from cptjax.evaluation.matrix import AccuracyTable

SEED_FOLDER = re.compile(r"(seed|order)\d+(_(seed|order)\d+)?")
IGNORED_FOLDERS = {
    "base",
    "hf",
    "checkpoints",
    "rollouts",
    "predictions",
    "tensorboard",
    "wandb",
}  # "base": the pre-stage that made the base model
STOPPED_AFTER_SECONDS = (
    300  # seconds without a write after which an unfinished run counts as stopped
)
ROLLOUT_BYTES = 400_000  # bytes of a rollouts file that are read at its start and at its end


@dataclasses.dataclass(frozen=True)
class ReportRun:
    path: Path
    label: str
    config: dict[str, Any]
    table: AccuracyTable
    summary: dict[str, Any]
    log: list[dict[str, Any]]

    @property
    def state(self) -> str:
        if self.table.finished:
            return "finished"
        return (
            "running"
            if time.time() - last_write_time(self.path) < STOPPED_AFTER_SECONDS
            else "stopped"
        )

    @property
    def joint(self) -> bool:
        """True where one stage trains everything: such a run has no order and forgets nothing it was trained on."""
        return len(self.table.stages) == 1 and len(self.table.tasks) > 1

    @property
    def variant(self) -> str:
        """What tells it from the other runs of its arm: seed or order."""
        name = self.path.resolve().name
        return name if SEED_FOLDER.fullmatch(name) else f"seed{self.config.get('seed', 0)}"

    def number(self, name: str) -> dict[str, Any]:
        """A number of the summary; empty where it is of a group that another run's config names."""
        return self.summary["metrics"].get(name, {"value": None, "stderr": None})


@dataclasses.dataclass(frozen=True)
class Arm:
    """One method: a run, or the same config under several seeds or task orders."""

    label: str
    runs: tuple[ReportRun, ...]

    def spread(self, name: str) -> dict[str, Any] | None:
        return self.over("metrics", name, "value")

    def over(self, *keys: str) -> dict[str, Any] | None:
        """Returns the spread of a summary entry, as in over("tasks", "colour", "final")."""
        return summary.mean_and_sd(nested_value(run.summary, keys) for run in self.runs)

    @property
    def joint(self) -> bool:
        return self.runs[0].joint


def nested_value(value: Any, keys: Sequence[str]) -> Any:
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def last_write_time(folder: Path) -> float:
    return max(
        (
            p.stat().st_mtime
            for p in [*folder.glob("*"), *folder.glob("rollouts/*")]
            if p.name != "report.html"
        ),
        default=0.0,
    )


def run_subfolders(folder: Path) -> list[Path]:
    return [
        p
        for p in sorted(folder.iterdir())
        if p.is_dir()
        and p.name not in IGNORED_FOLDERS
        and p.name[0] not in "._"
        and find_arm_folders(p)
    ]


def is_run_folder(folder: Path) -> bool:
    """Whether a run was started in a folder; an exported model has a config.json too, but no stages."""
    path = folder / "config.json"
    return path.is_file() and '"stages"' in path.read_text(encoding="utf-8")


def find_arm_folders(folder: Path) -> list[tuple[str, list[Path]]]:
    """Returns (label, workdirs) for each arm in a folder: a run, its seeds side by side, or arms side by side."""
    if not folder.is_dir():
        return []
    inner, label = run_subfolders(folder), folder.resolve().name
    own = [(label, [folder])] if is_run_folder(folder) else []
    if inner and all(SEED_FOLDER.fullmatch(p.name) for p in inner):
        return [
            *own,
            (label, [path for p in inner for _, paths in find_arm_folders(p) for path in paths]),
        ]
    return own + [group for p in inner for group in find_arm_folders(p)]


def read_arms(folders: Sequence[Path | str]) -> list[Arm]:
    """Reads all arms under the named folders, in the paper's order: SFT, the others, joint; joint serves as the others' reference."""
    found: list[tuple[str, list[Path]]] = []
    for folder in map(Path, folders):
        here = find_arm_folders(folder)
        if not here:
            raise ValueError(
                f"{folder} is no run: expected a workdir with config.json, or a folder of such workdirs"
            )
        found += here
    labels = _distinct_labels(found)
    read = [
        Arm(label, tuple(read_run(p, label) for p in paths))
        for label, (_, paths) in zip(labels, found, strict=True)
    ]
    read = [add_joint_reference(arm, read) for arm in read]
    return sorted(read, key=lambda a: (a.joint, not a.label.startswith("sft")))


def _distinct_labels(found: Sequence[tuple[str, list[Path]]]) -> list[str]:
    names = [name for name, _ in found]
    parent = lambda paths: paths[0].resolve().parent.name
    return [name if names.count(name) == 1 else f"{parent(paths)}/{name}" for name, paths in found]


def read_run(path: Path, label: str) -> ReportRun:
    tables = summary.load_run_tables(path)
    return report_run(tables, summary.summarise_run(tables), label)


def report_run(tables: summary.RunTables, totals: dict[str, Any], label: str) -> ReportRun:
    """What a page needs of a run whose files are already parsed; `totals` is its summary."""
    return ReportRun(
        tables.workdir, label, tables.config, tables.accuracy, totals, tables.metrics_lines
    )


def add_joint_reference(arm: Arm, others: Sequence[Arm]) -> Arm:
    """Adds intransigence to an arm's runs where a joint run of the same seed over the same tasks lies beside them."""
    joint = next(
        (
            o
            for o in others
            if o.joint and set(o.runs[0].table.tasks) == set(arm.runs[0].table.tasks)
        ),
        None,
    )
    if joint is None or arm.joint:
        return arm
    of_seed = {run.config.get("seed"): run.table for run in joint.runs}
    about = lambda run: files.to_jsonable(
        summary.summarise_table(run.table, of_seed.get(run.config.get("seed")))
    )
    return Arm(
        arm.label,
        tuple(dataclasses.replace(run, summary=run.summary | about(run)) for run in arm.runs),
    )


def read_rollouts(run: ReportRun, stage: int) -> list[dict[str, Any]]:
    """Reads the first and the last responses of a stage, without reading the middle of a large file."""
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
    """Returns the text of a prompt, be it a string or a conversation in the chat form."""
    if not isinstance(prompt, list):
        return str(prompt or "")
    contents = [m.get("content", "") for m in prompt if isinstance(m, Mapping)]
    parts = [part for c in contents for part in ([{"text": c}] if isinstance(c, str) else c)]
    return "\n".join(part["text"] for part in parts if part.get("text"))


def rollout_thumbnail(run: ReportRun, source: str | None) -> str | None:
    """Returns a thumbnail as a data URI; files outside the workdir are not embedded."""
    if not source or source.startswith("data:image/"):
        return source
    path = (run.path / source).resolve()
    if not path.is_relative_to(run.path.resolve()) or not path.is_file():
        return None
    from PIL import Image

    with Image.open(path) as image:
        image = image.convert("RGB")
    if max(image.size) > 320:
        image.thumbnail((320, 320))
    out = io.BytesIO()
    image.save(out, "PNG" if max(image.size) <= 160 else "JPEG")
    kind = "png" if max(image.size) <= 160 else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(out.getvalue()).decode()}"
