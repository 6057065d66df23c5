"""Read a user's data files as tables of rows; a row that cannot be read becomes a BadRow."""

import contextlib
import csv
import dataclasses
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cptjax.common import files
from cptjax.tasks import hub
from cptjax.tasks.bad_rows import BadRow

DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"}
HUB_DATASET = re.compile(
    r"(?P<id>(hf:)?[\w.-]+/[\w.-]+)(:(?P<config>[^@]+))?(@(?P<split>[\w.-]+))?"
)


@dataclasses.dataclass(frozen=True)
class DataTable:
    """The rows of one file.

    The number of a row is its line in a text file, otherwise its position, counted from 1.
    """

    file: str
    folder: Path  # relative image paths start from this folder
    rows: Sequence[dict[str, Any]]
    numbers: Sequence[int]
    columns: tuple[str, ...]
    bad: tuple[BadRow, ...] = ()
    # role -> column, see task.py
    roles: Mapping[str, str] = dataclasses.field(default_factory=dict)
    # further folders that hold images of the rows
    image_folders: tuple[Path, ...] = ()


def read_tables(source: str, split: str, root: str = "") -> list[DataTable]:
    """Read a data file, a folder of data files or images, or a hub dataset.

    A hub dataset is named org/name[:config][@split], and with hf: before it in any case.
    """
    path = Path(source).expanduser()
    with files.explain_errors(str(path)):
        if path.is_dir():
            return _read_folder(path, split)
        if path.is_file():
            return [_read_file(path)]
    named = HUB_DATASET.fullmatch(source)
    is_file_name = path.suffix in DATA_SUFFIXES and not source.startswith(files.HUB_PREFIX)
    hub_id = files.find_hub_id(named["id"]) if named and not is_file_name else None
    if hub_id is None:
        raise ValueError(
            f"{source}: no such file or folder, nor a hub dataset of the form "
            f"org/name[:config][@split]{files.nearest_path(source)}"
        )
    hub_source = hub.HubSource(hub_id, named["split"] or split, named["config"])
    rows, folders = hub.load_rows(hub_source, root), hub.media_folders(root)
    table = _arrow_table(source, folders[0], rows)
    return [dataclasses.replace(table, image_folders=folders)]


def _arrow_table(file: str, folder: Path, rows: hub.ArrowRows) -> DataTable:
    return DataTable(file, folder, rows, range(1, len(rows) + 1), tuple(rows.names))


def _read_folder(path: Path, split: str) -> list[DataTable]:
    """Read a saved dataset, a folder of data files, or a folder of images.

    The subfolders of a folder of images are the answers.
    """
    import datasets

    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        dataset = datasets.load_from_disk(str(path))
        if isinstance(dataset, datasets.DatasetDict):
            if split not in dataset:
                raise ValueError(f"{path}: no split {split!r}; it has {', '.join(dataset)}")
            dataset = dataset[split]
        return [_arrow_table(str(path), path, hub.ArrowRows(dataset))]
    data_files = sorted(file for file in path.iterdir() if file.suffix in DATA_SUFFIXES)
    if data_files:
        return [_read_file(file) for file in data_files]
    images = sorted(
        file.relative_to(path) for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES
    )
    if not images:
        raise ValueError(
            f"{path}: expected data files ({' '.join(DATA_SUFFIXES)}) or images in this folder, "
            "got neither"
        )
    rows = [{"images": image.as_posix(), "answer": image.parent.name} for image in images]
    return [DataTable(str(path), path, rows, range(1, len(rows) + 1), ("images", "answer"))]


def _read_file(path: Path) -> DataTable:
    if path.suffix == ".parquet":
        import datasets

        try:
            rows = hub.ArrowRows(datasets.Dataset.from_parquet(str(path)))
        except (datasets.exceptions.DatasetGenerationError, OSError, ValueError) as error:
            reason = " ".join(str(error.__cause__ or error).split())[:200]
            raise ValueError(f"{path}: not a parquet file with rows ({reason})") from error
        return _arrow_table(str(path), path.parent, rows)
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv}
    if path.suffix not in readers:
        raise ValueError(
            f"{path}: expected a data file that ends in {', '.join(DATA_SUFFIXES)}; "
            "rename or convert it"
        )
    rows, numbers, bad = [], [], []
    for number, row in readers[path.suffix](path):
        if isinstance(row, dict):
            rows.append(row)
            numbers.append(number)
            continue
        if not isinstance(row, Unreadable):
            row = f"expected an object {{...}}, got {type(row).__name__}"
        bad.append(BadRow(str(path), number, str(row)))
    columns = dict.fromkeys(name for row in rows for name in row)
    return DataTable(str(path), path.parent, rows, numbers, tuple(columns), tuple(bad))


class Unreadable(str):
    """The reason why a row could not be read; it takes the place of the row."""


def _read_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the number and value of each line that is not empty."""
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if line.strip():
            try:
                row = files.parse_json(line, unique=True)
            except ValueError as error:
                row = Unreadable(f"not JSON in UTF-8 ({error})")
            yield number, row


def _read_json(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the items of a list, which may be the only list in an object.

    A .json file may also contain JSON lines.
    """
    try:
        content = files.parse_json(path.read_bytes(), unique=True)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error})") from error
    except ValueError as error:
        if getattr(error, "msg", "") == "Extra data":
            yield from _read_jsonl(path)
            return
        raise ValueError(f"{path}: not JSON ({error})") from error
    values = content.values() if isinstance(content, dict) else [content]
    lists = [value for value in values if isinstance(value, list)]
    if len(lists) != 1:
        raise ValueError(f"{path}: expected a list of objects, or an object that holds one list")
    yield from enumerate(lists[0], 1)


def _read_csv(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the rows below a header line, each with the number of the line on which it starts."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error}); save it as UTF-8") from error
    csv.field_size_limit(2**27)
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    with contextlib.suppress(csv.Error):  # the loop below reports it
        names = list(reader.fieldnames or ())
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"{path}: the header names {twice[0]!r} twice; rename one column")
    while True:
        number = reader.reader.line_num + 1 if reader.fieldnames else 1
        try:
            row = next(reader, None)
        except csv.Error as error:
            row = Unreadable(f"not comma-separated values ({error})")
        if row is None:
            return
        if isinstance(row, dict) and (None in row or None in row.values()):
            amount = "more" if None in row else "fewer"
            row = Unreadable(
                f"{amount} fields than the header's {len(reader.fieldnames)}; "
                "put text with commas in quotes"
            )
        yield number, row
