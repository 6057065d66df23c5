"""A conversation's messages as templates want them, and its pictures in order, not yet opened."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

# Only the template and the processor write these; in a row's own text they would be taken for turns and pictures.
RESERVED_TOKENS = re.compile(
    r"<\|(?:im_start|im_end|vision_start|vision_end|image_pad|video_pad)\|>"
)

Messages = Sequence[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class MediaSource:
    """An image or a video of a conversation, not yet opened."""

    kind: str
    source: Any
    fps: float


def separate_media(
    messages: Messages, spare: dict[str, list], fps: float
) -> tuple[list[dict[str, Any]], list[MediaSource]]:
    """(messages without pictures, as templates want them, and the pictures in order)."""
    clean, items = [], []
    waiting = {kind: list(given) for kind, given in spare.items()}
    for message in messages:
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise ValueError(
                f"a message is a dict with role and content; {str(message)[:80]!r} came"
            )
        content = message["content"]
        parts = [
            _separate_part(part, waiting, items, fps)
            for part in ([content] if isinstance(content, str) else content)
        ]
        clean.append(
            {**message, "content": parts[0]["text"] if isinstance(content, str) else parts}
        )
    for kind, left in waiting.items():
        if left:
            n = len(spare[kind])
            raise ValueError(
                f"{n} {kind}s came for {n - len(left)} {kind} placeholders; give as many as the messages have"
            )
    if not clean:
        raise ValueError("an empty conversation came; expected at least one message")
    return clean, items


def refuse_special_tokens(text: str) -> str:
    """A row's own text, without the tokens that only templates write."""
    found = RESERVED_TOKENS.search(text)
    if found:
        raise ValueError(
            f"{found[0]} stands in the text of a message; only the processor writes it: take it out of the row"
        )
    return text


def _separate_part(
    part: Any, waiting: dict[str, list], items: list[MediaSource], fps: float
) -> dict[str, str]:
    part = {"type": "text", "text": part} if isinstance(part, str) else part
    kind = part.get("type")
    if kind == "text":
        return {"type": "text", "text": refuse_special_tokens(part["text"])}
    if kind not in waiting:
        raise ValueError(f"a part of a message is of type text, image or video; {kind!r} came")
    source = part.get(kind)
    if source is None:
        if not waiting[kind]:
            raise ValueError(
                f"an {kind} placeholder has no {kind}; give as many {kind}s as the messages have placeholders"
            )
        source = waiting[kind].pop(0)
    items.append(MediaSource(kind, source, float(part.get("fps", fps))))
    return {"type": kind}


def strip_media(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The conversation without its pictures, as the chat template takes it."""
    strip = lambda part: part if part["type"] == "text" else {"type": part["type"]}
    return [
        turn
        if isinstance(turn["content"], str)
        else {**turn, "content": [strip(p) for p in turn["content"]]}
        for turn in messages
    ]
