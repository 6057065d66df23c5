"""A user's data files as tables of plain rows, each with its file and row number; what can not be read is a BadRow."""

import csv
import dataclasses
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cptjax.tasks import hub
from cptjax.tasks.bad_rows import BadRow

DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"}
HUB_ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(:(?P<config>[^@]+))?(@(?P<split>[\w.-]+))?")


@dataclasses.dataclass(frozen=True)
class DataTable:
    """The rows of one file; `numbers` are their lines (text files) or positions from 1, `base` is where their images lie."""

    file: str
    base: Path
    rows: Sequence[dict[str, Any]]
    numbers: Sequence[int]
    columns: tuple[str, ...]


def read_tables(source: str, split: str, root: str = "") -> tuple[list[DataTable], list[BadRow]]:
    """Reads jsonl, json, csv, parquet, a folder of these or of images, or org/name[:config][@split] of the hub."""
    path = Path(source).expanduser()
    if path.is_dir():
        return _read_folder(path, split)
    if path.is_file():
        return _read_file(path)
    known = HUB_ID.fullmatch(source)
    if not known or path.suffix in DATA_SUFFIXES:
        raise ValueError(
            f"{source}: no such file or folder, nor a hub dataset of the form org/name[:config][@split]"
        )
    rows = hub.load_rows(hub.HubSource(known["id"], known["split"] or split, known["config"]), root)
    return [_make_table(source, Path(), rows, range(1, len(rows) + 1), rows.names)], []


def _make_table(
    file: str,
    base: Path,
    rows: Sequence,
    numbers: Sequence[int],
    columns: Sequence[str] | None = None,
) -> DataTable:
    columns = dict.fromkeys(name for row in rows for name in row) if columns is None else columns
    return DataTable(file, base, rows, numbers, tuple(columns))


def _read_file(path: Path) -> tuple[list[DataTable], list[BadRow]]:
    if path.suffix not in DATA_SUFFIXES:
        raise ValueError(
            f"{path}: the name of a data file must end in one of {' '.join(DATA_SUFFIXES)}"
        )
    if path.suffix == ".parquet":
        import datasets

        rows = hub.ArrowRows(datasets.Dataset.from_parquet(str(path)))
        return [_make_table(str(path), path.parent, rows, range(1, len(rows) + 1), rows.names)], []
    rows, numbers, bad = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv}[
        path.suffix
    ](path)
    return [_make_table(str(path), path.parent, rows, numbers)], bad


def _read_folder(path: Path, split: str) -> tuple[list[DataTable], list[BadRow]]:
    """Reads a saved dataset, a folder with metadata or data files, or one of images in which subfolders name the answers."""
    import datasets

    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        loaded = datasets.load_from_disk(str(path))
        if isinstance(loaded, datasets.DatasetDict):
            if split not in loaded:
                raise ValueError(f"{path}: no split {split!r}; it has {', '.join(loaded)}")
            loaded = loaded[split]
        rows = hub.ArrowRows(loaded)
        return [_make_table(str(path), path, rows, range(1, len(rows) + 1), rows.names)], []
    files = sorted(file for file in path.iterdir() if file.suffix in DATA_SUFFIXES)
    if files:
        tables, bad = zip(*map(_read_file, files), strict=True)
        return [table for group in tables for table in group], [
            row for group in bad for row in group
        ]
    images = sorted(
        file.relative_to(path) for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES
    )
    if not images:
        raise ValueError(
            f"{path}: no data files ({' '.join(DATA_SUFFIXES)}) and no images in this folder"
        )
    rows = [{"images": image.as_posix(), "answer": image.parent.name} for image in images]
    return [_make_table(str(path), path, rows, range(1, len(rows) + 1))], []


def _read_jsonl(path: Path) -> tuple[list[dict], list[int], list[BadRow]]:
    rows, numbers, bad = [], [], []
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode())
        except ValueError as error:
            bad.append(BadRow(str(path), number, f"not JSON in UTF-8 ({error})"))
            continue
        if isinstance(row, dict):
            rows.append(row)
            numbers.append(number)
        else:
            bad.append(
                BadRow(
                    str(path), number, f"an object {{...}} is expected, {type(row).__name__} came"
                )
            )
    return rows, numbers, bad


def _read_json(path: Path) -> tuple[list[dict], list[int], list[BadRow]]:
    """Reads one list of objects, bare or as the only list of an object; JSON lines under this name are read as such."""
    try:
        content = json.loads(path.read_bytes().decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return _read_jsonl(path)
        raise ValueError(f"{path}: not JSON ({error})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error})") from error
    lists = (
        [value for value in content.values() if isinstance(value, list)]
        if isinstance(content, dict)
        else [content]
    )
    if len(lists) != 1 or not isinstance(lists[0], list):
        raise ValueError(f"{path}: a list of objects is expected, or an object that holds one list")
    good = [(row, number) for number, row in enumerate(lists[0], 1) if isinstance(row, dict)]
    bad = [
        BadRow(str(path), number, f"an object {{...}} is expected, {type(row).__name__} came")
        for number, row in enumerate(lists[0], 1)
        if not isinstance(row, dict)
    ]
    return [row for row, _ in good], [number for _, number in good], bad


def _read_csv(path: Path) -> tuple[list[dict], list[int], list[BadRow]]:
    """Reads comma-separated values with a header line; a row's number is the line on which it starts."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error}); save it as UTF-8") from error
    csv.field_size_limit(2**27)
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    rows, numbers, bad = [], [], []
    while True:
        number = reader.reader.line_num + 1 if reader.fieldnames else 1
        try:
            row = next(reader, None)
        except csv.Error as error:
            bad.append(BadRow(str(path), number, f"not comma-separated values ({error})"))
            continue
        if row is None:
            return rows, numbers, bad
        if None in row or None in row.values():
            came = "more" if None in row else "fewer"
            reason = f"{came} fields than the header's {len(reader.fieldnames)}; put text with commas in quotes"
            bad.append(BadRow(str(path), number, reason))
            continue
        rows.append(row)
        numbers.append(number)
