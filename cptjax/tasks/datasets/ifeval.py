"""IFEval: instructions that a program can check; RLVR-IFeval for training, IFEval for testing.

The two datasets write a constraint differently; both are converted to the scorer's form, a list of
{"id": ..., arguments}. Rows with a constraint on the language are left out, because the scorer has
no language detector. Departure: RLVR's own lists of options are not compared; a response in one of
IFEval's three wordings is accepted. Paper C's 13,000 training and 1,972 evaluation prompts add up
to RLVR-IFeval, so `paper_c` splits that dataset.
"""

import functools
import json
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from cptjax.tasks import hub
from cptjax.tasks.scoring.instructions import CONSTRAINT_CHECKS, make_constraints
from cptjax.tasks.task import Examples, Task, limit_rows
from cptjax.types import Example

_log = logging.getLogger("cptjax")
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

# RLVR's checking function -> IFEval's instruction, and RLVR's argument -> IFEval's.
RLVR_INSTRUCTIONS = {
    "verify_keywords": ("keywords:existence", {"keyword_list": "keywords"}),
    "verify_keyword_frequency": ("keywords:frequency", {"word": "keyword"}),
    "validate_forbidden_words": (
        "keywords:forbidden_words",
        {"forbidden_words": "forbidden_words"},
    ),
    "verify_letter_frequency": ("keywords:letter_frequency", {"letter": "letter"}),
    "validate_response_language": ("language:response_language", {"language": "language"}),
    "verify_paragraph_count": ("length_constraints:number_paragraphs", {"N": "num_paragraphs"}),
    "validate_word_constraint": ("length_constraints:number_words", {}),
    "verify_sentence_constraint": ("length_constraints:number_sentences", {}),
    "validate_paragraphs": (
        "length_constraints:nth_paragraph_first_word",
        {"N": "num_paragraphs", "i": "nth_paragraph", "first_word": "first_word"},
    ),
    "verify_postscript": (
        "detectable_content:postscript",
        {"postscript_marker": "postscript_marker"},
    ),
    "validate_placeholders": ("detectable_content:number_placeholders", {"N": "num_placeholders"}),
    "verify_bullet_points": ("detectable_format:number_bullet_lists", {"N": "num_bullets"}),
    "validate_title": ("detectable_format:title", {}),
    "validate_choice": ("detectable_format:constrained_response", {}),
    "validate_highlighted_sections": (
        "detectable_format:number_highlighted_sections",
        {"N": "num_highlights"},
    ),
    "validate_sections": (
        "detectable_format:multiple_sections",
        {"N": "num_sections", "section_splitter": "section_spliter"},
    ),
    "validate_json_format": ("detectable_format:json_format", {}),
    "validate_repeat_prompt": (
        "combination:repeat_prompt",
        {"original_prompt": "prompt_to_repeat"},
    ),
    "validate_two_responses": ("combination:two_responses", {}),
    "validate_uppercase": ("change_case:english_capital", {}),
    "validate_lowercase": ("change_case:english_lowercase", {}),
    "validate_frequency_capital_words": ("change_case:capital_word_frequency", {}),
    "validate_end": ("startend:end_checker", {"end_phrase": "end_phrase"}),
    "validate_quotation": ("startend:quotation", {}),
    "validate_no_commas": ("punctuation:no_comma", {}),
}
# Instructions that compare a count: the arguments of IFEval for the relation and the number.
COUNTED_INSTRUCTIONS = {
    "verify_keyword_frequency": ("relation", "frequency"),
    "verify_letter_frequency": ("let_relation", "let_frequency"),
    "validate_word_constraint": ("relation", "num_words"),
    "verify_sentence_constraint": ("relation", "num_sentences"),
    "validate_frequency_capital_words": ("capital_relation", "capital_frequency"),
}


def build_example(row: dict[str, Any]) -> Example:
    """Return the example of a row of either dataset."""
    if "ground_truth" in row:
        turns = [
            {"role": turn["role"], "content": [{"type": "text", "text": turn["content"]}]}
            for turn in row["messages"]
        ]
        return Example(
            "",
            turns,
            translate_constraint(row["ground_truth"]),
            meta={"constraint": row["constraint"]},
        )
    answer = make_constraints(row["instruction_id_list"], row["kwargs"])
    return Example(
        str(row["key"]),
        [{"role": "user", "content": [{"type": "text", "text": row["prompt"]}]}],
        answer,
    )


def translate_constraint(ground_truth: str) -> list[dict[str, Any]]:
    """Return RLVR's function and arguments as constraints of IFEval."""
    given = json.loads(ground_truth)
    if given["func_name"] not in RLVR_INSTRUCTIONS:
        raise ValueError(
            f"unknown constraint {given['func_name']!r}; known are {', '.join(RLVR_INSTRUCTIONS)}"
        )
    name, names = RLVR_INSTRUCTIONS[given["func_name"]]
    arguments = {theirs: given[ours] for ours, theirs in names.items()}
    if given["func_name"] not in COUNTED_INSTRUCTIONS:
        return [{"id": name, **arguments}]
    relation, count = COUNTED_INSTRUCTIONS[given["func_name"]]
    return [
        {"id": name, **arguments, relation: sign, count: n}
        for sign, n in count_bounds(given.get("quantifier") or "exactly", given["N"])
    ]


def count_bounds(quantifier: str, n: int) -> list[tuple[str, int]]:
    """Translate "at most 5", "exactly 5" or "around 5" into IFEval's two relations.

    "Around" allows a tenth more or less, and at least 1.
    """
    slack = max(1, round(n / 10)) if quantifier == "around" else 0
    lower, upper = ("at least", n - slack), ("less than", n + slack + 1)
    return {"at least": [lower], "at most": [upper]}.get(quantifier, [lower, upper])


def checkable_rows(rows: hub.ArrowRows) -> np.ndarray:
    """Return a mask of the rows whose constraints are all known to the scorer."""
    if "ground_truth" in rows.names:
        constraints = [
            [RLVR_INSTRUCTIONS.get(json.loads(text)["func_name"], ("",))[0]]
            for text in rows.column("ground_truth").to_pylist()
        ]
    else:
        constraints = rows.column("instruction_id_list").to_pylist()
    return np.array(
        [all(name in CONSTRAINT_CHECKS for name in names) for names in constraints], bool
    )


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
    order, known = hub.usable_rows(rows, source), checkable_rows(rows)
    if not known[order].all():
        _log.warning(
            "%s/%s: %d rows with a constraint that cannot be checked are left out",
            name,
            split,
            (~known[order]).sum(),
        )
    return Examples(name, split, rows, build_example, limit_rows(order[known[order]], limit, seed))


def make_task(
    name: str = "ifeval", paper_c: bool = False, scorer: str = "ifeval", **fields: Any
) -> Task:
    return Task(
        name,
        functools.partial(load_split, name, PAPER_C_SOURCES if paper_c else SOURCES),
        scorer,
        **{"template": "none", **fields},
    )
