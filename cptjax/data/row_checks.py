"""Check every row that a run reads: decode its images, render its prompt, count its tokens."""

import concurrent.futures
import dataclasses
import math
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from cptjax.common import console, distributed, files
from cptjax.config import Stage, eval_templates, evaluated_tasks, replayed_tasks
from cptjax.data import image_patches, prompts
from cptjax.data.conversation import open_conversation_images
from cptjax.data.data_config import DataConfig
from cptjax.data.processor import Processor, load_processor
from cptjax.models.load import find_model_config
from cptjax.tasks import registry
from cptjax.tasks.bad_rows import BadRow, make_bad_row
from cptjax.tasks.prompted_task import PromptedTask, make_prompted_task
from cptjax.tasks.scoring.sandbox import SandboxPool
from cptjax.tasks.synthetic.dataset import SyntheticExamples
from cptjax.tasks.task import Subset, Task, content_text, limit_rows
from cptjax.types import Example

PROMPTS_PER_SPLIT = 3  # rendered prompts in a split's report
# Synthetic rows are alike: if the first ones are good, the others are not checked.
SYNTHETIC_ROWS_CHECKED = 64


@dataclasses.dataclass(frozen=True)
class SplitSpec:
    """One split of one task as a stage or the evaluation reads it."""

    task: str
    split: str
    template: str
    with_gold: bool  # the gold response is part of the row
    is_scored: bool  # responses to its rows are rewarded or scored
    # Of the longest gold response that a teacher reads after the prompt; 0 = no teacher.
    demonstration_tokens: int
    limit: int | None
    root: str
    allowed_bad_rows: int


@dataclasses.dataclass(frozen=True)
class RowSize:
    """The size of a good row."""

    tokens: int
    image_tokens: int  # of `tokens`
    patches: int


@dataclasses.dataclass(frozen=True)
class RowChecks:
    """The bad rows of a split, and the token count of each good row; 0 = not measured."""

    bad: list[BadRow]
    tokens: np.ndarray  # by row


class CheckedRows(Subset):
    """The good rows of a split, each with the token count that the check measured.

    A row holds references to its images, or the encoded images; the decoded pixels are not kept.
    """

    def __init__(self, examples: Sequence[Example], indices: Sequence[int], tokens: np.ndarray):
        super().__init__(examples, indices)
        self.tokens = tokens  # [rows] 0 = not measured


@dataclasses.dataclass(frozen=True)
class SplitReport:
    """The results of the pre-flight check of a split."""

    spec: SplitSpec
    template: str  # the name of the template that is used
    rows: list[RowSize]  # the good rows
    bad: list[BadRow]
    prompts: list[str]
    read: int
    total: int  # rows of the split, unread ones included

    @property
    def name(self) -> str:
        return f"{self.spec.task} {self.spec.split}"

    @property
    def tokens(self) -> np.ndarray:
        return np.array([row.tokens for row in self.rows], int)


def split_spec(config: ConfigDict, task: str, split: str, template: str = "") -> SplitSpec:
    """Describe a split as a stage (train) or the evaluation (test) reads it."""
    data, method, train = DataConfig.from_config(config.data), config.method, split == "train"
    distills = train and method.objective == "distill"
    return SplitSpec(
        task=task,
        split=split,
        template=template or data.template,
        with_gold=train and method.source == "gold",
        is_scored=not train or method.source in ("rollouts", "self"),
        demonstration_tokens=config.rollout.max_new_tokens if distills else 0,
        limit=data.limit if train else config.eval.limit,
        root=data.root,
        allowed_bad_rows=data.bad_rows,
    )


def training_splits(stage: Stage, stages: Sequence[Stage]) -> list[SplitSpec]:
    """Return the splits that a stage trains on: those of its own tasks, then the replayed ones."""
    tasks = (*stage.tasks, *replayed_tasks(stages, stage))
    return [split_spec(stage.config, task, "train") for task in tasks]


def run_splits(config: ConfigDict, stages: Sequence[Stage]) -> list[SplitSpec]:
    """Return every split that a run reads, each once: training splits, then evaluation splits."""
    training = [spec for stage in stages for spec in training_splits(stage, stages)]
    evaluation = [
        split_spec(config, task, "test", template)
        for task in (*evaluated_tasks(config, stages), *config.eval.general)
        for template in eval_templates(config, stages, task)
    ]
    return list(dict.fromkeys(training + evaluation))


def split_key(config: ConfigDict, spec: SplitSpec) -> tuple:
    """Return a key that is equal for two runs that read the same rows in the same way."""
    model = config.model
    return (
        spec,
        repr(config.tasks.to_dict().get(spec.task)),
        model.path,
        model.preset,
        model.min_pixels,
        model.max_pixels,
        DataConfig.from_config(config.data).length_buckets,
        tuple(config.data.outside_images),
    )


def resolve_config_task(config: ConfigDict, name: str) -> Task:
    """Return a task of the config; raise a ValueError if it needs other pixel limits or patches."""
    pixels = (config.model.min_pixels, config.model.max_pixels)
    outside = DataConfig.from_config(config.data).outside_images
    vision = find_model_config(config.model).vision
    patch = vision.patch if vision else None
    return registry.resolve_task(name, config.tasks.to_dict(), pixels, outside, patch)


def load_split(config: ConfigDict, spec: SplitSpec, task: Task) -> Sequence[Example]:
    """Load the rows of a split; a user's rows are checked except for their pixels."""
    return task.load(spec.split, root=spec.root, limit=spec.limit, seed=config.seed)


def check_rows(
    examples: Sequence[Example],
    prompted: PromptedTask,
    processor: Processor,
    spec: SplitSpec,
    limit: int,
) -> RowChecks:
    """Check all rows of a split; each process checks a part of them.

    Of synthetic rows only the first are checked, if these are good.
    """
    _refuse_images(examples, processor, spec)
    tokens = np.zeros(len(examples), np.int32)
    if isinstance(examples, SyntheticExamples):
        first = range(min(len(examples), SYNTHETIC_ROWS_CHECKED))
        sizes = _measure_rows(examples, first, prompted, processor, spec, limit)
        good = [size.tokens for size in sizes if isinstance(size, RowSize)]
        if len(good) == len(first):
            tokens[: len(first)] = good
            return RowChecks([], tokens)
    rows = range(jax.process_index(), len(examples), jax.process_count())
    sizes = _measure_rows(examples, rows, prompted, processor, spec, limit)
    bad = list(getattr(examples, "bad", ()))
    for part in distributed.gather_objects(list(zip(rows, sizes, strict=True))):
        for row, size in part:
            if isinstance(size, BadRow):
                bad.append(size)
            else:
                tokens[row] = size.tokens
    return RowChecks(bad, tokens)


def _refuse_images(examples: Sequence[Example], processor: Processor, spec: SplitSpec) -> None:
    """Refuse a task with images if the model takes none, by the first row alone."""
    if processor.pixels is not None or not len(examples):
        return
    contents = [message["content"] for message in examples[0].messages]
    if any(part["type"] != "text" for c in contents if not isinstance(c, str) for part in c):
        raise ValueError(
            f"task {spec.task} has images, and a {processor.cfg.family} model takes only text; "
            "choose a vision-language model or tasks without images"
        )


def check_split(
    config: ConfigDict, spec: SplitSpec, rows: int | None, sandbox: SandboxPool
) -> SplitReport:
    """Check a split, or `rows` of its rows chosen by the seed, and report sizes and prompts."""
    task = resolve_config_task(config, spec.task)
    prompted = make_prompted_task(task, spec.template, config.rewards, sandbox)
    examples = load_split(config, spec, task)
    model = config.model
    processor = load_processor(
        model.path or None, find_model_config(model), model.min_pixels, model.max_pixels
    )
    _refuse_images(examples, processor, spec)
    chosen = limit_rows(range(len(examples)), rows, config.seed).tolist()
    limit = DataConfig.from_config(config.data).longest_row
    sizes = _measure_rows(examples, chosen, prompted, processor, spec, limit)
    unreadable = list(getattr(examples, "bad", ()))
    good = [row for row, size in zip(chosen, sizes, strict=True) if isinstance(size, RowSize)]
    return SplitReport(
        spec,
        prompted.template.name,
        rows=[size for size in sizes if isinstance(size, RowSize)],
        bad=[*unreadable, *(size for size in sizes if isinstance(size, BadRow))],
        prompts=[
            processor.render_text(_conversation(examples[row], prompted, spec))
            for row in good[:PROMPTS_PER_SPLIT]
        ],
        read=len(sizes) + len(unreadable),
        total=len(examples) + len(unreadable),
    )


def _measure_rows(
    examples: Sequence[Example],
    rows: Sequence[int],
    prompted: PromptedTask,
    processor: Processor,
    spec: SplitSpec,
    limit: int,
) -> list[RowSize | BadRow]:
    """Measure rows in threads; Pillow decodes images without the interpreter lock."""
    prompted.refuse_unbounded_prompts(examples, rows)
    sizes = []
    with (
        console.progress_bar(f"check {spec.task} {spec.split}", len(rows)) as bar,
        concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads,
    ):
        for size in threads.map(
            lambda row: measure_row(examples, row, prompted, processor, spec, limit), rows
        ):
            sizes.append(size)
            bar.advance()
    return sizes


def _conversation(
    example: Example, prompted: PromptedTask, spec: SplitSpec
) -> list[dict[str, Any]]:
    """Return the conversation that is tokenised."""
    messages = prompted.build_prompt(example)
    if spec.with_gold:
        messages = [*messages, {"role": "assistant", "content": prompted.gold_response(example)}]
    return messages


def measure_row(
    examples: Sequence[Example],
    row: int,
    prompted: PromptedTask,
    processor: Processor,
    spec: SplitSpec,
    limit: int,
) -> RowSize | BadRow:
    """Return the size of a row, or the reason why it cannot be used."""
    try:
        example = examples[row]
        if spec.is_scored:
            prompted.check_answer(example, rewarded=spec.split == "train")
        # Decode each image once: a header does not show that the rest of the file is complete.
        opened = dataclasses.replace(example, messages=open_conversation_images(example.messages))
        conversation = _conversation(opened, prompted, spec)
        characters = sum(len(content_text(turn["content"])) for turn in conversation)
        if characters > limit * processor.longest_token:  # counting its tokens may take minutes
            raise ValueError(f"{characters} characters are over the limit of {limit} tokens")
        tokens, grids = processor.measure(conversation)
        image_tokens = sum(
            image_patches.count_image_tokens(grid, processor.pixels.merge) for grid in grids
        )
        if tokens > limit:
            raise ValueError(
                f"{tokens} tokens ({image_tokens} of them for {len(grids)} images) are over the "
                f"limit of {limit}; raise data.prompt_limit or lower model.max_pixels"
            )
        if spec.demonstration_tokens:
            demonstration = prompts.demonstration_prompt(prompted, opened)
            total = processor.measure(demonstration)[0]
            extra = prompts.extra_demonstration_tokens(processor, spec.demonstration_tokens)
            if total > limit + extra:
                raise ValueError(
                    f"its gold answer after the prompt makes {total} tokens, more than "
                    f"data.prompt_limit and rollout.max_new_tokens={spec.demonstration_tokens} "
                    "hold; raise one of them"
                )
        return RowSize(tokens, image_tokens, sum(map(math.prod, grids)))
    except (ValueError, OSError) as error:
        return make_bad_row(examples, row, error)
    except Exception as error:  # a row is a user's: whatever it causes is reported with it
        return make_bad_row(examples, row, ValueError(files.describe_error(error)))
