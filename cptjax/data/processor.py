"""The processor: conversations -> tokens, positions, loss masks and image patches."""

import collections
import dataclasses
import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from transformers import PreTrainedTokenizerBase

from cptjax.common import files, images
from cptjax.common.images import Grid, ImageSettings, open_image
from cptjax.data import image_patches, processor_files, tiny_tokenizer, video
from cptjax.data.collate import EncodedConversation, Media
from cptjax.data.conversation import MediaSource, Messages, refuse_reserved_tokens, separate_media
from cptjax.data.video import VideoClip
from cptjax.models import positions
from cptjax.models.config import ModelConfig
from cptjax.models.families import find_family
from cptjax.models.family import Family, MediaGrid
from cptjax.models.hf_config import locate_checkpoint
from cptjax.tasks import template_worker

VISION_TOKENS = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
# Some templates write the date; with today's, a run that is resumed tomorrow would differ.
TEMPLATE_DATE = "26 Jul 2024"  # the default of Llama 3's template
MAX_CACHED_LAYOUTS = 512


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
    pixels: ImageSettings | None  # None = the model takes no images
    source: Path | None = None
    fps: float = video.DEFAULT_FPS  # frames used per second of video

    @property
    def family(self) -> Family:
        return find_family(self.cfg)

    @functools.cached_property
    def reserved(self) -> re.Pattern:
        """The special tokens, which the text of a message must not contain."""
        added = self.tokenizer.added_tokens_decoder.values()
        special = sorted((t.content for t in added if t.special), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, special)) or r"(?!)")

    @functools.cached_property
    def longest_token(self) -> int:
        """The characters of the longest token."""
        return max(map(len, self.tokenizer.get_vocab()))

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
                date_string=TEMPLATE_DATE,
            )
        except (jinja2.TemplateError, KeyError, TypeError) as e:
            reason = " ".join(str(e).split())[:160]
            raise ValueError(f"the chat template cannot render this conversation: {reason}") from e

    def render_text(self, messages: Messages) -> str:
        """Write a conversation with one placeholder for each of its images and videos."""
        return self.render(self._separate(messages)[0])

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
        bare, sources = self._separate(messages)
        media = tuple(map(self._open, sources)) if media is None else tuple(media)
        grids = [
            MediaGrid(s.kind, m.grid, m.seconds, m.times)
            for s, m in zip(sources, media, strict=True)
        ]
        layout = self._cached_layout(bare, generation, grids)
        _check_prompt_limit(len(layout.tokens), media, limit)
        return EncodedConversation(
            layout.tokens, layout.types, layout.positions, layout.loss_mask, media, self.cfg
        )

    def append_response(
        self, prompt: EncodedConversation, text: str, limit: int | None = None
    ) -> EncodedConversation:
        """Return what `encode` returns for the prompt and its response, and open no image again."""
        answer = {"role": "assistant", "content": refuse_reserved_tokens(text, self.reserved)}
        _, turn, after_turn = self._split_turns([{"role": "user", "content": "?"}, answer], False)
        response = self.ids(turn)
        added = response + self.ids(after_turn)
        _check_prompt_limit(len(prompt) + len(added), prompt.media, limit)
        return prompt.append_tokens(added, trained=len(response))

    def _separate(self, messages: Messages) -> tuple[list[dict[str, Any]], list[MediaSource]]:
        """Separate messages from their images; refuse images if the model takes none."""
        bare, sources = separate_media(messages, self.fps, self.reserved)
        if sources and self.pixels is None:
            raise ValueError(
                f"the conversation has images, and a {self.cfg.family} model takes only text; "
                "choose a vision-language model or a task without images"
            )
        if self.pixels is None:  # the templates of text models take strings
            bare = [{**message, "content": _join_text(message["content"])} for message in bare]
        return bare, sources

    def _split_turns(self, bare: Messages, generation: bool | None) -> list[str]:
        """Render a conversation in pieces.

        The odd pieces are the assistant's responses, each with the end token of its turn.
        """
        whole = self.render(bare, generation)
        pieces, done = [], 0
        for i, message in enumerate(bare):
            if message["role"] != "assistant":
                continue
            prompt = self.render(bare[:i], generation=True)
            end = self.reserved.search(whole, len(prompt))
            if not whole.startswith(prompt) or end is None:
                raise ValueError(
                    "the chat template does not write a conversation as its prompt, the "
                    "assistant's response and an end token of the tokenizer; use another template"
                )
            pieces += [whole[done : len(prompt)], whole[len(prompt) : end.end()]]
            done = end.end()
        return [*pieces, whole[done:]]

    @functools.cached_property
    def turn_end(self) -> int:
        """The token that ends the assistant's turns."""
        turn = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
        return self.ids(self._split_turns(turn, False)[1])[-1]

    def measure(
        self, messages: Messages, *, generation: bool | None = None
    ) -> tuple[int, list[Grid]]:
        """Return the number of tokens and the grids of all images and videos, from file headers."""
        bare, sources = self._separate(messages)
        grids = [self._probe(source)[0] for source in sources]
        layout = self._cached_layout(bare, generation, grids)
        return len(layout.tokens), [media.grid for media in grids]

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
        processor_files.write_processor_files(folder, self.pixels, self.template, self.cfg)

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
        pieces, tower = self._split_turns(bare, generation), self.family.tower
        if tower is not None and tower.rewrite_videos is not None:
            pieces, grids = tower.rewrite_videos(pieces, grids)
        # A response is tokenised separately from its prompt, so that no token spans the two, as in
        # a sampled response.
        ids = [self.ids(piece) for piece in pieces]
        tokens = np.array([token for piece in ids for token in piece], np.int32)
        mask = np.repeat(np.arange(len(ids)) % 2 == 1, [len(piece) for piece in ids])
        types = np.zeros(len(tokens), np.int8)
        if tower is not None:
            tokens, types, mask = self._expand_placeholders(tokens, mask, grids)
            seconds = [media.seconds for media in grids if media.kind == "video"]
            ids3 = tower.token_positions(types, [m.grid for m in grids], seconds, self.cfg.vision)
        else:
            ids3 = positions.text_positions(len(tokens))
        for array in (tokens, types, ids3, mask):
            array.setflags(write=False)  # many rows share them
        return TokenLayout(tokens, types, ids3, mask)

    def _expand_placeholders(
        self, tokens: np.ndarray, mask: np.ndarray, grids: list[MediaGrid]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return tokens, types and mask with as many tokens for an image as its merged patches."""
        is_image, is_video = tokens == self.cfg.image_token, tokens == self.cfg.video_token
        types = np.where(is_image, 1, np.where(is_video, 2, 0)).astype(np.int8)
        written = [("image", "video")[t - 1] for t in types[types > 0]]
        if written != [media.kind for media in grids]:
            counts = collections.Counter(written)
            raise ValueError(
                f"the chat template wrote placeholders for {counts['image']} images and "
                f"{counts['video']} videos; the conversation has {len(grids)} images and videos in "
                "another order or number"
            )
        repeats = np.ones(len(tokens), np.int64)
        repeats[types > 0] = [
            image_patches.count_image_tokens(media.grid, self.pixels.merge) for media in grids
        ]
        tokens, types, mask = (np.repeat(x, repeats) for x in (tokens, types, mask))
        return tokens, types, mask

    def _probe(self, source: MediaSource) -> tuple[MediaGrid, VideoClip | None]:
        """Return the grid of an image or a video, and a video's chosen frames, without decoding."""
        if source.kind == "image":
            return MediaGrid("image", self.pixels.grid(*images.image_size(source.source))), None
        temporal, choose = self.pixels.temporal, self.family.tower.choose_frames
        clip = video.probe_video(source.source, source.fps, temporal, choose)
        grid = self.pixels.grid(*clip.size, len(clip.indices))
        return MediaGrid("video", grid, temporal / clip.fps, clip.pair_times(temporal)), clip

    def _open(self, source: MediaSource) -> Media:
        if source.kind == "image":
            frames = [open_image(source.source)]
            patches, grid = image_patches.cut_patches(frames, self.pixels)
            return Media(patches, grid, self.pixels)
        probed, clip = self._probe(source)
        frames = video.read_frames(source.source, clip)
        patches, grid = image_patches.cut_patches(frames, self.pixels, is_video=True)
        return Media(patches, grid, self.pixels, probed.seconds, probed.times)


def _join_text(content: str | list[dict[str, str]]) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _check_prompt_limit(n: int, media: Sequence[Media], limit: int | None) -> None:
    if limit is not None and n > limit:
        image_tokens = sum(image_patches.count_image_tokens(m.grid, m.pixels.merge) for m in media)
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

    None is the package's own small processor. Use the config of the result: it has all end tokens,
    and the pixel values that the checkpoint's vision tower takes.
    """
    with files.explain_errors(f"{folder}: its tokenizer or chat template"):
        return _load_processor(folder, cfg, min_pixels, max_pixels)


def _load_processor(
    folder: str | Path | None, cfg: ModelConfig, min_pixels: int | None, max_pixels: int | None
) -> Processor:
    source = None if folder is None else locate_checkpoint(folder)
    pixels = None
    if cfg.vision is not None:
        pixels = processor_files.read_image_settings(source, cfg, min_pixels, max_pixels)
        vision = processor_files.read_pixel_values(source, cfg.vision)
        cfg = dataclasses.replace(cfg, vision=vision)
    if source is None:
        tokenizer = tiny_tokenizer.build_tiny_tokenizer(cfg.text.vocab)
        template = tiny_tokenizer.TINY_CHAT_TEMPLATE
    else:
        from transformers import AutoTokenizer  # imports torch where it is installed: two seconds

        processor_files.refuse_special_files(source)
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                source, trust_remote_code=False, local_files_only=True
            )
        except Exception as e:  # the tokenizer's library raises Exception itself
            reason = files.describe_error(e)[:160]
            raise ValueError(
                f"{source} has no tokenizer that can be read ({reason}); "
                "copy the tokenizer files there"
            ) from e
        tokenizer.backend_tokenizer.no_truncation()  # some tokenizer files turn these on
        tokenizer.backend_tokenizer.no_padding()
        template = processor_files.read_chat_template(source, tokenizer.chat_template)
        question = [{"role": "user", "content": "?"}]
        template_worker.refuse_unbounded_chat(str(source), template, question)
    for token, number in zip(VISION_TOKENS, cfg.vision_tokens, strict=False):
        actual = tokenizer.convert_tokens_to_ids(token)
        if actual != number:
            owner = f"{source}'s tokenizer" if source else "the package's own tokenizer"
            raise ValueError(
                f"{owner} gives {token} the id {actual}; expected {number} as in the model's config"
            )
    return stop_at_turn_end(Processor(tokenizer, template, cfg, pixels, source))


def stop_at_turn_end(processor: Processor) -> Processor:
    """Return the processor, whose config names the token that ends a turn among the end tokens.

    The configs of some checkpoints that were not trained to answer only name the end of a text.
    """
    cfg, end = processor.cfg, processor.turn_end
    if end in cfg.eos:
        return processor
    return dataclasses.replace(processor, cfg=dataclasses.replace(cfg, eos=(*cfg.eos, end)))
