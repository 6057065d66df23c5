"""PathVQA (19,654 / 6,259 / 6,719 rows): half yes/no, half free text.

The scorer also reports the two halves separately.
"""

from typing import Any

from cptjax.common.images import open_image
from cptjax.tasks import hub
from cptjax.tasks.task import SHORT_ANSWER_SUFFIX, Task, user_turn
from cptjax.types import Example

SOURCES = {
    split: hub.HubSource("flaviagiammarino/path-vqa", split)
    for split in ("train", "validation", "test")
}


def build_example(row: dict[str, Any]) -> Example:
    meta = {"kind": "yes/no" if row["answer"].lower() in ("yes", "no") else "open"}
    return Example(
        "",
        user_turn("<image>" + row["question"], [open_image(row["image"])]),
        row["answer"],
        row["answer"],
        meta=meta,
    )


def make_task(name: str = "pathvqa", scorer: str = "pathvqa_split", **fields: Any) -> Task:
    return hub.make_hub_task(
        name,
        SOURCES,
        build_example,
        scorer,
        **{"answer_instruction": SHORT_ANSWER_SUFFIX, **fields},
    )
