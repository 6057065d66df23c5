"""Score multiple choice by the rules of each benchmark: option letters, MMMU, MMLU-Pro."""

import ast
import contextlib
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

from cptjax.tasks.scoring.extract import option_letter

CHOICE_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MMLU_PRO_STATED = re.compile(r"answer is \(?([A-J])\)?")
MMLU_PRO_ANSWER = re.compile(r"(?=[aA]nswer:\s*([A-J]))")
MMLU_PRO_ALONE = re.compile(r"\b[A-J]\b")
ANSWER_KEY_WORDS = (
    "could be ",
    "so ",
    "is ",
    "thus ",
    "therefore ",
    "final ",
    "answer ",
    "result ",
)
LONG_DIGITS = re.compile(r"\d{50,}")  # no gold number is so long, and they take quadratic time
NUMBER_PATTERN = (
    r"-?\b\d{1,3}(?:,\d{3})+\b|-?\d+(?:\.\d+)?[eE][+-]?\d+"
    r"|-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d)(?![,\d])"
)
MMMU_DISCIPLINES = {  # with their subjects, spelled as in a row's id
    "art_and_design": "Art Art_Theory Design Music",
    "business": "Accounting Economics Finance Manage Marketing",
    "science": "Biology Chemistry Geography Math Physics",
    "health_and_medicine": "Basic_Medical_Science Clinical_Medicine "
    "Diagnostics_and_Laboratory_Medicine Pharmacy Public_Health",
    "humanities_and_social_science": "History Literature Sociology Psychology",
    "tech_and_engineering": "Agriculture Architecture_and_Engineering Computer_Science "
    "Electronics Energy_and_Power Materials Mechanical_Engineering",
}


def gold_letter(answer: Any) -> str:
    """Return the gold option as a letter; a whole number, also as text, counts from 0."""
    text = str(answer).strip().strip("().").strip().upper()
    if len(text) == 1 and text in CHOICE_LETTERS:
        return text
    number = re.fullmatch(r"(\d{1,2})(?:\.0)?", text)
    if number is None or int(number[1]) >= len(CHOICE_LETTERS):
        raise ValueError(
            "a multiple-choice answer: expected one letter, or the number of an option from 0 to "
            f"{len(CHOICE_LETTERS) - 1}, got {answer!r:.60}; give the letter of the right option"
        )
    return CHOICE_LETTERS[int(number[1])]


def score_mcq_letter(prediction: str, answer: Any, meta: Any = None) -> float:
    """Return 1 if the response states the gold letter.

    "B", "b", "(B).", "B. cat" and "The answer is B." state B.
    """
    return float(option_letter(prediction) == gold_letter(answer))


def score_scienceqa_strict(prediction: str, answer: Any, meta: Any = None) -> float:
    """Return 1 if the prediction is the gold letter or begins with it and a period (lmms-eval)."""
    prediction, gold = prediction.strip(), gold_letter(answer).lower()
    if prediction.lower() == gold:
        return 1.0
    starts_with_option = prediction[:1].isupper() and prediction[1:2] == "."
    return float(starts_with_option and prediction[0].lower() == gold)


def score_mmstar(prediction: str, answer: Any, meta: Any = None) -> float:
    """Return 1 if MMStar's rule reads the gold letter.

    It looks at the first character, and at the one after "(", "option " or "the answer is ". Quirk
    kept: any word that begins with the gold letter is right.
    """
    text = prediction.lower().replace("\n", " ").strip()
    gold = gold_letter(answer).lower()
    starts = ("", "(", "option ", "the answer is ")
    return float(any(text.startswith(start + gold) for start in starts))


def find_mmlu_pro_letter(text: str) -> str | None:
    """Return the letter that MMLU-Pro's official extraction reads.

    It is X of the first "answer is (X)", else of the last "Answer: X" in the first line that has
    one, else the last capital A-J that is a word.
    """
    if stated := MMLU_PRO_STATED.search(text):
        return stated[1]
    found = None
    for answer in MMLU_PRO_ANSWER.finditer(text):
        if found and "\n" in text[found.start() : answer.start()]:
            break
        found = answer
    if found:
        return found[1]
    for alone in MMLU_PRO_ALONE.finditer(text):
        found = alone
    return found[0] if found else None


def score_mmlu_pro(prediction: str, answer: Any, meta: Any = None) -> float:
    """Score by MMLU-Pro's rule, except that a response without a letter is wrong.

    The official code then guesses at random.
    """
    return float(find_mmlu_pro_letter(prediction) == gold_letter(answer))


def row_options(meta: Mapping[str, Any]) -> list[str]:
    """Return the row's options, which MMMU writes as a Python list."""
    return as_strings(meta.get("options", ()))


def as_strings(value: Any) -> list[str]:
    """Convert a list, the text of a Python list, or one string to a list of strings."""
    if isinstance(value, str) and value.startswith("[") and value.endswith("]"):
        # An answer that only looks like a list is kept as text.
        with contextlib.suppress(ValueError, SyntaxError):
            value = ast.literal_eval(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [str(v) for v in value]
    return [str(value)]


def score_mmmu(prediction: str, answer: Any, meta: Mapping[str, Any]) -> float:
    """Score by MMMU's official rule.

    A response whose choice cannot be read counts as a random guess, the same for the same row.
    """
    return _score_mmmu(prediction, answer, meta, guess=True)


def score_mmmu_strict(prediction: str, answer: Any, meta: Mapping[str, Any]) -> float:
    """Score by MMMU's official rule, but count a choice that cannot be read as wrong."""
    return _score_mmmu(prediction, answer, meta, guess=False)


def _score_mmmu(prediction: str, answer: Any, meta: Mapping[str, Any], guess: bool) -> float:
    golds = as_strings(answer)
    if meta.get("question_type", "multiple-choice") == "open":
        return float(matches_mmmu_open(prediction, golds))
    choices = row_options(meta)
    if not choices:
        raise ValueError(
            "a multiple-choice row of MMMU: "
            "expected the column `options`, got no column or an empty one"
        )
    letter = parse_mmmu_choice(prediction, choices)
    if letter is None and guess:
        letter = random.Random(f"mmmu:{meta.get('id', '')}").choice(CHOICE_LETTERS[: len(choices)])
    return float(letter in golds)


def parse_mmmu_choice(text: str, choices: Sequence[str]) -> str | None:
    """Return the letter that MMMU's parser reads.

    It looks for "(X)", else "X ", else "X.", else an option's words, and takes the last of several.
    Quirk kept: "A " is also the article, so a chain of thought must be reduced to its final
    answer first, by the template's extraction.
    """
    for mark in ",.!?;:'":
        text = text.strip(mark)
    text = f" {text} "
    letters = CHOICE_LETTERS[: len(choices)]
    for test, place in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        if stated := [c for c in letters if test.format(c) in text]:
            return max(stated, key=lambda c: text.rfind(place.format(c)))
    if len(text.split()) > 5:
        ends = {
            c: text.lower().rfind(words.lower()) for c, words in zip(letters, choices, strict=True)
        }
        if max(ends.values()) >= 0:
            return max(ends, key=ends.__getitem__)
    return None


def matches_mmmu_open(text: str, golds: Sequence[str]) -> bool:
    """Return whether a key part of the response matches a gold answer.

    A part matches if it equals a gold number (to 2 decimals) or contains a gold string.
    """
    parts = answer_parts(text)
    predicted = {
        form
        for part in parts
        for piece in (part, *re.findall(NUMBER_PATTERN, LONG_DIGITS.sub(" ", part)))
        for form in normal_forms(piece)
    }
    gold = {form for answer in golds for form in normal_forms(answer)}
    gold_texts = [g for g in gold if isinstance(g, str)]
    return any(
        any(g in p for g in gold_texts) if isinstance(p, str) else p in gold for p in predicted
    )


def answer_parts(text: str) -> list[str]:
    """Return the key parts of a response, or the whole text if it has none.

    A key part is the end of a line after "is ", "so ", "answer " etc., or "=" in the last line.
    """
    text = text.strip().strip(".").lower()
    lines, parts = text.split("\n"), []
    for i, line in enumerate(lines):
        words = ANSWER_KEY_WORDS + (("=",) if i == len(lines) - 1 else ())
        tails = [line.rsplit(word, 1)[1].strip() for word in words if word in line]
        # As in the original, a later tail replaces an empty one.
        kept = ""
        for tail in tails:
            kept = tail if not kept or len(tail) < len(kept) else kept
        if kept and kept not in list(":,.!?;'"):
            parts.append(kept)
    return parts or [text]


def normal_forms(text: str) -> list[str | float]:
    """Return the normal forms of a text: a number rounded to 2 decimals, else lower-case text.

    A single letter has two forms, with a space before and after it.
    """
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def mmmu_subject(meta: Mapping[str, Any]) -> str:
    """Return the subject in a row's id: "validation_Art_Theory_12" -> "Art_Theory"."""
    if "subject" in meta:
        return str(meta["subject"])
    match = re.fullmatch(r"[^_]+_(.+?)_\d+", str(meta.get("id", "")))
    return match[1] if match else ""


def mmmu_discipline(meta: Mapping[str, Any]) -> str:
    """Return the MMMU discipline of a row, or "other" for an unknown subject."""
    subject = mmmu_subject(meta)
    for discipline, subjects in MMMU_DISCIPLINES.items():
        if subject in subjects.split():
            return discipline
    return "other"
