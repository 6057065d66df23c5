"""MMLU-Pro: 12,032 questions with up to ten options, after five worked examples of the category.

The worked examples come from the validation split.
"""

import functools
from collections.abc import Sequence
from typing import Any

from cptjax.tasks import hub
from cptjax.tasks.task import (
    OPTION_LETTER_SUFFIX,
    Examples,
    Task,
    format_options,
    limit_rows,
    select_columns,
    user_turn,
)
from cptjax.types import Example

DATASET = "TIGER-Lab/MMLU-Pro"
SOURCES = {"train": hub.HubSource(DATASET, "validation"), "test": hub.HubSource(DATASET, "test")}
FEW_SHOT_HEADER = (
    "The following are multiple choice questions (with answers) about {category}. "
    'Think step by step and then finish your answer with "the answer is (X)" '
    "where X is the correct letter choice.\n\n"
)
THINK_PROMPT = "Let's think step by step."


def build_example(
    row: dict[str, Any], worked: dict[str, list[dict[str, Any]]], shots: int
) -> Example:
    text = format_question(row)
    if shots:
        others = [
            shot for shot in worked[row["category"]] if shot["question_id"] != row["question_id"]
        ]
        before = [
            f"{format_question(shot)}\n{format_solution(shot)}\n\n" for shot in others[:shots]
        ]
        text = (
            FEW_SHOT_HEADER.format(category=row["category"])
            + "".join(before)
            + f"{text}\nAnswer: {THINK_PROMPT}"
        )
    else:
        text = text.removeprefix("Question:\n").replace("\nOptions:\n", "\n")
    meta = {"options": row["options"], **select_columns(row, "category", "src")}
    return Example(
        str(row["question_id"]), user_turn(text), row["answer"], row["answer"], meta=meta
    )


def format_question(row: dict[str, Any]) -> str:
    options = [option for option in row["options"] if option != "N/A"]
    return f"Question:\n{row['question']}\nOptions:\n{format_options(options)}"


def format_solution(row: dict[str, Any]) -> str:
    """Return a worked solution without the dataset's prefix "A: ", which reads like option A."""
    return "Answer: " + row["cot_content"].removeprefix("A: ").removeprefix("Answer: ")


def load_split(
    name: str, shots: int, split: str, root: str = "", limit: int | None = None, seed: int = 0
) -> Sequence[Example]:
    source = hub.pick_source(name, SOURCES, split)
    rows = hub.load_rows(source, root)
    worked: dict[str, list[dict[str, Any]]] = {}
    for shot in hub.load_rows(SOURCES["train"], root) if shots else ():
        worked.setdefault(shot["category"], []).append(shot)
    build_row = functools.partial(build_example, worked=worked, shots=shots)
    return Examples(
        name, split, rows, build_row, limit_rows(hub.usable_rows(rows, source), limit, seed)
    )


def make_task(
    name: str = "mmlu_pro", shots: int = 5, scorer: str = "mmlu_pro", **fields: Any
) -> Task:
    """Return the task.

    With `shots` > 0 the prompt contains its own instruction (template "none"); with 0 (paper A) the
    template adds one.
    """
    own = {"answer_instruction": OPTION_LETTER_SUFFIX} if not shots else {"template": "none"}
    return Task(name, functools.partial(load_split, name, shots), scorer, **{**own, **fields})
