"""RefCOCO grounding: the box of an expression, in pixels of the resized image; acc@0.5.

Qwen2.5-VL states boxes in pixels *after* the processor's resizing. Therefore `build_example`
resizes the image, and the box with it, to the size that the processor would choose within
`min_pixels` and `max_pixels`; the processor then changes neither. The limits must be those of
model.min_pixels and model.max_pixels. The public copy has no training split, so "train" is its
"val".
"""

import functools
from typing import Any

from PIL import Image

from cptjax.common.images import ImageSettings, open_image
from cptjax.tasks import hub
from cptjax.tasks.task import Task, user_turn
from cptjax.types import Example

SPLITS = {"train": "val", "validation": "testB", "test": "testA"}
QUESTION = (
    '<image>Locate "{expression}" in the image. '
    "Give its bounding box in pixels as [x1, y1, x2, y2]."
)


def build_example(row: dict[str, Any], min_pixels: int, max_pixels: int) -> Example:
    image = open_image(row["image"])
    height, width = ImageSettings(min_pixels, max_pixels).size(image.width, image.height)
    x, y, w, h = row["bbox"]
    across, down = width / image.width, height / image.height
    left, top = round(x * across), round(y * down)
    box = [left, top, max(left + 1, round((x + w) * across)), max(top + 1, round((y + h) * down))]
    expression = row["answer"][0]
    meta = {
        "size": [width, height],
        "original_size": [image.width, image.height],
        "expressions": row["answer"],
    }
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    return Example(
        str(row["question_id"]),
        user_turn(QUESTION.format(expression=expression), [resized]),
        box,
        str(box),
        meta=meta,
    )


def make_task(
    name: str = "refcoco",
    dataset: str = "lmms-lab/RefCOCO",
    min_pixels: int = 200_704,
    max_pixels: int = 1_003_520,
    scorer: str = "iou50",
    **fields: Any,
) -> Task:
    """Return the task; `dataset` may be lmms-lab/RefCOCOplus, whose files have the same form."""
    sources = {ours: hub.HubSource(dataset, theirs) for ours, theirs in SPLITS.items()}
    build_row = functools.partial(build_example, min_pixels=min_pixels, max_pixels=max_pixels)
    own = {"direct_suffix": "Give only the box.", "pixels": (min_pixels, max_pixels)}
    return hub.make_hub_task(name, sources, build_row, scorer, **{**own, **fields})
