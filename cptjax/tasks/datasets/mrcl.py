"""MRCL ("RL Forgets!", arXiv 2607.04364): medicine, navigation, geometry, puzzles and finance.

Download the hub dataset MaolinLuo/MRCL to data.root/MRCL and unpack the images.zip of each part:

    MRCL/FinMME/jsons/train/data.json    a list of objects, such as
        {"id": ..., "image": "path in images/", "tolerance": 0.1,
         "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}
    MRCL/FinMME/images/

`tolerance` belongs to FinMME's numeric rows. Navigation and Puzzle also have a chain of thought,
`full_text_only_thought`, which no released script trains on. A question without <image> has its
image first.

The reward follows the released training code: the box must be right, and Navigation's counts the
moves up to the first wrong one. The score follows the released evaluation, which reads the whole
response where there is no box. The words of the instructions are ours.
"""

import functools
import re
from pathlib import Path
from typing import Any

from cptjax.common.images import open_image
from cptjax.tasks import released_files
from cptjax.tasks.task import Task, select_columns, user_turn
from cptjax.types import Example

DATASET = "MaolinLuo/MRCL"
IMAGE_MARK = re.compile(r"<image(?:[_ ]?\d+)?>")
LETTER = "The final answer is the capital letter of the right option alone."
# part -> folder, what the final answer is, scorer, reward
PARTS = {
    "medbookvqa": ("MedBookVQA", LETTER, "mrcl", "mrcl_box"),
    "navigation": (
        "Navigation",
        "There is exactly one shortest path. The final answer is its moves alone, as capital "
        "letters separated by commas.",
        "mrcl",
        "mrcl_moves",
    ),
    "wemath2": (
        "We-Math2",
        "The final answer is, without any other words: the capital letter of the right option, Yes "
        "or No, a number, the missing word or phrase, or a formula in LaTeX between dollar signs.",
        "mrcl",
        "mrcl_box",
    ),
    "puzzle": ("Puzzle", LETTER, "mrcl", "mrcl_box"),
    "finmme": (
        "FinMME",
        "The final answer is the capital letter of the right option, several letters separated by "
        "commas if several are right, or a number, and nothing else.",
        "mrcl_finmme",
        "mrcl_finmme_box",
    ),
}


def build_example(row: dict[str, Any], images: Path) -> Example:
    question, answer = released_files.read_conversation_turns(row)
    (image,) = released_files.read_columns(row, "image")
    text, count = IMAGE_MARK.subn("<image>", question)
    return Example(
        "",
        user_turn(text if count else "<image>" + text, [open_image(image, images)]),
        answer,
        answer,
        meta=select_columns(row, "tolerance"),
    )


def make_task(name: str, part: str = "", **fields: Any) -> Task:
    """Return the task of one part of MRCL."""
    if part not in PARTS:
        raise ValueError(f"tasks.{name}.part={part!r}: choose one of {', '.join(PARTS)}")
    folder, instruction, scorer, reward = PARTS[part]
    release = released_files.Release(
        DATASET,
        {split: (f"{folder}/jsons/{split}/data.json",) for split in ("train", "test")},
        (f"{folder}/images",),
    )
    own = {"answer_instruction": instruction, "scorer": scorer, "reward": reward}
    load = functools.partial(released_files.load_release_split, name, release, build_example)
    return Task(name, load, **{**own, **fields})
