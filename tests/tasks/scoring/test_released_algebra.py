"""The rules of MRCL and of MLLM-CTBench's reward, called without a worker."""

import pytest

from cptjax.tasks.scoring import released_algebra as algebra


@pytest.mark.parametrize(
    ("prediction", "gold", "score"),
    [
        ("b", "B", 1),
        ("A", "B", 0),
        ("Yes", "yes", 1),
        ("No", "on", 0),
        ("0.5", "$\\frac{1}{2}$", 1),
        ("y = 2x+1", "$y=2x+1$", 1),
        ("f(x) = x^2", "$x^2$", 1),
        ("II", "Second", 1),
        ("x; 3", "x;4", 0.5),
        ("3; x", "x; 3", 0),  # each part in its place
        ("x", "x; 3", 0.5),
        ("R, R,U", "R,R,U", 1),
        ("1" * 1000, "1", 0),
        ("", "1", 0),
    ],
)
def test_mrcl_counts_the_right_parts(prediction, gold, score):
    assert algebra.score_mrcl(prediction, [gold]) == score


@pytest.mark.parametrize(
    ("prediction", "gold", "tolerance", "score"),
    [
        ("C, A", "A,C", None, 1),
        ("A", "A,C", None, 0.5),
        ("A,B", "A,C", None, 0),
        ("A,B,C", "A,C", None, 0),
        ("", "A,C", None, 0),
        ("B", "B", None, 1),
        ("10.1", "10", 0.2, 1),
        ("10.3", "10", 0.2, 0),
        ("10.1", "10", None, 0),
        ("ten", "10", 0.2, 0),
    ],
)
def test_finmme_has_sets_of_options_and_numbers_with_a_tolerance(
    prediction, gold, tolerance, score
):
    assert algebra.score_finmme(prediction, [gold], tolerance) == score


SOLUTION = "<think> a thought </think><answer> %s </answer>"


@pytest.mark.parametrize(
    ("completion", "solution", "reward"),
    [
        (SOLUTION % "B", SOLUTION % "B", 1),
        (SOLUTION % "Cat", SOLUTION % "cat", 1),
        (SOLUTION % "dog", SOLUTION % "cat", 0),
        (SOLUTION % "$\\frac{2}{4}$", SOLUTION % "$\\frac{1}{2}$", 1),
        (SOLUTION % "ab+cd", SOLUTION % "ab+ce", 1 - 1 / 5),  # one edit of five signs
        (SOLUTION % "the red cat", SOLUTION % "a red cat", 2 / 3),  # ROUGE-L
        (SOLUTION % "?", SOLUTION % "a red cat", 0),
        ("It is (C)", "C", 1),
        ("It is (c)", "C", 0),
    ],
)
def test_ctbench_rewards_equality_or_similarity(completion, solution, reward):
    assert algebra.reward_ctbench(completion, [], solution) == pytest.approx(reward)
