"""Check RLVR-IFeval's constraints as paper C's released code does, which differs from IFEval.

A gold answer is the row's `ground_truth`: the name of a function and its arguments,

    {"func_name": "verify_paragraph_count", "N": 3, "quantifier": None, ...}

Some checks are stricter than IFEval's and some looser, and the reward is exactly this: paragraphs
are divided by `* * *`, options are those of the row, a keyword is counted as a whole word but
forbidden as a part of a word, letters are counted in their case. A check that its arguments do not
fit counts as not met. The response is checked as it is, without removing space at its ends.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from cptjax.tasks.scoring.language import detect_language

Arguments = Mapping[str, Any]
WORD = re.compile(r"\w+")
CAPITAL_WORD = re.compile(r"\b[A-Z]+\b")
# A space after a full stop or question mark, unless it ends something like "e.g." or "Mr."
SENTENCE_SPACE = re.compile(r"(?<!\w\.\w.)(?<![A-Z][a-z]\.)(?<=\.|\?)\s")
DIVIDER = "* * *"


def compare_with_quantifier(count: int, args: Arguments, slack: int) -> bool:
    """Compare a count with N: "at least", "at most", or "around", which allows `slack`."""
    quantifier, n = args["quantifier"], args["N"]
    if quantifier == "at least":
        return count >= n
    if quantifier == "at most":
        return count <= n
    return quantifier == "around" and abs(count - n) <= slack


def _keywords(text: str, args: Arguments) -> bool:
    return all(word.lower() in text.lower() for word in args["keyword_list"])


def _keyword_frequency(text: str, args: Arguments) -> bool:
    return WORD.findall(text.lower()).count(args["word"].lower()) == args["N"]


def _forbidden_words(text: str, args: Arguments) -> bool:
    return not any(word.lower() in text.lower() for word in args["forbidden_words"])


def _letter_frequency(text: str, args: Arguments) -> bool:
    letter, n = args["letter"], args["N"]
    return len(letter) == 1 and text.count(letter) == n


def _response_language(text: str, args: Arguments) -> bool:
    language = args["language"]
    return language is not None and detect_language(text) == language


def _paragraph_count(text: str, args: Arguments) -> bool:
    lines = (line.strip() for line in text.splitlines())
    pieces = "\n".join(lines).strip().split(DIVIDER)
    return all(piece.strip() for piece in pieces) and len(pieces) == args["N"]


def _word_count(text: str, args: Arguments) -> bool:
    slack = max(round(args["N"] * 0.1), 1)
    return compare_with_quantifier(len(text.split()), args, slack)


def _sentence_count(text: str, args: Arguments) -> bool:
    return compare_with_quantifier(len(SENTENCE_SPACE.split(text)), args, slack=1)


def _paragraphs(text: str, args: Arguments) -> bool:
    n, first_word, i = args["N"], args["first_word"], args["i"]
    pieces = text.split("\n\n")
    return len(pieces) == n and pieces[i - 1].strip().startswith(first_word)


def _postscript(text: str, args: Arguments) -> bool:
    marker = args["postscript_marker"]
    place = text.find(marker)
    return place >= 0 and len(text[place:].strip()) > len(marker)


def count_brackets(text: str) -> int:
    """Return the number of [placeholders], each within a line.

    A regular expression needs quadratic time for a text of opening brackets.
    """
    count = 0
    for line in text.split("\n"):
        place = line.find("[")
        while place >= 0 and (close := line.find("]", place)) >= 0:
            count += 1
            place = line.find("[", close)
    return count


def _placeholders(text: str, args: Arguments) -> bool:
    return count_brackets(text) >= args["N"]


def _bullet_points(text: str, args: Arguments) -> bool:
    lines = text.split("\n")
    return sum(line.strip().startswith(("*", "-")) for line in lines) == args["N"]


def _title(text: str, args: Arguments) -> bool:
    # The first << of a line has a >> after it, or no << of the line has.
    return any(
        line.find(">>", line.find("<<") + 2) >= 0 for line in text.split("\n") if "<<" in line
    )


def _choice(text: str, args: Arguments) -> bool:
    return any(text in option for option in args["options"])


def _highlighted_sections(text: str, args: Arguments) -> bool:
    # Each pair of stars in a line is a section, an empty one too.
    return sum(line.count("*") // 2 for line in text.split("\n")) >= args["N"]


def _sections(text: str, args: Arguments) -> bool:
    pieces = text.split(args["section_splitter"])
    return len(pieces) - (pieces[0] == "") == args["N"]


def _json_format(text: str, args: Arguments) -> bool:
    json.loads(text)  # a ValueError counts as not met
    return True


def _repeat_prompt(text: str, args: Arguments) -> bool:
    return text.startswith(args["original_prompt"])


def _two_responses(text: str, args: Arguments) -> bool:
    first, _, second = text.partition("******")
    return text.count("******") == 1 and first.strip() != second.strip()


def _capital_words(text: str, args: Arguments) -> bool:
    return compare_with_quantifier(len(CAPITAL_WORD.findall(text)), args, slack=0)


RLVR_CHECKS: dict[str, Callable[[str, Arguments], bool]] = {
    "verify_keywords": _keywords,
    "verify_keyword_frequency": _keyword_frequency,
    "validate_forbidden_words": _forbidden_words,
    "verify_letter_frequency": _letter_frequency,
    "validate_response_language": _response_language,
    "verify_paragraph_count": _paragraph_count,
    "validate_word_constraint": _word_count,
    "verify_sentence_constraint": _sentence_count,
    "validate_paragraphs": _paragraphs,
    "verify_postscript": _postscript,
    "validate_placeholders": _placeholders,
    "verify_bullet_points": _bullet_points,
    "validate_title": _title,
    "validate_choice": _choice,
    "validate_highlighted_sections": _highlighted_sections,
    "validate_sections": _sections,
    "validate_json_format": _json_format,
    "validate_repeat_prompt": _repeat_prompt,
    "validate_two_responses": _two_responses,
    "validate_uppercase": lambda text, args: text == text.upper(),
    "validate_lowercase": lambda text, args: text == text.lower(),
    "validate_frequency_capital_words": _capital_words,
    "validate_end": lambda text, args: text.endswith(args["end_phrase"]),
    "validate_quotation": lambda text, args: text.startswith('"') and text.endswith('"'),
    "validate_no_commas": lambda text, args: "," not in text,
}
# What a check raises where the row lacks an argument, or has one of the wrong type.
UNFIT_ARGUMENTS = (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError)


def find_rlvr_check(constraint: Arguments) -> Callable[[str, Arguments], bool]:
    """Return the check of a constraint, or raise a ValueError that names the known ones."""
    name = constraint.get("func_name") if isinstance(constraint, Mapping) else constraint
    if name not in RLVR_CHECKS:
        raise ValueError(
            f"an RLVR constraint: expected func_name to be one of {', '.join(RLVR_CHECKS)}; "
            f"got {name!r}"
        )
    return RLVR_CHECKS[name]


def score_rlvr_ifeval(prediction: str, answer: Any, meta: Any = None) -> float:
    """Return 1 if the response meets the row's constraint."""
    constraint = json.loads(answer) if isinstance(answer, str) else answer
    check = find_rlvr_check(constraint)
    if check is _response_language:
        detect_language("language")  # a missing package is an error of the installation
    try:
        return float(check(prediction, constraint))
    except UNFIT_ARGUMENTS:
        return 0.0
