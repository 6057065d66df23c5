"""MME: 2,374 yes/no questions in 14 categories, two for each image, for evaluation only.

Each question ends in "Please answer yes or no." The official score is the sum of points over the
categories of perception and of cognition, see scoring/summaries.py.
"""

from typing import Any

from cptjax.common.images import open_image
from cptjax.tasks import hub
from cptjax.tasks.task import Task, select_columns, user_turn
from cptjax.types import Example

SOURCES = {"test": hub.HubSource("lmms-lab/MME", "test")}


def build_example(row: dict[str, Any]) -> Example:
    question, image = row["question"].strip(), open_image(row["image"])
    return Example(
        "",  # two rows share a question_id
        user_turn("<image>" + question, [image]),
        row["answer"],
        row["answer"],
        meta=select_columns(row, "question_id", "category"),
    )


def make_task(name: str = "mme", scorer: str = "mme", **fields: Any) -> Task:
    return hub.make_hub_task(name, SOURCES, build_example, scorer, **fields)
