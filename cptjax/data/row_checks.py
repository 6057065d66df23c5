"""Every row that a run will read, read once as the run would: decoded, rendered, tokenised, counted."""

import concurrent.futures
import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from cptjax.common import console, distributed
from cptjax.common.images import open_image
from cptjax.config import Stage, eval_templates, evaluated_tasks, replayed_tasks
from cptjax.data import image_patches, processor, prompts
from cptjax.data.collate import length_buckets
from cptjax.data.conversation import strip_media
from cptjax.data.processor import Processor
from cptjax.models.load import find_model_config
from cptjax.tasks import prompted_task, registry
from cptjax.tasks.bad_rows import BadRow, collect_bad_rows, make_bad_row
from cptjax.tasks.prompted_task import PromptedTask
from cptjax.tasks.scoring import sandbox
from cptjax.tasks.synthetic import dataset
from cptjax.tasks.task import Subset, conversation_images, limit_rows
from cptjax.types import Example

SHOWN_PROMPTS = 3  # shown of each split
SYNTHETIC_ROWS_CHECKED = 64  # rows that are looked at before a run


@dataclasses.dataclass(frozen=True)
class SplitSpec:
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
class RowSize:
    """What a good row takes."""

    tokens: int
    seen: int  # of them for pictures
    patches: int


@dataclasses.dataclass(frozen=True)
class SplitReport:
    """What was found in one reading."""

    reading: SplitSpec
    rows: list[RowSize]
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


def prompt_buckets(config: ConfigDict) -> tuple[int, ...]:
    return tuple(config.data.buckets) or length_buckets(config.data.prompt_limit)


def split_spec(config: ConfigDict, task: str, split: str, template: str = "") -> SplitSpec:
    """A split as a stage, or the evaluation, reads it."""
    d, m, train = config.data, config.method, split == "train"
    shown = config.rollout.max_new_tokens if train and m.objective == "distill" else 0
    limit = d.limit if train else config.eval.limit
    return SplitSpec(
        task,
        split,
        template or d.template,
        train and m.source == "gold",
        shown,
        limit,
        d.root,
        d.bad_rows,
    )


def training_splits(each: Stage, stages: Sequence[Stage]) -> list[SplitSpec]:
    """What a stage learns from: its own tasks, then those it replays."""
    return [
        split_spec(each.config, task, "train")
        for task in (*each.tasks, *replayed_tasks(stages, each))
    ]


def run_splits(config: ConfigDict, stages: Sequence[Stage]) -> list[SplitSpec]:
    """Every split that a run reads, each once: what its stages train on, what it is evaluated on."""
    names = [*evaluated_tasks(config, stages), *config.eval.general]
    tested = [
        split_spec(config, task, "test", template)
        for task in names
        for template in eval_templates(config, stages, task)
    ]
    return list(
        dict.fromkeys([r for each in stages for r in training_splits(each, stages)] + tested)
    )


def split_key(config: ConfigDict, reading: SplitSpec) -> tuple:
    """Equal where two runs read the same rows in the same way."""
    m = config.model
    return (
        reading,
        repr(config.tasks.to_dict().get(reading.task)),
        m.path,
        m.preset,
        m.min_pixels,
        m.max_pixels,
        prompt_buckets(config),
    )


def load_examples(config: ConfigDict, reading: SplitSpec) -> Sequence[Example]:
    """The rows of a split."""
    task = registry.resolve_task(
        reading.task, config.tasks.to_dict(), (config.model.min_pixels, config.model.max_pixels)
    )
    return task.load(reading.split, root=reading.root, limit=reading.limit, seed=config.seed)


def check_split(
    config: ConfigDict, reading: SplitSpec, rows: int | None, pool: sandbox.SandboxPool
) -> SplitReport:
    """Reads a split, or `rows` of it chosen by seed."""
    examples = load_examples(config, reading)
    prompted = prompted_task.make_prompted_task(
        registry.resolve_task(reading.task, config.tasks.to_dict()),
        reading.template,
        config.rewards,
        pool,
    )
    words = processor.load_processor(
        config.model.path or None,
        find_model_config(config.model),
        config.model.min_pixels,
        config.model.max_pixels,
    )
    chosen = [int(i) for i in limit_rows(range(len(examples)), rows, config.seed)]
    measure = lambda i: measure_row(
        examples, i, prompted, words, reading, max(prompt_buckets(config))
    )
    found = []
    with console.progress_bar(f"check {reading.task} {reading.split}", len(chosen)) as bar:
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
            for each in threads.map(measure, chosen):
                found.append(each)
                bar.advance()
    good = [(i, row) for i, row in zip(chosen, found, strict=True) if isinstance(row, RowSize)]
    bad = [*getattr(examples, "bad", ()), *(each for each in found if isinstance(each, BadRow))]
    prompts = [
        words.render(strip_media(full_conversation(examples[i], prompted, reading.answered)))
        for i, _ in good[:SHOWN_PROMPTS]
    ]
    unread = len(bad) - (len(found) - len(good))  # rows that were bad before they were examples
    return SplitReport(
        reading, [row for _, row in good], bad, prompts, len(found) + unread, len(examples) + unread
    )


def full_conversation(
    example: Example, prompted: PromptedTask, answered: bool
) -> list[dict[str, Any]]:
    """What is tokenised of an example."""
    messages = prompted.build_prompt(example)
    return (
        [*messages, {"role": "assistant", "content": prompted.gold_response(example)}]
        if answered
        else messages
    )


def measure_row(
    examples: Sequence[Example],
    i: int,
    prompted: PromptedTask,
    words: Processor,
    reading: SplitSpec,
    limit: int,
) -> RowSize | BadRow:
    """What a row takes, or what is wrong with it."""
    try:
        messages = full_conversation(examples[i], prompted, reading.answered)
        for source in conversation_images(messages):
            if not isinstance(source, Image.Image):
                open_image(source)  # a header alone does not tell that the rest is there
        tokens, grids = words.measure(messages)
        seen = sum(image_patches.count_image_tokens(grid, words.cfg.vision.merge) for grid in grids)
        if tokens > limit:
            made = f"{tokens} tokens ({seen} of them for {len(grids)} pictures)"
            raise ValueError(
                f"{made} are over the limit of {limit}; raise data.prompt_limit or lower model.max_pixels"
            )
        if reading.shown:
            demonstrated = words.measure(prompts.demonstration_prompt(prompted, examples[i]))[0]
            if demonstrated > limit + prompts.extra_demonstration_tokens(words, reading.shown):
                made = f"its gold answer behind the prompt makes {demonstrated} tokens"
                raise ValueError(
                    f"{made}, more than data.prompt_limit and rollout.max_new_tokens={reading.shown} hold; raise one of them"
                )
        return RowSize(tokens, seen, seen * words.cfg.vision.merge**2)
    except (ValueError, OSError) as error:
        return make_bad_row(examples, i, error)


def find_bad_rows(
    examples: Sequence[Example],
    prompted: PromptedTask,
    words: Processor,
    reading: SplitSpec,
    limit: int,
) -> list[BadRow]:
    """The rows that a run can not use; each process looks at its share. Drawn rows are alike, so of many only the first are looked at."""
    problem = lambda rows, i: (
        found
        if isinstance(found := measure_row(rows, i, prompted, words, reading, limit), BadRow)
        else None
    )
    look = lambda rows: collect_bad_rows(
        Subset(examples, rows), problem, f"check {examples.where(0)[0]}"
    )
    if isinstance(examples, dataset.SyntheticExamples) and not look(
        range(min(len(examples), SYNTHETIC_ROWS_CHECKED))
    ):
        return []
    found = (
        look(range(jax.process_index(), len(examples), jax.process_count()))
        if len(examples)
        else []
    )
    return [
        *getattr(examples, "bad", ()),
        *distributed.concat_lists(distributed.gather_objects(found)),
    ]
