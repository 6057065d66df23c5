"""A second statement of the RLVR-IFeval checks, as plain as possible, for comparison in the tests.

Each function takes the text and the keyword arguments of a row; whatever raises counts as not met.
"""

import json
import re

from langdetect import detect

BY_QUANTIFIER = {
    "at least": lambda count, n, slack: count >= n,
    "at most": lambda count, n, slack: count <= n,
    "around": lambda count, n, slack: n - slack <= count <= n + slack,
}


def quantified(count, quantifier, n, slack):
    return quantifier in BY_QUANTIFIER and BY_QUANTIFIER[quantifier](count, n, slack)


def paragraph_count(text, N, **_):
    stripped = "\n".join(line.strip() for line in text.splitlines()).strip()
    parts = stripped.split("* * *")
    return "" not in [part.strip() for part in parts] and len(parts) == N


def sentence_count(text, N, quantifier, **_):
    breaks = [
        i
        for i in range(1, len(text))
        if text[i].isspace()
        and text[i - 1] in ".?"
        and not re.search(r"\w\.\w.\Z", text[:i], re.DOTALL)
        and not re.search(r"[A-Z][a-z]\.\Z", text[:i])
    ]
    return quantified(len(breaks) + 1, quantifier, N, 1)


def first_word_of_paragraph(text, N, first_word, i, **_):
    parts = re.split("\n\n", text)
    return len(parts) == N and re.match(re.escape(first_word), parts[i - 1].strip()) is not None


def postscript(text, postscript_marker, **_):
    if postscript_marker not in text:
        return False
    return len(text[text.index(postscript_marker) :].strip()) > len(postscript_marker)


def sections(text, N, section_splitter, **_):
    parts = text.split(section_splitter)
    return len(parts[1:] if parts[0] == "" else parts) == N


def two_responses(text, **_):
    parts = text.split("******")
    return len(parts) == 2 and parts[0].strip() != parts[1].strip()


def letter_frequency(text, letter, N, **_):
    assert len(letter) == 1
    return sum(character == letter for character in text) == N


SEMANTICS = {
    "verify_keywords": lambda t, keyword_list, **_: all(
        t.lower().count(k.lower()) or k == "" for k in keyword_list
    ),
    "verify_keyword_frequency": lambda t, word, N, **_: (
        [w == word.lower() for w in [word, *re.findall(r"\b\w+\b", t.lower())]][1:].count(True) == N
    ),
    "validate_forbidden_words": lambda t, forbidden_words, **_: (
        [w for w in forbidden_words if w.lower() in t.lower()] == []
    ),
    "verify_letter_frequency": letter_frequency,
    "validate_response_language": lambda t, language, **_: detect(t) == language,
    "verify_paragraph_count": paragraph_count,
    "validate_word_constraint": lambda t, N, quantifier, **_: quantified(
        len(t.split()), quantifier, N, max(1, round(N / 10))
    ),
    "verify_sentence_constraint": sentence_count,
    "validate_paragraphs": first_word_of_paragraph,
    "verify_postscript": postscript,
    "validate_placeholders": lambda t, N, **_: len(re.findall(r"\[.*?\]", t)) >= N,
    "verify_bullet_points": lambda t, N, **_: (
        len([line for line in t.split("\n") if line.strip()[:1] in ("*", "-")]) == N
    ),
    "validate_title": lambda t, **_: re.search("<<.*>>", t) is not None,
    "validate_choice": lambda t, options, **_: True in [t in option for option in options],
    "validate_highlighted_sections": lambda t, N, **_: len(re.findall(r"\*.*?\*", t)) >= N,
    "validate_sections": sections,
    "validate_json_format": lambda t, **_: json.loads(t) is not NotImplemented,
    "validate_repeat_prompt": lambda t, original_prompt, **_: (
        t[: len(original_prompt)] == original_prompt
    ),
    "validate_two_responses": two_responses,
    "validate_uppercase": lambda t, **_: t.upper() == t,
    "validate_lowercase": lambda t, **_: t.lower() == t,
    "validate_frequency_capital_words": lambda t, N, quantifier, **_: quantified(
        len(re.findall(r"\b[A-Z]+\b", t)), quantifier, N, 0
    ),
    "validate_end": lambda t, end_phrase, **_: t.endswith(end_phrase),
    "validate_quotation": lambda t, **_: t[:1] == '"' == t[-1:],
    "validate_no_commas": lambda t, **_: t.count(",") == 0,
}


def is_met(text, constraint):
    arguments = {k: v for k, v in constraint.items() if k != "func_name"}
    try:
        return bool(SEMANTICS[constraint["func_name"]](text, **arguments))
    except Exception:
        return False
