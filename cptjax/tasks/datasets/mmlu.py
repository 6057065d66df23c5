"""MMLU: four options, 57 subjects.

Paper C trains on 12,000 questions of the test split and evaluates on the other 2,042, with a prompt
and a reading of the answer of its own.
"""

from typing import Any

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

DATASET = "cais/mmlu"
TRAIN_SHARE = 12_000 / 14_042
SOURCES = {
    "train": hub.HubSource(DATASET, "auxiliary_train", "all"),
    "validation": hub.HubSource(DATASET, "validation", "all"),
    "test": hub.HubSource(DATASET, "test", "all"),
}
PAPER_C_SOURCES = {
    "train": hub.HubSource(DATASET, "test", "all", part=(0.0, TRAIN_SHARE)),
    "test": hub.HubSource(DATASET, "test", "all", part=(TRAIN_SHARE, 1.0)),
}


PAPER_C_INSTRUCTION = 'Reason about it and answer with "The answer is: <option>"'


def build_example(row: dict[str, Any]) -> Example:
    text = f"{row['question'].strip()}\n{format_options(row['choices'])}"
    return _build_from_text(row, text)


def build_paper_c_example(row: dict[str, Any]) -> Example:
    """Return an example with the prompt of paper C's released code."""
    options = format_options(row["choices"])
    text = f"{row['question']}\n\nAnswer options:\n{options}\n"
    return _build_from_text(row, text, target="The answer is: {letter}")


def _build_from_text(row: dict[str, Any], text: str, target: str = "{letter}") -> Example:
    letter = OPTION_LETTERS[row["answer"]]
    meta = {"options": row["choices"], **select_columns(row, "subject")}
    return Example("", user_turn(text), letter, target.format(letter=letter), meta=meta)


def make_task(name: str = "mmlu", paper_c: bool = False, **fields: Any) -> Task:
    if paper_c:
        own = {
            "scorer": "retain_mmlu",
            "template": "none",
            "answer_instruction": PAPER_C_INSTRUCTION,
        }
        return hub.make_hub_task(name, PAPER_C_SOURCES, build_paper_c_example, **{**own, **fields})
    own = {"scorer": "mcq_letter", "answer_instruction": OPTION_LETTER_SUFFIX}
    return hub.make_hub_task(name, SOURCES, build_example, **{**own, **fields})
