"""Super-CLEVR in the wording of MathV360K: 8,000 training and 642 test rows.

They are a fixed random division of the dataset's only split, with paper A's sizes. The scorer
normalises "three" to "3".
"""

from typing import Any

from cptjax.common.images import open_image
from cptjax.tasks import hub
from cptjax.tasks.task import SHORT_ANSWER_SUFFIX, Task, select_columns, user_turn
from cptjax.types import Example

DATASET, DATASET_CONFIG = "lmms-lab/LLaVA-OneVision-Data", "Super-CLEVR(MathV360K)"
TRAIN_SHARE = 8000 / 8642
SOURCES = {
    "train": hub.HubSource(DATASET, "train", DATASET_CONFIG, part=(0.0, TRAIN_SHARE)),
    "test": hub.HubSource(DATASET, "train", DATASET_CONFIG, part=(TRAIN_SHARE, 1.0)),
}


def build_example(row: dict[str, Any]) -> Example:
    question, reply = (turn["value"] for turn in row["conversations"][:2])
    answer = reply.removeprefix("The answer is ").strip().removesuffix(".")
    question = "<image>" + question.replace("<image>", "").strip()
    return Example(
        row["id"],
        user_turn(question, [open_image(row["image"])]),
        answer,
        answer,
        meta=select_columns(row, "data_source"),
    )


def make_task(name: str = "superclevr", scorer: str = "vqa_em_modal", **fields: Any) -> Task:
    return hub.make_hub_task(
        name, SOURCES, build_example, scorer, **{"direct_suffix": SHORT_ANSWER_SUFFIX, **fields}
    )
