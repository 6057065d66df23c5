"""TextVQA: 34,602 training and 5,000 test questions (the validation split).

The dataset's own test split has no answers.
"""

import functools
from typing import Any

from cptjax.common.images import open_image
from cptjax.tasks import hub
from cptjax.tasks.task import SHORT_ANSWER_SUFFIX, Task, most_frequent, select_columns, user_turn
from cptjax.types import Example

DATASET = "lmms-lab/textvqa"
SOURCES = {"train": hub.HubSource(DATASET, "train"), "test": hub.HubSource(DATASET, "validation")}


def build_example(row: dict[str, Any], ocr: bool, single: bool, released: bool) -> Example:
    tokens = row["ocr_tokens"] or ()
    if released:
        question = "<image>\n" + row["question"]
        listed = "Reference OCR token:" + ",".join(tokens)
    else:
        question = "<image>" + row["question"].capitalize()
        listed = "Reference OCR token: " + ", ".join(tokens)
    if ocr:
        question += "\n" + listed
    best = most_frequent(row["answers"])
    meta = select_columns(row, "image_id", "image_classes") | (
        {"annotators": row["answers"]} if single else {}
    )
    return Example(
        str(row["question_id"]),
        user_turn(question, [open_image(row["image"])]),
        best if single else row["answers"],
        best,
        meta=meta,
    )


def make_task(
    name: str = "textvqa",
    ocr: bool = False,
    single: bool = False,
    released: bool = False,
    scorer: str = "vqa_soft",
    **fields: Any,
) -> Task:
    """Return the task.

    `ocr` lists the dataset's OCR tokens in the prompt; `single` keeps only the most frequent of the
    ten answers (paper A); `released` words the prompts as in paper A's files.
    """
    build_row = functools.partial(build_example, ocr=ocr, single=single, released=released)
    return hub.make_hub_task(
        name, SOURCES, build_row, scorer, **{"answer_instruction": SHORT_ANSWER_SUFFIX, **fields}
    )
