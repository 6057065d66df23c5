"""How good is an answer? Text in, number out; each scorer has a version id that stands beside every number it gives.

    response --extract--> prediction --score--> Record --summarise--> {"accuracy": ..., "extraction_failure": ..., ...}

A response without an answer in the expected form scores 0 and is counted as an extraction failure beside the accuracy, because much
"forgetting" is only a change of form. Symbolic algebra and a user's own `file.py:function` run in worker processes under a time limit.
"""

import dataclasses
import difflib
import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cptjax.scorers import choice, instructions, puzzles, text
from cptjax.scorers.extract import EXTRACTIONS, extract
from cptjax.verify import Call, Pool, shared_pool, split_target

__all__ = ["EXTRACTIONS", "SCORERS", "Record", "Scorer", "extract", "find", "from_file", "score", "summarise"]

SYMBOLIC = str(Path(__file__).with_name("symbolic.py"))


@dataclasses.dataclass(frozen=True)
class Record:
    """One scored answer."""

    id: str
    score: float
    prediction: str | None  # None: nothing could be extracted
    answer: Any
    meta: Mapping[str, Any]
    error: str = ""  # why a worker gave no score (time limit, crash); the score is then 0


Summary = Callable[[Sequence[Record]], dict[str, float]]


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


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else 0.0


def _by(name: Callable[[Record], str], prefix: str) -> Summary:
    def summary(records: Sequence[Record]) -> dict[str, float]:
        groups = defaultdict(list)
        for record in records:
            groups[name(record)].append(record.score)
        return {f"{prefix}/{key}": _mean(groups[key]) for key in sorted(groups)}

    return summary


def _yes_no(records: Sequence[Record]) -> dict[str, float]:
    """POPE's numbers: yes is the positive class, and the yes-ratio is that of the predictions."""
    said = [text.yes_or_no(r.prediction or "") for r in records]
    gold = [text.gold_yes_no(r.answer) for r in records]
    hits = sum(s == g == "yes" for s, g in zip(said, gold, strict=True))
    precision, recall = hits / max(1, said.count("yes")), hits / max(1, gold.count("yes"))
    return {
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if hits else 0.0,
        "yes_ratio": said.count("yes") / max(1, len(said)),
        "neither": said.count(None) / max(1, len(said)),
    }


def _pathvqa(records: Sequence[Record]) -> dict[str, float]:
    """Yes/no questions apart from open ones; the open ones also by token recall and F1."""
    closed = [r for r in records if text.plain(str(r.answer)) in ("yes", "no")]
    rest = [r for r in records if text.plain(str(r.answer)) not in ("yes", "no")]
    overlap = [text.token_overlap(r.prediction or "", str(r.answer)) for r in rest]
    return {
        "yes_no": _mean([r.score for r in closed]),
        "open": _mean([r.score for r in rest]),
        "open_recall": _mean([recall for recall, _ in overlap]),
        "open_f1": _mean([f1 for _, f1 in overlap]),
        "yes_no_n": float(len(closed)),
        "open_n": float(len(rest)),
    }


def _mmmu(records: Sequence[Record]) -> dict[str, float]:
    closed = [r for r in records if r.meta.get("question_type", "multiple-choice") != "open"]
    unread = [r.prediction is None or choice.mmmu_choice(r.prediction, choice.options(r.meta)) is None for r in closed]
    return _by(lambda r: choice.discipline(r.meta), "discipline")(records) | {"unread_choice": _mean(unread)}


def _mmlu_pro(records: Sequence[Record]) -> dict[str, float]:
    unread = [r.prediction is None or choice.mmlu_pro_letter(r.prediction) is None for r in records]
    return _by(lambda r: str(r.meta.get("category", "other")), "category")(records) | {"unread_choice": _mean(unread)}


def _overlap(records: Sequence[Record]) -> dict[str, float]:
    values = [puzzles.iou(r.prediction or "", r.answer) for r in records]
    return {"mean_iou": _mean(values), "iou_50": _mean([v >= 0.5 for v in values])}


def _hits(records: Sequence[Record]) -> dict[str, float]:
    return {"hit": _mean([puzzles.jigsaw_hits(r.prediction or "", r.answer) for r in records])}


def _constraints(records: Sequence[Record]) -> dict[str, float]:
    met = [instructions.follows(r.prediction or "", c) for r in records for c in r.answer]
    return {"instruction_level": _mean(met)}


_ALL = (
    Scorer("exact", text.exact),
    Scorer("contains", text.contains),
    Scorer("exact_match", text.exact_match),
    Scorer("vqa_soft", text.vqa_soft),
    Scorer("vqa_em_modal", text.vqa_em_modal),
    Scorer("mcq_letter", choice.mcq_letter),
    Scorer("yes_no", text.yes_no, summary=_yes_no),
    Scorer("pathvqa_split", text.exact_match, summary=_pathvqa),
    Scorer("anls", text.anls),
    Scorer("numeric", puzzles.numeric),
    Scorer("math", f"{SYMBOLIC}:any_equal"),
    Scorer("mathruler_parity", f"{SYMBOLIC}:any_lenient", missing="None"),  # the paper's code scores a missing box as the text "None"
    Scorer("mmmu_official", choice.mmmu, summary=_mmmu, missing=""),
    Scorer("mmmu_strict", choice.mmmu_strict, summary=_mmmu),
    Scorer("mmlu_pro", choice.mmlu_pro, summary=_mmlu_pro),
    Scorer("iou", puzzles.iou, summary=_overlap),
    Scorer("iou50", puzzles.iou50, summary=_overlap),
    Scorer("countdown", puzzles.countdown),
    Scorer("jigsaw", puzzles.jigsaw, summary=_hits),
    Scorer("ifeval", instructions.ifeval, extraction="whole", summary=_constraints),
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
        known = dict(zip(unique, pool.map(scorer.rule, [Call((p, list(golds))) for p, golds in unique]), strict=True))
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


def summarise(scorer: Scorer, records: Sequence[Record]) -> dict[str, float]:
    """Mean score, extraction failures and worker errors as shares of the records, then the scorer's own metrics."""
    summary = {
        "accuracy": _mean([r.score for r in records]),
        "extraction_failure": _mean([r.prediction is None for r in records]),
        "error": _mean([bool(r.error) for r in records]),
    }
    return summary | (scorer.summary(records) if scorer.summary and records else {})
