"""Super-CLEVR in the wording of MathV360K: 8,000 training and 642 test rows.

They are a fixed random division of the dataset's only split, with paper A's sizes. With `released`
the test rows are those whose questions are in paper A's released test file, of which
superclevr_test.b64 holds a hash of each question and of its answer. Of rows with the same question,
those with the same answer come first; rows that agree in both cannot be told apart. The scorer
normalises "three" to "3".
"""

import base64
import functools
import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cptjax.common import console
from cptjax.common.images import open_image
from cptjax.tasks import hub
from cptjax.tasks.task import (
    SHORT_ANSWER_SUFFIX,
    Examples,
    Task,
    limit_rows,
    select_columns,
    user_turn,
)
from cptjax.types import Example

DATASET, DATASET_CONFIG = "lmms-lab/LLaVA-OneVision-Data", "Super-CLEVR(MathV360K)"
TRAIN_SHARE = 8000 / 8642
SOURCES = {
    "train": hub.HubSource(DATASET, "train", DATASET_CONFIG, part=(0.0, TRAIN_SHARE)),
    "test": hub.HubSource(DATASET, "train", DATASET_CONFIG, part=(TRAIN_SHARE, 1.0)),
}
RELEASED_TEST_FILE = Path(__file__).with_name("superclevr_test.b64")
QUESTION_BYTES, ANSWER_BYTES = 4, 1  # of the hashes in the file


def read_conversation(row: dict[str, Any]) -> tuple[str, str]:
    """Return the question of a row, with its hint, and the answer."""
    question, reply = (turn["value"] for turn in row["conversations"][:2])
    answer = reply.removeprefix("The answer is ").strip().removesuffix(".")
    return question.replace("<image>", "").strip(), answer


def build_example(row: dict[str, Any], released: bool = False) -> Example:
    question, answer = read_conversation(row)
    return Example(
        row["id"],
        user_turn(("<image>\n" if released else "<image>") + question, [open_image(row["image"])]),
        answer,
        answer,
        meta=select_columns(row, "data_source"),
    )


def _hash_text(text: str, size: int) -> bytes:
    normal = " ".join(text.lower().split()).rstrip(".")
    return hashlib.blake2b(normal.encode(), digest_size=size).digest()


def read_released_hashes() -> Counter:
    """Return how often each pair of hashes (question, answer) is in paper A's test file."""
    data = base64.b64decode(RELEASED_TEST_FILE.read_text())
    size = QUESTION_BYTES + ANSWER_BYTES
    pairs = (data[i : i + size] for i in range(0, len(data), size))
    return Counter((pair[:QUESTION_BYTES], pair[QUESTION_BYTES:]) for pair in pairs)


def select_released_rows(texts: Sequence[tuple[str, str]], wanted: Counter) -> np.ndarray:
    """Return a mask of the rows (question, answer) that are in the released test file."""
    keys = [
        (_hash_text(question.rpartition("Question:")[2], QUESTION_BYTES), _hash_text(answer, 1))
        for question, answer in texts
    ]
    mask, left = np.zeros(len(texts), bool), Counter(wanted)
    for row, key in enumerate(keys):
        if left[key] > 0:
            mask[row] = True
            left[key] -= 1
    by_question = Counter()
    for (question, _), count in left.items():
        by_question[question] += count
    for row, (question, _) in enumerate(keys):
        if not mask[row] and by_question[question] > 0:
            mask[row] = True
            by_question[question] -= 1
    return mask


def load_released_split(
    name: str, split: str, root: str = "", limit: int | None = None, seed: int = 0
) -> Sequence[Example]:
    hub.pick_source(name, SOURCES, split)
    rows = hub.load_rows(hub.HubSource(DATASET, "train", DATASET_CONFIG), root)
    wanted = read_released_hashes()
    conversations = rows.column("conversations").to_pylist()
    texts = [read_conversation({"conversations": turns}) for turns in conversations]
    in_test = select_released_rows(texts, wanted)
    if in_test.sum() != wanted.total():
        console.print_message(
            f"task {name}: {in_test.sum()} of the {wanted.total()} test questions of the release "
            f"are among the {len(rows)} rows"
        )
    order = np.flatnonzero(in_test if split == "test" else ~in_test)
    build_row = functools.partial(build_example, released=True)
    return Examples(name, split, rows, build_row, limit_rows(order, limit, seed))


def make_task(name: str = "superclevr", released: bool = False, **fields: Any) -> Task:
    """Return the task; `released` has the split and the wording of paper A's files."""
    load = (
        functools.partial(load_released_split, name)
        if released
        else functools.partial(hub.load_hub_split, name, SOURCES, build_example)
    )
    own = {"scorer": "vqa_em_modal", "answer_instruction": SHORT_ANSWER_SUFFIX}
    return Task(name, load, **{**own, **fields})
