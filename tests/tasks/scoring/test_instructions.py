"""Each IFEval-style constraint with a response that meets it and one that does not."""

import pytest

from cptjax.tasks.scoring import instructions
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
    "change_case:english_capital": ({}, "YES, 2!", "Yes"),
    "change_case:english_lowercase": ({}, "yes, 2!", "Yes"),
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
