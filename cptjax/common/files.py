"""Write files atomically, append to files of lines, read both, and verify them by hashes."""

import contextlib
import csv
import difflib
import hashlib
import io
import json
import math
import os
import re
import traceback
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

MAX_JSON_DEPTH = 100
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


@contextlib.contextmanager
def explain_errors(what: str) -> Iterator[None]:
    """Turn an unexpected error of code that reads what a user gave into a ValueError of one line.

    `what` names the file or the setting. A ValueError or an OSError has its own line already.
    """
    try:
        yield
    except (ValueError, OSError):
        raise
    except Exception as error:
        raise ValueError(f"{what}: {describe_error(error)}") from error


class TryAgain(OSError):
    """The hub, a bucket or a disk does not answer now; the same command may work later."""


def is_outage(error: BaseException | None) -> bool:
    """Return whether a request failed because a server did not answer, or not in time."""
    while error is not None:
        names = {kind.__name__ for kind in type(error).__mro__}
        status = getattr(getattr(error, "response", None), "status_code", 0)
        # Of httpx, requests and Python; without a network on purpose, trying again does not help.
        outage = {"TransportError", "Timeout", "ConnectionError", "TimeoutError"} & names
        if (outage and "OfflineModeIsEnabled" not in names) or status == 429 or status >= 500:
            return True
        error = error.__cause__ or error.__context__
    return False


def describe_error(error: BaseException) -> str:
    """Return the kind of an error, its first line and where it was raised."""
    lines = str(error).strip().splitlines()
    reason = f": {lines[0][:300]}" if lines else ""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}{reason}{where}"


def cache_folder() -> Path:
    """Return the folder of cptjax in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser().resolve() / "cptjax"


def local_folder(folder: str | Path, setting: str = "--workdir") -> Path:
    """Return the path of a local folder; refuse an address such as s3://bucket/run."""
    if not str(folder):
        raise ValueError(f"{setting} is empty: expected a folder; is a shell variable not set?")
    if re.match(r"\w{2,}:/", str(folder)):
        but = "; only gs:// addresses are supported" if setting == "--workdir" else ""
        raise ValueError(f"{setting}={folder}: expected a folder on a disk{but}")
    return Path(folder).expanduser()


def output_page(path: str | Path, setting: str = "--out") -> Path:
    """Return the path of a page to write, which has its numbers next to it as .json."""
    page = local_folder(path or ".", setting)
    if page.is_dir() or page.suffix == ".json":
        got = "no name" if path == "" else "a folder" if page.is_dir() else "that of its numbers"
        raise ValueError(
            f"{setting}={path}: expected the path of a page, got {got}; "
            "add a name such as page.html"
        )
    return page


def orbax_folder(folder: str | Path, setting: str = "--workdir") -> Path:
    """Return the path of a local folder; refuse one in which Orbax finds no checkpoint."""
    path = local_folder(folder, setting)
    if "[" in str(path.absolute()):  # Orbax searches for parts of checkpoints by patterns
        raise ValueError(
            f"{setting}={folder}: Orbax cannot read checkpoints in a path with '['; "
            "choose another folder"
        )
    return path


HUB_PREFIX = "hf:"
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def find_hub_id(text: str) -> str | None:
    """Return the hub id that a setting names: hf:org/name, or org/name if no folder org/ is here.

    Return None for other text. With a folder org/, org/name is a path that does not exist.
    """
    name = text.removeprefix(HUB_PREFIX)
    if not HUB_ID.fullmatch(name):
        return None
    folder = Path(name.partition("/")[0])
    if name == text and folder.is_dir():
        raise ValueError(
            f"{text}: no such file or folder{nearest_path(text)}; since the folder {folder}/ "
            f"exists, this is not read as a hub id: write {HUB_PREFIX}{text} for that"
        )
    return name


def nearest_path(text: str) -> str:
    """Return "; did you mean PATH?" for a path that does not exist, or "" without a similar one."""
    path = Path(text).expanduser()
    if path.exists():
        return ""
    names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


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
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path | str) -> None:
    """Write the names in a folder to disk: a rename survives a power loss only after that."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems cannot
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_files(folder: Path) -> None:
    """Write the files in a folder to disk, with their names."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(folder)


def write_json(path: Path | str, value: Any) -> None:
    """Replace a JSON file atomically."""
    write_text(path, json.dumps(to_jsonable(value), indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path | str, kind: type = object) -> Any:
    """Read a JSON file; refuse, by its name, a file that is not JSON or holds another kind."""
    try:
        value = parse_json(read_bytes(path))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON ({error}); restore the file") from None
    if not isinstance(value, kind):
        expected = {dict: "an object {...}", list: "a list [...]"}[kind]
        raise ValueError(
            f"{path}: expected {expected}, got {type(value).__name__}; restore the file"
        )
    return value


def parse_json(text: str | bytes, unique: bool = False) -> Any:
    """Parse JSON in UTF-8, with or without a byte order mark.

    Refuse nesting that a later step could not process, and halves of surrogate pairs, which no
    file can hold. `unique` refuses an object that has one key twice.
    """
    text = text if isinstance(text, str) else text.decode("utf-8-sig")
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys if unique else None)
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_JSON_DEPTH} levels") from None
    if text.count("[") + text.count("{") > MAX_JSON_DEPTH:
        _check_depth(value)
    if _SURROGATE.search(text):  # mostly halves of whole pairs, which json has joined
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"text with half of a surrogate pair, {error.object[error.start]!r}"
            ) from None
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} is given twice in one object")
    return values


def _check_depth(value: Any) -> None:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_JSON_DEPTH):
        items = [v.values() if isinstance(v, dict) else v for v in level]
        level = [v for inner in items for v in inner if isinstance(v, dict | list)]
        if not level:
            return
    raise ValueError(f"nested deeper than {MAX_JSON_DEPTH} levels")


def add_hash(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the JSON values of a record with their hash under the key "sha256"."""
    values = json.loads(json.dumps(values))
    return {**values, "sha256": _hash_values(values)}


def has_valid_hash(values: Any) -> bool:
    """Return whether a record is what `add_hash` returned."""
    if not isinstance(values, dict) or "sha256" not in values:
        return False
    rest = {key: value for key, value in values.items() if key != "sha256"}
    return _hash_values(rest) == values["sha256"]


def _hash_values(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def write_checked_json(path: Path | str, values: Mapping[str, Any]) -> None:
    """Replace a JSON object atomically; `read_checked_json` notices any later change."""
    write_json(path, add_hash(to_jsonable(values)))


def read_checked_json(path: Path | str) -> dict[str, Any]:
    """Read what `write_checked_json` wrote; refuse a file that was changed since."""
    values = read_json(path)
    if not has_valid_hash(values):
        raise ValueError(f"{path}: its values differ from their sha256; restore the file")
    return {key: value for key, value in values.items() if key != "sha256"}


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
        if self.path.exists() and not self.path.is_file():
            raise ValueError(f"{self.path}: expected a file, got a folder, a pipe or a device")
        self.file = self.path.open("a+b")
        self._hash = hashlib.sha256()  # of the first `_hashed` bytes
        self._hashed = 0
        self._end_at_line(self.file.seek(0, os.SEEK_END))

    def _end_at_line(self, end: int) -> None:
        """Cut the file behind its last complete line before a position."""
        while end:
            self.file.seek(end - 1)
            if self.file.read(1) == b"\n":
                break
            end -= 1
        self.file.truncate(end)
        if end < self._hashed:
            self._hash, self._hashed = hashlib.sha256(), 0

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

    def position(self) -> dict[str, Any]:
        """Write everything to disk; return the length in bytes, and a hash of the content."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.seek(self._hashed)
        while part := self.file.read(1 << 20):
            self._hash.update(part)
            self._hashed += len(part)
        return {"bytes": self._hashed, "sha256": self._hash.hexdigest()}

    def truncate(self, size: int) -> None:
        """Cut the file back to a length; a shorter file keeps its complete lines."""
        self._end_at_line(min(size, self.file.seek(0, os.SEEK_END)))

    def close(self) -> None:
        self.file.close()


def file_position(path: Path) -> dict[str, Any]:
    """Return the length in bytes and the hash of a file, as `LineFile.position` does."""
    content = path.read_bytes()
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def describe_change(path: Path, position: Mapping[str, Any]) -> str:
    """Say how a file differs from its recorded position; "" = its first bytes are the same."""
    size = position["bytes"]
    if not path.is_file():
        return f"{path} is missing; {size} bytes of it were recorded" if size else ""
    with path.open("rb") as file:
        total, left = hashlib.sha256(), size
        while part := file.read(min(left, 1 << 20)):
            total.update(part)
            left -= len(part)
    if left:
        return f"{path} has {size - left} bytes; {size} were recorded"
    if position.get("sha256", total.hexdigest()) != total.hexdigest():
        return f"{path} was changed: its first {size} bytes are not those that were recorded"
    return ""


def restore_line_ends(path: Path, position: Mapping[str, Any]) -> bool:
    """Undo a change of the line ends to CRLF, as spreadsheets make it, if that is all."""
    text = path.read_bytes().replace(b"\r\n", b"\n") if path.is_file() else b""
    start = hashlib.sha256(text[: position["bytes"]]).hexdigest()
    if not text or start != position.get("sha256"):
        return False
    write_text(path, text.decode(errors="replace"))
    return True


def read_jsonl(path: Path | str) -> list[dict[str, Any]]:
    """Read a jsonl file, except an incomplete last line; a missing file has no rows."""
    path = Path(path)
    return parse_jsonl(read_bytes(path), path) if path.exists() else []


def read_bytes(path: Path | str) -> bytes:
    """Return the content of a file; refuse a folder, and a pipe or device, which may not end."""
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: expected a file, got a folder, a pipe or a device")
    return path.read_bytes()


def parse_jsonl(text: bytes, path: Path) -> list[dict[str, Any]]:
    """Parse the complete lines of a jsonl file; `path` names it in errors."""
    rows = []
    for line in text[: text.rfind(b"\n") + 1].splitlines():
        try:
            row = parse_json(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise ValueError(
                f"{path}: expected one JSON object per line, got {line[:60]!r}; delete that line "
                "or restore the file"
            )
        rows.append(row)
    return rows


def folder_bytes(folder: Path | str) -> int:
    """Return the size of all files in a folder; others may add and remove some meanwhile."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.stat(os.path.join(place, name)).st_size
    return total
