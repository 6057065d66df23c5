"""MMMU: 150 training (dev) and 900 test questions (validation), with images inside the text."""

import ast
import re
from typing import Any

from cptjax.common.images import open_image
from cptjax.tasks import hub
from cptjax.tasks.task import (
    OPTION_LETTER_SUFFIX,
    SHORT_ANSWER_SUFFIX,
    Task,
    format_options,
    select_columns,
    user_turn,
)
from cptjax.types import Example

DATASET = "lmms-lab/MMMU"
SOURCES = {"train": hub.HubSource(DATASET, "dev"), "test": hub.HubSource(DATASET, "validation")}


def build_example(row: dict[str, Any]) -> Example:
    options = ast.literal_eval(row["options"] or "[]")
    choice = row["question_type"] == "multiple-choice"
    text = f"{row['question']}\n{format_options(options)}" if choice else row["question"]
    text, numbers = inline_images(
        text, [n for n in range(1, 8) if row.get(f"image_{n}") is not None]
    )
    images = [open_image(row[f"image_{n}"]) for n in numbers]
    answer = row["answer"]
    if answer.startswith("["):  # an open question may list several answers as a Python list
        answer = [str(item) for item in ast.literal_eval(answer)]
    meta = {
        "options": options,
        "answer_instruction": OPTION_LETTER_SUFFIX if choice else SHORT_ANSWER_SUFFIX,
        "subject": "_".join(row["id"].split("_")[1:-1]),  # of an id like validation_Art_Theory_3
        **select_columns(row, "id", "question_type", "subfield", "topic_difficulty", "img_type"),
    }
    return Example(
        row["id"],
        user_turn(text, images),
        answer,
        answer if isinstance(answer, str) else answer[0],
        meta=meta,
    )


def inline_images(text: str, present: list[int]) -> tuple[str, list[int]]:
    """Replace <image 2> by <image> and return the number of each image.

    Images that the text does not mention go first.
    """
    mentioned = [int(n) for n in re.findall(r"<image (\d)>", text)]
    absent = [n for n in mentioned if n not in present]
    if absent:
        raise ValueError(
            f"the question mentions <image {absent[0]}> but the row has no image_{absent[0]}"
        )
    first = [n for n in present if n not in mentioned]
    return "<image>" * len(first) + re.sub(r"<image \d>", "<image>", text), first + mentioned


def make_task(name: str = "mmmu", scorer: str = "mmmu_official", **fields: Any) -> Task:
    return hub.make_hub_task(name, SOURCES, build_example, scorer, **fields)
