"""Check constraints on the form of a response: a re-implementation of IFEval's checks.

Ids and arguments are those of IFEval (arXiv 2311.07911). An answer is a list of constraints:

    [{"id": "punctuation:no_comma"},
     {"id": "length_constraints:number_words", "relation": "less than", "num_words": 50}]

As in the original, keywords, forbidden words, section marks and unusual postscript marks are
regular expressions, and capitals and lower case must also be English. The strict score checks the
response as it is; the loose score accepts it also without its stars, its first or its last line.
Departure: sentences and capital words are counted without nltk, see english_tokens.py.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from cptjax.tasks.scoring.english_tokens import count_sentences, treebank_words
from cptjax.tasks.scoring.language import detect_language
from cptjax.tasks.scoring.rlvr_constraints import count_brackets

# These need the package langdetect.
LANGUAGE_CONSTRAINTS = (
    "language:response_language",
    "change_case:english_capital",
    "change_case:english_lowercase",
)
CONSTRAINED_RESPONSES = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


def _compare(count: int, relation: str, threshold: int) -> bool:
    if relation not in ("less than", "at least"):
        raise ValueError(f"relation: expected 'less than' or 'at least', got {relation!r}")
    return count < threshold if relation == "less than" else count >= threshold


def _count(pattern: str, text: str, flags: int = 0) -> int:
    return sum(1 for _ in re.finditer(pattern, text, flags))


def _trim_blocks(blocks: Sequence[str]) -> list[str] | None:
    """Drop an empty block at either end; return None if one in the middle is empty."""
    inner = [b.strip() for b in blocks]
    inner = inner[1:] if inner and not inner[0] else inner
    inner = inner[:-1] if inner and not inner[-1] else inner
    return inner if all(inner) else None


def _has_blocks(text: str, divider: str, n: int) -> bool:
    found = _trim_blocks(re.split(divider, text))
    return found is not None and len(found) == n


def _is_json(text: str) -> bool:
    text = text.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):  # a thousand open brackets exceed the recursion limit
        return False
    return True


def _nth_paragraph(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    # A blank paragraph is not counted, but keeps its place.
    paragraphs = text.split("\n\n")
    count = sum(bool(p.strip()) for p in paragraphs)
    if count != num_paragraphs or not 0 < nth_paragraph <= count:
        return False
    words = paragraphs[nth_paragraph - 1].split()
    if not words:
        return False
    return re.split(r"[.,?!'\"]", words[0].lstrip("'").lstrip('"'))[0].lower() == first_word.lower()


def _two_responses(text: str) -> bool:
    found = _trim_blocks(text.split("******"))
    return found is not None and len(found) == 2 and found[0] != found[1]


def _count_highlights(text: str) -> int:
    single = [h for h in re.findall(r"\*([^\n*]*)\*", text) if h.strip()]
    return len(single) + sum(bool(h.strip()) for h in re.findall(r"\*\*([^\n*]*)\*\*", text))


def _count_bullets(text: str) -> int:
    # A star may be followed by the next line, but not by another star.
    return _count(r"^[^\S\n]*\*[^*].*$", text, re.M) + _count(r"^[^\S\n]*-.*$", text, re.M)


def _has_title(text: str) -> bool:
    # In each line, from its first << to its last >>.
    for line in text.split("\n"):
        start, stop = line.find("<<"), line.rfind(">>")
        if 0 <= start < stop - 2 and line[start : stop + 2].lstrip("<").rstrip(">").strip():
            return True
    return False


def _postscript(text: str, postscript_marker: str) -> bool:
    marker = postscript_marker.strip()
    known = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    return bool(re.search(known.get(marker, marker.lower()), text.lower()))


def _compare_capitals(text: str, capital_relation: str, capital_frequency: int) -> bool:
    count = sum(word.isupper() for word in treebank_words(text))
    return _compare(count, capital_relation, capital_frequency)


def _is_english(text: str) -> bool:
    return detect_language(text) in (None, "en")  # a text without letters counts as English


CONSTRAINT_CHECKS: dict[str, Callable[..., bool]] = {
    "keywords:existence": lambda text, keywords: all(
        re.search(k, text, re.IGNORECASE) for k in keywords
    ),
    "keywords:forbidden_words": lambda text, forbidden_words: (
        not any(re.search(rf"\b{w}\b", text, re.IGNORECASE) for w in forbidden_words)
    ),
    "keywords:frequency": lambda text, keyword, frequency, relation: _compare(
        _count(keyword.strip(), text, re.IGNORECASE), relation, frequency
    ),
    "keywords:letter_frequency": lambda text, letter, let_frequency, let_relation: _compare(
        Counter(text.lower())[letter.strip().lower()], let_relation, let_frequency
    ),
    "language:response_language": lambda text, language: detect_language(text) in (None, language),
    "length_constraints:number_words": lambda text, relation, num_words: _compare(
        _count(r"\w+", text), relation, num_words
    ),
    "length_constraints:number_sentences": lambda text, relation, num_sentences: _compare(
        count_sentences(text), relation, num_sentences
    ),
    "length_constraints:number_paragraphs": lambda text, num_paragraphs: _has_blocks(
        text, r"\*\*\*", num_paragraphs
    ),
    "length_constraints:nth_paragraph_first_word": _nth_paragraph,
    "detectable_content:number_placeholders": lambda text, num_placeholders: (
        count_brackets(text) >= num_placeholders
    ),
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": lambda text, num_bullets: (
        _count_bullets(text) == num_bullets
    ),
    "detectable_format:number_highlighted_sections": lambda text, num_highlights: (
        _count_highlights(text) >= num_highlights
    ),
    "detectable_format:multiple_sections": lambda text, section_spliter, num_sections: (
        _count(rf"{section_spliter.strip()}\s?\d+", text) >= num_sections
    ),
    "detectable_format:constrained_response": lambda text: any(
        c in text for c in CONSTRAINED_RESPONSES
    ),
    "detectable_format:title": _has_title,
    "detectable_format:json_format": _is_json,
    "combination:two_responses": _two_responses,
    "combination:repeat_prompt": lambda text, prompt_to_repeat: (
        text.strip().lower().startswith(prompt_to_repeat.strip().lower())
    ),
    "startend:end_checker": lambda text, end_phrase: (
        text.strip().strip('"').lower().endswith(end_phrase.strip().lower())
    ),
    "startend:quotation": lambda text: (
        len(text.strip()) > 1 and text.strip()[0] == text.strip()[-1] == '"'
    ),
    "change_case:english_capital": lambda text: text.isupper() and _is_english(text),
    "change_case:english_lowercase": lambda text: text.islower() and _is_english(text),
    "change_case:capital_word_frequency": _compare_capitals,
    "punctuation:no_comma": lambda text: "," not in text,
}


def make_constraints(
    ids: Sequence[str], arguments: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return the constraints of IFEval's columns `instruction_id_list` and `kwargs`.

    Arguments that are None are left out.
    """
    if len(ids) != len(arguments):
        raise ValueError(
            f"expected a set of arguments for each of {len(ids)} instruction ids, "
            f"got {len(arguments)}"
        )
    return [
        {"id": i, **{k: v for k, v in a.items() if v is not None}}
        for i, a in zip(ids, arguments, strict=True)
    ]


def follows_constraint(text: str, constraint: Mapping[str, Any]) -> bool:
    """Return whether a response meets one constraint; an empty response meets none."""
    arguments = dict(constraint)
    check = CONSTRAINT_CHECKS.get(arguments.pop("id", None))
    if check is None:
        raise ValueError(
            f"unknown constraint {constraint.get('id')!r}; known: {', '.join(CONSTRAINT_CHECKS)}"
        )
    try:
        return bool(text.strip()) and check(text, **arguments)
    except re.error as error:
        raise ValueError(f"constraint {constraint['id']}: {error} in {arguments}") from error
    except TypeError as error:
        raise ValueError(
            f"constraint {constraint['id']} has the wrong arguments {sorted(arguments)}: {error}"
        ) from error


def score_ifeval(prediction: str, answer: Sequence[Mapping[str, Any]], meta: Any = None) -> float:
    """Return 1 if all constraints are met (prompt-level, strict)."""
    return float(all(follows_constraint(prediction, c) for c in answer))


def loose_variants(text: str) -> Iterator[str]:
    """Yield the response, and its forms that the loose score accepts in its place."""
    lines = text.split("\n")
    forms = [text, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    for form in forms:
        yield form
        yield form.replace("*", "")


def follows_loosely(text: str, constraint: Mapping[str, Any]) -> bool:
    """Return whether a form of the response meets one constraint."""
    return any(follows_constraint(form, constraint) for form in loose_variants(text))
