"""The processor: conversations -> tokens, positions, loss masks and image patches."""

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
from cptjax.data.conversation import MediaSource, Messages, refuse_reserved_tokens, separate_media
from cptjax.models.config import ModelConfig, locate_checkpoint
from cptjax.models.positions import mrope

IMAGE_TOKEN, VIDEO_TOKEN = "<|image_pad|>", "<|video_pad|>"
# The odd pieces of a split are the assistant's responses, each with the end of its turn.
ASSISTANT_TURN = re.compile(r"(?<=<\|im_start\|>assistant\n)(.*?<\|im_end\|>)", re.DOTALL)
MAX_CACHED_LAYOUTS = 512

# The kind of an image or video, its grid, and the seconds between two frame pairs of a video.
MediaGrid = tuple[str, Grid, float]


@dataclasses.dataclass(frozen=True)
class TokenLayout:
    """A conversation's tokens and their positions: everything except its pixels."""

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
    fps: float = video.DEFAULT_FPS  # frames used per second of video

    @property
    def min_pixels(self) -> int:
        return self.pixels.min_pixels

    @property
    def max_pixels(self) -> int:
        return self.pixels.max_pixels

    def render(self, messages: Messages, generation: bool | None = None) -> str:
        """Write the conversation with the chat template.

        generation: end with the start of an assistant turn; None = only if the last turn is not the
            assistant's.
        """
        generation = messages[-1]["role"] != "assistant" if generation is None else generation
        try:
            return self.tokenizer.apply_chat_template(
                list(messages),
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=generation,
            )
        except (jinja2.TemplateError, KeyError, TypeError) as e:
            reason = " ".join(str(e).split())[:160]
            raise ValueError(f"the chat template cannot render this conversation: {reason}") from e

    def render_text(self, messages: Messages) -> str:
        """Write a conversation with one placeholder for each of its images and videos."""
        return self.render(separate_media(messages, self.fps)[0])

    def encode(
        self,
        messages: Messages,
        *,
        generation: bool | None = None,
        limit: int | None = None,
        media: Sequence[Media] | None = None,
    ) -> EncodedConversation:
        """Encode a conversation: tokens, positions, loss mask, patches of its images and videos.

        limit: the most tokens allowed; a longer conversation raises a ValueError.
        media: the conversation's images and videos if they are already open; None = open them.
        """
        bare, sources = separate_media(messages, self.fps)
        media = tuple(map(self._open, sources)) if media is None else tuple(media)
        grids = [(s.kind, m.grid, m.seconds) for s, m in zip(sources, media, strict=True)]
        layout = self._cached_layout(bare, generation, grids)
        _check_prompt_limit(len(layout.tokens), media, self.pixels.merge, limit)
        return EncodedConversation(
            layout.tokens, layout.types, layout.positions, layout.loss_mask, media, self.cfg
        )

    def append_response(
        self, prompt: EncodedConversation, text: str, limit: int | None = None
    ) -> EncodedConversation:
        """Return what `encode` returns for the prompt and its response, and open no image again."""
        ending, after_turn = self._turn_ending
        response = self.ids(refuse_reserved_tokens(text) + ending)
        added = response + self.ids(after_turn)
        tokens = np.concatenate([prompt.tokens, np.array(added, np.int32)])
        _check_prompt_limit(len(tokens), prompt.media, self.pixels.merge, limit)
        n, start = len(added), prompt.positions.max() + 1
        text_positions = start + np.arange(n, dtype=prompt.positions.dtype)
        return EncodedConversation(
            tokens,
            np.concatenate([prompt.types, np.zeros(n, np.int8)]),
            np.concatenate([prompt.positions, np.broadcast_to(text_positions, (3, n))], 1),
            np.concatenate([prompt.loss_mask, np.arange(n) < len(response)]),
            prompt.media,
            self.cfg,
        )

    @functools.cached_property
    def _turn_ending(self) -> tuple[str, str]:
        """The texts that the chat template writes at the end of a response and after it."""
        turn = self.render(
            [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}],
            generation=False,
        )
        *_, response, after_turn = ASSISTANT_TURN.split(turn)
        return response.removeprefix("!"), after_turn

    def measure(
        self, messages: Messages, *, generation: bool | None = None
    ) -> tuple[int, list[Grid]]:
        """Return the number of tokens and the grids of all images and videos, from file headers."""
        bare, sources = separate_media(messages, self.fps)
        grids = [(source.kind, *self._probe(source)) for source in sources]
        layout = self._cached_layout(bare, generation, grids)
        return len(layout.tokens), [grid for _, grid, _ in grids]

    def ids(self, text: str) -> list[int]:
        """Return the tokens of plain text."""
        return self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids

    def prefix_ids(self, text: str) -> list[int]:
        """Return the tokens of a text that continues.

        They are the tokens that begin within the text when another word follows it.
        """
        encoding = self.tokenizer.backend_tokenizer.encode(f"{text} x", add_special_tokens=False)
        return [
            token
            for token, (start, _) in zip(encoding.ids, encoding.offsets, strict=True)
            if start < len(text)
        ]

    def decode(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """Return the texts of token rows, without special tokens."""
        return self.tokenizer.batch_decode(
            [list(map(int, row)) for row in rows], skip_special_tokens=True
        )

    def save(self, folder: str | Path) -> None:
        """Write tokenizer, template and pixel limits as files that transformers and vLLM read."""
        folder = Path(folder)
        if self.source is None:
            self.tokenizer.save_pretrained(folder)
        else:
            processor_files.copy_processor_files(self.source, folder)
        processor_files.write_processor_files(folder, self.pixels, self.template)

    def _cached_layout(
        self, bare: Messages, generation: bool | None, grids: list[MediaGrid]
    ) -> TokenLayout:
        """Return the layout of a conversation from a cache.

        Many rows of a task have the same prompt and image size.
        """
        key = repr((bare, generation, grids))
        layout = self._layouts.get(key)
        if layout is None:
            layout = self._compute_layout(bare, generation, grids)
            if len(self._layouts) >= MAX_CACHED_LAYOUTS:
                self._layouts.clear()
            self._layouts[key] = layout
        return layout

    @functools.cached_property
    def _layouts(self) -> dict[str, TokenLayout]:
        return {}

    def _compute_layout(
        self, bare: Messages, generation: bool | None, grids: list[MediaGrid]
    ) -> TokenLayout:
        pieces = ASSISTANT_TURN.split(self.render(bare, generation))
        turns = sum(m["role"] == "assistant" for m in bare)
        if len(pieces) // 2 != turns:
            raise ValueError(
                f"the chat template wrote {len(pieces) // 2} ChatML assistant turns for {turns}; "
                "use a ChatML template"
            )
        # A response is tokenised separately from its prompt, so that no token spans the two, as in
        # a sampled response.
        ids = [self.ids(piece) for piece in pieces]
        tokens = np.array([token for piece in ids for token in piece], np.int32)
        mask = np.repeat(np.arange(len(ids)) % 2 == 1, [len(piece) for piece in ids])
        is_image, is_video = tokens == self.cfg.image_token, tokens == self.cfg.video_token
        types = np.where(is_image, 1, np.where(is_video, 2, 0)).astype(np.int8)
        written = [("image", "video")[t - 1] for t in types[types > 0]]
        if written != [kind for kind, _, _ in grids]:
            counts = collections.Counter(written)
            raise ValueError(
                f"the chat template wrote placeholders for {counts['image']} images and "
                f"{counts['video']} videos; the conversation has {len(grids)} images and videos in "
                "another order or number"
            )
        # A placeholder becomes as many tokens as its image has merged patches; this is the only
        # place that expands placeholders.
        repeats = np.ones(len(tokens), np.int64)
        repeats[types > 0] = [
            image_patches.count_image_tokens(grid, self.pixels.merge) for _, grid, _ in grids
        ]
        tokens, types, mask = (np.repeat(x, repeats) for x in (tokens, types, mask))
        seconds = [s for kind, _, s in grids if kind == "video"]
        positions = mrope(types, [grid for _, grid, _ in grids], seconds, self.cfg.vision)
        for array in (tokens, types, positions, mask):
            array.setflags(write=False)  # many rows share them
        return TokenLayout(tokens, types, positions, mask)

    def _probe(self, source: MediaSource) -> tuple[Grid, float]:
        """Return the grid, and the seconds between two frame pairs, without decoding."""
        if source.kind == "image":
            return self.pixels.grid(*images.image_size(source.source)), 0.0
        clip = video.probe_video(source.source, source.fps, self.pixels.temporal)
        return self.pixels.grid(*clip.size, len(clip.indices)), self.pixels.temporal / clip.fps

    def _open(self, source: MediaSource) -> Media:
        if source.kind == "image":
            frames, seconds = [open_image(source.source)], 0.0
        else:
            clip = video.probe_video(source.source, source.fps, self.pixels.temporal)
            frames = video.read_frames(source.source, clip)
            seconds = self.pixels.temporal / clip.fps
        patches, grid = image_patches.cut_patches(frames, self.pixels)
        return Media(patches, grid, self.pixels, seconds)


def _check_prompt_limit(n: int, media: Sequence[Media], merge: int, limit: int | None) -> None:
    if limit is not None and n > limit:
        image_tokens = sum(image_patches.count_image_tokens(m.grid, merge) for m in media)
        raise ValueError(
            f"a prompt of {n} tokens ({image_tokens} of them for {len(media)} images) is over the "
            f"limit of {limit}; raise data.prompt_limit or lower model.max_pixels"
        )


def load_processor(
    folder: str | Path | None,
    cfg: ModelConfig,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
) -> Processor:
    """Load the processor of a Hugging Face checkpoint, a folder or a hub id.

    None is the package's own small processor.
    """
    source = None if folder is None else locate_checkpoint(folder)
    pixels = processor_files.read_image_settings(source, cfg, min_pixels, max_pixels)
    if source is None:
        tokenizer = tiny_tokenizer.build_tiny_tokenizer(cfg.text.vocab)
        template = tiny_tokenizer.TINY_CHAT_TEMPLATE
    else:
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                source, trust_remote_code=False, local_files_only=True
            )
        except (OSError, ValueError, KeyError, ImportError, AttributeError) as e:
            reason = str(e).splitlines()[0][:120]
            raise ValueError(
                f"{source} has no tokenizer that can be read ({reason}); "
                "copy the tokenizer files there"
            ) from e
        tokenizer.backend_tokenizer.no_truncation()  # some tokenizer files turn these on
        tokenizer.backend_tokenizer.no_padding()
        template = processor_files.read_chat_template(source, tokenizer.chat_template)
    expected = {
        IMAGE_TOKEN: cfg.image_token,
        VIDEO_TOKEN: cfg.video_token,
        "<|vision_start|>": cfg.vision_start,
        "<|vision_end|>": cfg.vision_end,
    }
    for token, number in expected.items():
        actual = tokenizer.convert_tokens_to_ids(token)
        if actual != number:
            owner = f"{source}'s tokenizer" if source else "the package's own tokenizer"
            raise ValueError(
                f"{owner} gives {token} the id {actual}; expected {number} as in the model's config"
            )
    return Processor(tokenizer, template, cfg, pixels, source)
