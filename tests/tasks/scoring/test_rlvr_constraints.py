"""The checks of RLVR-IFeval agree with a second statement of the released semantics."""

import random

import pytest
import rlvr_semantics

from cptjax.tasks.scoring import language, rlvr_constraints
from cptjax.tasks.scoring.scorers import find_scorer, score_responses, summarise_records

SCORER = find_scorer("rlvr_ifeval")
AT_LEAST, AROUND, AT_MOST = "at least", "around", "at most"


def counted(n, texts, quantifiers=(AT_LEAST, AROUND, AT_MOST, "exactly")):
    return [({"N": n, "quantifier": q}, text) for q in quantifiers for text in texts]


PROBES = {  # function -> (arguments, response)
    "verify_keywords": [
        ({"keyword_list": ["cat", "Dog"]}, t)
        for t in ("A CAT, a dog.", "concatenate dogs", "a cat", "", "c a t dog")
    ],
    "verify_keyword_frequency": [
        ({"word": "Cat", "N": 2}, t)
        for t in ("cat CAT", "cat cats", "cat, cat!", "cat-cat", "cat_cat cat", "cat cat cat")
    ],
    "validate_forbidden_words": [
        ({"forbidden_words": ["cat"]}, t) for t in ("Concatenate.", "the Cat", "dog", "c-at", "")
    ],
    "verify_letter_frequency": [
        ({"letter": letter, "N": 2}, t)
        for letter, t in (("a", "aA"), ("a", "aAa"), ("A", "bAA"), ("a", "banana"), ("ab", "ab"))
    ],
    "validate_response_language": [
        ({"language": code}, t)
        for code, t in (
            ("en", "This is a plain English sentence about cats."),
            ("fr", "Ceci est une phrase toute simple sur les chats."),
            ("fr", "This is a plain English sentence about cats."),
            ("en", "123"),
            (None, "This is a plain English sentence about cats."),
        )
    ],
    "verify_paragraph_count": [
        ({"N": 2}, t)
        for t in (
            "a\n* * *\nb",
            "a\n***\nb",
            "a * * * b",
            "* * *\na\n* * *\nb",
            "a\n* * *\n  \n",
            "a\n\nb",
            "  a  \n  * * *  \n  b",
        )
    ],
    "validate_word_constraint": [
        *counted(30, [" ".join(["w"] * n) for n in (26, 27, 33, 34)], (AT_LEAST, AROUND, AT_MOST)),
        *counted(3, ["a b", "a  b\nc-d", "a b c d e"]),
    ],
    "verify_sentence_constraint": [
        *counted(2, ["One. Two.", "One. Two. Three. Four.", "One! Two!"]),
        *counted(2, ["Mr. Fox runs.", "It is e.g. red. Yes?", "Pi is 3.5 m? No."], (AT_LEAST,)),
    ],
    "validate_paragraphs": [
        ({"N": 2, "i": i, "first_word": "Hello"}, t)
        for i, t in (
            (1, "Hello you\n\nb"),
            (2, "a\n\n Hello, b"),
            (2, "a\n\nhello b"),
            (2, "a\n\nHelloween"),
            (1, "\n\nHello"),
            (3, "a\n\nHello"),
            (0, "a\n\nHello"),
        )
    ],
    "verify_postscript": [
        ({"postscript_marker": "P.S."}, t)
        for t in ("a P.S. b", "a P.S.", "a P.S. ", "a p.s. b", "a P. S. b", "P.S.x")
    ],
    "validate_placeholders": [
        ({"N": 2}, t) for t in ("[a] [b]", "[a [b] c]", "[] []", "[a\n] [b]", "[[a]]", "[a]")
    ],
    "verify_bullet_points": [
        ({"N": 2}, t) for t in ("* a\n- b", "*a\n  -b", "**a**\n* b", "a\n* b", "* a\n* b\n* c")
    ],
    "validate_title": [({}, t) for t in ("<<a>> b", "<<>>", "<a>", "<< >>", "<<a\n>>", ">><<")],
    "validate_choice": [
        ({"options": ["yes", "no", "maybe so"]}, t)
        for t in ("yes", "maybe", "Yes", "yes.", "My answer is yes.", "", "e")
    ],
    "validate_highlighted_sections": [
        ({"N": 2}, t) for t in ("*a* *b*", "**a**", "** **", "*a\n*b* c", "*a* b", "***a***")
    ],
    "validate_sections": [
        ({"N": 2, "section_splitter": "Section"}, t)
        for t in (
            "Section 1 a Section 2 b",
            "Intro. Section 1 a Section 2 b",
            "Intro. Section 1",
            "SECTION 1 SECTION 2",
            "\nSection 1 a Section 2 b",
        )
    ],
    "validate_json_format": [
        ({}, t)
        for t in ('{"a": 1}', '```json\n{"a": 1}\n```', "1", "{'a': 1}", " [1] ", "[" * 9000)
    ],
    "validate_repeat_prompt": [
        ({"original_prompt": "Say hi"}, t) for t in ("Say hi. Hi", "say hi", " Say hi", "Say hi")
    ],
    "validate_two_responses": [
        ({}, t) for t in ("a******b", "a****** a", "a****** b******c", "a*******b", "******", "ab")
    ],
    "validate_uppercase": [({}, t) for t in ("YES, 2!", "Yes", "12", "ÉTÉ", "")],
    "validate_lowercase": [({}, t) for t in ("yes, 2!", "Yes", "12", "été", "")],
    "validate_frequency_capital_words": counted(
        2, ["AN ICE cream", "I am A U.S. cat", "NASA's X-Y", "A"], (AT_LEAST, AROUND, AT_MOST)
    ),
    "validate_end": [
        ({"end_phrase": "Any questions?"}, t)
        for t in ("So. Any questions?", "so. any questions?", 'Any questions?"', "Any questions? ")
    ],
    "validate_quotation": [({}, t) for t in ('"a"', '"', 'say "a"', ' "a"', "“a”")],
    "validate_no_commas": [({}, t) for t in ("a b", "a, b", "a，b", ",")],
}
CASES = [
    ({"func_name": name, **arguments}, text)
    for name, probes in PROBES.items()
    for arguments, text in probes
]


def test_every_function_has_probes():
    assert set(PROBES) == set(rlvr_constraints.RLVR_CHECKS) == set(rlvr_semantics.SEMANTICS)
    assert len(PROBES) == 25 and len(CASES) >= 131


def test_all_probes_agree_with_the_released_semantics():
    wrong = [
        (constraint, text)
        for constraint, text in CASES
        if SCORER.score(text, constraint) != rlvr_semantics.is_met(text, constraint)
    ]
    assert wrong == []
    # Both outcomes occur for every function.
    met = {
        (constraint["func_name"], rlvr_semantics.is_met(text, constraint))
        for constraint, text in CASES
    }
    assert len(met) == 2 * len(PROBES)


PIECES = (
    ["a", "B", " ", "\n", "\n\n", "*", "* * *", "***", "******", "<<", ">>", "[", "]", "-", '"']
    + [",", ". ", "? ", "!", "P.S.", "Section", "1", "word", "Word", "cat", "Cat", "{", "}", "é"]
    + ["e.g. ", "Mr. ", "yes", "USA", "\t", ""]
)  # fmt: skip
VALUES = {
    "N": (None, 0, 1, 2, 3, 4),
    "quantifier": (None, AT_LEAST, AROUND, AT_MOST, "exactly"),
    "end_phrase": (".", "cat", "yes", "", None),
    "keyword_list": (["cat"], ["cat", "word"], [], None),
    "word": ("cat", "a", "Word", None),
    "forbidden_words": (["cat"], ["B", "x"], [], None),
    "letter": ("a", "B", "ab", None),
    "i": (None, -1, 0, 1, 2, 3),
    "first_word": ("a", "Word", "", None),
    "postscript_marker": ("P.S.", " P.S. ", "", None),
    "options": (["yes", "no"], [], None, "yes/no"),
    "section_splitter": ("Section", "", None),
    "original_prompt": ("word", "", None),
}


def test_random_texts_and_incomplete_arguments_agree_too():
    rng = random.Random(0)
    for name in set(PROBES) - {"validate_response_language"}:
        for _ in range(200):
            text = "".join(rng.choices(PIECES, k=rng.randint(0, 12)))
            row = {k: rng.choice(v) for k, v in VALUES.items() if rng.random() < 0.95}
            constraint = {"func_name": name, **row}
            expected = rlvr_semantics.is_met(text, constraint)
            assert SCORER.score(text, constraint) == expected, (text, constraint)


def test_the_response_is_checked_with_the_space_at_its_ends():
    row = {"func_name": "validate_end", "end_phrase": "end"}
    records = score_responses(SCORER, ["the end", "the end\n", ""], [row] * 3, [{}] * 3)
    assert [r.score for r in records] == [1.0, 0.0, 0.0]
    kinds = [{"constraint_type": kind} for kind in ("End Checker", "No Commas")]
    rows = [row, {"func_name": "validate_no_commas"}]
    metrics = summarise_records(SCORER, score_responses(SCORER, ["a", "b"], rows, kinds))
    assert metrics["kind/End Checker"].value == 0.0 and metrics["kind/No Commas"].value == 1.0


def test_wrong_rows_and_a_missing_package_are_one_line(monkeypatch):
    with pytest.raises(ValueError, match="expected func_name to be one of .*; got 'validate_x'"):
        SCORER.score("a", {"func_name": "validate_x"})
    monkeypatch.setattr(language.importlib.util, "find_spec", lambda name: None)
    language._load_detector.cache_clear()
    language.detect_language.cache_clear()
    with pytest.raises(ValueError, match=r"langdetect, which is not installed; run pip install"):
        SCORER.score("a b", {"func_name": "validate_response_language", "language": "en"})
    language._load_detector.cache_clear()
