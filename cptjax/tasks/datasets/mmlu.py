"""MMLU: four options, 57 subjects.

Paper C trains on 12,000 questions of the test split and evaluates on the other 2,042.
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


def build_example(row: dict[str, Any]) -> Example:
    letter = OPTION_LETTERS[row["answer"]]
    meta = {"options": row["choices"], **select_columns(row, "subject")}
    return Example(
        "",
        user_turn(f"{row['question'].strip()}\n{format_options(row['choices'])}"),
        letter,
        letter,
        meta=meta,
    )


def make_task(
    name: str = "mmlu", paper_c: bool = False, scorer: str = "mcq_letter", **fields: Any
) -> Task:
    return hub.make_hub_task(
        name,
        PAPER_C_SOURCES if paper_c else SOURCES,
        build_example,
        scorer,
        **{"direct_suffix": OPTION_LETTER_SUFFIX, **fields},
    )
