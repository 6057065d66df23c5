"""MMLU-Pro: 12,032 questions with up to ten options, asked after five worked ones of the same category (validation split)."""

import functools
from collections.abc import Sequence
from typing import Any

from cptjax.tasks import hub
from cptjax.tasks.task import LETTER, Examples, Task, ask, lettered, plain, sample
from cptjax.types import Example

DATASET = "TIGER-Lab/MMLU-Pro"
SOURCES = {"train": hub.Source(DATASET, "validation"), "test": hub.Source(DATASET, "test")}
HEADER = (
    "The following are multiple choice questions (with answers) about {category}. Think step by step and then finish "
    'your answer with "the answer is (X)" where X is the correct letter choice.\n\n'
)
THINK = "Let's think step by step."


def build(row: dict[str, Any], worked: dict[str, list[dict[str, Any]]], shots: int) -> Example:
    text = stated(row)
    if shots:
        others = [shot for shot in worked[row["category"]] if shot["question_id"] != row["question_id"]]
        before = [f"{stated(shot)}\n{solution(shot)}\n\n" for shot in others[:shots]]
        text = HEADER.format(category=row["category"]) + "".join(before) + f"{text}\nAnswer: {THINK}"
    else:
        text = text.removeprefix("Question:\n").replace("\nOptions:\n", "\n")
    meta = {"options": row["options"], **plain(row, "category", "src")}
    return Example(str(row["question_id"]), ask(text), row["answer"], row["answer"], meta=meta)


def stated(row: dict[str, Any]) -> str:
    return f"Question:\n{row['question']}\nOptions:\n{lettered(row['options'])}"


def solution(row: dict[str, Any]) -> str:
    """Writes a worked answer; the dataset's own begins with "A: ", which reads as option A."""
    return "Answer: " + row["cot_content"].removeprefix("A: ").removeprefix("Answer: ")


def load(name: str, shots: int, split: str, root: str = "", limit: int | None = None, seed: int = 0) -> Sequence[Example]:
    source = hub.pick(name, SOURCES, split)
    rows = hub.load_rows(source, root)
    worked: dict[str, list[dict[str, Any]]] = {}
    for shot in hub.load_rows(SOURCES["train"], root) if shots else ():
        worked.setdefault(shot["category"], []).append(shot)
    build_row = functools.partial(build, worked=worked, shots=shots)
    return Examples(name, split, rows, build_row, sample(hub.usable(rows, source), limit, seed))


def make(name: str = "mmlu_pro", shots: int = 5, scorer: str = "mmlu_pro", **fields: Any) -> Task:
    """Makes the task; with `shots` the prompt carries its own instruction (template "none"), without (paper A) the template gives it."""
    own = {"direct_suffix": LETTER} if not shots else {"template": "none"}
    return Task(name, functools.partial(load, name, shots), scorer, **{**own, **fields})
