r"""MATH: 7,500 competition problems for training, MATH-500 for testing.

The answer is what the solution puts inside \boxed{}. Paper C reads it from the solution by its own
rule, so there the answer is the solution.
"""

import dataclasses
from typing import Any

from cptjax.tasks import hub
from cptjax.tasks.scoring.extract import boxed_answer
from cptjax.tasks.task import Task, select_columns, user_turn
from cptjax.types import Example

SOURCES = {
    "train": hub.HubSource("DigitalLearningGmbH/MATH-lighteval", "train"),
    "test": hub.HubSource("HuggingFaceH4/MATH-500", "test"),
}
INSTRUCTION = "The final answer is the result alone."
PAPER_C_INSTRUCTION = (
    "Reason about the problem, derive your answer, and wrap your final answer in $\\boxed{ }$."
)


def build_example(row: dict[str, Any]) -> Example:
    answer = row.get("answer") or boxed_answer(row["solution"])
    if not answer:
        raise ValueError(r"expected a solution with its answer in \boxed{}, got one without")
    meta = select_columns(row, "level", "type", "subject", "solution")
    return Example(row.get("unique_id") or "", user_turn(row["problem"]), answer, answer, meta=meta)


def build_paper_c_example(row: dict[str, Any]) -> Example:
    """Return an example with the prompt of paper C's released code."""
    example = build_example(row)
    messages = user_turn(f"{row['problem']}\n")
    return dataclasses.replace(
        example, messages=messages, answer=row["solution"], target=row["solution"]
    )


def make_task(name: str = "math", paper_c: bool = False, **fields: Any) -> Task:
    if paper_c:
        own = {
            "scorer": "retain_math",
            "template": "none",
            "answer_instruction": PAPER_C_INSTRUCTION,
        }
        return hub.make_hub_task(name, SOURCES, build_paper_c_example, **{**own, **fields})
    own = {"scorer": "math", "answer_instruction": INSTRUCTION}
    return hub.make_hub_task(name, SOURCES, build_example, **{**own, **fields})
