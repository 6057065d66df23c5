"""The table of scorers, extraction failures, and a user's own scorer."""

import random
import re

import pytest

from cptjax.tasks.scoring import scorers
from cptjax.tasks.scoring.judged import write_verdict
from cptjax.tasks.scoring.sandbox import SandboxPool
from cptjax.tasks.scoring.scorers import (
    ScoreRecord,
    find_scorer,
    score_responses,
    summarise_records,
)


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


def test_extraction_failures_are_reported_with_the_accuracy():
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
        "scienceqa_strict": ("B", "A", "B", {}),
        "mmstar": ("B", "A", "B", {}),
        "pope": ("yes", "no", "yes", {}),
        "mme": ("yes", "no", "yes", {}),
        "retain_mmlu": ("The answer is: B", "B", "B", {}),
        "retain_math": ("5", "6", "5", {}),
        "retain_countdown": ("2+3", "2-3", 5, {"nums": [3, 2]}),
        "rlvr_ifeval": ("x", "x,", {"func_name": "validate_no_commas"}, {}),
        "refusal": (write_verdict(True), write_verdict(False), 1, {}),
        "mmlu_pro": ("B", "A", "B", {}),
        "mmmu_official": ("B", "A", "B", {"options": ["x", "y"]}),
        "mmmu_strict": ("B", "A", "B", {"options": ["x", "y"]}),
        "iou": ("[0,0,1,1]", "[2,2,3,3]", [0, 0, 1, 1], {}),
        "iou50": ("[0,0,1,1]", "[2,2,3,3]", [0, 0, 1, 1], {}),
        "countdown": ("2+3", "2-3", 5, {"nums": [3, 2]}),
        "jigsaw": ("2 1", "1 2", [2, 1], {}),
        "only_option": ("x", "x or y", "x", {"options": ["x", "y"]}),
        "json": ('{"x": 1}', "x", '{"x": 1}', {}),
        "likelihood": ("0.0", "-9999.0", "x", {}),
        "mrcl_box": ("\\boxed{blue}", "blue", "blue", {}),
        "mrcl_finmme_box": ("\\boxed{5.05}", "\\boxed{5.2}", "5", {"tolerance": 0.1}),
        "mrcl_moves": ("\\boxed{U,R}", "\\boxed{R,U}", "U,R", {}),
        "ctbench_choice": ("B", "A", "B", {}),
        "ctbench_number": ("5", "6", "5", {}),
        "ctbench_reward": ("blue", "crimson", "blue", {"solution": "blue"}),
        "ifeval": ("x", "x,", [{"id": "punctuation:no_comma"}], {}),
    }
    for name, scorer in scorers.SCORERS.items():
        right, wrong, answer, meta = rows.get(name, ("blue", "crimson", "blue", {}))
        records = score_responses(scorer, [right, wrong], [answer] * 2, [meta] * 2, pool=pool)
        assert [r.score for r in records] == [1.0, 0.0], name
        assert values(scorer, records)["accuracy"] == 0.5, name


def test_the_id_of_a_scorer_names_the_public_scorer_that_it_re_implements():
    ids = [scorer.id for scorer in scorers.SCORERS.values()]
    assert {"pope@1=LLaVA", "mmlu_pro@2=MMLU-Pro", "mmmu_official@2=lmms-eval"} <= set(ids)
    assert {"rlvr_ifeval@2=retaining-by-doing", "exact@1"} <= set(ids) and len(set(ids)) == len(ids)


def test_scores_do_not_depend_on_the_order_of_rows():
    said, gold = ["a", "b c", "the d", "5"], ["a", "c", "d", "5"]
    order = random.Random(0).sample(range(4), 4)
    plain = score_responses(find_scorer("vqa_soft"), said, gold, [{}] * 4)
    mixed = score_responses(
        find_scorer("vqa_soft"), [said[i] for i in order], [gold[i] for i in order], [{}] * 4
    )
    assert [plain[i].score for i in order] == [r.score for r in mixed]
