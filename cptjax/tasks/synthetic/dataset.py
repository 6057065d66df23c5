"""Synthetic tasks: unlimited images and questions generated from a seed, without any download.

There are ten families: colour, shape, count, position, digit, compare, jigsaw2, jigsaw3 (images),
facts and arithmetic (text only). Levels 1-3 add distractors, cells or digits, or weaken the cue;
facts have one level. Example i depends only on the seed, the split and the family. No image is in
two splits (`painting.add_noise`), and from level 2 on no sum is; facts and single-digit sums are
*knowledge*, one table that all splits share.

With three settings, a pre-stage makes a base model like those found in practice, with its own
wording and systematic mistakes:

    styles   weights of the wordings of `target`, such as {"it is": 0.4, "i think": 0.6};
             "" is the bare answer
    bias     probability with which the labels of a random half of the classes are replaced, each
             class by one fixed wrong class
    world    number that decides which facts are true and which classes are biased; None = the seed

`answer` is always correct; `target` has the styled, possibly biased label, and `meta` its label and
style.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from cptjax.tasks.synthetic import painting, random_streams
from cptjax.tasks.synthetic.families import SYNTHETIC_FAMILIES, SyntheticSpec, answer_classes
from cptjax.tasks.synthetic.random_streams import RandomStreams
from cptjax.tasks.task import Task, did_you_mean, user_turn
from cptjax.types import Example

SYNTHETIC_SPLITS = ("train", "validation", "test")
SYNTHETIC_SIZES = {"train": 10_000, "validation": 500, "test": 500}  # without a limit
ANSWER_STYLES = ("it is", "answer :", "i think", "the answer is")
BLOCK_SIZE = 64  # examples generated at a time
# Parts of every hash; other texts would generate other rows.
ROWS_KEY, PUZZLES_KEY = "drawn", "pictures"


@dataclasses.dataclass(frozen=True)
class ExampleBlock:
    """Consecutive examples: images [n side side 3] (None for text), and the texts of each."""

    images: np.ndarray | None
    questions: list[str]
    answers: list[str]
    labels: list[str]
    styles: list[str]


def generate_block(
    spec: SyntheticSpec, split: str, seed: int, start: int, stop: int
) -> ExampleBlock:
    """Generate examples start..stop of a split."""
    number = SYNTHETIC_SPLITS.index(split)
    streams = RandomStreams.of(
        random_streams.hash_key(ROWS_KEY, spec.family, spec.level, seed, split),
        np.arange(start, stop),
    )
    canvas, questions, answers = SYNTHETIC_FAMILIES[spec.family](spec, streams, number)
    images = None if canvas is None else painting.add_noise(canvas, streams, spec.noise, number)
    names, weights = zip(*spec.styles, strict=True)
    shares = np.cumsum(weights) / np.sum(weights)
    styles = np.searchsorted(shares, streams.uniform("style")[:, 0], side="right")
    wrong_classes = biased_classes(spec) if spec.bias else {}
    is_biased = streams.uniform("bias")[:, 0] < spec.bias
    labels = [
        wrong_classes.get(answer, answer) if biased else answer
        for answer, biased in zip(answers, is_biased, strict=True)
    ]
    return ExampleBlock(images, questions, answers, labels, [names[i] for i in styles])


def biased_classes(spec: SyntheticSpec) -> dict[str, str]:
    """Return the biased half of the classes, each with its wrong class."""
    names = answer_classes(spec)
    if not names:
        raise ValueError(f"{spec.family} has too many classes for biased labels; leave bias=0")
    rng = np.random.default_rng(int(random_streams.hash_key("bias", spec.family, spec.world)))
    order = rng.permutation(len(names))
    biased = order[: (len(names) + 1) // 2]
    shifts = rng.integers(1, len(names), len(biased))
    return {
        names[c]: names[(c + shift) % len(names)] for c, shift in zip(biased, shifts, strict=True)
    }


@functools.lru_cache(maxsize=1024)
def _cached_block(spec: SyntheticSpec, split: str, seed: int, number: int) -> ExampleBlock:
    return generate_block(spec, split, seed, number * BLOCK_SIZE, (number + 1) * BLOCK_SIZE)


@dataclasses.dataclass(frozen=True)
class SyntheticExamples(Sequence[Example]):
    """The first `size` examples of a split, generated on access, one block at a time."""

    name: str
    spec: SyntheticSpec
    split: str
    seed: int
    size: int

    def __len__(self) -> int:
        return self.size

    def where(self, index: int) -> tuple[str, int]:
        """Return the split and number of an example."""
        return f"{self.name}/{self.split}", index

    def __getitem__(self, index: int) -> Example:
        index = range(self.size)[index]
        block = _cached_block(self.spec, self.split, self.seed, index // BLOCK_SIZE)
        at = index % BLOCK_SIZE
        images = [] if block.images is None else [Image.fromarray(block.images[at])]
        label, style = block.labels[at], block.styles[at]
        meta = {
            "family": self.spec.family,
            "level": self.spec.level,
            "label": label,
            "style": style,
        }
        return Example(
            id=f"{self.name}/{self.split}/{index}",
            messages=user_turn("<image>" * len(images) + block.questions[at], images),
            answer=block.answers[at],
            target=f"{style} {label}".strip(),
            task=self.name,
            meta=meta,
        )


@dataclasses.dataclass(frozen=True)
class PuzzleImages(Sequence[tuple[str, Image.Image]]):
    """Generated images for jigsaw puzzles, each with its name."""

    split: str
    seed: int
    side: int
    size: int | None

    def __len__(self) -> int:
        return SYNTHETIC_SIZES[self.split] if self.size is None else self.size

    def __getitem__(self, index: int) -> tuple[str, Image.Image]:
        index = range(len(self))[index]
        number = SYNTHETIC_SPLITS.index(self.split)
        streams = RandomStreams.of(
            random_streams.hash_key(PUZZLES_KEY, self.seed, self.split), np.array([index])
        )
        canvas = painting.paint_puzzle_images(streams, self.side)
        return str(index), Image.fromarray(painting.add_noise(canvas, streams, 6.0, number)[0])


def load_synthetic_split(
    name: str,
    spec: SyntheticSpec,
    split: str,
    root: str = "",
    limit: int | None = None,
    seed: int = 0,
) -> SyntheticExamples:
    """Return the first `limit` examples of a split.

    No file is read, so `root` has no effect.
    """
    if split not in SYNTHETIC_SPLITS:
        raise ValueError(f"task {name}: no split {split!r}; it has {', '.join(SYNTHETIC_SPLITS)}")
    spec = dataclasses.replace(spec, world=seed) if spec.world is None else spec
    return SyntheticExamples(
        name, spec, split, seed, SYNTHETIC_SIZES[split] if limit is None else limit
    )


def styled_exact(prediction: str, answer: Any, meta: Any = None) -> float:
    """Return 1 if the prediction is the answer, alone or after one of the ANSWER_STYLES."""
    predicted, gold = (" ".join(t.split()).replace(" :", ":") for t in (prediction, str(answer)))
    return float(
        any(
            predicted == f"{style} {gold}".strip()
            for style in ("", *(style.replace(" :", ":") for style in ANSWER_STYLES))
        )
    )


def make_synthetic_task(
    name: str = "synthetic",
    family: str = "colour",
    level: int = 1,
    side: int = 32,
    noise: float = 18.0,
    styles: Mapping[str, float] | None = None,
    bias: float = 0.0,
    world: int | None = 0,
    **fields: Any,
) -> Task:
    """Return a synthetic task; see the module's docstring for `styles`, `bias` and `world`."""
    if family not in SYNTHETIC_FAMILIES:
        raise ValueError(
            f"synthetic task: no family {family!r}{did_you_mean(family, SYNTHETIC_FAMILIES)}; "
            f"there are {', '.join(SYNTHETIC_FAMILIES)}"
        )
    if level not in ((1,) if family == "facts" else (1, 2, 3)) or not 0 <= bias <= 1:
        raise ValueError(
            "synthetic task: expected level 1, 2 or 3 (facts: 1) and 0 <= bias <= 1, "
            f"got level={level} and bias={bias}"
        )
    if type(side) is not int or not 8 <= side <= 4096:
        raise ValueError(f"synthetic task: expected side=8 to 4096 pixels, got {side!r:.60}")
    unknown = [style for style in styles or () if style and style not in ANSWER_STYLES]
    if unknown or (styles is not None and not sum(styles.values()) > 0):
        raise ValueError(
            "synthetic task: styles: expected weights of '', "
            f"{', '.join(map(repr, ANSWER_STYLES))}; got {dict(styles)}"
        )
    spec = SyntheticSpec(
        family, level, side, noise, tuple(styles.items()) if styles else (("", 1.0),), bias, world
    )
    if bias:
        biased_classes(spec)
    defaults = {
        "scorer": styled_exact,
        "template": "none",
        "forced_prefix": max(spec.styles, key=lambda style: style[1])[0] or ANSWER_STYLES[0],
    }
    return Task(name, functools.partial(load_synthetic_split, name, spec), **{**defaults, **fields})
