"""Geometry3K with free-form answers (2,101 / 300 / 601 rows), not lmms-eval's four choices."""

from typing import Any

from cptjax.common.images import open_image
from cptjax.tasks import hub
from cptjax.tasks.task import SHORT_ANSWER_SUFFIX, Task, user_turn
from cptjax.types import Example

SOURCES = {
    split: hub.HubSource("hiyouga/geometry3k", split) for split in ("train", "validation", "test")
}


def build_example(row: dict[str, Any]) -> Example:
    return Example(
        "",
        user_turn(row["problem"], [open_image(image) for image in row["images"]]),
        row["answer"],
        row["answer"],
    )


def make_task(name: str = "geometry3k", scorer: str = "math", **fields: Any) -> Task:
    return hub.make_hub_task(
        name,
        SOURCES,
        build_example,
        scorer,
        **{"answer_instruction": SHORT_ANSWER_SUFFIX, "also": ("mathruler_parity",), **fields},
    )
