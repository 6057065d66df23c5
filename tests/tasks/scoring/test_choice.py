"""Golden vectors of the rules for multiple choice."""

import pytest

from cptjax.tasks.scoring import choice
from cptjax.tasks.scoring.scorers import (
    summarise_records,
)


def values(scorer, records):
    return {name: metric.value for name, metric in summarise_records(scorer, records).items()}


def test_mcq_letter_reads_index_and_letter():
    assert (
        choice.score_mcq_letter("(C)", 2)
        == choice.score_mcq_letter("c", "C")
        == choice.score_mcq_letter("The answer is C.", "(C)")
        == 1.0
    )
    assert choice.score_mcq_letter("C", 1) == 0.0 and choice.score_mcq_letter("Cat", "C") == 0.0
    assert (
        choice.score_mcq_letter("The answer is B, since A is red.", "B")
        == choice.score_mcq_letter("The answer is B because it is", "B")
        == 1.0
    )


@pytest.mark.parametrize(
    ("said", "letter"),
    [
        ("Between (A) and (C) I choose (C)", "C"),
        ("(B) since A is wrong", "B"),
        ("D", "D"),
        ("It must be B.", "B"),
        ("A picture shows this", "A"),  # the article: an official quirk
        ("I believe it shows the dog and cat", "A"),
        ("I think", None),
    ],
)
def test_mmmu_choice(said, letter):
    assert choice.parse_mmmu_choice(said, ["cat", "dog", "blue", "12"]) == letter


@pytest.mark.parametrize(
    ("said", "gold", "right"),
    [
        ("Therefore the answer is 0.5", "0.5", True),
        ("The answer is hepatitis", "hepatitis", True),
        ("The answer is 0.9", "0.5", False),
        ("It costs $1,200.", "1200", True),
        ("x = 0.333", "0.33", True),
        (
            "so it is chronic hepatitis B",
            "hepatitis",
            False,
        ),  # the official parser cuts after the "is " of hepatitis
        ("it shows hepatitis", "hepatitis", True),
        ("the result is 24/7", "['24/7', '3.43']", True),
        ("3.4286", "['24/7', '3.43']", True),
        ("", "5", False),
    ],
)
def test_mmmu_open_question(said, gold, right):
    assert choice.score_mmmu(said, gold, {"question_type": "open"}) == float(right)


def test_mmmu_disciplines_cover_the_thirty_subjects():
    subjects = [s for names in choice.MMMU_DISCIPLINES.values() for s in names.split()]
    assert len(subjects) == len(set(subjects)) == 30
    assert choice.mmmu_discipline({"id": "validation_Art_Theory_12"}) == "art_and_design"


@pytest.mark.parametrize(
    ("said", "letter"),
    [
        ("The answer is (C). Not B", "C"),
        ("answer is J", "J"),
        ("A and B are wrong.\nAnswer: D", "D"),
        ("first A\nthen perhaps F, who knows", "F"),
        ("nothing", None),
    ],
)
def test_mmlu_pro_letter(said, letter):
    assert choice.find_mmlu_pro_letter(said) == letter
