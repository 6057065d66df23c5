"""Super-CLEVR as MathV360K words it: 8,642 rows in one split, of which 642 fixed random ones are the test (paper A's numbers).

The scorer's normaliser takes "three" for "3".
"""

from typing import Any

from cptjax.images import open_image
from cptjax.tasks import hub
from cptjax.tasks.task import WORD, Task, ask, plain
from cptjax.types import Example

DATASET, CONFIG = "lmms-lab/LLaVA-OneVision-Data", "Super-CLEVR(MathV360K)"
TRAIN = 8000 / 8642
SOURCES = {
    "train": hub.Source(DATASET, "train", CONFIG, part=(0.0, TRAIN)),
    "test": hub.Source(DATASET, "train", CONFIG, part=(TRAIN, 1.0)),
}


def build(row: dict[str, Any]) -> Example:
    question, reply = (turn["value"] for turn in row["conversations"][:2])
    answer = reply.removeprefix("The answer is ").strip().removesuffix(".")
    question = "<image>" + question.replace("<image>", "").strip()
    return Example(row["id"], ask(question, [open_image(row["image"])]), answer, answer, meta=plain(row, "data_source"))


def make(name: str = "superclevr", scorer: str = "vqa_em_modal", **fields: Any) -> Task:
    return hub.task(name, SOURCES, build, scorer, **{"direct_suffix": WORD, **fields})
