"""POPE: is the object in the image? 9,000 yes/no questions in three kinds (random, popular, adversarial); for evaluation only."""

from typing import Any

from cptjax.images import open_image
from cptjax.tasks import hub
from cptjax.tasks.task import WORD, Task, ask, plain
from cptjax.types import Example

SOURCES = {"test": hub.Source("lmms-lab/POPE", "test")}


def build(row: dict[str, Any]) -> Example:
    meta = plain(row, "question_id", "image_source", "category")
    return Example(row["id"], ask("<image>" + row["question"], [open_image(row["image"])]), row["answer"], row["answer"], meta=meta)


def make(name: str = "pope", scorer: str = "yes_no", **fields: Any) -> Task:
    return hub.task(name, SOURCES, build, scorer, **{"direct_suffix": WORD, **fields})
