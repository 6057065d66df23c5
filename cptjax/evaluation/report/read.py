"""Find the runs under the given folders, and read what the report shows."""

import base64
import dataclasses
import io
import math
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cptjax.common import buckets, files
from cptjax.common.images import open_image
from cptjax.common.runs import FRESH_FOLDER
from cptjax.config import nearest_names
from cptjax.evaluation import summary
from cptjax.evaluation.matrix import AccuracyTable, Cells
from cptjax.evaluation.summary import RunTables

SEED_FOLDER = re.compile(r"(seed|order)\d+(_(seed|order)\d+)?")
RUNS_FILE = "runs.json"  # in the folder of several runs: their sub-folders as the config lists them
IGNORED_FOLDERS = {
    "base",  # the pre-stage that made the base model
    FRESH_FOLDER,
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
    def variant(self) -> str:
        """The seed or order that distinguishes the run from the other runs of its arm."""
        name = self.path.resolve().name
        return name if SEED_FOLDER.fullmatch(name) else f"seed{self.config.get('seed', 0)}"

    @property
    def evaluated_stages(self) -> list[dict[str, Any]]:
        """The metrics of the stages up to the last whose evaluation has every task."""
        tasks = {*self.table.tasks, *self.config.get("eval", {}).get("general", ())}
        rows = self.summary["per_stage"]
        while rows and any((rows[-1]["stage"], task) not in self.table.cells for task in tasks):
            rows = rows[:-1]
        return rows

    def metric(self, name: str) -> dict[str, Any]:
        """Return a metric of the summary; its value is None if the run lacks the metric's group."""
        return self.summary["metrics"].get(name, {"value": None, "stderr": None})


@dataclasses.dataclass(frozen=True)
class Arm:
    """One method: a run, or the same config under several seeds or task orders."""

    label: str
    runs: tuple[ReportRun, ...]
    is_joint: bool = False  # the reference of the other arms; see `is_joint_reference`

    @property
    def counted_runs(self) -> tuple[ReportRun, ...]:
        """The finished runs, or all of them while none is finished."""
        return tuple(run for run in self.runs if run.table.finished) or self.runs

    def spread(self, metric: str) -> dict[str, Any] | None:
        """Return mean, deviation and count of a metric over the counted runs."""
        return self.spread_of("metrics", metric, "value")

    def spread_of(self, *keys: str) -> dict[str, Any] | None:
        """Return the spread of a summary entry, as in spread_of("tasks", "colour", "final")."""
        return summary.mean_and_sd(nested_value(run.summary, keys) for run in self.counted_runs)


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

    An exported model also has a config.json, but without stages. A run whose config.json is damaged
    still has its other files.
    """
    path = folder / "config.json"
    if not path.is_file():
        return False
    return b'"stages"' in path.read_bytes() or (folder / "versions.json").is_file()


def read_run_names(folder: Path) -> list[str]:
    """Return the sub-folders of a folder's runs as the config lists them; [] = not recorded."""
    path = folder / RUNS_FILE
    names = files.read_json(path, list) if path.is_file() else []
    if not all(isinstance(name, str) and ".." not in Path(name).parts for name in names):
        raise ValueError(f"{path}: expected names of sub-folders; restore the file")
    return names


def missing_runs(folders: Sequence[Path | str]) -> list[str]:
    """Return the sub-folders of the runs that the config lists and that have not started."""
    return [
        name
        for folder in map(Path, folders)
        for name in read_run_names(folder)
        if not is_run_folder(folder / name)
    ]


def find_arm_folders(folder: Path) -> list[tuple[Path, list[Path]]]:
    """Return (folder, workdirs) of each arm in a folder, which holds a run, seeds or arms.

    They are in the order of the config, the others by name.
    """
    if not folder.is_dir():
        return []
    arms = [(folder, [folder])] if is_run_folder(folder) else []
    inner: dict[Path, list[tuple[Path, list[Path]]]] = {}
    known = [folder / name.partition("/")[0] for name in read_run_names(folder) if name]
    for path in dict.fromkeys([*known, *sorted(folder.iterdir())]):
        if path.is_dir() and path.name not in IGNORED_FOLDERS and path.name[0] not in "._":
            if found := find_arm_folders(path):
                inner[path] = found
    inner_arms = [arm for found in inner.values() for arm in found]
    if inner and all(SEED_FOLDER.fullmatch(path.name) for path in inner):
        return [*arms, (folder, [path for _, paths in inner_arms for path in paths])]
    return arms + inner_arms


def read_arms(folders: Sequence[Path | str], sort: str = "") -> list[Arm]:
    """Read all arms under the given folders.

    They are in the order of their config; if it is not known, SFT is first. With `sort`, here or
    in the config, the arms with the best mean of that metric are first. Joint training is last: it
    is the reference for the intransigence of the other arms. A run under several of the folders
    counts once.
    """
    found: list[tuple[Path, list[Path]]] = []
    for folder in map(buckets.fetch, folders):
        arms_of_folder = find_arm_folders(folder)
        if not arms_of_folder:
            raise ValueError(
                f"{folder} is not a run: "
                "expected a workdir with config.json, or a folder of such workdirs"
            )
        found += arms_of_folder
    found = drop_repeated_arms(found)
    labels = distinct_labels([folder for folder, _ in found])
    arms = [
        Arm(label, tuple(read_run(path, label) for path in paths))
        for label, (_, paths) in zip(labels, found, strict=True)
    ]
    arms = [dataclasses.replace(arm, is_joint=is_joint_reference(arm, arms)) for arm in arms]
    arms = [add_references(arm, arms) for arm in arms]
    if sort := sort or report_setting(arms, "sort"):
        arms = sort_by_metric(arms, sort)
    elif not any(read_run_names(Path(folder)) for folder in folders):
        arms.sort(key=lambda arm: not arm.label.startswith("sft"))
    return sorted(arms, key=lambda arm: arm.is_joint)


def drop_repeated_arms(found: Sequence[tuple[Path, list[Path]]]) -> list[tuple[Path, list[Path]]]:
    """Return the arms whose workdirs are not all in another arm, or in an equal one before."""
    runs = [{path.resolve() for path in paths} for _, paths in found]
    return [
        arm
        for i, arm in enumerate(found)
        if not any(runs[i] < other or (runs[i] == other and j < i) for j, other in enumerate(runs))
    ]


def report_setting(arms: Sequence[Arm], name: str) -> str:
    """Return a setting of `config.report`, as the first run that sets it has it."""
    values = [run.config.get("report", {}).get(name) for arm in arms for run in arm.runs]
    return next(filter(None, values), "")


def sort_by_metric(arms: Sequence[Arm], name: str) -> list[Arm]:
    """Sort arms by the mean of a metric, the best first; arms without it are last."""
    formulas = {k: m for arm in arms for run in arm.runs for k, m in run.summary["metrics"].items()}
    if name not in formulas:
        raise ValueError(
            f"sort={name!r} is no metric of these runs; {nearest_names(name, formulas)}"
        )
    sign = 1 if formulas[name]["better"] == "lower" else -1
    means = {arm.label: spread["mean"] for arm in arms if (spread := arm.spread(name))}
    return sorted(arms, key=lambda arm: sign * means[arm.label] if arm.label in means else math.inf)


def distinct_labels(folders: Sequence[Path]) -> list[str]:
    """Return the names of the arms' folders, with as many parents as make equal names differ.

    Arms of one folder are numbered.
    """
    paths = [folder.resolve() for folder in folders]
    labels, depth = {path: path.name for path in paths}, 1
    while len(set(labels.values())) < len(labels):
        names, depth = list(labels.values()), depth + 1
        labels = {
            path: "/".join(path.parts[-depth:]) if names.count(name) > 1 else name
            for path, name in labels.items()
        }
    numbers = [paths[: i + 1].count(path) for i, path in enumerate(paths)]
    return [
        f"{labels[path]} ({number})" if number > 1 else labels[path]
        for path, number in zip(paths, numbers, strict=True)
    ]


def read_run(path: Path, label: str) -> ReportRun:
    with files.explain_errors(f"the result files in {path}"):
        tables = summary.load_run_tables(path)
        return ReportRun(label, tables, summary.summarise_run(tables))


def is_joint_reference(arm: Arm, others: Sequence[Arm]) -> bool:
    """Return whether an arm trains in one stage the tasks that another arm trains in several.

    No task of it can be forgotten. Where all arms have one stage, they are methods to compare.
    """
    table, tables = arm.runs[0].table, [other.runs[0].table for other in others]
    return len(table.stages) == 1 < len(table.tasks) and any(
        len(other.stages) > 1 and set(other.tasks) == set(table.tasks) for other in tables
    )


def add_references(arm: Arm, others: Sequence[Arm]) -> Arm:
    """Add the metrics of an arm's runs that compare them with other runs.

    The intransigence needs a joint run with the same tasks and seed, the plasticity runs of single
    stages from the base model.
    """
    tasks = set(arm.runs[0].table.tasks)
    joint = next((o for o in others if o.is_joint and set(o.runs[0].table.tasks) == tasks), None)
    joint_tables = {}
    if joint is not None and not arm.is_joint:
        joint_tables = {run.config.get("seed"): run.table for run in joint.runs}
    runs = []
    for run in arm.runs:
        references = joint_tables.get(run.config.get("seed")), read_fresh_cells(run)
        totals = files.to_jsonable(summary.summarise_table(run.table, *references))
        runs.append(dataclasses.replace(run, summary=run.summary | totals))
    return dataclasses.replace(arm, runs=tuple(runs))


def read_fresh_cells(run: ReportRun) -> Cells:
    """Return the accuracy on each task after only its last stage, trained from the base model.

    Runs of single stages that are not finished are left out.
    """
    cells: Cells = {}
    for task in run.table.trained():
        folder = run.path / FRESH_FOLDER / f"stage{run.table.last(task)}"
        if is_run_folder(folder):
            table = summary.load_accuracy_table(folder, summary.load_config(folder))
            if table.finished:
                cells["fresh", task] = table.cells[1, task]
    return cells


def read_rollouts(run: ReportRun, stage: int) -> list[dict[str, Any]]:
    """Read the first and the last responses of a stage; the middle of a large file is not read."""
    path = run.path / "rollouts" / f"stage{stage}.jsonl"
    if not path.is_file():
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
