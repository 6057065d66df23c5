"""ScienceQA, the questions with an image: 6,218 for training, 2,017 for testing.

The answer is a letter.
"""

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
    question = f"<image>{context}{row['question']}\n{format_options(row['choices'])}"
    letter = OPTION_LETTERS[row["answer"]]
    meta = {
        "options": row["choices"],
        **select_columns(row, "task", "grade", "subject", "topic", "category", "skill"),
    }
    return Example("", user_turn(question, [open_image(row["image"])]), letter, letter, meta=meta)


def make_task(name: str = "scienceqa", scorer: str = "mcq_letter", **fields: Any) -> Task:
    return hub.make_hub_task(
        name, SOURCES, build_example, scorer, **{"direct_suffix": OPTION_LETTER_SUFFIX, **fields}
    )
