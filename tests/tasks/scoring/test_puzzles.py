"""Numbers, boxes, Countdown and the jigsaw."""

import itertools

import pytest

from cptjax.tasks.scoring import puzzles


@pytest.mark.parametrize(
    ("said", "value"),
    [
        ("1,234", 1234),
        ("-.5", -0.5),
        ("3e2", 300),
        ("50%", 50),
        ("$3.", 3),
        ("1/2", 0.5),
        ("3 cm", 3),
        ("1/0", None),
        ("2 or 3", None),
        ("\N{MINUS SIGN}5", -5),
        ("-$5", -5),
        (r"-\$1,200", -1200),
        ("$-5$", -5),
        ("- 5", -5),
        ("x = - 5", -5),
        ("Room-5", 5),
        ("x-5", 5),
        ("5-6", None),
        ("12 cm^2", 12),
        ("12 m2", 12),
        (r"14 \text{ cm}^2", 14),
        ("9.8 m/s^2", 9.8),
        (r"50\%", 50),
        ("1/2 cup", 0.5),
        (r"\frac{1}{2}", 0.5),
        (r"is -\dfrac{1}{2}", -0.5),
        ("1 1/2", 1.5),
        (r"-1\frac{1}{2}", -1.5),
        (r"3 \times 10^5", 300_000),
        ("3 x 10^{-2}", 0.03),
        ("10^3", 1000),
        ("10^9999", None),
        ("0^-1", None),
        ("3x^2", None),
        ("2x2", None),
        ("x", None),
    ],
)
def test_number(said, value):
    assert puzzles.parse_number(said) == value


def test_numeric_tolerance():
    for empty in (None, ""):
        assert puzzles.score_numeric("5.1", "5", {"tolerance": empty}) == 0.0
        assert puzzles.score_numeric("5", "5", {"tolerance": empty}) == 1.0
    assert puzzles.score_numeric("3.14", "3.14159") == 0.0
    assert puzzles.score_numeric("3.14", "3.14159", {"tolerance": 0.01}) == 1.0
    with pytest.raises(ValueError, match="expected a number as the answer, got 'blue'"):
        puzzles.score_numeric("1", "blue")


@pytest.mark.parametrize(
    "said",
    [
        "[10, 10, 30, 30]",
        "(10,10),(30,30)",
        '```json\n[{"bbox_2d": [10, 10, 30, 30], "label": "a 2"}]\n```',
        "10 10 30 30",
    ],
)
def test_box_forms(said):
    assert puzzles.parse_box(said) == (10, 10, 30, 30)


def test_iou():
    assert puzzles.score_iou("[0, 0, 20, 10]", [10, 0, 30, 10]) == pytest.approx(100 / 300)
    assert puzzles.score_iou("[0, 0, 10, 10]", [20, 20, 30, 30]) == 0.0
    assert (
        puzzles.score_iou("[10, 10, 0, 0]", [0, 0, 10, 10]) == 0.0
        and puzzles.score_iou("a box", [0, 0, 1, 1]) == 0.0
    )
    assert (
        puzzles.score_iou50("[0, 0, 10, 10]", [0, 0, 20, 10]) == 1.0
        and puzzles.score_iou50("[0, 0, 9, 10]", [0, 0, 20, 10]) == 0.0
    )
    with pytest.raises(ValueError, match="x1 < x2"):
        puzzles.score_iou("[0, 0, 1, 1]", [5, 0, 1, 1])


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ("(25 - 1) * 3 / 2", 1),
        (r"(25 - 1) \times 3 \div 2", 1),
        ("(25-1)*3//2", 0),  # floor division is not division
        ("25 + 25/2*1", 0),  # a number twice
        ("36", 0),
        ("25 - 1 + 3 * 2 + 6", 0),  # a number of its own
        ("(25 - 1) * 3 / 2 = 36", 0),
        ("(2 ** 25)", 0),
        ("__import__('os').system('true')", 0),
        ("(" * 150 + "1", 0),
        ("25 / (1 - 3 + 2)", 0),
    ],
)
def test_countdown(said, right):
    assert puzzles.score_countdown(said, 36, {"nums": [1, 2, 3, 25]}) == right


def test_countdown_reads_the_numbers_of_a_csv_column():
    assert puzzles.score_countdown("1 + 2 * 3", "7", {"nums": "[1, 2, 3]"}) == 1.0
    assert puzzles.score_countdown("1 + 2 * 3", "7", {"nums": "[1, 2, 4]"}) == 0.0


def test_countdown_division_must_be_exact():
    assert puzzles.score_countdown("7 / 2 * 2", 6, {"nums": [7, 2, 2]}) == 0.0
    assert puzzles.score_countdown("7 / 2 * 2", 7, {"nums": [7, 2, 2]}) == 0.0
    with pytest.raises(ValueError, match="expected the column `nums`"):
        puzzles.score_countdown("1", 1, {})


def test_jigsaw_convention_is_that_of_the_image():
    original, shown = "ABCD", "CADB"
    answer = [shown.index(tile) + 1 for tile in original]
    assert answer == [2, 4, 1, 3] and "answer = 2 4 1 3" in puzzles.__doc__
    assert [shown[n - 1] for n in answer] == list(original)


def test_jigsaw_hits():
    assert (
        puzzles.jigsaw_hit_rate("2 4 1 3", [2, 4, 1, 3]) == 1.0
        and puzzles.score_jigsaw("2, 4\n1, 3", "2 4 1 3") == 1.0
    )
    assert (
        puzzles.jigsaw_hit_rate("[2, 4, 3, 1]", [2, 4, 1, 3]) == 0.5
        and puzzles.score_jigsaw("2 4 3 1", [2, 4, 1, 3]) == 0.0
    )
    # Every place counts on its own, as published: also in a response that is not a permutation.
    assert puzzles.jigsaw_hit_rate("2 2 2 2", [2, 4, 1, 3]) == 0.25
    assert puzzles.jigsaw_hit_rate("2 4 1", [2, 4, 1, 3]) == 0.75
    nine = "1 2 3 4 5 6 7 8 8"
    assert puzzles.jigsaw_hit_rate(nine, list(range(1, 10))) == pytest.approx(8 / 9)
    assert puzzles.score_jigsaw("2 4 1 3 1", [2, 4, 1, 3]) == 0.0
    assert puzzles.jigsaw_hit_rate("2 4 1 3 1", [2, 4, 1, 3]) == 1.0
    assert puzzles.jigsaw_hit_rate("", [2, 4, 1, 3]) == 0.0
    assert puzzles.jigsaw_hit_rate("2 " + "4" * 5_000, [2, 4, 1, 3]) == 0.25
    with pytest.raises(ValueError, match="expected each tile 1..n once"):
        puzzles.jigsaw_hit_rate("1 2", [1, 1])
    mean = (
        sum(
            puzzles.jigsaw_hit_rate(" ".join(map(str, p)), [1, 2, 3, 4])
            for p in itertools.permutations(range(1, 5))
        )
        / 24
    )
    assert mean == pytest.approx(1 / 4)
