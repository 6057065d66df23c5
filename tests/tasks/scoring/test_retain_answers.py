"""Paper C's readings of MMLU, MATH and Countdown, against plain statements of the released rules."""

import random
import re

import pytest

from cptjax.tasks.scoring import retain_answers
from cptjax.tasks.scoring.scorers import find_scorer


def released_option(text):
    match = re.search(
        r"\bThe(.*)answer is(?: option)?:?\s*(\w+)", text.replace("*", ""), re.IGNORECASE
    )
    return match and match[2].upper()


MMLU_ANSWERS = (
    "The answer is: B",
    "The answer is B.",
    "The answer is (B)",
    "The answer is option C",
    "The answer is option: C",
    "**The correct answer is: D**",
    "the answer is b",
    "Therefore, the best answer is A, not B",
    "The answer is A. No, the answer is B",
    "The answer is A.\nThe answer is B",
    "The answer is:\nC",
    "answer is B",
    "Then my answer is B",
    "B",
    "The answer is option",
    "The answer is 42",
    "",
    "Theanswer is B",
    "In the end\nthe answer is C",
)


def test_mmlu_takes_the_word_of_the_released_pattern():
    assert len(MMLU_ANSWERS) >= 19
    for text in MMLU_ANSWERS:
        assert retain_answers.parse_retain_mmlu(text) == released_option(text), text
    rng = random.Random(0)
    pieces = ["The ", "the", "answer is", " option", ":", " ", "B", "(C)", "\n", "*", "Therefore, "]
    for _ in range(2000):
        text = "".join(rng.choices(pieces, k=rng.randint(0, 9)))
        assert retain_answers.parse_retain_mmlu(text) == released_option(text), text
    scorer = find_scorer("retain_mmlu")
    assert scorer.score("The answer is: B", "B") == 1.0 == 1 - scorer.score("The answer is A", "B")


@pytest.mark.parametrize(
    ("said", "solution", "right"),
    [
        ("So \\boxed{\\frac12}", "is \\boxed{\\dfrac{1}{2}}.", 1),
        ("\\boxed{1} or \\boxed{1{,}000\\text{ cm}}", "\\boxed{1000}", 1),
        ("it is $x = 5$", "\\boxed{5}", 1),
        ("it is 5 or 6", "\\boxed{6}", 1),
        ("5", "\\boxed{5.0}", 0),  # equality of text, not of numbers
        ("\\boxed{\\left(3, 4\\right)}", "\\boxed{(3,4)}", 1),
        ("\\boxed{a \\text{ and } b}", "\\boxed{b}", 0),
        ("\\boxed{{{2}}}", "\\boxed{2}", 1),  # three levels are no box, so the last number counts
        ("\\boxed{90^\\circ}", "\\boxed{90}", 1),
        ("\\boxed{\\sqrt2}", "\\boxed{\\sqrt{2}}", 1),
        ("\\boxed{3", "\\boxed{3}", 1),
        ("", "\\boxed{3}", 0),
        ("\\boxed{x \\in [1,2]}", "\\boxed{[1,2]}", 0),
    ],
)
def test_math_compares_normalised_text(said, solution, right):
    assert find_scorer("retain_math").score(said, f"Thus {solution}") == right


def test_math_accepts_an_answer_in_place_of_a_solution():
    assert find_scorer("retain_math").score("\\boxed{\\frac{1}{2}}", "\\dfrac{1}{2}") == 1.0


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ("\\boxed{(25 - 1) * 3 / 2}", 1),
        ("(25 - 1) * 3 / 2", 1),  # no box is needed
        ("\\boxed{1+1} and \\boxed{ (25-1)*3//2 }", 1),  # // divides exactly too
        ("So (25 - 1) * 3 / 2", 0),
        ("\\boxed{(25 - 1) \\times 3 \\div 2}", 0),
        ("\\boxed{(25 - 1) · 3 / 2}", 0),
        ("\\boxed{(25 - True) * 3 / 2}", 1),  # Python's True is the number 1
        ("\\boxed{(25 - 1) * 3 / 2 = 36}", 0),
        ("\\boxed{25 + 25/2*1}", 0),
        ("\\boxed{36}", 0),
        ("\\boxed{(25 - 1) * 3.0 / 2}", 0),
        ("\\boxed{-(1 - 25) * 3 / 2}", 0),
        ("\\boxed{25 / (1 - 3 + 2)}", 0),
        ("(25-1)*3/2 # thirty-six", 1),
        ("2 ** 25", 0),
        ("\x00", 0),
        ("", 0),
    ],
)
def test_countdown(said, right):
    assert find_scorer("retain_countdown").score(said, 36, {"nums": [1, 2, 3, 25]}) == right


def test_countdown_targets_are_0_to_99():
    score = find_scorer("retain_countdown").score
    assert score("50 * 3", 150, {"nums": [50, 3]}) == 0.0
    assert score("33 * 3", 99, {"x": [3, 33]}) == score("3 - 3", 0, {"nums": [3, 3]}) == 1.0
    assert score("1 - 3", -2, {"nums": [1, 3]}) == 0.0
    with pytest.raises(ValueError, match="expected the column `nums`"):
        score("1", 1, {})
