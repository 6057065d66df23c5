"""The table of scorers, and how to score responses: text in, number out.

    response --extract--> prediction --score--> ScoreRecord --summarise--> {"accuracy": Metric, ...}

The id of a scorer is recorded with every number that it produces: its name, its version, and the
public scorer whose rule it re-implements, as in `pope@1=LLaVA`; without the last the rule is ours.
A response without an answer in the expected form scores 0 and also counts as an extraction failure,
because much "forgetting" is only a change of form. Symbolic algebra and a user's own
`file.py:function` run in worker processes with a time limit.
"""

import dataclasses
import difflib
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cptjax.tasks.scoring import (
    captions,
    choice,
    ctbench_answers,
    instructions,
    judged,
    puzzles,
    retain_answers,
    rlvr_constraints,
    summaries,
    text,
)
from cptjax.tasks.scoring.extract import extract_answer
from cptjax.tasks.scoring.sandbox import SandboxCall, SandboxPool, shared_sandbox_pool, split_target
from cptjax.tasks.scoring.summaries import Metric, Summary

SYMBOLIC_FILE = str(Path(__file__).with_name("symbolic.py"))
ALGEBRA_FILE = str(Path(__file__).with_name("released_algebra.py"))
# On a busy machine, algebra may take this many times its limit of processor time.
SYMBOLIC_PATIENCE = 6.0


@dataclasses.dataclass(frozen=True)
class ScoreRecord:
    """One scored response."""

    id: str
    score: float
    prediction: str | None  # None = nothing could be extracted
    answer: Any
    meta: Mapping[str, Any]
    error: str = ""  # why a worker gave no score (time limit, crash); the score is then 0


@dataclasses.dataclass(frozen=True)
class Scorer:
    """A rule that maps (prediction, answer, the row's columns) to a number, usually in [0, 1]."""

    name: str
    # A string is file.py:function, called in a worker process.
    rule: Callable[[str, Any, Mapping[str, Any]], float] | str
    version: str = "1"
    reference: str = ""  # the public scorer whose rule this is; "" = none
    extraction: str = ""  # "" = the prompt template's
    missing: str | None = None  # the prediction where nothing was extracted; None = score 0
    columns: tuple[str, ...] = ()  # of the row, which a built-in rule in a worker also gets
    summary: Summary | None = None  # further metrics of the records
    # What gives the prediction: the response | the judge of the task, its verdict on the response |
    # the likelihood, the log-probability of the answer as the response; nothing is generated.
    reads: str = "response"  # response | judge | likelihood
    # An error in a user's scorer stops the run; one in a built-in scorer scores 0.
    is_users: bool = False

    @property
    def id(self) -> str:
        """Name, version and reference, as recorded with each result."""
        return f"{self.name}@{self.version}" + (f"={self.reference}" if self.reference else "")

    def score(self, prediction: str, answer: Any, meta: Mapping[str, Any] | None = None) -> float:
        """Return the score of one prediction, which is not extracted from a response first."""
        ((score, _),) = _apply_rule(self, [(prediction, answer, meta or {}, "0")], None, "stop")
        return score


_BUILT_IN = (
    Scorer("exact", text.score_exact),
    Scorer("contains", text.score_contains),
    Scorer("contains_words", text.score_contains_words, "2"),
    Scorer("only_option", text.score_only_option, "2"),
    Scorer("json", text.score_json),
    Scorer("exact_match", text.score_exact_match),
    Scorer("lower_exact_match", text.score_lower_exact_match, reference="RFTvsSFT"),
    Scorer("gqa_strict", text.score_gqa_strict, reference="lmms-eval"),
    Scorer("vqa_soft", text.score_vqa_soft, reference="EvalAI"),
    Scorer("vqa_em_modal", text.score_vqa_em_modal),
    Scorer("mcq_letter", choice.score_mcq_letter, "3"),
    Scorer("scienceqa_strict", choice.score_scienceqa_strict, reference="lmms-eval"),
    Scorer("yes_no", text.score_yes_no, summary=summaries.summarise_yes_no),
    Scorer("pope", text.score_pope, reference="LLaVA", summary=summaries.summarise_pope),
    Scorer("mme", text.score_mme, reference="lmms-eval", summary=summaries.summarise_mme),
    Scorer("mmstar", choice.score_mmstar, reference="MMStar", summary=summaries.summarise_mmstar),
    Scorer("pathvqa_split", text.score_exact_match, summary=summaries.summarise_pathvqa),
    Scorer("anls", text.score_anls),
    Scorer("numeric", puzzles.score_numeric, "3"),
    Scorer("math", f"{SYMBOLIC_FILE}:any_equal"),
    # The paper's code scores a missing box as the text "None".
    Scorer("mathruler_parity", f"{SYMBOLIC_FILE}:any_lenient", "2", "mathruler", missing="None"),
    Scorer("mmmu_official", choice.score_mmmu, "2", "lmms-eval", summary=summaries.summarise_mmmu),
    Scorer("mmmu_strict", choice.score_mmmu_strict, summary=summaries.summarise_mmmu),
    Scorer(
        "mmlu_pro", choice.score_mmlu_pro, "2", "MMLU-Pro", summary=summaries.summarise_mmlu_pro
    ),
    Scorer("iou", puzzles.score_iou, summary=summaries.summarise_overlap),
    Scorer("iou50", puzzles.score_iou50, summary=summaries.summarise_overlap),
    Scorer("countdown", puzzles.score_countdown),
    Scorer("jigsaw", puzzles.score_jigsaw, "2", summary=summaries.summarise_jigsaw),
    Scorer(
        "ifeval",
        instructions.score_ifeval,
        "3",
        "google-research",
        extraction="raw",
        summary=summaries.summarise_constraints,
    ),
    # Paper C's (arXiv 2510.18874) own readings of a response.
    Scorer(
        "rlvr_ifeval",
        rlvr_constraints.score_rlvr_ifeval,
        "2",
        "retaining-by-doing",
        extraction="raw",
        summary=summaries.summarise_rlvr,
    ),
    Scorer(
        "retain_mmlu",
        retain_answers.score_retain_mmlu,
        "2",
        "retaining-by-doing",
        extraction="raw",
        summary=summaries.summarise_retain_mmlu,
    ),
    Scorer(
        "retain_math",
        retain_answers.score_retain_math,
        "2",
        "retaining-by-doing",
        extraction="raw",
    ),
    Scorer(
        "retain_countdown",
        retain_answers.score_retain_countdown,
        "2",
        "retaining-by-doing",
        extraction="raw",
    ),
    Scorer(
        "refusal",
        judged.score_refusal,
        reference="retaining-by-doing",
        extraction="raw",
        summary=summaries.summarise_refusals,
        reads="judge",
    ),
    Scorer(
        "likelihood",
        text.score_likelihood,
        extraction="raw",
        summary=summaries.summarise_likelihood,
        reads="likelihood",
    ),
    # MRCL (arXiv 2607.04364): its evaluation, and the accuracies of its rewards.
    Scorer(
        "mrcl", f"{ALGEBRA_FILE}:score_mrcl", reference="MaolinLuo/CPO", extraction="boxed_option"
    ),
    Scorer(
        "mrcl_finmme",
        f"{ALGEBRA_FILE}:score_finmme",
        reference="MaolinLuo/CPO",
        extraction="boxed_option",
        columns=("tolerance",),
    ),
    Scorer("mrcl_box", f"{ALGEBRA_FILE}:score_mrcl", reference="MaolinLuo/CPO", extraction="boxed"),
    Scorer(
        "mrcl_finmme_box",
        f"{ALGEBRA_FILE}:score_finmme",
        reference="MaolinLuo/CPO",
        extraction="boxed",
        columns=("tolerance",),
    ),
    Scorer("mrcl_moves", puzzles.score_moves, reference="MaolinLuo/CPO", extraction="boxed"),
    # MLLM-CTBench (arXiv 2508.08275); its rules read the thoughts of a response themselves.
    *(
        Scorer(name, rule, reference="MLLM-CTBench", extraction="verbatim")
        for name, rule in {
            "ctbench_open": ctbench_answers.score_ctbench_open,
            "ctbench_choice": ctbench_answers.score_ctbench_choice,
            "ctbench_number": ctbench_answers.score_ctbench_number,
            "ctbench_math": ctbench_answers.score_ctbench_math,
        }.items()
    ),
    Scorer(
        "ctbench_reward",
        f"{ALGEBRA_FILE}:reward_ctbench",
        reference="MLLM-CTBench",
        extraction="verbatim",
        columns=("solution",),
    ),
    # UCIT (arXiv 2503.12941).
    Scorer("ucit", text.score_lower_exact_match, reference="MCITlib"),
    Scorer(
        "caption",
        captions.score_caption,
        reference="coco-caption",
        summary=summaries.summarise_captions,
    ),
)
SCORERS: dict[str, Scorer] = {scorer.name: scorer for scorer in _BUILT_IN}


def find_scorer(name: str) -> Scorer:
    """Return a built-in scorer by name, or a user's by `file.py:function`.

    A user's function is `score(prediction, answer, **columns) -> float`; its version is a hash of
    the file.
    """
    if name in SCORERS:
        return SCORERS[name]
    if ".py:" not in name:
        close = difflib.get_close_matches(name, SCORERS, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown scorer {name!r}{hint}; built in: {', '.join(SCORERS)}")
    path, function = split_target(name)
    if not path.is_file():
        raise ValueError(f"scorer {name}: there is no file {path}")
    version = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    return Scorer(f"{path.name}:{function}", f"{path.resolve()}:{function}", version, is_users=True)


def score_responses(
    scorer: Scorer,
    responses: Sequence[str],
    answers: Sequence[Any],
    metas: Sequence[Mapping[str, Any]],
    ids: Sequence[str] | None = None,
    *,
    extraction: str = "whole",
    pool: SandboxPool | None = None,
    on_error: str = "stop",
) -> list[ScoreRecord]:
    """Score each response.

    `on_error` (stop | zero) says what an error in a user's scorer does; `pool` holds the worker
    processes for scorers that need them.
    """
    ids = [str(i) for i in range(len(responses))] if ids is None else ids
    predictions = [extract_answer(r, scorer.extraction or extraction) for r in responses]
    inputs = [scorer.missing if p is None else p for p in predictions]
    rows = [i for i, value in enumerate(inputs) if value is not None]
    scored = _apply_rule(
        scorer, [(inputs[i], answers[i], metas[i], ids[i]) for i in rows], pool, on_error
    )
    results = [(0.0, "")] * len(responses)
    for i, result in zip(rows, scored, strict=True):
        results[i] = result
    return [
        ScoreRecord(row_id, score, prediction, answer, meta, error)
        for row_id, (score, error), prediction, answer, meta in zip(
            ids, results, predictions, answers, metas, strict=True
        )
    ]


def _apply_rule(
    scorer: Scorer, rows: Sequence[tuple], pool: SandboxPool | None, on_error: str
) -> list[tuple[float, str]]:
    """Return the score and error of each (prediction, answer, columns, id)."""
    if callable(scorer.rule):
        return [(_checked_score(scorer, *row), "") for row in rows]
    pool = pool or shared_sandbox_pool()
    if scorer.is_users:
        outcomes = pool.map(
            scorer.rule, [SandboxCall((p, a), keyword_columns(meta)) for p, a, meta, _ in rows]
        )
    else:  # responses of a group are often equal, so compare each pair of texts once
        pairs = [
            (p, tuple(text.gold_answers(a)), tuple((c, meta.get(c)) for c in scorer.columns))
            for p, a, meta, _ in rows
        ]
        unique = list(dict.fromkeys(pairs))
        calls = [SandboxCall((p, list(golds)), dict(columns)) for p, golds, columns in unique]
        compared = pool.map(scorer.rule, calls, patience=SYMBOLIC_PATIENCE)
        by_pair = dict(zip(unique, compared, strict=True))
        outcomes = [by_pair[pair] for pair in pairs]
    results = []
    for (*_, row_id), outcome in zip(rows, outcomes, strict=True):
        error = outcome.error or describe_non_number(outcome.value)
        if error and scorer.is_users and on_error == "stop":
            raise ValueError(f"scorer {scorer.name} failed on row {row_id}: {error}")
        results.append((0.0, error) if error else (float(outcome.value), ""))
    return results


def _checked_score(
    scorer: Scorer, prediction: str, answer: Any, meta: Mapping[str, Any], row_id: str
) -> float:
    try:
        value = scorer.rule(prediction, answer, meta)
    except ValueError as error:
        raise ValueError(f"row {row_id}: {error}") from error
    except Exception as error:
        raise ValueError(
            f"scorer {scorer.name} failed on row {row_id}: {type(error).__name__}: {error}"
        ) from error
    if wrong := describe_non_number(value):
        raise ValueError(f"scorer {scorer.name} failed on row {row_id}: {wrong}")
    return float(value)


def keyword_columns(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row's columns as keyword arguments.

    A column named like a positional argument gets an underscore at its end.
    """
    return {
        f"{k}_" if k in ("completion", "prediction", "answer") else str(k): v
        for k, v in meta.items()
    }


def describe_non_number(value: Any) -> str:
    """Describe what is wrong with a score; return "" for a finite number."""
    if isinstance(value, (bool, int, float, np.bool_, np.integer, np.floating)) and math.isfinite(
        value
    ):
        return ""
    return f"returned {value!r}; expected a finite number"


def summarise_records(scorer: Scorer, records: Sequence[ScoreRecord]) -> dict[str, Metric]:
    """Compute every metric of a scorer's records."""
    return summaries.summarise_scores(records, scorer.summary)
