"""Find the final answer in a response; a missing answer is counted separately from a wrong one."""

import re
from collections.abc import Callable

ANSWER_IS = re.compile(r"\banswer\s*(?:is\b|:)\s*:?\s*", re.IGNORECASE)
# Without the lookbehind, a run of backslashes takes quadratic time.
BRACES = re.compile(r"(?<!\\)\\+boxed\s*\{|\\.|[{}]", re.DOTALL)
# Around an option letter these are only markup; an opened box is also found by boxed_answer.
MARKUP = re.compile(r"\\(?:boxed|text(?:bf|rm)?|math(?:bf|rm))\b|[\\*$`{}\"“”]")
REASON = r"(?:because|since|as|for|due)\b"
# "I. think" is a pronoun, and no option I.
PRONOUN = r"I[.,:;)]? (?:think|believe|guess|know|see|am|would|do|don't|can|can't|cannot|have)\b"
OPTION_WORD = r"(?i:(?:the )?(?:option|choice|letter):?\s)?"
LEADING_THOUGHT = re.compile(r"\s*<think>.*?</think>\s*", re.DOTALL)
LETTER_ALONE = r"\(?([A-Za-z])\)? ?[.:,)]*"
# A capital is an option, not a word such as "A", where one of these follows.
LETTER_AND_WORDS = (
    rf"(?!{PRONOUN})(?:\(([A-Za-z])\)|([a-z])\)(?=\s|\Z)"
    r"|([A-Z])(?:[.:)](?=\s|\Z)"  # B. cat
    r"|(?= [-–—] )"  # B - cat
    rf"|(?= \([^()\n]*\)(?! (?!{REASON})\w))))"  # B (cat)
)
LETTER_STATED = re.compile(
    r"\b(?i:answer|(?:correct|right|best) (?:option|choice))\s?(?i:is\b|:)\s?:?\s?"
    rf"{OPTION_WORD}(?:(?!{PRONOUN}){LETTER_ALONE}(?=\n|\Z|(?<=\.) [A-Z])|{LETTER_AND_WORDS}"
    rf"|([A-Z])(?:[,;](?=\s|\Z)|(?= {REASON})))"
)
LETTER_FIRST = re.compile(
    rf"{OPTION_WORD}(?:{LETTER_ALONE}\Z|{LETTER_AND_WORDS}"
    # a line of its own, but not the first of a list of letters
    rf"|([A-Za-z])(?=\n(?!{LETTER_ALONE}(?:\n|\Z))))"
)


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
    r"""Return the option letter that a text states, consists of, or starts with.

    It is in the last box, else in the last "answer is" or "answer:" that names a letter, else at
    the start: "\boxed{B}", "the answer is option B, since ...", "(b).", "B. cat", "Option B".
    """
    plain = _plain_text(text)
    *_, stated = [None, *LETTER_STATED.finditer(plain)]
    boxed = LETTER_FIRST.match(_plain_text(boxed_answer(text) or ""))
    match = boxed or stated or LETTER_FIRST.match(plain)
    return next(filter(None, match.groups())).upper() if match else None


def _plain_text(text: str) -> str:
    """Remove markup, and replace a run of spaces or line ends by one."""
    text = MARKUP.sub("", text).strip()
    return re.sub(r"\s+", lambda run: "\n" if "\n" in run[0] else " ", text)


def _after_thought(extract: Callable[[str], str | None]) -> Callable[[str], str | None]:
    """Return an extraction that skips a leading <think>...</think>.

    The chat templates of reasoning models write one, an empty one too; it is not the response.
    """

    def extract_after_thought(text: str) -> str | None:
        thought = LEADING_THOUGHT.match(text)
        return extract(text[thought.end() :] if thought else text)

    return extract_after_thought


EXTRACTIONS: dict[str, Callable[[str], str | None]] = {
    "whole": _after_thought(whole_text),
    "boxed": boxed_answer,
    "boxed_option": boxed_option,
    "answer_tag": tagged_answer,
    "answer_is": _after_thought(stated_answer),
    "letter": _after_thought(option_letter),
    "raw": _after_thought(raw_text),
    "verbatim": raw_text,
}


def extract_answer(text: str, how: str) -> str | None:
    """Return the final answer of a response, or None if it has none in the expected form."""
    if how not in EXTRACTIONS:
        raise ValueError(f"extraction: expected {', '.join(EXTRACTIONS)}; got {how!r}")
    return EXTRACTIONS[how](text)
