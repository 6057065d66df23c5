"""POPE: 9,000 yes/no questions about objects in images, for evaluation only.

The questions are of three kinds: random, popular and adversarial.
"""

from typing import Any

from cptjax.common.images import open_image
from cptjax.tasks import hub
from cptjax.tasks.task import SHORT_ANSWER_SUFFIX, Task, select_columns, user_turn
from cptjax.types import Example

SOURCES = {"test": hub.HubSource("lmms-lab/POPE", "test")}


def build_example(row: dict[str, Any]) -> Example:
    meta = select_columns(row, "question_id", "image_source", "category")
    return Example(
        row["id"],
        user_turn("<image>" + row["question"], [open_image(row["image"])]),
        row["answer"],
        row["answer"],
        meta=meta,
    )


def make_task(name: str = "pope", scorer: str = "pope", **fields: Any) -> Task:
    return hub.make_hub_task(
        name,
        SOURCES,
        build_example,
        scorer,
        **{"answer_instruction": SHORT_ANSWER_SUFFIX, **fields},
    )
