"""Read benchmarks that are released as JSON files beside folders of images.

The hub repositories of such benchmarks hold the images in archives, which `datasets` cannot read.
Download the repository, unpack its archives, and put the folder under data.root.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cptjax.tasks import hub
from cptjax.tasks.task import Examples, limit_rows
from cptjax.types import Example

Row = dict[str, Any]
BuildRow = Callable[..., Example]  # (row, images=the folder of its image paths)


@dataclasses.dataclass(frozen=True)
class Release:
    """Where a benchmark's files are in the folder of its hub repository.

    Several paths are names of the same file in different copies; the first that exists is read.
    """

    dataset: str  # hub id
    files: Mapping[str, tuple[str, ...]]  # split -> paths of its JSON file
    images: tuple[str, ...] = ()  # folders at which image paths start; () = the folder itself


def load_release_split(
    task: str,
    release: Release,
    build: BuildRow,
    split: str,
    root: str = "",
    limit: int | None = None,
    seed: int = 0,
) -> Examples:
    """Load a split's examples; images are opened when an example is accessed."""
    folder = find_release(task, release, root)
    rows = read_rows(task, release, folder, split)
    return make_examples(task, release, folder, split, rows, build, limit, seed)


def make_examples(
    task: str,
    release: Release,
    folder: Path,
    split: str,
    rows: Sequence[Row],
    build: BuildRow,
    limit: int | None,
    seed: int,
) -> Examples:
    """Return the examples of rows that are read."""
    images = find_path(task, folder, release.images) if release.images else folder
    build_row = functools.partial(build, images=images)
    return Examples(task, split, rows, build_row, limit_rows(range(len(rows)), limit, seed))


def find_release(task: str, release: Release, root: str) -> Path:
    """Return the local folder of a benchmark."""
    candidates = hub.local_folders(release.dataset, root)
    for folder in candidates:
        if folder.is_dir():
            return folder
    places = ", ".join(map(str, candidates)) or "data.root is empty"
    raise ValueError(
        f"task {task}: no copy of {release.dataset} ({places}); its images are in archives: "
        "download it, unpack them, and put the folder under data.root"
    )


def read_rows(task: str, release: Release, folder: Path, split: str) -> list[Row]:
    """Read the rows of a split: a JSON list of objects."""
    if split not in release.files:
        raise ValueError(f"task {task}: no split {split!r}; it has {', '.join(release.files)}")
    path = find_path(task, folder, release.files[split])
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON in UTF-8 ({error})") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: expected a list of objects {{...}}")
    hub.record_source(f"{release.dataset} {task} {split}", [str(path)])
    return rows


def find_path(task: str, folder: Path, paths: Sequence[str]) -> Path:
    """Return the first of the paths that exists in a folder."""
    for path in paths:
        if (folder / path).exists():
            return folder / path
    raise ValueError(f"task {task}: {folder} has no {' nor '.join(paths)}")


def read_columns(row: Row, *columns: str) -> list[Any]:
    """Return columns of a row; a row without them is in a form that is not known."""
    missing = [name for name in columns if row.get(name) in (None, "")]
    if missing:
        raise ValueError(
            f"expected the columns {', '.join(columns)}, got no {', '.join(missing)} but "
            f"{', '.join(row)}; rows of another form can be a task of your own (README)"
        )
    return [row[name] for name in columns]


def read_conversation_turns(row: Row) -> tuple[str, str]:
    """Return the question and the answer of a row in LLaVA's form.

    Its column `conversations` is [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}].
    """
    (turns,) = read_columns(row, "conversations")
    match turns:
        case [{"from": "human", "value": str(question)}, {"from": "gpt", "value": str(answer)}]:
            return question, answer
    raise ValueError(
        f"conversations: expected a turn of human and one of gpt, each with a value, got {turns!r}"
    )
