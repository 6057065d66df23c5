"""Geometry3K with free-form answers (2,101 / 300 / 601), not the four-choice set of the same size that lmms-eval uses."""

from typing import Any

from cptjax.images import open_image
from cptjax.tasks import hub
from cptjax.tasks.task import WORD, Task, ask
from cptjax.types import Example

SOURCES = {split: hub.Source("hiyouga/geometry3k", split) for split in ("train", "validation", "test")}


def build(row: dict[str, Any]) -> Example:
    return Example("", ask(row["problem"], [open_image(image) for image in row["images"]]), row["answer"], row["answer"])


def make(name: str = "geometry3k", scorer: str = "math", **fields: Any) -> Task:
    return hub.task(name, SOURCES, build, scorer, **{"direct_suffix": WORD, "also": ("mathruler_parity",), **fields})
