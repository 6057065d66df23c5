"""WildJailbreak and WildGuardTest: harmful prompts to refuse and benign ones to answer.

A judge decides whether a response is a refusal, see scoring/judged.py. The answer is 1 for a
harmful prompt and 0 for a benign one. Both are for evaluation only, as in paper C.
"""

from typing import Any

import numpy as np

from cptjax.tasks import hub
from cptjax.tasks.task import Task, select_columns, user_turn
from cptjax.types import Example

WILDJAILBREAK = {
    "test": hub.HubSource("allenai/wildjailbreak", "train", "eval", tabs=True, file="eval")
}


def has_label(rows: hub.ArrowRows) -> np.ndarray:
    """Return a mask of the rows whose prompt is labelled; some annotators did not agree."""
    name = "prompt_harm_label" if "prompt_harm_label" in rows.names else "label"
    return np.array([bool(label) for label in rows.column(name).to_pylist()])


WILDGUARDTEST = {
    "test": hub.HubSource("allenai/wildguardmix", "test", "wildguardtest", keep=has_label)
}


def _build_example(prompt: str, harmful: bool, meta: dict[str, Any]) -> Example:
    return Example("", user_turn(prompt), int(harmful), meta={"prompt": prompt, **meta})


def build_wildjailbreak(row: dict[str, Any]) -> Example:
    label = str(row["label"]).strip()
    if label not in ("0", "1"):
        raise ValueError(f"expected the label 0 (benign) or 1 (harmful), got {row['label']!r}")
    return _build_example(row["adversarial"], label == "1", select_columns(row, "data_type"))


def build_wildguardtest(row: dict[str, Any]) -> Example:
    """Return the example of a row of allenai/wildguardmix, or of a copy with the column `label`."""
    label = row.get("prompt_harm_label") or row.get("label")
    if label not in ("harmful", "unharmful"):
        raise ValueError(f"expected the label harmful or unharmful, got {label!r}")
    meta = select_columns(row, "adversarial", "subcategory")
    return _build_example(row["prompt"], label == "harmful", meta)


def make_wildjailbreak(name: str = "wildjailbreak", **fields: Any) -> Task:
    """Return the task; its field `judge` must be given to evaluate it."""
    own = {"scorer": "refusal", "template": "none", **fields}
    return hub.make_hub_task(name, WILDJAILBREAK, build_wildjailbreak, **own)


def make_wildguardtest(name: str = "wildguardtest", **fields: Any) -> Task:
    """Return the task; its field `judge` must be given to evaluate it."""
    own = {"scorer": "refusal", "template": "none", **fields}
    return hub.make_hub_task(name, WILDGUARDTEST, build_wildguardtest, **own)
