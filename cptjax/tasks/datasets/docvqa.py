"""DocVQA: 39,463 training and 5,349 test questions (the validation split).

The score is ANLS over all accepted answers.
"""

from typing import Any

from cptjax.common.images import open_image
from cptjax.tasks import hub
from cptjax.tasks.task import SHORT_ANSWER_SUFFIX, Task, select_columns, user_turn
from cptjax.types import Example

DATASET = "HuggingFaceM4/DocumentVQA"
SOURCES = {"train": hub.HubSource(DATASET, "train"), "test": hub.HubSource(DATASET, "validation")}


def build_example(row: dict[str, Any]) -> Example:
    answers = row["answers"]
    meta = select_columns(row, "question_types", "docId")
    return Example(
        str(row["questionId"]),
        user_turn("<image>" + row["question"], [open_image(row["image"])]),
        answers,
        answers[0],
        meta=meta,
    )


def make_task(name: str = "docvqa", scorer: str = "anls", **fields: Any) -> Task:
    return hub.make_hub_task(
        name,
        SOURCES,
        build_example,
        scorer,
        **{"answer_instruction": SHORT_ANSWER_SUFFIX, **fields},
    )
