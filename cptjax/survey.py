"""Every row that a run will read, read once as the run would: decoded, rendered, tokenised, counted."""

import concurrent.futures
import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from cptjax import console, multihost, patches, processor, prompting, runtime, settings, tasks, teaching, verify
from cptjax.batching import ladder
from cptjax.images import open_image
from cptjax.model.config import Config, read
from cptjax.processor import Processor
from cptjax.prompting import Course
from cptjax.settings import Stage
from cptjax.tasks import BadRow, synthetic
from cptjax.tasks.task import sample
from cptjax.tasks.validate import Chosen, validate
from cptjax.types import Example

PROMPTS = 3  # shown of each split
DRAWN = 64  # rows that are looked at before a run


@dataclasses.dataclass(frozen=True)
class Reading:
    """One split of one task as a stage or the evaluation reads it."""

    task: str
    split: str
    template: str
    answered: bool  # the gold answer belongs to the row
    shown: int  # tokens of the longest gold answer that a teacher is shown behind the prompt; 0 = none is
    limit: int | None
    root: str
    allowed: int  # bad rows


@dataclasses.dataclass(frozen=True)
class Row:
    """What a good row takes."""

    tokens: int
    seen: int  # of them for pictures
    patches: int


@dataclasses.dataclass(frozen=True)
class Findings:
    """What was found in one reading."""

    reading: Reading
    rows: list[Row]
    bad: list[BadRow]
    prompts: list[str]
    read: int
    total: int  # rows of the split, unread ones included

    @property
    def name(self) -> str:
        return f"{self.reading.task} {self.reading.split}"

    @property
    def tokens(self) -> np.ndarray:
        return np.array([row.tokens for row in self.rows], int)


def lengths(config: ConfigDict) -> tuple[int, ...]:
    return tuple(config.data.buckets) or ladder(config.data.prompt_limit)


def reading(config: ConfigDict, task: str, split: str, template: str = "") -> Reading:
    """A split as a stage, or the evaluation, reads it."""
    d, m, train = config.data, config.method, split == "train"
    shown = config.rollout.max_new_tokens if train and m.objective == "distill" else 0
    limit = d.limit if train else config.eval.limit
    return Reading(task, split, template or d.template, train and m.source == "gold", shown, limit, d.root, d.bad_rows)


def trained(each: Stage, stages: Sequence[Stage]) -> list[Reading]:
    """What a stage learns from: its own tasks, then those it replays."""
    return [reading(each.config, task, "train") for task in (*each.tasks, *settings.replayed(stages, each))]


def readings(config: ConfigDict, stages: Sequence[Stage]) -> list[Reading]:
    """Every split that a run reads, each once: what its stages train on, what it is evaluated on."""
    names = [*settings.examined(config, stages), *config.eval.general]
    tested = [reading(config, task, "test", template) for task in names for template in settings.templates(config, stages, task)]
    return list(dict.fromkeys([r for each in stages for r in trained(each, stages)] + tested))


def key(config: ConfigDict, reading: Reading) -> tuple:
    """Equal where two runs read the same rows in the same way."""
    m = config.model
    return reading, repr(config.tasks.to_dict().get(reading.task)), m.path, m.preset, m.min_pixels, m.max_pixels, lengths(config)


def load(config: ConfigDict, reading: Reading) -> Sequence[Example]:
    """The rows of a split."""
    task = tasks.resolve(reading.task, config.tasks.to_dict(), (config.model.min_pixels, config.model.max_pixels))
    return task.load(reading.split, root=reading.root, limit=reading.limit, seed=config.seed)


def look(config: ConfigDict, reading: Reading, rows: int | None, pool: verify.Pool) -> Findings:
    """Reads a split, or `rows` of it chosen by seed."""
    examples = load(config, reading)
    course = prompting.course(tasks.resolve(reading.task, config.tasks.to_dict()), reading.template, config.rewards, pool)
    words = processor.load(config.model.path or None, model(config), config.model.min_pixels, config.model.max_pixels)
    chosen = [int(i) for i in sample(range(len(examples)), rows, config.seed)]
    measure = lambda i: measure_row(examples, i, course, words, reading, max(lengths(config)))
    found = []
    with console.progress(f"check {reading.task} {reading.split}", len(chosen)) as bar:
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
            for each in threads.map(measure, chosen):
                found.append(each)
                bar.advance()
    good = [(i, row) for i, row in zip(chosen, found, strict=True) if isinstance(row, Row)]
    bad = [*getattr(examples, "bad", ()), *(each for each in found if isinstance(each, BadRow))]
    prompts = [words.render(plain(conversation(examples[i], course, reading.answered))) for i, _ in good[:PROMPTS]]
    unread = len(bad) - (len(found) - len(good))  # rows that were bad before they were examples
    return Findings(reading, [row for _, row in good], bad, prompts, len(found) + unread, len(examples) + unread)


def model(config: ConfigDict) -> Config:
    return read(config.model.path) if config.model.path else runtime.preset(config.model.preset)


def conversation(example: Example, course: Course, answered: bool) -> list[dict[str, Any]]:
    """What is tokenised of an example."""
    messages = course.messages(example)
    return [*messages, {"role": "assistant", "content": course.gold(example)}] if answered else messages


def measure_row(
    examples: Sequence[Example], i: int, course: Course, words: Processor, reading: Reading, limit: int
) -> Row | BadRow:  # fmt: skip
    """What a row takes, or what is wrong with it."""
    file, number = examples.where(i)
    try:
        messages = conversation(examples[i], course, reading.answered)
        for source in pictures(messages):
            if not isinstance(source, Image.Image):
                open_image(source)  # a header alone does not tell that the rest is there
        tokens, grids = words.measure(messages)
        seen = sum(patches.merged(grid, words.cfg.vision.merge) for grid in grids)
        if tokens > limit:
            made = f"{tokens} tokens ({seen} of them for {len(grids)} pictures)"
            raise ValueError(f"{made} are over the limit of {limit}; raise data.prompt_limit or lower model.max_pixels")
        if reading.shown:
            demonstrated = words.measure(teaching.demonstrated(course, examples[i]))[0]
            if demonstrated > limit + teaching.beyond(words, reading.shown):
                made = f"its gold answer behind the prompt makes {demonstrated} tokens"
                raise ValueError(f"{made}, more than data.prompt_limit and rollout.max_new_tokens={reading.shown} hold; raise one of them")
        return Row(tokens, seen, seen * words.cfg.vision.merge**2)
    except (ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        return BadRow(file, number, reason.removeprefix(f"{file}:{number}: ").removeprefix(f"{file}, row {number}: "))


def bad_rows(examples: Sequence[Example], course: Course, words: Processor, reading: Reading, limit: int) -> list[BadRow]:
    """The rows that a run can not use; each process looks at its share. Drawn rows are alike, so of many only the first are looked at."""
    problem = lambda rows, i: found if isinstance(found := measure_row(rows, i, course, words, reading, limit), BadRow) else None
    look = lambda rows: validate(Chosen(examples, rows), problem, f"check {examples.where(0)[0]}")
    if isinstance(examples, synthetic.Drawn) and not look(range(min(len(examples), DRAWN))):
        return []
    found = look(range(jax.process_index(), len(examples), jax.process_count())) if len(examples) else []
    return [*getattr(examples, "bad", ()), *multihost.together(multihost.gather(found))]


def pictures(messages: Sequence[dict[str, Any]]) -> Iterator[Any]:
    for part in (part for turn in messages if isinstance(turn["content"], list) for part in turn["content"]):
        if part["type"] == "image":
            yield part["image"]
        elif part["type"] == "video" and isinstance(part["video"], list):
            yield from part["video"]


def plain(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The conversation without its pictures, as the chat template takes it."""
    strip = lambda part: part if part["type"] == "text" else {"type": part["type"]}
    return [turn if isinstance(turn["content"], str) else {**turn, "content": [strip(p) for p in turn["content"]]} for turn in messages]
