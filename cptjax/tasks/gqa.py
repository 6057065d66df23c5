"""GQA, balanced: 943,000 questions to train on, 12,578 of testdev to test; images are a dataset of their own, joined on imageId."""

import functools
from collections.abc import Sequence
from typing import Any

from cptjax.images import open_image
from cptjax.tasks import hub
from cptjax.tasks.task import WORD, Examples, Task, ask, plain, sample
from cptjax.types import Example

DATASET = "lmms-lab/GQA"
SPLITS = {"train": "train", "validation": "val", "test": "testdev"}


def build(row: dict[str, Any], images: hub.Rows, place: dict[str, int]) -> Example:
    if row["imageId"] not in place:
        raise ValueError(f"question {row['id']}: no image {row['imageId']!r} among the images of its split")
    image = open_image(images[place[row["imageId"]]]["image"])
    meta = plain(row, "imageId", "fullAnswer", "types")
    return Example(row["id"], ask("<image>" + row["question"], [image]), row["answer"], row["answer"], meta=meta)


def load(name: str, train_rows: int | None, split: str, root: str = "", limit: int | None = None, seed: int = 0) -> Sequence[Example]:
    """Loads questions and their images; the join is a dictionary from imageId to row, no image is copied."""
    sources = {ours: hub.Source(DATASET, theirs, f"{theirs}_balanced_instructions") for ours, theirs in SPLITS.items()}
    sources["train"] = hub.Source(DATASET, "train", "train_balanced_instructions", most=train_rows)
    source = hub.pick(name, sources, split)
    questions = hub.load_rows(source, root)
    images = hub.load_rows(hub.Source(DATASET, source.split, f"{source.split}_balanced_images"), root)
    place = {image: row for row, image in enumerate(images.column("id").to_pylist())}
    build_row = functools.partial(build, images=images, place=place)
    return Examples(name, split, questions, build_row, sample(hub.usable(questions, source), limit, seed))


def make(name: str = "gqa", train_rows: int | None = None, scorer: str = "exact_match", **fields: Any) -> Task:
    """Makes the task; `train_rows` trains on a fixed random subset (paper A saw about 80,000)."""
    return Task(name, functools.partial(load, name, train_rows), scorer, **{"direct_suffix": WORD, **fields})
