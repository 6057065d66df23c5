"""Files written in one step, JSON lines that only grow, and reading them back."""

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def to_jsonable(value: Any) -> Any:
    """Turns arrays, means and paths into what JSON can hold; a number that is not finite becomes null."""
    if hasattr(value, "value"):  # a types.Mean; importing it here would load jax
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
    """Replaces a file in one step: a reader, or a kill, sees the old text or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with draft.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def write_json(path: Path | str, value: Any) -> None:
    write_text(path, json.dumps(to_jsonable(value), indent=1, ensure_ascii=False) + "\n")


def csv_text(rows: Iterable[Iterable[Any]]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(
        ["" if v is None else v for v in to_jsonable(list(row))] for row in rows
    )
    return out.getvalue()


class LineFile:
    """A file of whole lines that only grows; a half line that a kill left at its end is cut off."""

    def __init__(self, path: Path | str, columns: tuple[str, ...] = ()):
        self.path, self.columns = Path(path), columns
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = self.path.open("a+b")
        self._cut_half_line()

    def _cut_half_line(self) -> None:
        end = self.file.seek(0, os.SEEK_END)
        while end and not self._ends_line(end):
            end -= 1
        self.file.truncate(end)

    def _ends_line(self, end: int) -> bool:
        self.file.seek(end - 1)
        return self.file.read(1) == b"\n"

    def append(self, *rows: Mapping[str, Any]) -> None:
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
                f"{self.path.name}: a row needs exactly {', '.join(self.columns)}; got {', '.join(row)}"
            )
        return csv_text([[row[c] for c in self.columns]])

    def position(self) -> int:
        """Returns the length in bytes, after everything up to it is on the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())
        return self.file.seek(0, os.SEEK_END)

    def truncate(self, position: int) -> None:
        if (size := self.position()) < position:
            raise ValueError(
                f"{self.path}: the checkpoint expects at least {position} bytes, the file has {size}; restore the file"
            )
        self.file.truncate(position)

    def close(self) -> None:
        self.file.close()


def read_jsonl(path: Path | str) -> list[dict[str, Any]]:
    """Reads a jsonl file, without the half line that a running or killed writer may have at its end."""
    path = Path(path)
    return parse_jsonl(path.read_bytes(), path) if path.exists() else []


def parse_jsonl(text: bytes, path: Path) -> list[dict[str, Any]]:
    rows = []
    for line in text[: text.rfind(b"\n") + 1].splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            raise ValueError(
                f"{path}: expected one JSON object a line, got {line[:60]!r}; delete that line or restore the file"
            ) from None
    return rows


def folder_bytes(folder: Path | str) -> int:
    return sum(p.stat().st_size for p in Path(folder).rglob("*") if p.is_file())
