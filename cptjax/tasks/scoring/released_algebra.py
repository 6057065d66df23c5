r"""Rules of released benchmarks that use computer algebra; run in worker processes only.

MRCL (arXiv 2607.04364): an answer may have several parts, separated by ";". A part is right if
math-verify finds it equal, or if it is the same text without case, spaces and any of \ , ; { } $.
FinMME's answers of several options are sets, and its numbers have a tolerance.

MLLM-CTBench (arXiv 2508.08275), reward: 1 if math-verify finds the response equal to the solution;
else 1 for the same answer, else the similarity of a formula or the ROUGE-L of several words. Quirk
kept: math-verify reads the whole texts, so the numbers of a chain of thought count too.
"""

import functools
import re

from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify
from rapidfuzz.distance import Levenshtein

from cptjax.tasks.scoring.captions import distinct_rouge_l
from cptjax.tasks.scoring.symbolic import MAX_ANSWER_LENGTH

LEFT_SIDE = re.compile(
    r"^(\s*\$?\$?)\s*(?:f\s*\(\s*x\s*\)|y|f\s*\\left\(\s*x\s*\\right\))\s*=\s*(?![^=]*=)",
    re.IGNORECASE,
)
QUADRANTS = {"I": "First", "II": "Second", "III": "Third", "IV": "Fourth"}
IGNORED_SIGNS = str.maketrans("", "", "\\,; {}$")
# With the settings of the release, except that the time limits are those of the worker.
MRCL_LATEX = LatexExtractionConfig(
    normalization_config=NormalizationConfig(
        nits=True, malformed_operators=False, basic_latex=True, boxed="none", units=True
    ),
    boxed_match_priority=0,
    try_extract_without_anchor=True,
)
FORMULA_SIGNS = re.compile(r"[+=\-\\{}^$]")
OPTION = re.compile(r"(?:^|\s|\[|\()([A-H])(?:\s|\]|\)|$)")
TAGGED = re.compile(r"<answer>([\s\S]*?)</answer>")


def split_parts(text: str, sign: str) -> list[str]:
    return [part.strip() for part in text.split(sign) if part.strip()]


@functools.lru_cache(maxsize=1 << 12)  # a gold answer is compared with every response of its group
def _parse_gold(text: str) -> list:
    return parse(text, extraction_mode="first_match", parsing_timeout=None)


def is_same_part(prediction: str, gold: str, tolerance: float | None = None) -> bool:
    """Return whether one part of an answer is right."""
    prediction, gold = (
        QUADRANTS.get(t.strip(), t) for t in (LEFT_SIDE.sub(r"\1", t) for t in (prediction, gold))
    )
    if len(prediction) <= MAX_ANSWER_LENGTH and (parsed := _parse_gold(gold)):
        stated = parse(
            f"${prediction}$", [MRCL_LATEX], extraction_mode="first_match", parsing_timeout=None
        )
        if verify(parsed, stated, timeout_seconds=None):
            return True
    a, b = (text.lower().translate(IGNORED_SIGNS) for text in (prediction, gold))
    if a == b or tolerance is None:
        return a == b
    try:
        return abs(float(a) - float(b)) <= tolerance
    except ValueError:
        return False


def score_mrcl(prediction: str, answers: list[str]) -> float:
    """Return the share of the gold answer's parts that are right, each in its place."""
    (gold,) = answers
    golds, parts = split_parts(gold, ";") or [gold], split_parts(prediction, ";")
    right = sum(is_same_part(a, b) for a, b in zip(parts, golds, strict=False))
    return right / len(golds)


def score_finmme(prediction: str, answers: list[str], tolerance: float | None) -> float:
    """Return 1 for the right option, options or number, and one half for some of the options."""
    (gold,) = answers
    if "," not in gold:
        return float(is_same_part(prediction, gold, tolerance))
    options, golds = set(split_parts(prediction, ",")), set(split_parts(gold, ","))
    return 1.0 if options == golds else 0.5 if options and options < golds else 0.0


@functools.lru_cache(maxsize=1 << 10)
def _parse_text(text: str) -> list:
    return parse(text, parsing_timeout=None)


def reward_ctbench(completion: str, answers: list[str], solution: str) -> float:
    """Return the reward of MLLM-CTBench's GRPO, without that of the form."""
    if verify(_parse_text(completion), _parse_text(solution), timeout_seconds=None):
        return 1.0
    gold, stated = (
        tagged[1].strip().lower() if (tagged := TAGGED.search(text)) else text.strip()
        for text in (solution, completion)
    )
    reward = float(stated == gold)
    if FORMULA_SIGNS.search(gold):
        reward = max(0.0, 1 - Levenshtein.distance(stated, gold) / len(gold))
    elif len(re.findall(r"\b\w+\b", gold)) >= 2:
        words, gold_words = (re.findall(r"\b[a-z0-9]+\b", t.lower()) for t in (stated, gold))
        reward = distinct_rouge_l(words, gold_words) if words and gold_words else reward
    options = OPTION.findall(stated)
    return 1.0 if options and options[-1] == gold else reward
