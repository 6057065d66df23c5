"""Conversations -> tokens, positions and patches: chat template, placeholders, loss masks, video frames."""

import collections
import dataclasses
import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from cptjax import patches, processor_files, tokenizer, video
from cptjax.batching import Encoded, Media, Shape, bucket, collate, ladder, widest
from cptjax.images import open_image
from cptjax.model.config import Config, located
from cptjax.model.positions import mrope
from cptjax.patches import Grid, Pixels

__all__ = ["Encoded", "Media", "Processor", "Shape", "bucket", "collate", "ladder", "load", "widest"]

IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"
# Only the template and the processor write these; in a row's own text they would be taken for turns and pictures.
RESERVED = re.compile(r"<\|(?:im_start|im_end|vision_start|vision_end|image_pad|video_pad)\|>")
ANSWER = re.compile(r"(?<=<\|im_start\|>assistant\n)(.*?<\|im_end\|>)", re.DOTALL)  # odd pieces of a split are the assistants'

Messages = Sequence[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class _Item:
    """An image or a video of a conversation, not yet opened."""

    kind: str
    source: Any
    fps: float


@dataclasses.dataclass(frozen=True)
class _Text:
    """A rendered conversation: one token per placeholder."""

    tokens: np.ndarray
    loss_mask: np.ndarray
    items: list[_Item]


@dataclasses.dataclass(frozen=True)
class Processor:
    """A checkpoint's tokenizer, chat template and pixel limits."""

    tokenizer: PreTrainedTokenizerBase
    template: str
    cfg: Config
    pixels: Pixels
    source: Path | None = None
    fps: float = video.FPS  # frames shown of a second of video

    @property
    def min_pixels(self) -> int:
        return self.pixels.min_pixels

    @property
    def max_pixels(self) -> int:
        return self.pixels.max_pixels

    def render(self, messages: Messages, generation: bool | None = None) -> str:
        """The conversation as the chat template writes it; by default the assistant is asked to speak unless it spoke last."""
        generation = messages[-1]["role"] != "assistant" if generation is None else generation
        try:
            return self.tokenizer.apply_chat_template(
                list(messages), chat_template=self.template, tokenize=False, add_generation_prompt=generation
            )
        except (jinja2.TemplateError, KeyError, TypeError) as e:
            raise ValueError(f"the chat template cannot render this conversation: {' '.join(str(e).split())[:160]}") from e

    def encode(
        self,
        messages: Messages,
        *,
        images: Sequence = (),
        videos: Sequence = (),
        generation: bool | None = None,
        prefix: str = "",
        limit: int | None = None,
    ) -> Encoded:
        """A conversation with its pictures; `images` and `videos` fill, in order, parts of messages that carry none.

        prefix: how the answer begins; it is part of the prompt.
        """
        text = self._text(messages, images, videos, generation, prefix)
        media = [self._open(item) for item in text.items]
        grids = [m.grid for m in media]
        tokens, mask = self.expand(text.tokens, text.loss_mask, grids)
        _check_limit(len(tokens), grids, self.pixels.merge, limit)
        types = np.where(tokens == self.cfg.image_token, 1, np.where(tokens == self.cfg.video_token, 2, 0)).astype(np.int8)
        seconds = [m.seconds for m, item in zip(media, text.items, strict=True) if item.kind == "video"]
        positions, _ = mrope(types, grids, seconds, self.cfg.vision)
        return Encoded(tokens, types, positions, mask, tuple(media), self.cfg)

    def answered(self, prompt: Encoded, text: str, limit: int | None = None) -> Encoded:
        """A prompt with its answer, as `encode` makes it of both; pictures are not opened again."""
        answer, end = self.ids(_own(text) + self._closing[0]), self.ids(self._closing[1])
        more = len(answer) + len(end)
        tokens = np.concatenate([prompt.tokens, np.array(answer + end, np.int32)])
        _check_limit(len(tokens), [m.grid for m in prompt.media], self.pixels.merge, limit)
        types = np.concatenate([prompt.types, np.zeros(more, np.int8)])
        after = prompt.positions.max() + 1 + np.arange(more, dtype=prompt.positions.dtype)
        positions = np.concatenate([prompt.positions, np.broadcast_to(after, (3, more))], 1)
        mask = np.concatenate([prompt.loss_mask, np.arange(more) < len(answer)])
        return Encoded(tokens, types, positions, mask, prompt.media, self.cfg)

    @functools.cached_property
    def _closing(self) -> tuple[str, str]:
        """What the chat template writes at the end of an answer, and after it."""
        turn = self.render([{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}], generation=False)
        *_, answer, after = ANSWER.split(turn)
        return answer.removeprefix("!"), after

    def measure(
        self, messages: Messages, *, images: Sequence = (), videos: Sequence = (), generation: bool | None = None, prefix: str = ""
    ) -> tuple[int, list[Grid]]:
        """(number of tokens, grid of each picture), from image headers alone."""
        text = self._text(messages, images, videos, generation, prefix)
        grids = [self._look(item) for item in text.items]
        return len(self.expand(text.tokens, text.loss_mask, grids)[0]), grids

    def expand(self, tokens: np.ndarray, mask: np.ndarray, grids: Sequence[Grid]) -> tuple[np.ndarray, np.ndarray]:
        """Each placeholder becomes as many tokens as its picture has merged patches; nothing else in the package does this."""
        repeat = np.ones(len(tokens), np.int64)
        repeat[(tokens == self.cfg.image_token) | (tokens == self.cfg.video_token)] = [patches.merged(g, self.pixels.merge) for g in grids]
        return np.repeat(tokens, repeat), np.repeat(mask, repeat)

    def ids(self, text: str) -> list[int]:
        """The tokens of plain text."""
        return self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids

    def opening(self, text: str) -> list[int]:
        """The tokens of a text that goes on: those that begin within it when another word follows."""
        both = self.tokenizer.backend_tokenizer.encode(f"{text} x", add_special_tokens=False)
        return [token for token, (start, _) in zip(both.ids, both.offsets, strict=True) if start < len(text)]

    def decode(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """Texts without special tokens."""
        return self.tokenizer.batch_decode([list(map(int, row)) for row in rows], skip_special_tokens=True)

    def save(self, folder: str | Path) -> None:
        """Tokenizer, template and pixel limits as files that transformers and vLLM read."""
        folder = Path(folder)
        if self.source is None:
            self.tokenizer.save_pretrained(folder)
        else:
            processor_files.copy(self.source, folder)
        processor_files.write(folder, self.pixels, self.template)

    def _text(self, messages: Messages, images: Sequence, videos: Sequence, generation: bool | None, prefix: str) -> _Text:
        clean, items = _flatten(messages, {"image": list(images), "video": list(videos)}, self.fps)
        pieces = ANSWER.split(self.render(clean, generation))
        turns = sum(m["role"] == "assistant" for m in clean)
        if len(pieces) // 2 != turns:
            raise ValueError(f"the chat template wrote {len(pieces) // 2} ChatML assistant turns for {turns}; use a ChatML template")
        # An answer is tokenised apart from its prompt, as when it is sampled: no token spans the two.
        ids = [self.ids(piece) for piece in pieces]
        ids[-1] = ids[-1] + self.opening(_own(prefix))
        mask = np.repeat(np.arange(len(ids)) % 2 == 1, [len(x) for x in ids])
        tokens = np.array([t for x in ids for t in x], np.int32)
        kinds = {self.cfg.image_token: "image", self.cfg.video_token: "video"}
        written = [kinds[t] for t in tokens.tolist() if t in kinds]
        if written != [item.kind for item in items]:
            counts = collections.Counter(written)
            raise ValueError(
                f"the chat template wrote placeholders for {counts['image']} images and {counts['video']} videos; "
                f"the conversation has {len(items)} pictures in another order or number"
            )
        return _Text(tokens, mask, items)

    def _look(self, item: _Item) -> Grid:
        if item.kind == "image":
            return self.pixels.grid(*patches.dimensions(item.source))
        clip = video.look(item.source, item.fps, self.pixels.temporal)
        return self.pixels.grid(*clip.size, len(clip.indices))

    def _open(self, item: _Item) -> Media:
        if item.kind == "image":
            return Media(*patches.cut([open_image(item.source)], self.pixels), self.pixels)
        clip = video.look(item.source, item.fps, self.pixels.temporal)
        return Media(*patches.cut(video.frames(item.source, clip), self.pixels), self.pixels, self.pixels.temporal / clip.fps)


def _flatten(messages: Messages, spare: dict[str, list], fps: float) -> tuple[list[dict[str, Any]], list[_Item]]:
    """(messages without pictures, as templates want them, and the pictures in order)."""
    clean, items = [], []
    waiting = {kind: list(given) for kind, given in spare.items()}
    for message in messages:
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise ValueError(f"a message is a dict with role and content; {str(message)[:80]!r} came")
        content = message["content"]
        parts = [_part(part, waiting, items, fps) for part in ([content] if isinstance(content, str) else content)]
        clean.append({**message, "content": parts[0]["text"] if isinstance(content, str) else parts})
    for kind, left in waiting.items():
        if left:
            n = len(spare[kind])
            raise ValueError(f"{n} {kind}s came for {n - len(left)} {kind} placeholders; give as many as the messages have")
    if not clean:
        raise ValueError("an empty conversation came; expected at least one message")
    return clean, items


def _own(text: str) -> str:
    """A row's own text, without the tokens that only templates write."""
    found = RESERVED.search(text)
    if found:
        raise ValueError(f"{found[0]} stands in the text of a message; only the processor writes it: take it out of the row")
    return text


def _part(part: Any, waiting: dict[str, list], items: list[_Item], fps: float) -> dict[str, str]:
    part = {"type": "text", "text": part} if isinstance(part, str) else part
    kind = part.get("type")
    if kind == "text":
        return {"type": "text", "text": _own(part["text"])}
    if kind not in waiting:
        raise ValueError(f"a part of a message is of type text, image or video; {kind!r} came")
    source = part.get(kind)
    if source is None:
        if not waiting[kind]:
            raise ValueError(f"an {kind} placeholder has no {kind}; give as many {kind}s as the messages have placeholders")
        source = waiting[kind].pop(0)
    items.append(_Item(kind, source, float(part.get("fps", fps))))
    return {"type": kind}


def _check_limit(n: int, grids: Sequence[Grid], merge: int, limit: int | None) -> None:
    if limit is not None and n > limit:
        seen = sum(patches.merged(g, merge) for g in grids)
        raise ValueError(
            f"a prompt of {n} tokens ({seen} of them for {len(grids)} pictures) is over the limit of {limit}; "
            "raise data.prompt_limit or lower model.max_pixels"
        )


def load(folder: str | Path | None, cfg: Config, min_pixels: int | None = None, max_pixels: int | None = None) -> Processor:
    """The processor of a Hugging Face checkpoint (folder or hub id), or without one the project's own small one."""
    source = None if folder is None else located(folder)
    pixels = processor_files.pixels(source, cfg, min_pixels, max_pixels)
    if source is None:
        words, template = tokenizer.build(cfg.text.vocab), tokenizer.TEMPLATE
    else:
        try:
            words = AutoTokenizer.from_pretrained(source, trust_remote_code=False, local_files_only=True)
        except (OSError, ValueError, KeyError, ImportError, AttributeError) as e:
            reason = str(e).splitlines()[0][:120]
            raise ValueError(f"{source} has no tokenizer that can be read ({reason}); copy the tokenizer files there") from e
        words.backend_tokenizer.no_truncation()  # as some files ask for
        words.backend_tokenizer.no_padding()
        template = processor_files.template(source, words.chat_template)
    expected = {IMAGE: cfg.image_token, VIDEO: cfg.video_token, "<|vision_start|>": cfg.vision_start, "<|vision_end|>": cfg.vision_end}
    for token, number in expected.items():
        if words.convert_tokens_to_ids(token) != number:
            whose = f"{source}'s tokenizer" if source else "the project's own tokenizer"
            raise ValueError(f"{whose} gives {token} the id {words.convert_tokens_to_ids(token)}; the model's config says {number}")
    return Processor(words, template, cfg, pixels, source)
