"""RefCOCO grounding: the box of an expression, in pixels of the resized image; acc@0.5.

Qwen2.5-VL states boxes in pixels *after* the processor's resizing. Therefore `build_example`
resizes the image, and the box with it, to the size that the processor would choose within
`min_pixels` and `max_pixels`; the processor then changes neither. The limits must be those of
model.min_pixels and model.max_pixels, and the model's patches those of Qwen2.5-VL; Qwen3-VL has
larger patches and states boxes in thousandths of the image. Each expression of a row is a question
of its own. The public copy has no training split: where another split is tested, its "val" is for
training.
"""

import functools
from collections.abc import Sequence
from typing import Any

from PIL import Image

from cptjax.common.images import ImageSettings, open_image
from cptjax.tasks import hub
from cptjax.tasks.task import Examples, Task, did_you_mean, limit_rows, user_turn
from cptjax.types import Example

SPLITS = ("val", "test", "testA", "testB")
PATCH = 14  # pixels; of Qwen2.5-VL
INSTRUCTION = "The final answer is the box alone."
QUESTION = (
    '<image>Locate "{expression}" in the image. '
    "Give its bounding box in pixels as [x1, y1, x2, y2]."
)


class Expressions(Sequence[tuple[dict[str, Any], int]]):
    """The rows of a split with the number of an expression, for each expression of each row."""

    def __init__(self, rows: hub.ArrowRows):
        self.rows = rows
        counts = [len(expressions) for expressions in rows.column("answer").to_pylist()]
        self.places = [(row, k) for row, count in enumerate(counts) for k in range(count)]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[dict[str, Any], int]:
        row, k = self.places[index]
        return self.rows[row], k


def build_example(place: tuple[dict[str, Any], int], min_pixels: int, max_pixels: int) -> Example:
    row, k = place
    image = open_image(row["image"])
    settings = ImageSettings(min_pixels, max_pixels, patch=PATCH)
    height, width = settings.size(image.width, image.height)
    x, y, w, h = row["bbox"]
    across, down = width / image.width, height / image.height
    left, top = round(x * across), round(y * down)
    box = [left, top, max(left + 1, round((x + w) * across)), max(top + 1, round((y + h) * down))]
    expression = row["answer"][k]
    meta = {
        "size": [width, height],
        "original_size": [image.width, image.height],
        "expressions": row["answer"],
    }
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    return Example(
        f"{row['question_id']}-{k}",
        user_turn(QUESTION.format(expression=expression), [resized]),
        box,
        str(box),
        meta=meta,
    )


def load_split(
    name: str,
    sources: dict[str, hub.HubSource],
    build_row: hub.BuildExample,
    split: str,
    root: str = "",
    limit: int | None = None,
    seed: int = 0,
) -> Sequence[Example]:
    rows = Expressions(hub.load_rows(hub.pick_source(name, sources, split), root))
    return Examples(name, split, rows, build_row, limit_rows(range(len(rows)), limit, seed))


def make_task(
    name: str = "refcoco",
    dataset: str = "lmms-lab/RefCOCO",
    split: str = "val",
    min_pixels: int = 200_704,
    max_pixels: int = 1_003_520,
    **fields: Any,
) -> Task:
    """Return the task; `split` is the one of the public copy that is evaluated.

    `dataset` may be lmms-lab/RefCOCOplus, whose files have the same form.
    """
    if split not in SPLITS:
        raise ValueError(
            f"tasks.{name}.split: expected one of {', '.join(SPLITS)}; "
            f"got {split!r}{did_you_mean(split, SPLITS)}"
        )
    splits = {"test": split} if split == "val" else {"train": "val", "test": split}
    sources = {ours: hub.HubSource(dataset, theirs) for ours, theirs in splits.items()}
    build_row = functools.partial(build_example, min_pixels=min_pixels, max_pixels=max_pixels)
    own = {
        "scorer": "iou50",
        "answer_instruction": INSTRUCTION,
        "pixels": (min_pixels, max_pixels),
        "patch": PATCH,
    }
    return Task(name, functools.partial(load_split, name, sources, build_row), **{**own, **fields})
