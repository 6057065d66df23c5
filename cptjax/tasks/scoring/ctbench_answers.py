"""Score answers to MLLM-CTBench as its second, corrected version of the released scorers does.

The answer of a response stands in its last <answer> tags, else outside of its thoughts. Two quirks
are kept: an option letter is the first A to H that stands alone in capitals, so the article "a" is
A; and an answer without such a letter is right if any of its words has the gold letter.
"""

import difflib
import re
from typing import Any

from cptjax.tasks.scoring.extract import tagged_answer
from cptjax.tasks.scoring.text import gold_answers

THINK_TAG = re.compile(r"<(/?)think>", re.IGNORECASE)
ANSWER_TAG = re.compile(r"</?answer>", re.IGNORECASE)
PUNCTUATION = re.compile(r"[!-/:-@\[-`{-~]")
OPTION_FIRST = re.compile(r"\(?\s*([A-Ha-h])\s*(?:[.):,]|$)")
OPTION_ALONE = re.compile(r"\b([A-H])\b")
LAST_NUMBER = re.compile(r"-?\d+\.?\d*")
TOLERANCE = 1e-3
LONG_ANSWER = 8  # characters; a longer gold answer need not be literal
LEAST_SIMILARITY = 0.6


def remove_thoughts(text: str) -> str:
    """Replace each <think>...</think> by a space; a thought without an end goes to the end."""
    kept, place = [], 0
    for tag in THINK_TAG.finditer(text):
        if place is not None and not tag[1]:
            kept.append(text[place : tag.start()])
            place = None
        elif place is None and tag[1]:
            place = tag.end()
    return " ".join(kept if place is None else [*kept, text[place:]])


def read_response(text: str) -> str:
    """Return the answer that a response states."""
    tagged = tagged_answer(text)
    return ANSWER_TAG.sub(" ", remove_thoughts(text)).strip() if tagged is None else tagged


def normalise_answer(text: str) -> str:
    """Convert to lower case, with a space for each punctuation mark."""
    return " ".join(PUNCTUATION.sub(" ", text.lower()).split())


def find_option(text: str) -> str | None:
    """Return the option letter that a text starts with, or the first that stands alone."""
    text = text.strip()
    found = OPTION_FIRST.match(text) or OPTION_ALONE.search(text.upper())
    return found[1].upper() if found else None


def find_number(text: str) -> float | None:
    """Return the last number in a text."""
    numbers = LAST_NUMBER.findall(text.replace(",", ""))
    return float(numbers[-1]) if numbers else None


def is_same_text(answer: str, gold: str) -> bool:
    """Return whether an answer contains the gold text, or resembles a long one."""
    answer, gold = normalise_answer(answer), normalise_answer(gold)
    if not gold or gold in answer:
        return bool(gold)
    matcher = difflib.SequenceMatcher(None, gold, answer)
    ratios = (matcher.real_quick_ratio, matcher.quick_ratio, matcher.ratio)  # ever smaller
    return len(gold) > LONG_ANSWER and all(ratio() >= LEAST_SIMILARITY for ratio in ratios)


def is_same_number(answer: str, gold: str) -> bool:
    """Return whether the last numbers of an answer and the gold text are equal."""
    a, b = find_number(answer), find_number(gold)
    return a is not None and b is not None and abs(a - b) < TOLERANCE


def is_same_choice(answer: str, gold: str) -> bool:
    """Return whether an answer states the gold letter; a gold text that is none is compared."""
    a, b = find_option(answer), find_option(gold.upper())
    return a == b if a and b else is_same_text(answer, gold)


def score_ctbench_open(prediction: str, answer: Any, meta: Any = None) -> float:
    (gold,) = gold_answers(answer)
    return float(is_same_text(read_response(prediction), gold))


def score_ctbench_number(prediction: str, answer: Any, meta: Any = None) -> float:
    (gold,) = gold_answers(answer)
    return float(is_same_number(read_response(prediction), gold))


def score_ctbench_choice(prediction: str, answer: Any, meta: Any = None) -> float:
    (gold,) = gold_answers(answer)
    return float(is_same_choice(read_response(prediction), gold))


def score_ctbench_math(prediction: str, answer: Any, meta: Any = None) -> float:
    """Return 1 if a response states the gold letter, yes or no, number or text."""
    (gold,) = (text.strip() for text in gold_answers(answer))
    stated = read_response(prediction)
    if re.fullmatch("[A-Ha-h]", gold):
        return float(is_same_choice(stated, gold))
    if gold.lower() in ("yes", "no"):
        words = normalise_answer(stated)
        return float(words.startswith(gold.lower()) or gold.lower() in words.split())
    return float(is_same_number(stated, gold) or is_same_text(stated, gold))
