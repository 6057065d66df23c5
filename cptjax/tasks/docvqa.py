"""DocVQA: 39,463 questions to train on, 5,349 of the validation split to test, scored by ANLS over all accepted answers."""

from typing import Any

from cptjax.images import open_image
from cptjax.tasks import hub
from cptjax.tasks.task import WORD, Task, ask, plain
from cptjax.types import Example

DATASET = "HuggingFaceM4/DocumentVQA"
SOURCES = {"train": hub.Source(DATASET, "train"), "test": hub.Source(DATASET, "validation")}


def build(row: dict[str, Any]) -> Example:
    answers = row["answers"]
    meta = plain(row, "question_types", "docId")
    return Example(str(row["questionId"]), ask("<image>" + row["question"], [open_image(row["image"])]), answers, answers[0], meta=meta)


def make(name: str = "docvqa", scorer: str = "anls", **fields: Any) -> Task:
    return hub.task(name, SOURCES, build, scorer, **{"direct_suffix": WORD, **fields})
