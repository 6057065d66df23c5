"""VizWiz-VQA: 4,319 validation questions are the test; 43.3% of them are unanswerable, so a constant answer scores that.

The hub has no training split. The official files serve, as they unpack, under data.root:

    vizwiz/Annotations/train.json     [{"image": "VizWiz_train_00000000.jpg", "question": ..., "answers": [{"answer": ...}, ...]}]
    vizwiz/train/VizWiz_train_00000000.jpg
"""

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cptjax.images import open_image
from cptjax.tasks import hub
from cptjax.tasks.task import WORD, Examples, Task, ask, modal, plain, sample
from cptjax.types import Example

DATASET = "lmms-lab/VizWiz-VQA"
SOURCES = {"test": hub.Source(DATASET, "val")}
SUFFIX = "When the provided information is insufficient, respond with 'Unanswerable'.\n" + WORD


def build(row: dict[str, Any], single: bool) -> Example:
    best = modal(row["answers"])
    meta = plain(row, "category") | ({"annotators": row["answers"]} if single else {})
    messages = ask("<image>" + row["question"].capitalize(), [open_image(row["image"])])
    return Example(str(row["question_id"]), messages, best if single else row["answers"], best, meta=meta)


def load(name: str, build_row: hub.Build, split: str, root: str = "", limit: int | None = None, seed: int = 0) -> Sequence[Example]:
    if split != "train":
        return hub.load(name, SOURCES | {"train": None}, build_row, split, root, limit, seed)
    rows = official(root)
    return Examples(name, split, rows, build_row, sample(range(len(rows)), limit, seed))


def official(root: str) -> list[dict[str, Any]]:
    """Reads the official training annotations into the columns of the hub dataset."""
    for folder in (Path(root, "vizwiz"), Path(root, "VizWiz"), Path(root, "lmms-lab__VizWiz-VQA")):
        for annotations in (folder / "Annotations" / "train.json", folder / "train.json"):
            if root and annotations.is_file():
                return [_columns(entry, folder / "train") for entry in json.loads(annotations.read_text(encoding="utf-8"))]
    raise ValueError(
        "task vizwiz: the hub has no training split; unpack the official Annotations/train.json and train/ images "
        f"under {Path(root or '<data.root>', 'vizwiz')}"
    )


def _columns(entry: dict[str, Any], images: Path) -> dict[str, Any]:
    return {
        "question_id": Path(entry["image"]).stem,
        "image": str(images / entry["image"]),
        "question": entry["question"],
        "answers": [answer["answer"] for answer in entry["answers"]],
        "category": entry.get("answer_type"),
    }


def make(name: str = "vizwiz", single: bool = False, scorer: str = "vqa_soft", **fields: Any) -> Task:
    """Makes the task; `single` keeps the most frequent of the ten answers, as paper A and MCITlib do."""
    build_row = functools.partial(build, single=single)
    return Task(name, functools.partial(load, name, build_row), scorer, **{"direct_suffix": SUFFIX, **fields})
