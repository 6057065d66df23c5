"""IFEval: instructions that a program can check; RLVR-IFeval for training, IFEval for testing.

The two datasets have their own constraints and their own checks: `rlvr_ifeval` rewards the training
rows, `ifeval` scores the test rows. Paper C's 13,000 training and 1,972 evaluation prompts add up
to RLVR-IFeval, so `paper_c` splits that dataset and scores it with its own checks. Rows with a
constraint on the language need the package langdetect.
"""

import functools
import json
from collections.abc import Iterable, Sequence
from typing import Any

from cptjax.tasks import hub
from cptjax.tasks.scoring.instructions import (
    CONSTRAINT_CHECKS,
    LANGUAGE_CONSTRAINTS,
    make_constraints,
)
from cptjax.tasks.scoring.language import require_langdetect
from cptjax.tasks.scoring.rlvr_constraints import find_rlvr_check
from cptjax.tasks.task import Examples, Task, limit_rows, select_columns
from cptjax.types import Example

TRAIN_DATASET = "allenai/RLVR-IFeval"
TRAIN_SHARE = 13_000 / 14_973
SOURCES = {
    "train": hub.HubSource(TRAIN_DATASET, "train"),
    "test": hub.HubSource("google/IFEval", "train"),
}
PAPER_C_SOURCES = {
    "train": hub.HubSource(TRAIN_DATASET, "train", part=(0.0, TRAIN_SHARE)),
    "test": hub.HubSource(TRAIN_DATASET, "train", part=(TRAIN_SHARE, 1.0)),
}


def build_example(row: dict[str, Any]) -> Example:
    """Return the example of a row of either dataset."""
    if "ground_truth" in row:
        constraint = json.loads(row["ground_truth"])
        find_rlvr_check(constraint)
        turns = [
            {"role": turn["role"], "content": [{"type": "text", "text": turn["content"]}]}
            for turn in row["messages"]
        ]
        return Example(
            "", turns, constraint, meta=select_columns(row, "constraint", "constraint_type")
        )
    constraints = make_constraints(row["instruction_id_list"], row["kwargs"])
    for constraint in constraints:
        if constraint["id"] not in CONSTRAINT_CHECKS:
            raise ValueError(
                f"unknown constraint {constraint['id']!r}; known: {', '.join(CONSTRAINT_CHECKS)}"
            )
    return Example(
        str(row["key"]),
        [{"role": "user", "content": [{"type": "text", "text": row["prompt"]}]}],
        constraints,
    )


def needs_langdetect(rows: hub.ArrowRows, order: Iterable[int]) -> bool:
    """Return whether a chosen row has a constraint on the language."""
    if "ground_truth" in rows.names:
        texts = rows.column("ground_truth").to_pylist()
        return any("validate_response_language" in texts[i] for i in order)
    names = rows.column("instruction_id_list").to_pylist()
    return any(name in LANGUAGE_CONSTRAINTS for i in order for name in names[i])


def load_split(
    name: str,
    sources: dict[str, hub.HubSource],
    split: str,
    root: str = "",
    limit: int | None = None,
    seed: int = 0,
) -> Sequence[Example]:
    source = hub.pick_source(name, sources, split)
    rows = hub.load_rows(source, root)
    order = limit_rows(hub.usable_rows(rows, source), limit, seed)
    if needs_langdetect(rows, order):
        require_langdetect(f"task {name}: the constraints of its {split} rows on their language")
    return Examples(name, split, rows, build_example, order)


def make_task(name: str = "ifeval", paper_c: bool = False, **fields: Any) -> Task:
    own = {"template": "none", "scorer": "ifeval", "reward": "rlvr_ifeval"}
    if paper_c:
        own["scorer"] = "rlvr_ifeval"
    sources = PAPER_C_SOURCES if paper_c else SOURCES
    return Task(name, functools.partial(load_split, name, sources), **{**own, **fields})
