"""A second statement of IFEval's checks, as plain as possible, for comparison in the tests.

Sentences and capital words, which the original counts with nltk, are compared with counts that are
written down in the tests.
"""

import functools
import json
import re

from langdetect import LangDetectException, detect


def related(count, relation, threshold):
    return {"less than": count < threshold, "at least": count >= threshold}[relation]


@functools.cache
def language_is(text, code):
    try:
        return detect(text) == code
    except LangDetectException:
        return True


def pieces_between(text, divider):
    """Return the pieces, or None if one that is neither first nor last is blank."""
    pieces = re.split(divider, text)
    if any(not piece.strip() for piece in pieces[1:-1]):
        return None
    ends = {0, len(pieces) - 1}
    return [p.strip() for i, p in enumerate(pieces) if p.strip() or i not in ends]


def has_pieces(text, divider, n):
    pieces = pieces_between(text, divider)
    return pieces is not None and len(pieces) == n


def two_responses(text):
    pieces = pieces_between(text, r"\*{6}")
    return pieces is not None and len(pieces) == 2 and pieces[0] != pieces[1]


def first_word(text, num_paragraphs, nth_paragraph, first_word):
    paragraphs = text.split("\n\n")
    count = len([p for p in paragraphs if p.strip()])
    if nth_paragraph > count or not paragraphs[nth_paragraph - 1].strip():
        return False
    word = paragraphs[nth_paragraph - 1].split()[0].lstrip("'").lstrip('"')
    return count == num_paragraphs and re.split(r"[.,?!'\"]", word)[0].lower() == first_word.lower()


def is_json(text):
    text = text.strip()
    for mark in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(mark)
    try:
        json.loads(text.removesuffix("```").strip())
        return True
    except ValueError:
        return False


def highlights(text):
    single = [h for h in re.findall(r"\*[^\n*]*\*", text) if h.strip("*").strip()]
    double = [h for h in re.findall(r"\*\*[^\n*]*\*\*", text) if h[2:-2].strip()]
    return len(single) + len(double)


def postscript(text, postscript_marker):
    pattern = {"P.P.S": r"p\.\s?p\.\s?s.*$", "P.S.": r"p\.\s?s\..*$"}.get(
        postscript_marker.strip(), postscript_marker.strip().lower() + ".*$"
    )
    return re.search(pattern, text.lower(), re.MULTILINE) is not None


SEMANTICS = {
    "keywords:existence": lambda t, keywords: all(re.search(k, t, re.I) for k in keywords),
    "keywords:forbidden_words": lambda t, forbidden_words: (
        not re.search("|".join(rf"\b{w}\b" for w in forbidden_words), t, re.I)
    ),
    "keywords:frequency": lambda t, keyword, frequency, relation: related(
        len(re.findall(keyword.strip(), t, re.I)), relation, frequency
    ),
    "keywords:letter_frequency": lambda t, letter, let_frequency, let_relation: related(
        t.lower().count(letter.lower()), let_relation, let_frequency
    ),
    "language:response_language": lambda t, language: language_is(t, language),
    "length_constraints:number_words": lambda t, relation, num_words: related(
        len(re.findall(r"\w+", t)), relation, num_words
    ),
    "length_constraints:number_paragraphs": lambda t, num_paragraphs: has_pieces(
        t, r"\s?\*\*\*\s?", num_paragraphs
    ),
    "length_constraints:nth_paragraph_first_word": first_word,
    "detectable_content:number_placeholders": lambda t, num_placeholders: (
        len(re.findall(r"\[.*?\]", t)) >= num_placeholders
    ),
    "detectable_content:postscript": postscript,
    "detectable_format:number_bullet_lists": lambda t, num_bullets: (
        len(re.findall(r"^\s*\*[^*].*$", t, re.M)) + len(re.findall(r"^\s*-.*$", t, re.M))
        == num_bullets
    ),
    "detectable_format:number_highlighted_sections": lambda t, num_highlights: (
        highlights(t) >= num_highlights
    ),
    "detectable_format:multiple_sections": lambda t, section_spliter, num_sections: (
        len(re.split(rf"\s?{section_spliter.strip()}\s?\d+\s?", t)) - 1 >= num_sections
    ),
    "detectable_format:constrained_response": lambda t: re.search(
        r"My answer is (yes|no|maybe)\.", t
    ),
    "detectable_format:title": lambda t: any(
        m.lstrip("<").rstrip(">").strip() for m in re.findall(r"<<[^\n]+>>", t)
    ),
    "detectable_format:json_format": is_json,
    "combination:two_responses": two_responses,
    "combination:repeat_prompt": lambda t, prompt_to_repeat: (
        t.strip().lower().find(prompt_to_repeat.strip().lower()) == 0
    ),
    "startend:end_checker": lambda t, end_phrase: (
        t.strip().strip('"').lower().endswith(end_phrase.strip().lower())
    ),
    "startend:quotation": lambda t: re.fullmatch(r'"(.*)"', t.strip(), re.DOTALL),
    "change_case:english_capital": lambda t: t.isupper() and language_is(t, "en"),
    "change_case:english_lowercase": lambda t: t.islower() and language_is(t, "en"),
    "punctuation:no_comma": lambda t: re.search(",", t) is None,
}


def is_met(text, constraint):
    arguments = {k: v for k, v in constraint.items() if k != "id"}
    return bool(text.strip()) and bool(SEMANTICS[constraint["id"]](text, **arguments))


def is_met_loosely(text, constraint):
    lines = text.split("\n")
    forms = [text] + ["\n".join(kept).strip() for kept in (lines[1:], lines[:-1], lines[1:-1])]
    return any(is_met(form, constraint) for f in forms for form in (f, f.replace("*", "")))
