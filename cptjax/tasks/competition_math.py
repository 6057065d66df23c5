"""MATH: 7,500 competition problems to train on, the 500 of MATH-500 to test; the answer is what the solution boxes."""

from typing import Any

from cptjax.scorers.extract import boxed
from cptjax.tasks import hub
from cptjax.tasks.task import Task, ask, plain
from cptjax.types import Example

SOURCES = {
    "train": hub.Source("DigitalLearningGmbH/MATH-lighteval", "train"),
    "test": hub.Source("HuggingFaceH4/MATH-500", "test"),
}
SUFFIX = "Give only the final answer."


def build(row: dict[str, Any]) -> Example:
    answer = row.get("answer") or boxed(row["solution"])
    if not answer:
        raise ValueError("the solution boxes no answer")
    meta = plain(row, "level", "type", "subject", "solution")
    return Example(row.get("unique_id") or "", ask(row["problem"]), answer, answer, meta=meta)


def make(name: str = "math", scorer: str = "math", **fields: Any) -> Task:
    return hub.task(name, SOURCES, build, scorer, **{"direct_suffix": SUFFIX, **fields})
