"""Find the final answer in a response; a missing answer is counted separately from a wrong one."""

import re
from collections.abc import Callable

ANSWER_IS = re.compile(r"\banswer\s*(?:is\b|:)\s*:?\s*", re.IGNORECASE)
# Without the lookbehind, a run of backslashes takes quadratic time.
BRACES = re.compile(r"(?<!\\)\\+boxed\s*\{|\\.|[{}]", re.DOTALL)
LETTER_ALONE = re.compile(r"\(?([A-Za-z])\)?\s*[.:,)]?")
LETTER_STATED = re.compile(
    r"\(([A-Z])\)|([A-Z])(?:[.:,;)](?=\s|$)|(?=\s+(?:because|since|as|for|due)\b))"
)
LETTER_FIRST = re.compile(r"\(([A-Z])\)|([A-Z])[.:)](?:\s|$)")


def raw_text(text: str) -> str:
    """Return the response as it is, an empty one too."""
    return text


def whole_text(text: str) -> str | None:
    """Return the response without space at either end, or None if it is empty."""
    return text.strip() or None


def boxed_answer(text: str) -> str | None:
    r"""Return the inside of the last `\boxed{...}` whose braces close; `\{` and `\}` are text."""
    opened, closed = [], {}
    for token in BRACES.finditer(text):  # a single pass, so open boxes do not add up in cost
        if token[0].endswith("{") and token[0] != r"\{":
            opened.append(token.end() if "boxed" in token[0] else None)
        elif token[0] == "}" and opened and (start := opened.pop()) is not None:
            closed[start] = token.start()
    return text[max(closed) : closed[max(closed)]].strip() if closed else None


def boxed_option(text: str) -> str | None:
    r"""Return the inside of the last box, or the whole response if it has none or an empty one.

    An option with its words, "B: a cat", becomes its letter.
    """
    answer = boxed_answer(text) or whole_text(text)
    letter, colon, _ = (answer or "").partition(":")
    letter = letter.strip()
    return letter if colon and len(letter) == 1 and letter.isalpha() else answer


def tagged_answer(text: str) -> str | None:
    """Return the inside of the last `<answer>...</answer>`."""
    inside = re.findall(r"<answer>((?:(?!<answer>).)*?)</answer>", text, re.DOTALL)
    return inside[-1].strip() if inside else None


def stated_answer(text: str) -> str | None:
    """Return what follows the last "answer is" or "answer:", to the end of its sentence or line."""
    *_, tail = ANSWER_IS.split(text)
    if tail == text:
        return None
    return re.split(r"\.\s+(?=[A-Z])|\n", tail)[0].strip().rstrip(".").strip() or None


def option_letter(text: str) -> str | None:
    """Return the option letter that a text states, consists of, or starts with.

    "the answer is B, since ..." states B, "b" and "(B)." are B, "B. cat" starts with B.
    """
    for part, form in (
        ((stated_answer(text) or "").strip("* "), LETTER_STATED),
        (text.strip("* \n"), LETTER_FIRST),
    ):
        if match := LETTER_ALONE.fullmatch(part):
            return match[1].upper()
        if match := form.match(part):
            return match[1] or match[2]
    return None


EXTRACTIONS: dict[str, Callable[[str], str | None]] = {
    "whole": whole_text,
    "boxed": boxed_answer,
    "boxed_option": boxed_option,
    "answer_tag": tagged_answer,
    "answer_is": stated_answer,
    "letter": option_letter,
    "raw": raw_text,
}


def extract_answer(text: str, how: str) -> str | None:
    """Return the final answer of a response, or None if it has none in the expected form."""
    if how not in EXTRACTIONS:
        raise ValueError(f"extraction: expected {', '.join(EXTRACTIONS)}; got {how!r}")
    return EXTRACTIONS[how](text)
