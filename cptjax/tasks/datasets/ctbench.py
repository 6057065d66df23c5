"""MLLM-CTBench (arXiv 2508.08275): seven tasks of art, OCR, economics, science, math and medicine.

Download the hub dataset yueluoshuangtian/MLLM-CITBench to data.root/MLLM-CITBench and unpack
img.zip into images/:

    MLLM-CITBench/reasoning_train/math.json    a list of objects, such as
        {"problem": "a question and the form of its answer", "image": "path in images/",
         "solution": "<think> reasoning </think><answer> answer </answer>"}
    MLLM-CITBench/reasoning_test/math.json
    MLLM-CITBench/images/

fomc and numglue have no images. SFT trains on the whole solution. The answer is what stands between
the tags <answer>, else after </think>, else the whole solution; the reward then sees it in tags.

The score follows the second, corrected version of the released scorers (`_common_v2.py`): the first
reads no option letters, so fomc would always score 0. The reward is that of the released GRPO code.
"""

import functools
from pathlib import Path
from typing import Any

from cptjax.common.images import open_image
from cptjax.tasks import released_files
from cptjax.tasks.scoring.extract import tagged_answer
from cptjax.tasks.task import Task, user_turn
from cptjax.types import Example

DATASET = "yueluoshuangtian/MLLM-CITBench"
SCORERS = {  # part -> scorer
    "art": "ctbench_open",
    "ocr": "ctbench_open",
    "fomc": "ctbench_choice",
    "science": "ctbench_choice",
    "numglue": "ctbench_number",
    "math": "ctbench_math",
    "medical": "ctbench_open",
}
FILES = {part: part for part in SCORERS} | {"ocr": "OCR"}
TEXT_ONLY = ("fomc", "numglue")


def read_answer(solution: str) -> str:
    """Return the answer of a solution."""
    return tagged_answer(solution) or solution.rpartition("</think>")[2].strip()


def build_example(row: dict[str, Any], images: Path) -> Example:
    problem, solution = released_files.read_columns(row, "problem", "solution")
    answer = read_answer(solution)
    rewarded = solution if tagged_answer(solution) else f"<answer>{answer}</answer>"
    pictures = [open_image(row["image"], images)] if row.get("image") else []
    return Example(
        "",
        user_turn("<image>" * len(pictures) + problem, pictures),
        answer,
        solution,
        meta={"solution": rewarded},
    )


def make_task(name: str, part: str = "", **fields: Any) -> Task:
    """Return the task of one part of MLLM-CTBench."""
    if part not in SCORERS:
        raise ValueError(f"tasks.{name}.part={part!r}: choose one of {', '.join(SCORERS)}")
    release = released_files.Release(
        DATASET,
        {split: (f"reasoning_{split}/{FILES[part]}.json",) for split in ("train", "test")},
        () if part in TEXT_ONLY else ("images",),
    )
    own = {"scorer": SCORERS[part], "reward": "ctbench_reward"}
    load = functools.partial(released_files.load_release_split, name, release, build_example)
    return Task(name, load, **{**own, **fields})
