"""MMStar: 1,500 four-option questions that need their image, for evaluation only.

The options are part of the question. The official score is the mean of six categories.
"""

from typing import Any

from cptjax.common.images import open_image
from cptjax.tasks import hub
from cptjax.tasks.task import OPTION_LETTER_SUFFIX, Task, select_columns, user_turn
from cptjax.types import Example

SOURCES = {"test": hub.HubSource("Lin-Chen/MMStar", "val", file="mmstar")}


def build_example(row: dict[str, Any]) -> Example:
    question, image = row["question"].strip(), open_image(row["image"])
    return Example(
        str(row["index"]),
        user_turn("<image>" + question, [image]),
        row["answer"],
        row["answer"],
        meta=select_columns(row, "category", "l2_category"),
    )


def make_task(name: str = "mmstar", scorer: str = "mmstar", **fields: Any) -> Task:
    return hub.make_hub_task(
        name,
        SOURCES,
        build_example,
        scorer,
        **{"answer_instruction": OPTION_LETTER_SUFFIX, **fields},
    )
