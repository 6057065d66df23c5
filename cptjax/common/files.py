"""Write files atomically, append to files of lines, and read both."""

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def to_jsonable(value: Any) -> Any:
    """Convert arrays, means and paths to JSON values; numbers that are not finite become None."""
    if hasattr(value, "value"):  # a types.Mean; importing that module would load jax
        return to_jsonable(value.value)
    if isinstance(value, Mapping):
        return {str(k): to_jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_jsonable(v) for v in value]
    if hasattr(value, "tolist"):
        return to_jsonable(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def write_text(path: Path | str, text: str) -> None:
    """Replace a file atomically: readers see the old text or the new one, even after a kill."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path | str, value: Any) -> None:
    """Replace a JSON file atomically."""
    write_text(path, json.dumps(to_jsonable(value), indent=1, ensure_ascii=False) + "\n")


def csv_text(rows: Iterable[Iterable[Any]]) -> str:
    """Return rows as CSV lines; None is an empty field."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(
        ["" if v is None else v for v in to_jsonable(list(row))] for row in rows
    )
    return out.getvalue()


class LineFile:
    """A file of lines that only grows: JSON objects, or CSV rows with given columns.

    Opening it removes an incomplete last line, which a killed process may have left.
    """

    def __init__(self, path: Path | str, columns: tuple[str, ...] = ()):
        self.path, self.columns = Path(path), columns
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = self.path.open("a+b")
        end = self.file.seek(0, os.SEEK_END)
        while end:
            self.file.seek(end - 1)
            if self.file.read(1) == b"\n":
                break
            end -= 1
        self.file.truncate(end)

    def append(self, *rows: Mapping[str, Any]) -> None:
        """Append rows; a CSV file starts with its header."""
        text = "".join(self._text(row) for row in rows)
        if self.columns and self.file.seek(0, os.SEEK_END) == 0:
            text = csv_text([self.columns]) + text
        self.file.write(text.encode())
        self.file.flush()

    def _text(self, row: Mapping[str, Any]) -> str:
        if not self.columns:
            return json.dumps(to_jsonable(row), ensure_ascii=False) + "\n"
        if set(row) != set(self.columns):
            raise ValueError(
                f"{self.path.name}: expected a row with exactly {', '.join(self.columns)}; "
                f"got {', '.join(row)}"
            )
        return csv_text([[row[c] for c in self.columns]])

    def position(self) -> int:
        """Write everything to disk, and return the length in bytes."""
        self.file.flush()
        os.fsync(self.file.fileno())
        return self.file.seek(0, os.SEEK_END)

    def truncate(self, position: int) -> None:
        """Cut the file back to a length that `position` returned."""
        if (size := self.position()) < position:
            raise ValueError(
                f"{self.path}: the checkpoint expects at least {position} bytes, the file has "
                f"{size}; restore the file"
            )
        self.file.truncate(position)

    def close(self) -> None:
        self.file.close()


def read_jsonl(path: Path | str) -> list[dict[str, Any]]:
    """Read a jsonl file, except an incomplete last line; a missing file has no rows."""
    path = Path(path)
    return parse_jsonl(path.read_bytes(), path) if path.exists() else []


def parse_jsonl(text: bytes, path: Path) -> list[dict[str, Any]]:
    """Parse the complete lines of a jsonl file; `path` names it in errors."""
    rows = []
    for line in text[: text.rfind(b"\n") + 1].splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            raise ValueError(
                f"{path}: expected one JSON object per line, got {line[:60]!r}; delete that line "
                "or restore the file"
            ) from None
    return rows


def folder_bytes(folder: Path | str) -> int:
    """Return the size of all files in a folder."""
    return sum(p.stat().st_size for p in Path(folder).rglob("*") if p.is_file())
