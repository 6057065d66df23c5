"""VizWiz-VQA: 4,319 test questions (the validation split); training needs the official files.

43.3% of the test questions are unanswerable, so a constant response scores that much. The hub has
no training split; the official files are read from where they unpack under data.root:

    vizwiz/Annotations/train.json     [{"image": "VizWiz_train_00000000.jpg", "question": ...,
                                        "answers": [{"answer": ...}, ...]}]
    vizwiz/train/VizWiz_train_00000000.jpg
"""

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cptjax.common.images import open_image
from cptjax.tasks import hub
from cptjax.tasks.task import (
    SHORT_ANSWER_SUFFIX,
    Examples,
    Task,
    limit_rows,
    most_frequent,
    select_columns,
    user_turn,
)
from cptjax.types import Example

DATASET = "lmms-lab/VizWiz-VQA"
SOURCES = {"test": hub.HubSource(DATASET, "val")}
SUFFIX = (
    "When the provided information is insufficient, respond with 'Unanswerable'.\n"
    + SHORT_ANSWER_SUFFIX
)


def build_example(row: dict[str, Any], single: bool, released: bool) -> Example:
    best = most_frequent(row["answers"])
    meta = select_columns(row, "category") | ({"annotators": row["answers"]} if single else {})
    question = "\n" + row["question"] if released else row["question"].capitalize()
    messages = user_turn("<image>" + question, [open_image(row["image"])])
    return Example(
        str(row["question_id"]), messages, best if single else row["answers"], best, meta=meta
    )


def load_split(
    name: str,
    build_row: hub.BuildExample,
    split: str,
    root: str = "",
    limit: int | None = None,
    seed: int = 0,
) -> Sequence[Example]:
    if split != "train":
        return hub.load_hub_split(
            name, SOURCES | {"train": None}, build_row, split, root, limit, seed
        )
    rows = read_official_annotations(root)
    return Examples(name, split, rows, build_row, limit_rows(range(len(rows)), limit, seed))


def read_official_annotations(root: str) -> list[dict[str, Any]]:
    """Return the official training annotations in the columns of the hub dataset."""
    for folder in (Path(root, "vizwiz"), Path(root, "VizWiz"), Path(root, "lmms-lab__VizWiz-VQA")):
        for annotations in (folder / "Annotations" / "train.json", folder / "train.json"):
            if root and annotations.is_file():
                return [
                    _to_hub_columns(entry, folder / "train")
                    for entry in json.loads(annotations.read_text(encoding="utf-8"))
                ]
    raise ValueError(
        "task vizwiz: the hub has no training split; unpack the official "
        f"Annotations/train.json and train/ images under {Path(root or '<data.root>', 'vizwiz')}"
    )


def _to_hub_columns(entry: dict[str, Any], images: Path) -> dict[str, Any]:
    return {
        "question_id": Path(entry["image"]).stem,
        "image": str(images / entry["image"]),
        "question": entry["question"],
        "answers": [answer["answer"] for answer in entry["answers"]],
        "category": entry.get("answer_type"),
    }


def make_task(
    name: str = "vizwiz",
    single: bool = False,
    released: bool = False,
    scorer: str = "vqa_soft",
    **fields: Any,
) -> Task:
    """Return the task.

    `single` keeps only the most frequent of the ten answers, as paper A and MCITlib do; `released`
    words the prompts as in paper A's files.
    """
    build_row = functools.partial(build_example, single=single, released=released)
    return Task(
        name,
        functools.partial(load_split, name, build_row),
        scorer,
        **{"answer_instruction": SUFFIX, **fields},
    )
