"""Find the final answer in a response. None = there is none, which is reported beside the accuracy and never hidden in it."""

import re
from collections.abc import Callable

ANSWER_IS = re.compile(r"\banswer\s*(?:is\b|:)\s*:?\s*", re.IGNORECASE)
BRACES = re.compile(r"\\+boxed\s*\{|\\.|[{}]", re.DOTALL)
LETTER_ALONE = re.compile(r"\(?([A-Za-z])\)?\s*[.:,)]?")
LETTER_STATED = re.compile(
    r"\(([A-Z])\)|([A-Z])(?:[.:,;)](?=\s|$)|(?=\s+(?:because|since|as|for|due)\b))"
)
LETTER_FIRST = re.compile(r"\(([A-Z])\)|([A-Z])[.:)](?:\s|$)")


def whole_text(text: str) -> str | None:
    """The response as it is."""
    return text.strip() or None


def boxed_answer(text: str) -> str | None:
    r"""The inside of the last `\boxed{...}` whose braces close; `\{` and `\}` are text."""
    opened, closed = [], {}
    for token in BRACES.finditer(
        text
    ):  # one pass, so that a thousand open boxes cost no more than one
        if token[0].endswith("{") and token[0] != r"\{":
            opened.append(token.end() if "boxed" in token[0] else None)
        elif token[0] == "}" and opened and (start := opened.pop()) is not None:
            closed[start] = token.start()
    return text[max(closed) : closed[max(closed)]].strip() if closed else None


def tagged_answer(text: str) -> str | None:
    """The inside of the last `<answer>...</answer>`."""
    inside = re.findall(r"<answer>((?:(?!<answer>).)*?)</answer>", text, re.DOTALL)
    return inside[-1].strip() if inside else None


def stated_answer(text: str) -> str | None:
    """What follows the last "answer is" or "answer:", to the end of its sentence or line."""
    *_, tail = ANSWER_IS.split(text)
    if tail == text:
        return None
    return re.split(r"\.\s+(?=[A-Z])|\n", tail)[0].strip().rstrip(".").strip() or None


def option_letter(text: str) -> str | None:
    """An option letter: the text states one ("the answer is B, since ..."), is one ("b", "(B)."), or starts with one ("B. cat")."""
    for part, form in (
        ((stated_answer(text) or "").strip("* "), LETTER_STATED),
        (text.strip("* \n"), LETTER_FIRST),
    ):
        if found := LETTER_ALONE.fullmatch(part):
            return found[1].upper()
        if found := form.match(part):
            return found[1] or found[2]
    return None


EXTRACTIONS: dict[str, Callable[[str], str | None]] = {
    "whole": whole_text,
    "boxed": boxed_answer,
    "answer_tag": tagged_answer,
    "answer_is": stated_answer,
    "letter": option_letter,
}


def extract_answer(text: str, how: str) -> str | None:
    """The final answer of a response, or None."""
    if how not in EXTRACTIONS:
        raise ValueError(f"extraction must be one of {', '.join(EXTRACTIONS)}; got {how!r}")
    return EXTRACTIONS[how](text)
