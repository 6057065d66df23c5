"""Golden vectors of each benchmark's rule, what is reported beside the mean, and a user's own scorer."""

import random
import re

import numpy as np
import pytest

from cptjax.tasks.scoring import choice, scorers, text
from cptjax.tasks.scoring.sandbox import SandboxPool
from cptjax.tasks.scoring.scorers import (
    ScoreRecord,
    find_scorer,
    score_responses,
    summarise_records,
)
from cptjax.tasks.scoring.summaries import mean_metric, ratio_metric


@pytest.fixture(scope="module")
def pool():
    with SandboxPool(processes=1, timeout=20.0) as workers:
        yield workers


@pytest.fixture(scope="module")
def user(tmp_path_factory):
    path = tmp_path_factory.mktemp("user") / "mine.py"
    path.write_text(
        "import sys\n"
        "def half(prediction, answer, **columns): return 0.5\n"
        "def leaves(prediction, answer): sys.exit(1)\n"
        "def nan(prediction, answer): return float('nan')\n"
    )
    return path


def values(scorer, records):
    return {name: metric.value for name, metric in summarise_records(scorer, records).items()}


@pytest.mark.parametrize(
    ("raw", "normal"),
    [
        ("Yes.", "yes"),
        ("1,000", "1000"),
        ("it's", "it 's"),
        ("Coca-Cola", "coca cola"),
        ("U.S.A.", "usa"),
        ("none", "0"),
        ("dont", "don't"),
        ("a.b", "ab"),
        ("5:4", "5:4"),
        ("3.5", "3.5"),
        ("$5.00", "$5.00"),
        ("Ten", "10"),
        ("The  cat\n", "cat"),
        ("a -b-c", "bc"),
        ("they'dve", "they'd've"),
        ("somebody'd", "somebodyd"),
        (".5", ".5"),
        ("5.", "5"),
        ("." * 40, "." * 8),
    ],
)
def test_evalai_normaliser(raw, normal):
    assert text.normalise_vqa_answer(raw) == normal


def test_vqa_soft_leaves_the_compared_annotator_out():
    answers = ["red"] * 3 + ["blue"] * 7
    assert text.score_vqa_soft("Red.", answers) == pytest.approx(
        0.9
    )  # 7 see 3 matches -> 1, 3 see 2 matches -> 2/3; the plain rule gives 1
    assert text.score_vqa_soft("red", ["red"] * 4 + ["blue"] * 6) == 1.0
    assert text.score_vqa_soft("red", ["red"] + ["blue"] * 9) == pytest.approx(0.3)
    assert text.score_vqa_soft("red", ["red"] * 2 + ["blue"] * 8) == pytest.approx(0.6)
    assert text.score_vqa_soft("green", answers) == 0.0
    assert (
        text.score_vqa_soft("the Red", "red") == 1.0
        and text.score_vqa_soft("red", ["red", "red"]) == 1.0
    )


def test_modal_answer():
    answers = ["unanswerable"] * 4 + ["Dog", "dog", "a dog", "DOG.", "dog"] + ["cat"]
    assert (
        text.score_vqa_em_modal("dog", answers) == 1.0
    )  # only after normalisation is "dog" the most frequent
    assert text.score_vqa_em_modal("unanswerable", answers) == 0.0
    assert text.score_vqa_em_modal("two", "2") == 1.0


def test_exact_rules_differ_where_they_should():
    cases = {"blue": (1, 1, 1), "Blue.": (0, 1, 1), "it is blue": (0, 0, 1), "blu": (0, 0, 0)}
    for said, expected in cases.items():
        assert (
            text.score_exact(said, "blue"),
            text.score_exact_match(said, "blue"),
            text.score_contains(said, "blue"),
        ) == expected
    assert text.score_exact_match("on", "no") == 0.0
    assert text.score_exact("b", ["a", "b"]) == 1.0
    assert text.score_contains("anything", "") == 0.0


def test_anls():
    assert text.score_anls("kitten", ["sitting"]) == pytest.approx(1 - 3 / 7)
    assert text.score_anls("Kitten ", ["dog", "kitten"]) == 1.0
    assert text.score_anls("abcd", ["abxy"]) == 0.5 and text.score_anls("abcd", ["axyz"]) == 0.0
    assert text.score_anls("a" * 20_000, ["a"]) == 0.0


def test_pope_yes_ratio_counts_predictions():
    yes_no = find_scorer("yes_no")
    said = ["Yes, there is.", "yes", "yes", "There is a dog in it: yes", "no", "maybe"]
    gold = ["yes", "yes", "no", "no", "yes", "no"]
    metrics = values(yes_no, score_responses(yes_no, said, gold, [{}] * 6))
    assert metrics["accuracy"] == pytest.approx(2 / 6)
    assert metrics["precision"] == pytest.approx(2 / 4) and metrics["recall"] == pytest.approx(
        2 / 3
    )
    assert metrics["f1"] == pytest.approx(4 / 7)
    assert metrics["yes_ratio"] == pytest.approx(4 / 6)  # of the gold answers it would be 3/6
    assert metrics["neither"] == pytest.approx(1 / 6)


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ("No, yes is wrong", "no"),
        ("yes and no", "yes"),
        ("is it yes or no", None),
        ("nothing", None),
    ],
)
def test_yes_or_no(said, found):
    assert text.parse_yes_no(said) == found


def test_pathvqa_reports_both_kinds():
    scorer = find_scorer("pathvqa_split")
    gold = ["yes", "no", "acute lung injury", "liver"]
    metrics = values(
        scorer, score_responses(scorer, ["Yes.", "yes", "lung injury", "liver"], gold, [{}] * 4)
    )
    assert (metrics["yes_no"], metrics["open"], metrics["accuracy"]) == (0.5, 0.5, 0.5)
    assert metrics["open_recall"] == pytest.approx((2 / 3 + 1) / 2) and metrics[
        "open_f1"
    ] == pytest.approx((0.8 + 1) / 2)


def test_every_metric_has_the_rows_and_the_error_of_its_own_group():
    found = summarise_records(
        find_scorer("pathvqa_split"),
        score_responses(
            find_scorer("pathvqa_split"),
            ["yes", "yes", "x", "no"],
            ["yes", "no", "liver", "no"],
            [{}] * 4,
        ),
    )
    assert {
        name: metric.n for name, metric in found.items() if "open" in name or "yes" in name
    } == {
        "yes_no": 3,
        "open": 1,
        "open_recall": 1,
        "open_f1": 1,
    }
    assert found["yes_no"].stderr == pytest.approx(
        (2 / 3 * 1 / 3 / 2) ** 0.5
    )  # p (1 - p) / (n - 1)
    assert np.isnan(found["open"].stderr)  # of one row
    closed = score_responses(find_scorer("pathvqa_split"), ["yes"], ["yes"], [{}])
    assert "open" not in summarise_records(find_scorer("pathvqa_split"), closed)
    metas = [{"category": "law"}] * 3 + [{"category": "math"}]
    groups = summarise_records(
        find_scorer("mmlu_pro"),
        score_responses(find_scorer("mmlu_pro"), ["B"] * 4, ["B"] * 4, metas),
    )
    assert (groups["category/law"].n, groups["category/math"].n, groups["accuracy"].n) == (3, 1, 4)


def test_errors_of_ratios_are_those_of_many_repetitions():
    """Precision, recall and F1 as POPE has them, redrawn a thousand times."""
    rng = np.random.default_rng(0)
    yes, gold = rng.random((2, 1000, 400)) < [[[0.3]], [[0.6]]]
    hit = yes & gold
    for parts, wholes in ((hit, yes), (hit, gold), (2 * hit, yes * 1 + gold)):
        told = [ratio_metric(a, b) for a, b in zip(parts, wholes, strict=True)]
        assert np.mean([t.stderr for t in told]) == pytest.approx(
            np.std([t.value for t in told]), rel=0.1
        )
        assert told[0].n == (wholes[0] > 0).sum()
    assert mean_metric([1, 0, 0, 1]) == pytest.approx((0.5, 4, np.std([1, 0, 0, 1], ddof=1) / 2))


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


def test_mmmu_guess_is_the_same_each_time_and_reported():
    subjects = ("Art_Theory", "Math")
    metas = [
        {"id": f"validation_{subject}_{i}", "options": "['a', 'b', 'c', 'd']"}
        for i in range(50)
        for subject in subjects
    ]
    official, strict = find_scorer("mmmu_official"), find_scorer("mmmu_strict")
    runs = [score_responses(official, ["no idea"] * 100, ["B"] * 100, metas) for _ in range(2)]
    assert [r.score for r in runs[0]] == [r.score for r in runs[1]]
    metrics = values(official, runs[0])
    assert 0.1 < metrics["accuracy"] < 0.45 and metrics["unread_choice"] == 1.0
    assert {"discipline/art_and_design", "discipline/science"} <= set(metrics)
    unboxed = score_responses(official, ["I guess B"] * 100, ["B"] * 100, metas, extraction="boxed")
    assert (
        values(official, unboxed)["accuracy"] == 0.0
        and values(official, unboxed)["extraction_failure"] == 1.0
    )
    assert (
        values(strict, score_responses(strict, ["no idea"] * 100, ["B"] * 100, metas))["accuracy"]
        == 0.0
    )


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


def test_mmlu_pro_mean_is_weighted_by_size():
    scorer = find_scorer("mmlu_pro")
    metas = [{"category": "law"}] * 3 + [{"category": "math"}]
    metrics = values(
        scorer, score_responses(scorer, ["The answer is (A)"] * 4, ["A", "A", "A", "B"], metas)
    )
    assert (
        metrics["accuracy"] == 0.75
        and metrics["category/law"] == 1.0
        and metrics["category/math"] == 0.0
    )


def test_extraction_failure_stands_beside_the_accuracy():
    scorer = find_scorer("exact_match")
    records = score_responses(
        scorer,
        [r"\boxed{blue}", "blue", r"\boxed{red}", "x"],
        ["blue"] * 4,
        [{}] * 4,
        extraction="boxed",
    )
    assert values(scorer, records) == {"accuracy": 0.25, "extraction_failure": 0.5, "error": 0.0}
    assert isinstance(records[0], ScoreRecord) and records[1].prediction is None


def test_a_users_scorer_stops_at_the_row_or_scores_zero(user, pool):
    scorer = find_scorer(f"{user}:half")
    assert re.fullmatch(r"mine\.py:half@[0-9a-f]{8}", scorer.id)
    assert score_responses(scorer, ["a"], ["b"], [{}], pool=pool)[0].score == 0.5
    broken = find_scorer(f"{user}:leaves")
    with pytest.raises(ValueError, match=r"scorer mine\.py:leaves failed on row r3: SystemExit"):
        score_responses(broken, ["a"], ["b"], [{}], ["r3"], pool=pool)
    records = score_responses(broken, ["a"], ["b"], [{}], pool=pool, on_error="zero")
    assert records[0].score == 0.0 and "SystemExit" in records[0].error


def test_loading_fails_early_with_a_reason(user, pool, tmp_path):
    (tmp_path / "bad.py").write_text("def f(:")
    with pytest.raises(
        ValueError, match=r"no function 'nope' in .*mine\.py; it has half, leaves, nan"
    ):
        pool.load(f"{user}:nope")
    with pytest.raises(ValueError, match="SyntaxError"):
        pool.load(f"{tmp_path}/bad.py:f")
    with pytest.raises(ValueError, match="there is no file"):
        find_scorer("nowhere/x.py:f")
    with pytest.raises(ValueError, match="expected file.py:function, got 'x.py:a b'"):
        find_scorer("x.py:a b")
    with pytest.raises(ValueError, match="unknown scorer 'vqa_sofd'; did you mean 'vqa_soft'"):
        find_scorer("vqa_sofd")


def test_every_scorer_scores_a_right_and_a_wrong_answer(pool):
    rows = {  # right, wrong, answer, columns
        "numeric": ("5", "6", "5", {}),
        "math": ("5", "6", "5", {}),
        "mathruler_parity": ("5", "6", "5", {}),
        "yes_no": ("yes", "no", "yes", {}),
        "mcq_letter": ("B", "A", "B", {}),
        "mmlu_pro": ("B", "A", "B", {}),
        "mmmu_official": ("B", "A", "B", {"options": ["x", "y"]}),
        "mmmu_strict": ("B", "A", "B", {"options": ["x", "y"]}),
        "iou": ("[0,0,1,1]", "[2,2,3,3]", [0, 0, 1, 1], {}),
        "iou50": ("[0,0,1,1]", "[2,2,3,3]", [0, 0, 1, 1], {}),
        "countdown": ("2+3", "2-3", 5, {"nums": [3, 2]}),
        "jigsaw": ("2 1", "1 2", [2, 1], {}),
        "ifeval": ("x", "x,", [{"id": "punctuation:no_comma"}], {}),
    }
    for name, scorer in scorers.SCORERS.items():
        right, wrong, answer, meta = rows.get(name, ("blue", "crimson", "blue", {}))
        records = score_responses(scorer, [right, wrong], [answer] * 2, [meta] * 2, pool=pool)
        assert [r.score for r in records] == [1.0, 0.0], name
        assert values(scorer, records)["accuracy"] == 0.5, name


def test_scores_do_not_depend_on_the_order_of_rows():
    said, gold = ["a", "b c", "the d", "5"], ["a", "c", "d", "5"]
    order = random.Random(0).sample(range(4), 4)
    plain = score_responses(find_scorer("vqa_soft"), said, gold, [{}] * 4)
    mixed = score_responses(
        find_scorer("vqa_soft"), [said[i] for i in order], [gold[i] for i in order], [{}] * 4
    )
    assert [plain[i].score for i in order] == [r.score for r in mixed]
