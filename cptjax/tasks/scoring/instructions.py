"""Check constraints on the form of a response: a re-implementation of IFEval's checks.

Ids and arguments are those of IFEval (arXiv 2311.07911). An answer is a list of constraints:

    [{"id": "punctuation:no_comma"},
     {"id": "length_constraints:number_words", "relation": "less than", "num_words": 50}]

The scores of some responses differ from the original's: words and sentences are split by regular
expressions instead of nltk, capitals are counted in texts of any language, and
`language:response_language` is missing because it needs a language detector.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

CONSTRAINED_RESPONSES = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


def _compare(count: int, relation: str, threshold: int) -> bool:
    if relation not in ("less than", "at least"):
        raise ValueError(f"relation: expected 'less than' or 'at least', got {relation!r}")
    return count < threshold if relation == "less than" else count >= threshold


def _count(pattern: str, text: str, flags: int = 0) -> int:
    return len(re.findall(pattern, text, flags))


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
    try:
        json.loads(re.sub(r"^```(?:json)?|```$", "", text.strip(), flags=re.IGNORECASE))
    except (ValueError, RecursionError):  # a thousand open brackets exceed the recursion limit
        return False
    return True


def _nth_paragraph(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    paragraphs = [p for p in text.split("\n\n") if p.strip()]
    if len(paragraphs) != num_paragraphs or not 0 < nth_paragraph <= num_paragraphs:
        return False
    return (
        re.split(r"[.,?!'\"]", paragraphs[nth_paragraph - 1].split()[0].lstrip("'\""))[0].lower()
        == first_word.lower()
    )


def _two_responses(text: str) -> bool:
    found = _trim_blocks(text.split("******"))
    return found is not None and len(found) == 2 and found[0] != found[1]


def _count_highlights(text: str) -> int:
    single = [h for h in re.findall(r"\*([^\n*]*)\*", text) if h.strip()]
    return len(single) + sum(bool(h.strip()) for h in re.findall(r"\*\*([^\n*]*)\*\*", text))


def _postscript(text: str, postscript_marker: str) -> bool:
    spaced = r"\s?".join(re.escape(part) for part in re.findall(r"[^.]+\.?", postscript_marker))
    return bool(re.search(spaced, text, re.IGNORECASE))


def _compare_capitals(text: str, capital_relation: str, capital_frequency: int) -> bool:
    count = sum(word.isupper() for word in re.findall(r"[\w'-]+", text))
    return _compare(count, capital_relation, capital_frequency)


CONSTRAINT_CHECKS: dict[str, Callable[..., bool]] = {
    "keywords:existence": lambda text, keywords: all(k.lower() in text.lower() for k in keywords),
    "keywords:forbidden_words": lambda text, forbidden_words: (
        not any(re.search(rf"\b{re.escape(w)}\b", text, re.IGNORECASE) for w in forbidden_words)
    ),
    "keywords:frequency": lambda text, keyword, frequency, relation: _compare(
        _count(re.escape(keyword.strip()), text, re.IGNORECASE), relation, frequency
    ),
    "keywords:letter_frequency": lambda text, letter, let_frequency, let_relation: _compare(
        text.lower().count(letter.lower()), let_relation, let_frequency
    ),
    "length_constraints:number_words": lambda text, relation, num_words: _compare(
        _count(r"\w+", text), relation, num_words
    ),
    "length_constraints:number_sentences": lambda text, relation, num_sentences: _compare(
        sum(bool(s.strip()) for s in re.split(r"[.!?]+(?:\s+|$)", text)), relation, num_sentences
    ),
    "length_constraints:number_paragraphs": lambda text, num_paragraphs: _has_blocks(
        text, r"\*\*\*", num_paragraphs
    ),
    "length_constraints:nth_paragraph_first_word": _nth_paragraph,
    "detectable_content:number_placeholders": lambda text, num_placeholders: (
        _count(r"\[.*?\]", text) >= num_placeholders
    ),
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": lambda text, num_bullets: (
        _count(r"^\s*(?:\*[^*\n]|-).*$", text, re.M) == num_bullets
    ),
    "detectable_format:number_highlighted_sections": lambda text, num_highlights: (
        _count_highlights(text) >= num_highlights
    ),
    "detectable_format:multiple_sections": lambda text, section_spliter, num_sections: (
        _count(rf"{re.escape(section_spliter.strip())}\s?\d+", text) >= num_sections
    ),
    "detectable_format:constrained_response": lambda text: any(
        c in text for c in CONSTRAINED_RESPONSES
    ),
    "detectable_format:title": lambda text: any(
        t.strip("<> ") for t in re.findall(r"<<([^\n]+)>>", text)
    ),
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
    "change_case:english_capital": str.isupper,
    "change_case:english_lowercase": str.islower,
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
    except TypeError as error:
        raise ValueError(
            f"constraint {constraint['id']} has the wrong arguments {sorted(arguments)}: {error}"
        ) from error


def score_ifeval(prediction: str, answer: Sequence[Mapping[str, Any]], meta: Any = None) -> float:
    """Return 1 if all constraints are met (prompt-level, strict)."""
    return float(all(follows_constraint(prediction, c) for c in answer))
