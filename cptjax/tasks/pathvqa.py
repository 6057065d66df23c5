"""PathVQA (19,654 / 6,259 / 6,719): half of the test is yes/no, half free text, so the scorer reports the two apart."""

from typing import Any

from cptjax.images import open_image
from cptjax.tasks import hub
from cptjax.tasks.task import WORD, Task, ask
from cptjax.types import Example

SOURCES = {split: hub.Source("flaviagiammarino/path-vqa", split) for split in ("train", "validation", "test")}


def build(row: dict[str, Any]) -> Example:
    meta = {"kind": "yes/no" if row["answer"].lower() in ("yes", "no") else "open"}
    return Example("", ask("<image>" + row["question"], [open_image(row["image"])]), row["answer"], row["answer"], meta=meta)


def make(name: str = "pathvqa", scorer: str = "pathvqa_split", **fields: Any) -> Task:
    return hub.task(name, SOURCES, build, scorer, **{"direct_suffix": WORD, **fields})
