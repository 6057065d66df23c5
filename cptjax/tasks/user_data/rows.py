"""One row of a user's table as an example: its turns, its images and videos in their places, its answer."""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cptjax.common.images import find_file
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
OpenMedia = Callable[
    [Any, Path], Any
]  # (an image's source, the folder of relative paths) -> what the messages hold


@dataclasses.dataclass(frozen=True)
class UserTaskSpec:
    """Where a user's data lies and how its rows are read."""

    name: str
    sources: tuple[tuple[str, str | float], ...]
    columns: tuple[tuple[str, str], ...] = ()
    prompt: str = ""
    image_root: str = ""
    limit: int | None = None
    needs_answer: bool = True


@dataclasses.dataclass(frozen=True)
class RenamedRows(Sequence[dict[str, Any]]):
    """Rows with their columns under the names of their roles, the rest under "meta"; `row` is the row as it was."""

    rows: Sequence[dict[str, Any]]
    roles: dict[str, str]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        used = set(self.roles.values())
        return {
            **{role: row.get(name) for role, name in self.roles.items()},
            "row": row,
            "meta": {
                name: value
                for name, value in row.items()
                if name not in used and not isinstance(value, bytes)
            },
        }


def build_user_example(
    spec: UserTaskSpec, table: DataTable, row: int, opened: OpenMedia
) -> Example:
    """Turns a row into an example."""
    content = table.rows[row]
    turns, answer, target = (
        row_turns(spec, content),
        clean_answer(content.get("answer")),
        clean_answer(content.get("target")),
    )
    if turns[-1]["role"] == "assistant":
        said = turn_text(turns.pop()["content"])
        target = said if target is None else target
    answer = target if answer is None else answer
    if answer is None and spec.needs_answer:
        raise ValueError("the answer is empty")
    if not turns or turns[-1]["role"] != "user":
        raise ValueError(
            "the conversation must end with a user's turn, or with one and the answer to it"
        )
    gold = answer if target is None else target
    gold = gold[0] if isinstance(gold, list) else gold
    messages = place_row_media(turns, content, table.base, opened)
    name = row_id(table, row, content)
    return Example(
        name,
        messages,
        "" if answer is None else answer,
        gold if isinstance(gold, str) else "",
        spec.name,
        content["meta"],
    )


def row_id(table: DataTable, row: int, content: dict[str, Any] | None = None) -> str:
    given = (content or table.rows[row]).get("id")
    return f"{Path(table.file).name}:{table.numbers[row]}" if given in (None, "") else str(given)


def row_turns(spec: UserTaskSpec, content: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the turns of a row: its messages, or its prompt as one turn."""
    messages = content.get("messages")
    messages = parse_json_list(messages) if isinstance(messages, str) else messages
    if messages and not spec.prompt:
        if not isinstance(messages, list) or not all(isinstance(turn, dict) for turn in messages):
            raise ValueError("messages must be a list of turns {role, content}")
        return [_read_turn(turn) for turn in messages]
    if spec.prompt:
        return [
            {
                "role": "user",
                "content": re.sub(
                    r"\{(\w+)\}", lambda m: str(content["row"].get(m[1], "")), spec.prompt
                ),
            }
        ]
    if clean_answer(content.get("prompt")) is None:
        raise ValueError("the prompt is empty")
    return [{"role": "user", "content": str(content["prompt"])}]


def _read_turn(turn: dict[str, Any]) -> dict[str, Any]:
    role, said = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if role not in CHAT_ROLES:
        raise ValueError(f"a turn's role must be system, user or assistant; {role!r} came")
    if not isinstance(said, (str, list)):
        raise ValueError(
            f"a turn's content must be text or a list of parts; {type(said).__name__} came"
        )
    return {"role": CHAT_ROLES[role], "content": said}


def place_row_media(
    turns: list[dict[str, Any]], content: dict[str, Any], base: Path, opened: OpenMedia
) -> list[dict[str, Any]]:
    """Puts images and videos where the turns ask for them: at <image> in text, or at a part that brings none of its own."""
    images = [opened(image, base) for image in as_list(content.get("images"))]
    videos = [video_frames(video, base, opened) for video in row_videos(content.get("videos"))]
    pieces = [{**turn, "content": _split_turn(turn["content"], base, opened)} for turn in turns]
    return place_media(pieces, images, videos)


def _split_turn(said: str | list[Any], base: Path, opened: OpenMedia) -> list[str | dict[str, Any]]:
    """Writes a turn as texts with placeholders, and parts that bring their own image or video."""
    pieces: list[str | dict[str, Any]] = []
    for part in [said] if isinstance(said, str) else said:
        kind = (
            part.get("type", "text")
            if isinstance(part, dict)
            else "text"
            if isinstance(part, str)
            else "?"
        )
        own = part.get(kind) if isinstance(part, dict) else part
        if kind not in ("text", "image", "video"):
            raise ValueError(f"a part's type must be text, image or video; {kind!r} came")
        if kind == "text":
            pieces.append(str(own or ""))
        else:
            made = own and (
                opened(own, base) if kind == "image" else video_frames(own, base, opened)
            )
            pieces.append({"type": kind, kind: made} if own else f"<{kind}>")
    return pieces


def locate_image(source: Any, base: Path) -> Any:
    """Stands in for opening an image: checks that it is there, and no more."""
    inside = source.get("path") if isinstance(source, dict) and not source.get("bytes") else source
    if isinstance(inside, str) and inside and not inside.startswith("data:image/"):
        return find_file(inside, base)
    if not inside:
        raise ValueError(f"an image is a path or bytes, but {source!r} came")
    return source


def video_frames(video: Any, base: Path, opened: OpenMedia) -> Any:
    """Returns a video file's path, or the frames of a list or of a folder of images."""
    if isinstance(video, dict):
        video = video.get("path") or video.get("video")
    if isinstance(video, str) and Path(base, video).is_dir():
        video = sorted(
            str(path)
            for path in Path(base, video).iterdir()
            if path.suffix.lower() in IMAGE_SUFFIXES
        )
    if isinstance(video, str) and video:
        path = find_file(video, base)
        if path.stat().st_size == 0:
            raise ValueError(f"{path}: an empty file, no video")
        return str(path)
    if not isinstance(video, (list, tuple)) or not video:
        raise ValueError(
            f"a video is a file, or a list or folder of frames, but {video!r:.80} came"
        )
    return [opened(frame, base) for frame in video]


def row_videos(value: Any) -> list[Any]:
    """Returns a row's videos; a flat list of image files is one video, frame by frame."""
    videos = as_list(value)
    flat = bool(videos) and all(
        isinstance(video, str) and Path(video).suffix.lower() in IMAGE_SUFFIXES for video in videos
    )
    return [videos] if flat else videos


def as_list(value: Any) -> list[Any]:
    """Returns a cell that may hold none, one, a list or a list written as JSON (csv) as a list."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = parse_json_list(value)
    if value is None or (isinstance(value, str) and not value.strip()):
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def parse_json_list(text: str) -> list[Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"a list in JSON is expected, {text!r:.60} came ({error})") from error
    return value if isinstance(value, list) else [value]


def clean_answer(answer: Any) -> Any:
    """Returns an answer as text (or a list of texts, or an object for a reward of one's own); None = empty."""
    if isinstance(answer, dict):
        return answer or None
    if isinstance(answer, (list, tuple)):
        return [str(item).strip() for item in answer if clean_answer(item) is not None] or None
    if answer is None or (isinstance(answer, float) and math.isnan(answer)):
        return None
    return str(answer).strip() or None


def turn_text(said: str | list[dict[str, Any]]) -> str | None:
    return clean_answer(
        said if isinstance(said, str) else "".join(str(part.get("text") or "") for part in said)
    )
