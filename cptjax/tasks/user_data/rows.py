"""Build an example from a row of a user's table: its turns, images, videos and answer."""

import dataclasses
import functools
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from cptjax.common import files
from cptjax.common.images import find_file
from cptjax.tasks.scoring.choice import gold_letter
from cptjax.tasks.task import place_media
from cptjax.tasks.user_data.readers import IMAGE_SUFFIXES, DataTable
from cptjax.types import Example

CHAT_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}


@dataclasses.dataclass(frozen=True)
class UserTaskSpec:
    """The settings of a user's task that say which rows it has and how to read them."""

    name: str
    sources: tuple[tuple[str, str | float], ...]  # (split, file or share of train)
    columns: tuple[tuple[str, str], ...] = ()  # (role, column)
    prompt: str = ""
    image_root: str = ""
    outside_images: tuple[str, ...] = ()  # see data.outside_images in configs/base.py
    limit: int | None = None
    needs_answer: bool = True
    scorer: str | Callable = "exact"  # says which answers a row may have


@dataclasses.dataclass(frozen=True)
class UserRow:
    """One row of a table."""

    table: DataTable
    index: int

    @property
    def file(self) -> str:
        return self.table.file

    @property
    def number(self) -> int:
        return self.table.numbers[self.index]

    def read_id(self) -> str:
        """Return the row's own id, or its file and number."""
        return _row_id(self, self.table.rows[self.index].get(self.table.roles.get("id")))


def _row_id(row: UserRow, value: Any) -> str:
    if value in (None, ""):
        return f"{Path(row.file).name}:{row.number}"
    if not isinstance(value, str | int):
        raise ValueError(f"the id: expected text or a whole number, got {value!r:.60}")
    return str(value)


def build_user_example(spec: UserTaskSpec, row: UserRow) -> Example:
    """Build the example of a row; its images are located but not opened."""
    table, columns = row.table, row.table.rows[row.index]
    cells = {role: columns.get(name) for role, name in table.roles.items()}
    turns = read_turns(spec, cells, columns)
    answer, target = cells.get("answer"), cells.get("target")
    if turns[-1]["role"] == "assistant":
        content = turns.pop()["content"]
        if not isinstance(content, str):
            parts = [part if isinstance(part, dict) else {"text": part} for part in content]
            if any(part.get("type", "text") != "text" for part in parts):
                raise ValueError("messages: expected only text in the last response")
            content = "".join(_read_text(part.get("text")) for part in parts)
        target = _first_given(target, content)
    answer = _first_given(answer, target)
    if spec.scorer == "mcq_letter" and answer is not None:
        answer = gold_letter(answer)
    target = _first_given(target, answer)
    if answer is None and spec.needs_answer:
        raise ValueError("the answer is empty")
    if not turns or turns[-1]["role"] != "user":
        raise ValueError(
            "expected a conversation that ends with a user's turn, or with a user's turn and the "
            "response to it"
        )
    return Example(
        _row_id(row, cells.get("id")),
        load_media(turns, cells, MediaFolders(table.folder, table.image_folders)),
        read_answer(spec, answer),
        read_target(spec, target),
        spec.name,
        meta={
            name: value
            for name, value in columns.items()
            if name not in table.roles.values() and not isinstance(value, bytes)
        },
    )


def read_turns(
    spec: UserTaskSpec, cells: Mapping[str, Any], columns: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return the turns of a row: the task's prompt filled in, its messages or its prompt column."""
    messages = cells.get("messages")
    messages = parse_json_list(messages) if isinstance(messages, str) else messages
    if spec.prompt:
        fill = lambda match: str(columns.get(match[1], ""))
        return [{"role": "user", "content": re.sub(r"\{(\w+)\}", fill, spec.prompt)}]
    if not messages:
        if clean_answer(cells.get("prompt")) is None:
            raise ValueError("the prompt is empty")
        return [{"role": "user", "content": _read_text(cells["prompt"])}]
    if not isinstance(messages, list) or not all(isinstance(turn, dict) for turn in messages):
        raise ValueError("messages: expected a list of turns {role, content}")
    turns = []
    for turn in messages:
        role = turn.get("role", turn.get("from"))
        content = turn.get("content", turn.get("value"))
        if not isinstance(role, str) or role not in CHAT_ROLES:
            raise ValueError(f"messages: expected the role system, user or assistant, got {role!r}")
        if not isinstance(content, (str, list)):
            raise ValueError(
                "messages: expected text or a list of parts as content, "
                f"got {type(content).__name__}"
            )
        turns.append({"role": CHAT_ROLES[role], "content": content})
    return turns


@dataclasses.dataclass(frozen=True)
class MediaFolders:
    """Where the images and videos of a row lie."""

    start: Path  # of relative paths
    allowed: tuple[Path, ...]  # without symbolic links

    def find(self, path: str) -> Path:
        """Return a file; one outside of the allowed folders, also by a link, is an error."""
        found = find_file(path, self.start)
        real = _real_folder(found.parent) / found.name
        real = Path(os.path.realpath(real)) if real.is_symlink() else real
        if not any(real.is_relative_to(folder) for folder in self.allowed):
            raise ValueError(
                f"{found} is {real}, outside of the folder of the data ({self.start}); if the "
                "rows may read it, name its folder in data.outside_images"
            )
        return found


def real_folders(folders: Iterable[str | Path]) -> tuple[Path, ...]:
    """Return folders without symbolic links and repetitions."""
    return tuple(dict.fromkeys(_real_folder(Path(folder).expanduser()) for folder in folders))


@functools.lru_cache(maxsize=4096)
def _real_folder(folder: Path) -> Path:
    return Path(os.path.realpath(folder))


def load_media(
    turns: list[dict[str, Any]], cells: Mapping[str, Any], folders: MediaFolders
) -> list[dict[str, Any]]:
    """Return the turns with their images and videos.

    The images and videos of the columns `images` and `videos` fill, in order, each <image> and
    <video> in a text and each part that has none of its own.
    """
    images = [locate_image(image, folders) for image in as_list(cells.get("images"))]
    sources = as_list(cells.get("videos"))
    if sources and all(
        isinstance(source, str) and Path(source).suffix.lower() in IMAGE_SUFFIXES
        for source in sources
    ):
        sources = [sources]  # a flat list of image files is one video, frame by frame
    videos = [load_video(source, folders) for source in sources]
    contents = [
        [
            _read_part(part, folders)
            for part in ([turn["content"]] if isinstance(turn["content"], str) else turn["content"])
        ]
        for turn in turns
    ]
    return place_media(
        [{**turn, "content": parts} for turn, parts in zip(turns, contents, strict=True)],
        images,
        videos,
    )


def _read_text(value: Any) -> str:
    """Return a text, which may be a number; refuse other kinds."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, str | int | float)):
        raise ValueError(f"expected text, got {type(value).__name__}: {value!r:.60}")
    return "" if value is None else str(value)


def _read_part(part: Any, folders: MediaFolders) -> str | dict[str, Any]:
    """Return a text with placeholders, or a finished part if it has its own image or video."""
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
    if kind not in ("text", "image", "video"):
        raise ValueError(f"messages: expected a part of type text, image or video, got {kind!r}")
    value = part.get(kind)
    if kind == "text":
        return _read_text(value)
    if not value:
        return f"<{kind}>"
    if kind == "image":
        return {"type": "image", "image": locate_image(value, folders)}
    return {"type": "video", "video": load_video(value, folders)}


def locate_image(source: Any, folders: MediaFolders) -> Any:
    """Return the path or the bytes of an image, to open it later.

    A missing file is an error.
    """
    if isinstance(source, dict) and not isinstance(source.get("bytes"), bytes | None):
        raise ValueError(f"an image: expected bytes, got {source['bytes']!r:.60}")
    value = source.get("path") if isinstance(source, dict) and not source.get("bytes") else source
    if isinstance(value, str) and value and not value.startswith("data:image/"):
        return folders.find(value)
    if not value:
        raise ValueError(f"an image: expected a path or bytes, got {source!r}")
    return source


def load_video(video: Any, folders: MediaFolders) -> Any:
    """Return the path of a video file, or the frames of a list or folder of images."""
    if isinstance(video, dict):
        video = video.get("path") or video.get("video")
    if isinstance(video, str) and Path(folders.start, video).is_dir():
        video = sorted(
            str(path)
            for path in Path(folders.start, video).iterdir()
            if path.suffix.lower() in IMAGE_SUFFIXES
        )
    if isinstance(video, str) and video:
        path = folders.find(video)
        if path.stat().st_size == 0:
            raise ValueError(f"{path}: expected a video, got an empty file")
        return str(path)
    if not isinstance(video, (list, tuple)) or not video:
        raise ValueError(
            f"a video: expected a file, or a list or folder of frames, got {video!r:.80}"
        )
    return [locate_image(frame, folders) for frame in video]


def as_list(value: Any) -> list[Any]:
    """Convert a cell to a list: it may be empty, one value, a list, or a list in JSON (csv)."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = parse_json_list(value)
    if value is None or (isinstance(value, str) and not value.strip()):
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def parse_json_list(text: str) -> list[Any]:
    try:
        value = files.parse_json(text)
    except ValueError as error:
        raise ValueError(f"expected a list in JSON, got {text!r:.60} ({error})") from error
    return value if isinstance(value, list) else [value]


def _first_given(*cells: Any) -> Any:
    """Return the first cell that is not empty, or None."""
    return next((cell for cell in cells if clean_answer(cell) is not None), None)


def read_answer(spec: UserTaskSpec, cell: Any) -> Any:
    """Return the answer of a cell in the form that the task's scorer reads; "" if it has none."""
    answer = clean_answer(cell)
    if answer is None:
        return ""
    return cell if spec.scorer == "json" and not isinstance(cell, str) else answer


def read_target(spec: UserTaskSpec, cell: Any) -> str:
    """Return the response that SFT trains on; "" if there is none.

    Of several texts it is the first. A list of numbers, such as a box, is one answer.
    """
    answer = clean_answer(cell)
    if answer is None:
        return ""
    if spec.scorer == "json" and not isinstance(cell, str):
        return json.dumps(cell, ensure_ascii=False)
    if isinstance(cell, list | tuple) and all(type(item) in (int, float) for item in cell):
        return str(list(cell))
    if isinstance(answer, list):
        return answer[0]
    return answer if isinstance(answer, str) else ""


def clean_answer(answer: Any) -> Any:
    """Return an answer as text, a list of texts, or an object (for a user's own reward).

    Return None if it is empty.
    """
    if isinstance(answer, dict):
        return answer or None
    if isinstance(answer, (list, tuple)):
        return [str(item).strip() for item in answer if clean_answer(item) is not None] or None
    if answer is None or (isinstance(answer, float) and math.isnan(answer)):
        return None
    if isinstance(answer, float) and math.isinf(answer):
        raise ValueError("the answer is an infinite number")
    return str(answer).strip() or None
