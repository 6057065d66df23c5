r"""MATH: 7,500 competition problems for training, MATH-500 for testing.

The answer is what the solution puts inside \boxed{}.
"""

from typing import Any

from cptjax.tasks import hub
from cptjax.tasks.scoring.extract import boxed_answer
from cptjax.tasks.task import Task, select_columns, user_turn
from cptjax.types import Example

SOURCES = {
    "train": hub.HubSource("DigitalLearningGmbH/MATH-lighteval", "train"),
    "test": hub.HubSource("HuggingFaceH4/MATH-500", "test"),
}
SUFFIX = "Give only the final answer."


def build_example(row: dict[str, Any]) -> Example:
    answer = row.get("answer") or boxed_answer(row["solution"])
    if not answer:
        raise ValueError(r"expected a solution with its answer in \boxed{}, got one without")
    meta = select_columns(row, "level", "type", "subject", "solution")
    return Example(row.get("unique_id") or "", user_turn(row["problem"]), answer, answer, meta=meta)


def make_task(name: str = "math", scorer: str = "math", **fields: Any) -> Task:
    return hub.make_hub_task(
        name, SOURCES, build_example, scorer, **{"direct_suffix": SUFFIX, **fields}
    )
