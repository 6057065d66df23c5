"""ScienceQA, the questions that have an image: 6,218 to train on, 2,017 to test. One letter is the answer."""

from typing import Any

from cptjax.images import open_image
from cptjax.tasks import hub
from cptjax.tasks.task import LETTER, LETTERS, Task, ask, lettered, plain
from cptjax.types import Example

DATASET = "derek-thomas/ScienceQA"
SOURCES = {split: hub.Source(DATASET, split, needs="image") for split in ("train", "validation", "test")}


def build(row: dict[str, Any]) -> Example:
    """Asks as lmms-eval does: the hint as context, the question, the lettered choices."""
    context = f"Context: {row['hint']}\n" if row["hint"] else ""
    question = f"<image>{context}{row['question']}\n{lettered(row['choices'])}"
    letter = LETTERS[row["answer"]]
    meta = {"options": row["choices"], **plain(row, "task", "grade", "subject", "topic", "category", "skill")}
    return Example("", ask(question, [open_image(row["image"])]), letter, letter, meta=meta)


def make(name: str = "scienceqa", scorer: str = "mcq_letter", **fields: Any) -> Task:
    return hub.task(name, SOURCES, build, scorer, **{"direct_suffix": LETTER, **fields})
