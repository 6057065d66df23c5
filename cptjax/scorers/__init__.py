"""How good is an answer? Text in, number out; each scorer has a version id that stands beside every number it gives.

    response --extract--> prediction --score--> Record --summarise--> {"accuracy": Metric(value, n, stderr), ...}

A response without an answer in the expected form scores 0 and is counted as an extraction failure beside the accuracy, because much
"forgetting" is only a change of form. Symbolic algebra and a user's own `file.py:function` run in worker processes under a time limit.
"""

import dataclasses
import difflib
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cptjax.scorers import choice, instructions, puzzles, summaries, text
from cptjax.scorers.extract import EXTRACTIONS, extract
from cptjax.scorers.summaries import Metric, Summary, mean, ratio
from cptjax.verify import Call, Pool, shared_pool, split_target

__all__ = ["EXTRACTIONS", "SCORERS", "Metric", "Record", "Scorer", "extract", "find", "from_file", "mean", "ratio", "score", "summarise"]

SYMBOLIC = str(Path(__file__).with_name("symbolic.py"))
PATIENCE = 6.0  # times the time limit that algebra may take where other programs keep the processors busy


@dataclasses.dataclass(frozen=True)
class Record:
    """One scored answer."""

    id: str
    score: float
    prediction: str | None  # None: nothing could be extracted
    answer: Any
    meta: Mapping[str, Any]
    error: str = ""  # why a worker gave no score (time limit, crash); the score is then 0


@dataclasses.dataclass(frozen=True)
class Scorer:
    """A rule that turns (prediction, answer, the row's columns) into a number, usually in [0, 1]."""

    name: str
    rule: Callable[[str, Any, Mapping[str, Any]], float] | str  # a string is file.py:function, called in a worker process
    version: str = "1"
    extraction: str = ""  # "" = as the prompt template says
    missing: str | None = None  # what is scored where nothing was extracted; None = score 0
    summary: Summary | None = None  # metrics beside the mean
    own: bool = False  # a user's: an error stops the run, where a built-in one scores 0

    @property
    def id(self) -> str:
        """Name and version, as written beside each result."""
        return f"{self.name}@{self.version}"

    def score(self, prediction: str, answer: Any, meta: Mapping[str, Any] | None = None) -> float:
        """The score of one prediction."""
        return score(self, [prediction], [answer], [meta or {}], extraction="whole")[0].score


_ALL = (
    Scorer("exact", text.exact),
    Scorer("contains", text.contains),
    Scorer("exact_match", text.exact_match),
    Scorer("vqa_soft", text.vqa_soft),
    Scorer("vqa_em_modal", text.vqa_em_modal),
    Scorer("mcq_letter", choice.mcq_letter, "2"),
    Scorer("yes_no", text.yes_no, summary=summaries.yes_no),
    Scorer("pathvqa_split", text.exact_match, summary=summaries.pathvqa),
    Scorer("anls", text.anls),
    Scorer("numeric", puzzles.numeric),
    Scorer("math", f"{SYMBOLIC}:any_equal"),
    Scorer("mathruler_parity", f"{SYMBOLIC}:any_lenient", missing="None"),  # the paper's code scores a missing box as the text "None"
    Scorer("mmmu_official", choice.mmmu, "2", summary=summaries.mmmu),
    Scorer("mmmu_strict", choice.mmmu_strict, summary=summaries.mmmu),
    Scorer("mmlu_pro", choice.mmlu_pro, summary=summaries.mmlu_pro),
    Scorer("iou", puzzles.iou, summary=summaries.overlap),
    Scorer("iou50", puzzles.iou50, summary=summaries.overlap),
    Scorer("countdown", puzzles.countdown),
    Scorer("jigsaw", puzzles.jigsaw, summary=summaries.hits),
    Scorer("ifeval", instructions.ifeval, extraction="whole", summary=summaries.constraints),
)
SCORERS: dict[str, Scorer] = {scorer.name: scorer for scorer in _ALL}


def find(name: str) -> Scorer:
    """A built-in scorer by name, or a user's by `file.py:function`."""
    if name in SCORERS:
        return SCORERS[name]
    if ".py:" in name:
        return from_file(name)
    near = difflib.get_close_matches(name, SCORERS, 1)
    raise ValueError(f"unknown scorer {name!r}{f', did you mean {near[0]!r}?' if near else ''}; built in: {', '.join(SCORERS)}")


def from_file(target: str) -> Scorer:
    """A user's `score(prediction, answer, **columns) -> float`; its version is a hash of the file."""
    path, function = split_target(target)
    if not path.is_file():
        raise ValueError(f"scorer {target}: there is no file {path}")
    version = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    return Scorer(f"{path.name}:{function}", f"{path.resolve()}:{function}", version, own=True)


def score(
    scorer: Scorer,
    responses: Sequence[str],
    answers: Sequence[Any],
    metas: Sequence[Mapping[str, Any]],
    ids: Sequence[str] | None = None,
    *,
    extraction: str = "whole",
    pool: Pool | None = None,
    on_error: str = "stop",
) -> list[Record]:
    """The record of each response; `on_error` = stop | zero is for a user's scorer, and `pool` for those that run in workers."""
    ids = [str(i) for i in range(len(responses))] if ids is None else ids
    said = [extract(r, scorer.extraction or extraction) for r in responses]
    inputs = [scorer.missing if s is None else s for s in said]
    rows = [i for i, value in enumerate(inputs) if value is not None]
    found = _apply(scorer, [(inputs[i], answers[i], metas[i], ids[i]) for i in rows], pool, on_error)
    results = dict(zip(rows, found, strict=True))
    missed = (0.0, "")
    return [
        Record(ids[i], results.get(i, missed)[0], said[i], answers[i], metas[i], results.get(i, missed)[1]) for i in range(len(responses))
    ]


def _apply(scorer: Scorer, rows: Sequence[tuple], pool: Pool | None, on_error: str) -> list[tuple[float, str]]:
    """(score, error) of each (prediction, answer, columns, id)."""
    if callable(scorer.rule):
        return [(_checked(scorer, *row), "") for row in rows]
    pool = pool or shared_pool()
    if scorer.own:
        outcomes = pool.map(scorer.rule, [Call((p, a), columns(meta)) for p, a, meta, _ in rows])
    else:  # the responses of a group often agree: each pair of texts is compared once
        pairs = [(p, tuple(text.golds(a))) for p, a, *_ in rows]
        unique = list(dict.fromkeys(pairs))
        found = pool.map(scorer.rule, [Call((p, list(golds))) for p, golds in unique], patience=PATIENCE)
        known = dict(zip(unique, found, strict=True))
        outcomes = [known[pair] for pair in pairs]
    results = []
    for (*_, row_id), outcome in zip(rows, outcomes, strict=True):
        error = outcome.error or not_a_number(outcome.value)
        if error and scorer.own and on_error == "stop":
            raise ValueError(f"scorer {scorer.name} failed on row {row_id}: {error}")
        results.append((0.0, error) if error else (float(outcome.value), ""))
    return results


def _checked(scorer: Scorer, prediction: str, answer: Any, meta: Mapping[str, Any], row_id: str) -> float:
    try:
        value = scorer.rule(prediction, answer, meta)
    except ValueError as error:
        raise ValueError(f"row {row_id}: {error}") from error
    except Exception as error:
        raise ValueError(f"scorer {scorer.name} failed on row {row_id}: {type(error).__name__}: {error}") from error
    if wrong := not_a_number(value):
        raise ValueError(f"scorer {scorer.name} failed on row {row_id}: {wrong}")
    return float(value)


def columns(meta: Mapping[str, Any]) -> dict[str, Any]:
    """A row's columns as keyword arguments; one named like a positional argument gets a final underscore."""
    return {f"{k}_" if k in ("completion", "prediction", "answer") else str(k): v for k, v in meta.items()}


def not_a_number(value: Any) -> str:
    """What is wrong with a score; "" for a finite number."""
    if isinstance(value, (bool, int, float, np.bool_, np.integer, np.floating)) and math.isfinite(value):
        return ""
    return f"returned {value!r}; expected a finite number"


def summarise(scorer: Scorer, records: Sequence[Record]) -> dict[str, Metric]:
    """Every metric of a scorer's records."""
    return summaries.summarise(records, scorer.summary)
