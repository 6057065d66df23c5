"""MMLU: four options, 57 subjects. Paper C trains on 12,000 questions of the test split and evaluates on the other 2,042."""

from typing import Any

from cptjax.tasks import hub
from cptjax.tasks.task import LETTER, LETTERS, Task, ask, lettered, plain
from cptjax.types import Example

DATASET = "cais/mmlu"
TRAIN = 12_000 / 14_042
SOURCES = {
    "train": hub.Source(DATASET, "auxiliary_train", "all"),
    "validation": hub.Source(DATASET, "validation", "all"),
    "test": hub.Source(DATASET, "test", "all"),
}
PAPER_C = {
    "train": hub.Source(DATASET, "test", "all", part=(0.0, TRAIN)),
    "test": hub.Source(DATASET, "test", "all", part=(TRAIN, 1.0)),
}


def build(row: dict[str, Any]) -> Example:
    letter = LETTERS[row["answer"]]
    meta = {"options": row["choices"], **plain(row, "subject")}
    return Example("", ask(f"{row['question'].strip()}\n{lettered(row['choices'])}"), letter, letter, meta=meta)


def make(name: str = "mmlu", paper_c: bool = False, scorer: str = "mcq_letter", **fields: Any) -> Task:
    return hub.task(name, PAPER_C if paper_c else SOURCES, build, scorer, **{"direct_suffix": LETTER, **fields})
