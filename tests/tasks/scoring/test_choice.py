"""Golden vectors of the rules for multiple choice."""

import random
import re

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
    assert choice.score_mcq_letter("C", "2") == choice.score_mcq_letter("A", 0) == 1.0
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


def official_mmlu_pro(text):
    """Extract as the three patterns of MMLU-Pro's code do, one after the other."""
    for pattern in (r"answer is \(?([A-J])\)?", r".*[aA]nswer:\s*([A-J])"):
        if match := re.search(pattern, text):
            return match[1]
    match = re.search(r"\b[A-J]\b(?!.*\b[A-J]\b)", text, re.DOTALL)
    return match and match[0]


MMLU_PRO_ANSWERS = (
    "The answer is (C). Not B",
    "Answer: A is tempting, but Answer: B",
    "Answer: Apple",
    "Answer:\n\nC",
    "Answer: A\nAnswer: B",
    "answer: (D)",
    "answer is Apple",
    "A and B are wrong.\nAnswer: D",
    "I think J",
    "Answer: Answer: B",
    "no letter",
    "The answer is: B",
    "It is K or B.",
    "",
)


def test_mmlu_pro_equals_the_official_extraction():
    rng = random.Random(0)
    pieces = ["answer is ", "(", "A", "B", "Answer:", " ", "answer:", "\n", "Apple", "J", "I ", "."]
    texts = ["".join(rng.choices(pieces, k=rng.randint(0, 9))) for _ in range(2000)]
    for text in (*MMLU_PRO_ANSWERS, *texts):
        assert choice.find_mmlu_pro_letter(text) == official_mmlu_pro(text), text


@pytest.mark.parametrize(
    ("said", "strict", "lenient"),
    [
        ("B", 1, 1),
        ("b", 1, 1),
        ("B. cat", 1, 1),
        ("B.", 1, 1),
        (" B ", 1, 1),
        ("(B)", 0, 1),
        ("The answer is B.", 0, 1),
        ("B) x", 0, 1),
        ("b.", 0, 1),
        ("**B**", 0, 1),
        ("Answer: B", 0, 1),
        ("A. B", 0, 0),
        ("Banana", 0, 0),
        ("", 0, 0),
    ],
)
def test_scienceqa_strict_beside_lenient(said, strict, lenient):
    assert choice.score_scienceqa_strict(said, "B") == strict
    assert choice.score_mcq_letter(said, "B") == lenient


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ("B", 1),
        ("b: dog", 1),
        ("(B) dog", 1),
        ("Option B", 1),
        ("The answer is B.", 1),
        ("Bird", 1),  # a quirk of the official rule
        ("A", 0),
        ("I choose B", 0),
        ("", 0),
    ],
)
def test_mmstar(said, right):
    assert choice.score_mmstar(said, "B") == right


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
