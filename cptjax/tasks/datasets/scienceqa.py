"""ScienceQA, the questions with an image: 6,218 for training, 2,017 for testing.

The answer is a letter.
"""

import functools
from collections.abc import Sequence
from typing import Any

from cptjax.common.images import open_image
from cptjax.tasks import hub
from cptjax.tasks.task import (
    OPTION_LETTER_SUFFIX,
    OPTION_LETTERS,
    Task,
    format_options,
    select_columns,
    user_turn,
)
from cptjax.types import Example

DATASET = "derek-thomas/ScienceQA"
SOURCES = {
    split: hub.HubSource(DATASET, split, needs="image") for split in ("train", "validation", "test")
}


def build_example(row: dict[str, Any]) -> Example:
    """Return an example with the prompt of lmms-eval: context, question, lettered choices."""
    context = f"Context: {row['hint']}\n" if row["hint"] else ""
    return _build_from_text(
        row, f"<image>{context}{row['question']}\n{format_options(row['choices'])}"
    )


def build_released_example(row: dict[str, Any], split: str) -> Example:
    """Return an example worded as in paper A's files, whose test prompts lack the word Context."""
    context = f"Context: {row['hint']}\n" if row["hint"] else ""
    text = f"{context}{row['question']}\n{format_options(row['choices'])}"
    if split == "test":
        text = text.replace("Context: ", "")
    return _build_from_text(row, f"<image>\n{text}")


def _build_from_text(row: dict[str, Any], question: str) -> Example:
    letter = OPTION_LETTERS[row["answer"]]
    meta = {
        "options": row["choices"],
        **select_columns(row, "task", "grade", "subject", "topic", "category", "skill"),
    }
    return Example("", user_turn(question, [open_image(row["image"])]), letter, letter, meta=meta)


def make_task(name: str = "scienceqa", released: bool = False, **fields: Any) -> Task:
    """Return the task; `released` words the prompts as in paper A's files."""
    own = {
        "scorer": "mcq_letter",
        "also": ("scienceqa_strict",),
        "answer_instruction": OPTION_LETTER_SUFFIX,
    }
    if released:
        return Task(name, functools.partial(load_released_split, name), **{**own, **fields})
    return hub.make_hub_task(name, SOURCES, build_example, **{**own, **fields})


def load_released_split(name: str, split: str, *args: Any, **settings: Any) -> Sequence[Example]:
    build_row = functools.partial(build_released_example, split=split)
    return hub.load_hub_split(name, SOURCES, build_row, split, *args, **settings)
