"""Mathematical equality: official, and with the quirks of the grader that the paper used."""

import time

import pytest

from cptjax.scorers import find, score, summarise, symbolic
from cptjax.verify import Pool


@pytest.fixture(scope="module")
def pool():
    with Pool(processes=1, timeout=20.0) as workers:
        yield workers


@pytest.mark.parametrize(
    ("said", "gold"),
    [
        ("0.5", r"\frac{1}{2}"), (r"\frac12", "1/2"), (r"\sqrt{12}", r"2\sqrt{3}"), ("50", r"50^\circ"), ("1,234", "1234"), ("x+1", "1+x"),
        (r"\frac { 28 } { 5 }", "5.6"), (r"2 \sqrt { 221 }", r"2\sqrt{221}"), (r"18 \sqrt { 2 }", r"\sqrt{648}"), ("x=5", "5"),
        ("12 cm", "12"), ("58", "58.0"), ("Blue.", "blue"), ("(1, 2)", "(1,2)"), (r"\dfrac{9}{2}", "4.5"), ("5:4", "5:4"),
    ],
)  # fmt: skip
def test_math_equal(said, gold):
    assert symbolic.equal(said, gold)


@pytest.mark.parametrize(
    ("said", "gold"),
    [
        ("on", "no"), ("football", "ball"), ("sunday", "sun"), ("two", "2"), ("6", "5"), ("(1,2)", "(2,1)"), ("29.73", r"2\sqrt{221}"),
        ("", "5"), ("blue", "red"), ("15.7", r"5\pi"),
    ],
)  # fmt: skip
def test_math_different(said, gold):
    assert not symbolic.equal(said, gold)


@pytest.mark.parametrize(
    ("said", "gold", "same"),
    [
        ("on", "no", True), ("wow", "oww", True), ("football", "ball", True), ("sunday", "sun", True), (".5", "1/2", True),
        ("50%", "50", True), ("5 cm^2", "5", True), ("Yes", "yes", True), ("3 or 4", "3,4", True), ("None", "none", True),
        ("1 million", "10^6", True), ("3 1/2", "7/2", True), (r"\frac{\sqrt{3}}{2}", r"\sqrt{3}/2", True), ("(1, 2)", "(1,2)", True),
        ("A.", "A", False), ("two", "2", False), ("blue.", "blue", False), ("the cat", "cat", False), ("2/4", "1/2", False),
        ("4/2", "2", False), ("[1,2)", "(1,2)", False), ("bule", "blue", False),
    ],
)  # fmt: skip
def test_mathruler_quirks(said, gold, same):
    assert symbolic.lenient(said, gold) == same


def test_missing_box_matches_a_gold_none_only_under_mathruler_parity(pool):
    for name, expected in ("mathruler_parity", 1.0), ("exact_match", 0.0):
        records = score(find(name), ["no box"], ["None"], [{}], extraction="boxed", pool=pool)
        assert records[0].score == expected and records[0].prediction is None


def test_on_is_no_only_under_mathruler_parity(pool):
    scores = {name: score(find(name), ["on"], ["no"], [{}], pool=pool)[0].score for name in ("mathruler_parity", "math", "exact_match")}
    assert scores == {"mathruler_parity": 1.0, "math": 0.0, "exact_match": 0.0}


@pytest.mark.parametrize(("name", "bomb"), [("mathruler_parity", "99999999!"), ("math", r"\binom{99999999}{4999999}")])
def test_a_hang_in_symbolic_algebra_scores_zero_and_is_reported(name, bomb):
    scorer = find(name)
    with Pool(processes=1, timeout=1.5) as workers:
        records = score(scorer, [bomb, "5"], ["x", "5.0"], [{}] * 2, pool=workers)
    assert [r.score for r in records] == [0.0, 1.0]
    assert "no answer within 1.5 s" in records[0].error and not records[1].error
    assert summarise(scorer, records)["error"] == 0.5


def test_degenerate_answers_take_no_time():
    start = time.perf_counter()
    assert not symbolic.equal("(" * 3000, "x") and not symbolic.equal(r"\frac{" * 2000, "x")
    assert time.perf_counter() - start < 0.5


def test_equal_pairs_are_compared_once(pool):
    scorer, calls = find("math"), []
    counting = Pool(processes=1)
    counting.map = lambda target, batch: calls.extend(batch) or pool.map(target, batch)
    records = score(scorer, ["1/2", "0.5", "1/2", "3"], ["0.5"] * 4, [{}] * 4, pool=counting)
    assert [r.score for r in records] == [1.0, 1.0, 1.0, 0.0] and len(calls) == 3
