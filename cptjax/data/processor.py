"""Conversations -> tokens, positions and patches: chat template, placeholders, loss masks, video frames."""

import collections
import dataclasses
import functools
import re
from collections.abc import Sequence
from pathlib import Path

import jinja2
import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from cptjax.common import images
from cptjax.common.images import Grid, ImageSettings, open_image
from cptjax.data import image_patches, processor_files, tiny_tokenizer, video
from cptjax.data.collate import EncodedConversation, Media
from cptjax.data.conversation import MediaSource, Messages, refuse_special_tokens, separate_media
from cptjax.models.config import ModelConfig, locate_checkpoint
from cptjax.models.positions import mrope

IMAGE_TOKEN, VIDEO_TOKEN = "<|image_pad|>", "<|video_pad|>"
ASSISTANT_TURN = re.compile(
    r"(?<=<\|im_start\|>assistant\n)(.*?<\|im_end\|>)", re.DOTALL
)  # odd pieces of a split are the assistants'
MAX_CACHED_LAYOUTS = 512  # kept of those made last

MediaGrid = tuple[
    str, Grid, float
]  # of a picture: its kind, its grid, and seconds from one frame pair of a video to the next


@dataclasses.dataclass(frozen=True)
class TokenLayout:
    """A conversation's tokens and where they stand: all but its pixels."""

    tokens: np.ndarray
    types: np.ndarray
    positions: np.ndarray
    loss_mask: np.ndarray


@dataclasses.dataclass(frozen=True)
class Processor:
    """A checkpoint's tokenizer, chat template and pixel limits."""

    tokenizer: PreTrainedTokenizerBase
    template: str
    cfg: ModelConfig
    pixels: ImageSettings
    source: Path | None = None
    fps: float = video.DEFAULT_FPS  # frames shown of a second of video

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
                list(messages),
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=generation,
            )
        except (jinja2.TemplateError, KeyError, TypeError) as e:
            raise ValueError(
                f"the chat template cannot render this conversation: {' '.join(str(e).split())[:160]}"
            ) from e

    def encode(
        self,
        messages: Messages,
        *,
        images: Sequence = (),
        videos: Sequence = (),
        generation: bool | None = None,
        prefix: str = "",
        limit: int | None = None,
    ) -> EncodedConversation:
        """A conversation with its pictures; `images` and `videos` fill, in order, parts of messages that carry none.

        prefix: how the answer begins; it is part of the prompt.
        """
        clean, pictures = separate_media(messages, {"image": images, "video": videos}, self.fps)
        media = tuple(self._open(picture) for picture in pictures)
        laid = self._laid(
            clean,
            generation,
            prefix,
            [(p.kind, m.grid, m.seconds) for p, m in zip(pictures, media, strict=True)],
        )
        _check_prompt_limit(len(laid.tokens), [m.grid for m in media], self.pixels.merge, limit)
        return EncodedConversation(
            laid.tokens, laid.types, laid.positions, laid.loss_mask, media, self.cfg
        )

    def answered(
        self, prompt: EncodedConversation, text: str, limit: int | None = None
    ) -> EncodedConversation:
        """A prompt with its answer, as `encode` makes it of both; pictures are not opened again."""
        answer, end = (
            self.ids(refuse_special_tokens(text) + self._closing[0]),
            self.ids(self._closing[1]),
        )
        more = len(answer) + len(end)
        tokens = np.concatenate([prompt.tokens, np.array(answer + end, np.int32)])
        _check_prompt_limit(len(tokens), [m.grid for m in prompt.media], self.pixels.merge, limit)
        types = np.concatenate([prompt.types, np.zeros(more, np.int8)])
        after = prompt.positions.max() + 1 + np.arange(more, dtype=prompt.positions.dtype)
        positions = np.concatenate([prompt.positions, np.broadcast_to(after, (3, more))], 1)
        mask = np.concatenate([prompt.loss_mask, np.arange(more) < len(answer)])
        return EncodedConversation(tokens, types, positions, mask, prompt.media, self.cfg)

    @functools.cached_property
    def _closing(self) -> tuple[str, str]:
        """What the chat template writes at the end of an answer, and after it."""
        turn = self.render(
            [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}],
            generation=False,
        )
        *_, answer, after = ASSISTANT_TURN.split(turn)
        return answer.removeprefix("!"), after

    def measure(
        self,
        messages: Messages,
        *,
        images: Sequence = (),
        videos: Sequence = (),
        generation: bool | None = None,
        prefix: str = "",
    ) -> tuple[int, list[Grid]]:
        """(number of tokens, grid of each picture), from image headers alone."""
        clean, pictures = separate_media(messages, {"image": images, "video": videos}, self.fps)
        seen = [(picture.kind, *self._look(picture)) for picture in pictures]
        return len(self._laid(clean, generation, prefix, seen).tokens), [
            grid for _, grid, _ in seen
        ]

    def ids(self, text: str) -> list[int]:
        """The tokens of plain text."""
        return self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids

    def opening(self, text: str) -> list[int]:
        """The tokens of a text that goes on: those that begin within it when another word follows."""
        both = self.tokenizer.backend_tokenizer.encode(f"{text} x", add_special_tokens=False)
        return [
            token
            for token, (start, _) in zip(both.ids, both.offsets, strict=True)
            if start < len(text)
        ]

    def decode(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """Texts without special tokens."""
        return self.tokenizer.batch_decode(
            [list(map(int, row)) for row in rows], skip_special_tokens=True
        )

    def save(self, folder: str | Path) -> None:
        """Tokenizer, template and pixel limits as files that transformers and vLLM read."""
        folder = Path(folder)
        if self.source is None:
            self.tokenizer.save_pretrained(folder)
        else:
            processor_files.copy_processor_files(self.source, folder)
        processor_files.write_processor_files(folder, self.pixels, self.template)

    def _laid(
        self, clean: Messages, generation: bool | None, prefix: str, seen: list[MediaGrid]
    ) -> TokenLayout:
        """Tasks often ask one question of pictures of one size: what was laid out lately is remembered."""
        key = repr((clean, generation, prefix, seen))
        found = self._layouts.get(key)
        if found is None:
            found = self._lay(clean, generation, prefix, seen)
            if len(self._layouts) >= MAX_CACHED_LAYOUTS:
                self._layouts.clear()
            self._layouts[key] = found
        return found

    @functools.cached_property
    def _layouts(self) -> dict[str, TokenLayout]:
        return {}

    def _lay(
        self, clean: Messages, generation: bool | None, prefix: str, seen: list[MediaGrid]
    ) -> TokenLayout:
        pieces = ASSISTANT_TURN.split(self.render(clean, generation))
        turns = sum(m["role"] == "assistant" for m in clean)
        if len(pieces) // 2 != turns:
            raise ValueError(
                f"the chat template wrote {len(pieces) // 2} ChatML assistant turns for {turns}; use a ChatML template"
            )
        # An answer is tokenised apart from its prompt, as when it is sampled: no token spans the two.
        ids = [self.ids(piece) for piece in pieces]
        ids[-1] = ids[-1] + self.opening(refuse_special_tokens(prefix))
        tokens = np.array([t for x in ids for t in x], np.int32)
        mask = np.repeat(np.arange(len(ids)) % 2 == 1, [len(x) for x in ids])
        types = np.where(
            tokens == self.cfg.image_token, 1, np.where(tokens == self.cfg.video_token, 2, 0)
        ).astype(np.int8)
        written = [("image", "video")[t - 1] for t in types[types > 0]]
        if written != [kind for kind, _, _ in seen]:
            counts = collections.Counter(written)
            raise ValueError(
                f"the chat template wrote placeholders for {counts['image']} images and {counts['video']} videos; "
                f"the conversation has {len(seen)} pictures in another order or number"
            )
        # Each placeholder becomes as many tokens as its picture has merged patches; nothing else in the package does this.
        repeat = np.ones(len(tokens), np.int64)
        repeat[types > 0] = [
            image_patches.count_image_tokens(grid, self.pixels.merge) for _, grid, _ in seen
        ]
        tokens, types, mask = (np.repeat(x, repeat) for x in (tokens, types, mask))
        seconds = [s for kind, _, s in seen if kind == "video"]
        positions = mrope(types, [grid for _, grid, _ in seen], seconds, self.cfg.vision)
        for each in (laid := TokenLayout(tokens, types, positions, mask)).__dict__.values():
            each.setflags(write=False)  # many rows share them
        return laid

    def _look(self, picture: MediaSource) -> tuple[Grid, float]:
        """Its grid and the seconds from one frame pair to the next, without decoding it."""
        if picture.kind == "image":
            return self.pixels.grid(*images.image_size(picture.source)), 0.0
        clip = video.probe_video(picture.source, picture.fps, self.pixels.temporal)
        return self.pixels.grid(*clip.size, len(clip.indices)), self.pixels.temporal / clip.fps

    def _open(self, picture: MediaSource) -> Media:
        if picture.kind == "image":
            return Media(
                *image_patches.cut_patches([open_image(picture.source)], self.pixels), self.pixels
            )
        clip = video.probe_video(picture.source, picture.fps, self.pixels.temporal)
        return Media(
            *image_patches.cut_patches(video.read_frames(picture.source, clip), self.pixels),
            self.pixels,
            self.pixels.temporal / clip.fps,
        )


def _check_prompt_limit(n: int, grids: Sequence[Grid], merge: int, limit: int | None) -> None:
    if limit is not None and n > limit:
        seen = sum(image_patches.count_image_tokens(g, merge) for g in grids)
        raise ValueError(
            f"a prompt of {n} tokens ({seen} of them for {len(grids)} pictures) is over the limit of {limit}; "
            "raise data.prompt_limit or lower model.max_pixels"
        )


def load_processor(
    folder: str | Path | None,
    cfg: ModelConfig,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
) -> Processor:
    """The processor of a Hugging Face checkpoint (folder or hub id), or without one the project's own small one."""
    source = None if folder is None else locate_checkpoint(folder)
    pixels = processor_files.read_image_settings(source, cfg, min_pixels, max_pixels)
    if source is None:
        words, template = (
            tiny_tokenizer.build_tiny_tokenizer(cfg.text.vocab),
            tiny_tokenizer.TINY_CHAT_TEMPLATE,
        )
    else:
        try:
            words = AutoTokenizer.from_pretrained(
                source, trust_remote_code=False, local_files_only=True
            )
        except (OSError, ValueError, KeyError, ImportError, AttributeError) as e:
            reason = str(e).splitlines()[0][:120]
            raise ValueError(
                f"{source} has no tokenizer that can be read ({reason}); copy the tokenizer files there"
            ) from e
        words.backend_tokenizer.no_truncation()  # as some files ask for
        words.backend_tokenizer.no_padding()
        template = processor_files.read_chat_template(source, words.chat_template)
    expected = {
        IMAGE_TOKEN: cfg.image_token,
        VIDEO_TOKEN: cfg.video_token,
        "<|vision_start|>": cfg.vision_start,
        "<|vision_end|>": cfg.vision_end,
    }
    for token, number in expected.items():
        if words.convert_tokens_to_ids(token) != number:
            whose = f"{source}'s tokenizer" if source else "the project's own tokenizer"
            raise ValueError(
                f"{whose} gives {token} the id {words.convert_tokens_to_ids(token)}; the model's config says {number}"
            )
    return Processor(words, template, cfg, pixels, source)
