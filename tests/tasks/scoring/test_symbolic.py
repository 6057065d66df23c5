"""Mathematical equality: official, and with the quirks of the grader that the paper used."""

import itertools
import json
import re
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import pytest

from cptjax.tasks.scoring import symbolic
from cptjax.tasks.scoring.sandbox import SandboxCall, SandboxPool
from cptjax.tasks.scoring.scorers import find_scorer, score_responses, summarise_records


@pytest.fixture(scope="module")
def pool():
    with SandboxPool(processes=1, timeout=20.0) as workers:
        yield workers


@pytest.mark.parametrize(
    ("said", "gold"),
    [
        ("0.5", r"\frac{1}{2}"),
        (r"\frac12", "1/2"),
        (r"\sqrt{12}", r"2\sqrt{3}"),
        ("50", r"50^\circ"),
        ("1,234", "1234"),
        ("x+1", "1+x"),
        (r"\frac { 28 } { 5 }", "5.6"),
        (r"2 \sqrt { 221 }", r"2\sqrt{221}"),
        (r"18 \sqrt { 2 }", r"\sqrt{648}"),
        ("x=5", "5"),
        ("12 cm", "12"),
        ("58", "58.0"),
        ("Blue.", "blue"),
        ("(1, 2)", "(1,2)"),
        (r"\dfrac{9}{2}", "4.5"),
        ("5:4", "5:4"),
    ],
)
def test_math_equal(said, gold):
    assert symbolic.equal_by_math_verify(said, gold)


GOLDS = json.loads(
    (Path(__file__).parent / "geometry3k_answers.json").read_text()
)  # all answers of Geometry3K's test split
RULES = {"math": symbolic.equal_by_math_verify, "mathruler_parity": symbolic.equal_by_mathruler}


def spellings(gold):
    """Other ways to write an answer: no spaces, other macros, fractions, decimals, one root."""
    found = {gold, gold.replace("\\frac", "\\dfrac")}
    if not re.search("[A-Z]", gold):  # words are met literally
        found.add(gold.replace(" ", ""))
    if mixed := re.fullmatch(r"(?:(\d+) )?\\frac \{ (\d+) \} \{ (\d+) \}", gold):
        value = int(mixed[1] or 0) + Fraction(int(mixed[2]), int(mixed[3]))
        found |= {str(value), rf"\frac{{{value.numerator}}}{{{value.denominator}}}"}
        found |= {str(float(value))} if value.denominator in (2, 4, 5) else set()
    if re.fullmatch(r"\d*\.\d+", gold):
        found |= {str(Fraction(gold)), f"{gold}0"}
    if re.fullmatch(r"\d+", gold):
        found |= {f"{gold}.0", rf"{gold}^\circ"}
    if root := re.fullmatch(r"(\d+) \\sqrt \{ (\d+) \}", gold):
        found.add(rf"\sqrt{{{int(root[1]) ** 2 * int(root[2])}}}")
    return found


@pytest.mark.parametrize("rule", RULES)
def test_the_answers_of_geometry3k_in_other_spellings(rule):
    pairs = [(said, gold) for gold in GOLDS for said in spellings(gold)]
    assert len(GOLDS) == 285 and len(pairs) > 800
    assert [pair for pair in pairs if not RULES[rule](*pair)] == []


@pytest.mark.parametrize("rule", RULES)
def test_the_answers_of_geometry3k_differ_from_each_other(rule):
    same = {("0.6", "0.60"), ("13", "13.0"), ("65", "65.0"), ("6 \\sqrt 2", "6 \\sqrt { 2 }")}
    assert {pair for pair in itertools.pairwise(GOLDS) if RULES[rule](*pair)} == same


SLOW = """import os, time
def wait(): time.sleep(1); return 1
def work():
    file, began = os.open({spent!r}, os.O_WRONLY | os.O_CREAT), time.process_time()
    while True: os.pwrite(file, b"%09.3f" % (time.process_time() - began), 0)
"""


def test_busy_processors_do_not_lower_a_score(tmp_path):
    """The limit is on processor time where a call may take long by the clock."""
    (tmp_path / "slow.py").write_text(SLOW.format(spent=str(tmp_path / "spent")))
    with SandboxPool(processes=1, timeout=0.3) as workers:
        assert workers.map(f"{tmp_path}/slow.py:wait", [SandboxCall(())])[0].late
        assert workers.map(f"{tmp_path}/slow.py:wait", [SandboxCall(())], patience=20)[0].value == 1
        assert workers.map(f"{tmp_path}/slow.py:work", [SandboxCall(())], patience=20)[0].late
    assert 0.2 < float((tmp_path / "spent").read_text()) < 5  # the clock alone would give it 6 s


DEAF = """import signal, sys
from cptjax.tasks.scoring.sandbox import SandboxCall, SandboxPool
if sys.argv[1] == "ignored": signal.signal(signal.SIGPROF, signal.SIG_IGN)
if sys.argv[1] == "blocked": signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGPROF])
with SandboxPool(processes=1, timeout=0.3) as workers:
    print(workers.map(sys.argv[2], [SandboxCall(())], patience=20)[0].late)
"""


@pytest.mark.parametrize("how", ["ignored", "blocked"])
def test_the_limit_holds_where_the_parent_ignores_the_signal(tmp_path, how):
    """A process inherits its parent's signal handling; libtpu makes the parent ignore this one."""
    (tmp_path / "slow.py").write_text(SLOW.format(spent=str(tmp_path / "spent")))
    command = [sys.executable, "-c", DEAF, how, f"{tmp_path}/slow.py:work"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert done.stdout == "True\n" and 0.2 < float((tmp_path / "spent").read_text()) < 5, (
        done.stderr
    )


@pytest.mark.parametrize(
    ("said", "gold"),
    [
        ("on", "no"),
        ("football", "ball"),
        ("sunday", "sun"),
        ("two", "2"),
        ("6", "5"),
        ("(1,2)", "(2,1)"),
        ("29.73", r"2\sqrt{221}"),
        ("", "5"),
        ("blue", "red"),
        ("15.7", r"5\pi"),
    ],
)
def test_math_different(said, gold):
    assert not symbolic.equal_by_math_verify(said, gold)


@pytest.mark.parametrize(
    ("said", "gold", "same"),
    [
        ("on", "no", True),
        ("wow", "oww", True),
        ("football", "ball", True),
        ("sunday", "sun", True),
        (".5", "1/2", True),
        ("50%", "50", True),
        ("5 cm^2", "5", True),
        ("Yes", "yes", True),
        ("3 or 4", "3,4", True),
        ("None", "none", True),
        ("1 million", "10^6", True),
        ("3 1/2", "7/2", True),
        (r"\frac{\sqrt{3}}{2}", r"\sqrt{3}/2", True),
        ("(1, 2)", "(1,2)", True),
        ("A.", "A", False),
        ("two", "2", False),
        ("blue.", "blue", False),
        ("the cat", "cat", False),
        ("2/4", "1/2", False),
        ("4/2", "2", False),
        ("[1,2)", "(1,2)", False),
        ("bule", "blue", False),
    ],
)
def test_mathruler_quirks(said, gold, same):
    assert symbolic.equal_by_mathruler(said, gold) == same


def test_missing_box_matches_a_gold_none_only_under_mathruler_parity(pool):
    for name, expected in ("mathruler_parity", 1.0), ("exact_match", 0.0):
        records = score_responses(
            find_scorer(name), ["no box"], ["None"], [{}], extraction="boxed", pool=pool
        )
        assert records[0].score == expected and records[0].prediction is None


def test_on_is_no_only_under_mathruler_parity(pool):
    scores = {
        name: score_responses(find_scorer(name), ["on"], ["no"], [{}], pool=pool)[0].score
        for name in ("mathruler_parity", "math", "exact_match")
    }
    assert scores == {"mathruler_parity": 1.0, "math": 0.0, "exact_match": 0.0}


@pytest.mark.parametrize(
    ("name", "bomb"), [("mathruler_parity", "99999999!"), ("math", r"\binom{99999999}{4999999}")]
)
def test_a_hang_in_symbolic_algebra_scores_zero_and_is_reported(name, bomb):
    scorer = find_scorer(name)
    with SandboxPool(processes=1, timeout=1.5) as workers:
        records = score_responses(scorer, [bomb, "5"], ["x", "5.0"], [{}] * 2, pool=workers)
    assert [r.score for r in records] == [0.0, 1.0]
    assert "no result within 1.5 s" in records[0].error and not records[1].error
    assert summarise_records(scorer, records)["error"].value == 0.5


def test_degenerate_answers_take_no_time():
    start = time.perf_counter()
    assert not symbolic.equal_by_math_verify("(" * 3000, "x") and not symbolic.equal_by_math_verify(
        r"\frac{" * 2000, "x"
    )
    assert time.perf_counter() - start < 0.5


def test_equal_pairs_are_compared_once(pool):
    scorer, calls = find_scorer("math"), []
    counting = SandboxPool(processes=1)
    counting.map = lambda target, batch, patience: (
        calls.extend(batch) or pool.map(target, batch, patience)
    )
    records = score_responses(
        scorer, ["1/2", "0.5", "1/2", "3"], ["0.5"] * 4, [{}] * 4, pool=counting
    )
    assert [r.score for r in records] == [1.0, 1.0, 1.0, 0.0] and len(calls) == 3
