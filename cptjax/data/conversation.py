"""Separate a conversation into messages for the chat template and its images and videos."""

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Any

from PIL import Image

from cptjax.common.images import ImageSource, open_image

Messages = Sequence[dict[str, Any]]
_HALF_PAIR = re.compile("[\ud800-\udfff]")


@dataclasses.dataclass(frozen=True)
class MediaSource:
    """An image or a video of a conversation, not yet opened."""

    kind: str  # image | video
    source: Any
    fps: float


def separate_media(
    messages: Messages, fps: float, reserved: re.Pattern
) -> tuple[list[dict[str, Any]], list[MediaSource]]:
    """Return the messages with an empty placeholder for each image or video, and these in order.

    reserved: the tokens that the text of a message must not contain.
    """
    bare: list[dict[str, Any]] = []
    media: list[MediaSource] = []
    for message in messages:
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise ValueError(
                f"a message: expected a dict with role and content, got {str(message)[:80]!r}"
            )
        content = message["content"]
        if isinstance(content, str):
            bare.append({**message, "content": refuse_reserved_tokens(content, reserved)})
            continue
        if isinstance(content, dict) or not isinstance(content, Iterable):
            raise ValueError(
                "the content of a message: expected a text or a list of parts, got "
                f"{str(content)[:80]}"
            )
        parts: list[dict[str, str]] = []
        for part in content:
            if isinstance(part, str):
                part = {"type": "text", "text": part}
            kind = part.get("type") if isinstance(part, dict) else part
            if kind == "text":
                if not isinstance(part.get("text"), str):
                    raise ValueError(
                        f"a part of type text: expected a text, got {str(part.get('text'))[:80]}"
                    )
                text = refuse_reserved_tokens(part["text"], reserved)
                parts.append({"type": "text", "text": text})
            elif kind in ("image", "video"):
                if part.get(kind) is None:
                    raise ValueError(f"an {kind} placeholder has no {kind}; add {kind}=... to it")
                media.append(MediaSource(kind, part[kind], float(part.get("fps", fps))))
                parts.append({"type": kind})
            else:
                raise ValueError(
                    f"a part of a message: expected type text, image or video, got {kind!r}"
                )
        bare.append({**message, "content": parts})
    if not bare:
        raise ValueError("got an empty conversation; expected at least one message")
    return bare, media


def refuse_reserved_tokens(text: str, reserved: re.Pattern) -> str:
    """Return a row's text; raise a ValueError if it contains a reserved token.

    Only the template and the processor write these; in the text of a row they would be read as
    turns and images.
    """
    if not isinstance(text, str):
        raise ValueError(f"a message: expected text, got {type(text).__name__}: {text!r:.60}")
    if half := _HALF_PAIR.search(text):
        raise ValueError(
            f"the text of a message contains {half[0]!r}, half of a surrogate pair, which is no "
            "character; remove it from the row"
        )
    token = reserved.search(text)
    if token:
        raise ValueError(
            f"the text of a message contains {token[0]}, which only the processor writes; "
            "remove it from the row"
        )
    return text


def open_conversation_images(messages: Messages) -> list[dict[str, Any]]:
    """Return the conversation with its images opened, and the frames of videos given as lists."""

    def open_part(part: dict[str, Any]) -> dict[str, Any]:
        if part["type"] == "image":
            return {**part, "image": _open_once(part["image"])}
        if part["type"] == "video" and isinstance(part["video"], list):
            return {**part, "video": [_open_once(frame) for frame in part["video"]]}
        return part

    return [
        turn
        if isinstance(turn["content"], str)
        else {**turn, "content": [open_part(part) for part in turn["content"]]}
        for turn in messages
    ]


def _open_once(source: ImageSource) -> ImageSource:
    return source if isinstance(source, Image.Image) else open_image(source)
