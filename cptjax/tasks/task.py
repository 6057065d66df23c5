"""What a task is, and the parts that datasets are built from: examples, prompts, options."""

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from cptjax.common.shuffle import permutation
from cptjax.tasks.scoring.extract import EXTRACTIONS
from cptjax.types import Example

SHORT_ANSWER_SUFFIX = "Answer the question using a single word or phrase."
OPTION_LETTER_SUFFIX = "Answer with the option's letter from the given choices directly."
OPTION_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclasses.dataclass(frozen=True)
class Task:
    """A dataset with its scorer, reward and prompt settings.

    The messages of its examples contain no instruction: the template adds the task's, which states
    the answers that the scorer accepts, and its own, which states the form of the response.
    """

    name: str
    # (split, root="", limit=None, seed=0) with split = train | validation | test
    load: Callable[..., Sequence[Example]]
    # a name in scoring/scorers.py, "file.py:function", or a function (prediction, answer, meta)
    scorer: str | Callable
    # "" = accuracy by `scorer` plus the template's format; else a name, "file.py:function" or a
    # function
    reward: str | Callable = ""
    template: str = ""  # "" = the config's
    extraction: str = ""  # "" = the template's
    # which answers the scorer accepts, such as "a single word or phrase"; in the prompt under every
    # template, after the row's own meta["answer_instruction"]
    answer_instruction: str = ""
    # the start of a response that evaluation can force, to score knowledge apart from format;
    # "" = the template's
    forced_prefix: str = ""
    also: tuple[str, ...] = ()  # further scorers to report
    # who reads a prompt with its response and gives the verdict that is scored: the Hugging Face
    # folder or hub id of a model, or "file.py:function"; "" = the response itself is scored
    judge: str = ""
    # the limits of the model's image size that the answers depend on; None = any
    pixels: tuple[int, int] | None = None
    # the side in pixels of the model's patches that the answers depend on; None = any
    patch: int | None = None

    def __post_init__(self) -> None:
        kinds: dict[str, Any] = {
            **dict.fromkeys(("scorer", "reward"), (str, Callable)),
            **dict.fromkeys(("template", "extraction", "answer_instruction"), str),
            **dict.fromkeys(("forced_prefix", "judge"), str),
            "also": (list, tuple),
        }
        for name, kind in kinds.items():
            value = getattr(self, name)
            if not isinstance(value, kind):
                expected = {str: "a text", (list, tuple): "a tuple of scorers"}.get(
                    kind, "a name, 'file.py:function' or a function"
                )
                raise ValueError(
                    f"tasks.{self.name}.{name}: expected {expected}, got {value!r:.200}"
                )
        if wrong := [each for each in self.also if not isinstance(each, str | Callable)]:
            raise ValueError(f"tasks.{self.name}.also: expected scorers, got {wrong[0]!r:.200}")
        limits = self.pixels
        if limits is not None and not (isinstance(limits, tuple) and len(limits) == 2):
            raise ValueError(f"tasks.{self.name}.pixels: expected (min, max), got {limits!r:.200}")
        if self.extraction and self.extraction not in EXTRACTIONS:
            raise ValueError(
                f"tasks.{self.name}.extraction={self.extraction!r}: expected one of "
                f"{', '.join(EXTRACTIONS)}"
            )


class Examples(Sequence[Example]):
    """Rows that become examples on access, so that no image is decoded before it is needed."""

    def __init__(
        self,
        task: str,
        split: str,
        rows: Sequence[Any],
        build: Callable[[Any], Example],
        order: Sequence[int] | None = None,
    ):
        self.task, self.split, self.rows, self.build = task, split, rows, build
        self.order = np.arange(len(rows)) if order is None else np.asarray(order, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.order)

    def where(self, index: int) -> tuple[str, int]:
        """Return the split and row of an example."""
        return f"{self.task}/{self.split}", int(self.order[index])

    def __getitem__(self, index: int) -> Example:
        if isinstance(index, slice):
            return Examples(self.task, self.split, self.rows, self.build, self.order[index])
        row = int(self.order[index])
        try:
            example = self.build(self.rows[row])
        except ValueError as error:
            raise ValueError(f"{self.task}/{self.split}, row {row}: {error}") from error
        return dataclasses.replace(
            example, id=f"{self.task}/{self.split}/{example.id or row}", task=self.task
        )


class Subset(Sequence[Example]):
    """The examples of a sequence at the given indices."""

    def __init__(self, examples: Sequence[Example], indices: Sequence[int]):
        self.examples, self.indices = examples, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Example:
        return self.examples[self.indices[index]]

    def where(self, index: int) -> tuple[str, int]:
        """Return the file and row of an example."""
        return self.examples.where(self.indices[index])


def limit_rows(order: Sequence[int], limit: int | None, seed: int) -> np.ndarray:
    """Choose `limit` of the indices by seed, and return them in order.

    A smaller limit chooses a subset of what a larger limit chooses.
    """
    order = np.asarray(order, dtype=np.int64)
    if limit is None or limit >= len(order):
        return order
    if limit < 0:
        raise ValueError(f"limit: expected a number of rows >= 0, got {limit}")
    return order[np.sort(permutation(len(order), (seed,))[:limit])]


def user_turn(
    text: str, images: Iterable[Any] = (), videos: Iterable[Any] = ()
) -> list[dict[str, Any]]:
    """Return a conversation of one user turn.

    Each <image> and <video> in the text is replaced by the next image or video.
    """
    return place_media([{"role": "user", "content": text}], list(images), list(videos))


def place_media(
    turns: Sequence[dict[str, Any]], images: Sequence[Any], videos: Sequence[Any]
) -> list[dict[str, Any]]:
    """Return the turns with their contents as lists of parts.

    Each <image> and <video> in a text becomes the next image or video. The content of a turn is a
    text, or a list of texts and finished parts; finished parts are left unchanged:

        [{"role": "user", "content": "a <image>?"}], ["cat.png"], []
        -> [{"role": "user", "content": [text "a ", image "cat.png", text "?"]}]
    """
    contents = [[t["content"]] if isinstance(t["content"], str) else t["content"] for t in turns]
    texts = "".join(piece for content in contents for piece in content if isinstance(piece, str))
    for kind, given in (("image", images), ("video", videos)):
        count = texts.count(f"<{kind}>")
        if count < len(given):
            hint = f"write <{kind}> where each belongs"
        elif count > len(given):
            hint = "each placeholder needs its own"
        else:
            continue
        raise ValueError(
            f"{count} <{kind}> in the prompt but {len(given)} {kind}(s) in the row; {hint}"
        )
    queues = {"image": iter(images), "video": iter(videos)}
    return [
        {
            **turn,
            "content": [part for piece in content for part in _fill_placeholders(piece, queues)],
        }
        for turn, content in zip(turns, contents, strict=True)
    ]


def _fill_placeholders(
    piece: str | dict[str, Any], queues: dict[str, Iterator[Any]]
) -> Iterator[dict[str, Any]]:
    """Yield the parts of a text, or a finished part as it is."""
    if isinstance(piece, dict):
        yield piece
        return
    for text in re.split(r"(<image>|<video>)", piece):
        if text in ("<image>", "<video>"):
            kind = text[1:-1]
            yield {"type": kind, kind: next(queues[kind])}
        elif text:
            yield {"type": "text", "text": text}


def conversation_images(messages: Sequence[dict[str, Any]]) -> Iterator[Any]:
    """Yield the images of a conversation in order, and the frames of videos given as lists."""
    for turn in messages:
        for part in [] if isinstance(turn["content"], str) else turn["content"]:
            if part["type"] == "image":
                yield part["image"]
            elif part["type"] == "video" and isinstance(part["video"], list):
                yield from part["video"]


def format_options(options: Sequence[str]) -> str:
    """Format options as lines such as "A. red"."""
    return "\n".join(
        f"{letter}. {option}" for letter, option in zip(OPTION_LETTERS, options, strict=False)
    )


def most_frequent(answers: Sequence[str]) -> str:
    """Return the most frequent answer, the first one of a tie."""
    return max(dict.fromkeys(answers), key=list(answers).count)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean X?" if a known word is close, else ""."""
    close = difflib.get_close_matches(word, list(known), 1)
    return f"; did you mean {close[0]!r}?" if close else ""


def refuse_old_name(setting: str, name: str) -> None:
    """Raise a ValueError that gives the new name of an old task or setting."""
    renamed = {"direct_suffix": "answer_instruction"}
    if re.fullmatch(r"drawn(_\w+)?", name):
        renamed[name] = name.replace("drawn", "synthetic", 1)
    if new := renamed.get(name):
        raise ValueError(f"{setting}: {name!r} was renamed; write {new!r}")


def select_columns(row: dict[str, Any], *columns: str) -> dict[str, Any]:
    """Return the named columns that are not None, for an example's meta."""
    return {name: row[name] for name in columns if row.get(name) is not None}


def example_text(example: Example) -> str:
    """Return an example's messages as text."""
    return "\n".join(content_text(turn["content"]) for turn in example.messages)


def content_text(content: str | list[dict[str, Any]]) -> str:
    """Return the text of a turn, with <image> and <video> in the places of images and videos."""
    if isinstance(content, str):
        return content
    return "".join(
        part["text"] if part["type"] == "text" else f"<{part['type']}>" for part in content
    )
