"""Each IFEval-style constraint with a response that meets it and one that does not."""

import ifeval_semantics
import pytest

from cptjax.tasks.scoring import english_tokens, instructions
from cptjax.tasks.scoring.scorers import find_scorer, score_responses, summarise_records

FOLLOWED = {  # constraint: (arguments, a response that meets it, one that does not)
    "keywords:existence": ({"keywords": ["cat", "Dog"]}, "A Cat, a dog.", "A cat."),
    "keywords:forbidden_words": ({"forbidden_words": ["cat"]}, "Concatenate.", "The Cat."),
    "keywords:frequency": (
        {"keyword": "cat", "frequency": 2, "relation": "at least"},
        "Cat cat",
        "cat",
    ),
    "keywords:letter_frequency": (
        {"letter": "a", "let_frequency": 2, "let_relation": "less than"},
        "bAb",
        "Banana",
    ),
    "length_constraints:number_words": (
        {"relation": "less than", "num_words": 3},
        "two words",
        "now three words",
    ),
    "length_constraints:number_sentences": (
        {"relation": "at least", "num_sentences": 2},
        "It is 3.5 m. Really!",
        "It is 3.5 m.",
    ),
    "length_constraints:number_paragraphs": ({"num_paragraphs": 2}, "a\n***\nb", "a\n***\n***\nb"),
    "length_constraints:nth_paragraph_first_word": (
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "hello"},
        'a\n\n"Hello, you',
        "hello\n\nb",
    ),
    "detectable_content:number_placeholders": ({"num_placeholders": 2}, "[a] and [b]", "[a]"),
    "detectable_content:postscript": (
        {"postscript_marker": "P.P.S"},
        "text\nP. P.S. more",
        "text\nP.S. more",
    ),
    "detectable_format:number_bullet_lists": ({"num_bullets": 2}, "* a\n- b", "* a\n* b\n* c"),
    "detectable_format:number_highlighted_sections": (
        {"num_highlights": 2},
        "*a* and **b**",
        "*a* and ** **",
    ),
    "detectable_format:multiple_sections": (
        {"section_spliter": "SECTION", "num_sections": 2},
        "SECTION 1 a SECTION 2 b",
        "SECTION 1 a",
    ),
    "detectable_format:constrained_response": ({}, "My answer is maybe.", "maybe"),
    "detectable_format:title": ({}, "<<Joy>>\ntext", "<< >>\n<Joy>"),
    "detectable_format:json_format": ({}, '```json\n{"a": 1}\n```', "{'a': 1}"),
    "combination:two_responses": ({}, "a******b", "a******a"),
    "combination:repeat_prompt": ({"prompt_to_repeat": "Say hi"}, "say hi. Hi!", "Hi! Say hi"),
    "startend:end_checker": (
        {"end_phrase": "Any other questions?"},
        "Yes. any other questions?",
        "Any other questions? No.",
    ),
    "startend:quotation": ({}, '"yes"', '"'),
    "change_case:english_capital": ({}, "THIS IS A PLAIN SENTENCE.", "This is a plain sentence."),
    "change_case:english_lowercase": ({}, "this is a plain sentence.", "ceci est une phrase."),
    "language:response_language": (
        {"language": "fr"},
        "Ceci est une phrase toute simple.",
        "This is a plain sentence.",
    ),
    "change_case:capital_word_frequency": (
        {"capital_relation": "at least", "capital_frequency": 2},
        "AN ICE cream",
        "An ICE cream",
    ),
    "punctuation:no_comma": ({}, "a b", "a, b"),
}


def test_every_constraint_has_a_pair():
    assert set(FOLLOWED) == set(instructions.CONSTRAINT_CHECKS)


@pytest.mark.parametrize("name", FOLLOWED)
def test_constraint(name):
    arguments, good, bad = FOLLOWED[name]
    assert instructions.follows_constraint(good, {"id": name, **arguments})
    assert not instructions.follows_constraint(bad, {"id": name, **arguments})
    assert not instructions.follows_constraint(" ", {"id": name, **arguments})


TEXTS = (  # with each constraint below
    "A Cat and a dog.",
    "concatenate",
    "THE CAT SAT, AND THE DOG TOO.",
    "the cat sat and the dog too.",
    "ceci est une phrase toute simple sur les chats",
    "a\n\n\n\nCat, you",
    "cat a\n\n'cat' b",
    "a\n***\nb",
    "***\na\n***\n***\nb",
    "one ****** two ******",
    "a******a",
    "* a\n- b\n\n  * c",
    "*\n* a",
    "** **\n*a* and **b**",
    "<<a> >>\n<< >>",
    "<<>>",
    "[a] [b\n] [[c]]",
    "text p. s. cat",
    "P.P.S. me",
    "Section 1 a Section2 b SECTION 3",
    "My answer is yes. Or no.",
    '```JSON\n{"a": 1}\n```',
    '"cat."',
    '"',
    "12 ! 3",
)
CONSTRAINTS = (
    {"id": "keywords:existence", "keywords": ["cat", "d.g"]},
    {"id": "keywords:forbidden_words", "forbidden_words": ["cat", "b+"]},
    {"id": "keywords:frequency", "keyword": " a", "frequency": 2, "relation": "at least"},
    {"id": "keywords:letter_frequency", "letter": "A", "let_frequency": 3, "let_relation": "less than"},
    {"id": "language:response_language", "language": "fr"},
    {"id": "length_constraints:number_words", "num_words": 3, "relation": "at least"},
    {"id": "length_constraints:number_paragraphs", "num_paragraphs": 2},
    {"id": "length_constraints:nth_paragraph_first_word", "num_paragraphs": 2, "nth_paragraph": 2, "first_word": "CAT"},
    {"id": "length_constraints:nth_paragraph_first_word", "num_paragraphs": 2, "nth_paragraph": 1, "first_word": "a"},
    {"id": "detectable_content:number_placeholders", "num_placeholders": 2},
    {"id": "detectable_content:postscript", "postscript_marker": "P.S."},
    {"id": "detectable_content:postscript", "postscript_marker": "P.P.S"},
    {"id": "detectable_content:postscript", "postscript_marker": "P.P.S."},
    {"id": "detectable_format:number_bullet_lists", "num_bullets": 3},
    {"id": "detectable_format:number_bullet_lists", "num_bullets": 1},
    {"id": "detectable_format:number_highlighted_sections", "num_highlights": 2},
    {"id": "detectable_format:multiple_sections", "section_spliter": "Section", "num_sections": 2},
    {"id": "detectable_format:constrained_response"},
    {"id": "detectable_format:title"},
    {"id": "detectable_format:json_format"},
    {"id": "combination:two_responses"},
    {"id": "combination:repeat_prompt", "prompt_to_repeat": "A cat "},
    {"id": "startend:end_checker", "end_phrase": "CAT."},
    {"id": "startend:quotation"},
    {"id": "change_case:english_capital"},
    {"id": "change_case:english_lowercase"},
    {"id": "punctuation:no_comma"},
)  # fmt: skip


def test_all_checks_agree_with_a_second_statement_of_the_original():
    cases = [(constraint, text) for constraint in CONSTRAINTS for text in TEXTS]
    assert len(cases) >= 146
    for constraint, text in cases:
        strict = instructions.follows_constraint(text, constraint)
        assert strict == ifeval_semantics.is_met(text, constraint), (constraint, text)
        loose = instructions.follows_loosely(text, constraint)
        assert loose == ifeval_semantics.is_met_loosely(text, constraint), (constraint, text)


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("It is 3.5 m. Really! Is it? Yes", 4),
        ("Mr. Smith met Dr. Fox at 5 p.m. on Jan. 3.", 1),
        ("He lives in the U.S. He likes it.", 2),
        ("J. Smith came. E.g. this one, i.e. that one.", 2),
        ("Wait... what? Wait... The end.", 3),
        ('He said "Go." Then he left. (Really!)', 3),
        ("Stop!!! Now", 2),
        ("no end", 1),
        ("What?! No!!", 3),  # punkt's quirk: a last mark of several is a sentence of its own
        ('Done.** Next* "', 2),
        ("1. apples 2. pears", 1),
        (" \n", 0),
    ],
)
def test_sentences_are_those_of_punkt(text, sentences):
    assert english_tokens.count_sentences(text) == sentences


@pytest.mark.parametrize(
    ("text", "capitals"),
    [
        ("NASA's X-RAY and A", 3),
        ("I'M (OK), *YES* AT&T", 6),
        ("CANNOT DON'T", 4),
        ("U.S.A. and COVID-19; 3 a", 2),
        ("USA,CAN B2", 3),
    ],
)
def test_capital_words_are_those_of_treebank(text, capitals):
    assert sum(word.isupper() for word in english_tokens.treebank_words(text)) == capitals


def test_loose_scores_are_reported_beside_the_strict_ones():
    scorer = find_scorer("ifeval")
    answer = [{"id": "startend:end_checker", "end_phrase": "end"}, {"id": "punctuation:no_comma"}]
    records = score_responses(scorer, ["the end\nBye", "a, the end"], [answer] * 2, [{}] * 2)
    metrics = summarise_records(scorer, records)
    assert metrics["accuracy"].value == 0.0 and metrics["loose"].value == 0.5
    assert metrics["instruction_level"].value == 0.5
    assert metrics["loose_instruction_level"].value == 0.75


def test_a_keyword_that_is_no_pattern_is_named():
    with pytest.raises(ValueError, match=r"keywords:existence: .*unterminated"):
        instructions.follows_constraint("a", {"id": "keywords:existence", "keywords": ["[a"]})


def test_endless_open_brackets_are_not_json():
    assert not instructions.follows_constraint("[" * 3000, {"id": "detectable_format:json_format"})


def test_ifeval_is_strict_per_prompt_and_reports_per_instruction():
    scorer = find_scorer("ifeval")
    answer = instructions.make_constraints(
        ["punctuation:no_comma", "keywords:existence"], [{"keywords": None}, {"keywords": ["x"]}]
    )
    assert answer == [
        {"id": "punctuation:no_comma"},
        {"id": "keywords:existence", "keywords": ["x"]},
    ]
    metrics = summarise_records(
        scorer, score_responses(scorer, ["x", "x, y"], [answer] * 2, [{}] * 2, extraction="boxed")
    )
    assert (metrics["accuracy"].value, metrics["extraction_failure"].value) == (0.5, 0.0)
    assert metrics["instruction_level"][:2] == (0.75, 2)  # 3 of 4 constraints, of 2 responses


def test_constraint_errors_name_the_constraint():
    with pytest.raises(ValueError, match="unknown constraint 'no_comma'"):
        instructions.follows_constraint("x", {"id": "no_comma"})
    with pytest.raises(
        ValueError, match="row r7: constraint keywords:existence has the wrong arguments"
    ):
        score_responses(
            find_scorer("ifeval"), ["x"], [[{"id": "keywords:existence"}]], [{}], ["r7"]
        )
