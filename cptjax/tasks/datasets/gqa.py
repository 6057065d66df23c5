"""GQA, balanced: 943,000 training and 12,578 test questions (testdev).

The images are in a dataset of their own, joined on imageId.
"""

import functools
from collections.abc import Sequence
from typing import Any

from cptjax.common.images import open_image
from cptjax.tasks import hub
from cptjax.tasks.task import (
    SHORT_ANSWER_SUFFIX,
    Examples,
    Task,
    limit_rows,
    select_columns,
    user_turn,
)
from cptjax.types import Example

DATASET = "lmms-lab/GQA"
SPLITS = {"train": "train", "validation": "val", "test": "testdev"}


def build_example(
    row: dict[str, Any], images: hub.ArrowRows, place: dict[str, int], released: bool
) -> Example:
    if row["imageId"] not in place:
        raise ValueError(
            f"question {row['id']}: no image {row['imageId']!r} among the images of its split"
        )
    image = open_image(images[place[row["imageId"]]]["image"])
    meta = select_columns(row, "imageId", "fullAnswer", "types")
    return Example(
        row["id"],
        user_turn(("<image>\n" if released else "<image>") + row["question"], [image]),
        row["answer"],
        row["answer"],
        meta=meta,
    )


def load_split(
    name: str,
    train_rows: int | None,
    released: bool,
    split: str,
    root: str = "",
    limit: int | None = None,
    seed: int = 0,
) -> Sequence[Example]:
    """Load questions and their images.

    The join is a dictionary from imageId to row; no image is copied.
    """
    sources = {
        ours: hub.HubSource(DATASET, theirs, f"{theirs}_balanced_instructions")
        for ours, theirs in SPLITS.items()
    }
    sources["train"] = hub.HubSource(
        DATASET, "train", "train_balanced_instructions", most=train_rows
    )
    source = hub.pick_source(name, sources, split)
    questions = hub.load_rows(source, root)
    images = hub.load_rows(
        hub.HubSource(DATASET, source.split, f"{source.split}_balanced_images"), root
    )
    place = {image: row for row, image in enumerate(images.column("id").to_pylist())}
    build_row = functools.partial(build_example, images=images, place=place, released=released)
    return Examples(
        name,
        split,
        questions,
        build_row,
        limit_rows(hub.usable_rows(questions, source), limit, seed),
    )


def make_task(
    name: str = "gqa", train_rows: int | None = None, released: bool = False, **fields: Any
) -> Task:
    """Return the task.

    `train_rows` trains on a fixed random subset (paper A used about 80,000); `released` words the
    prompts as in paper A's files.
    """
    own = {
        "scorer": "exact_match",
        "also": ("gqa_strict",),
        "answer_instruction": SHORT_ANSWER_SUFFIX,
    }
    return Task(
        name, functools.partial(load_split, name, train_rows, released), **{**own, **fields}
    )
