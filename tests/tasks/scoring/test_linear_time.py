"""Every scorer, extraction and form takes little time for any response of 100 kB, and raises nothing.

A policy that collapses into one repeated text is usual in reinforcement learning.
"""

import time

import pytest

from cptjax.tasks.rewards import FORMAT_CHECKS
from cptjax.tasks.scoring import english_tokens, instructions, scorers
from cptjax.tasks.scoring.extract import EXTRACTIONS

SIZE = 100_000
LIMIT = 2.0  # seconds of this process for one response; quadratic rules need more than 10
UNITS = (
    [" ", "\n", "\t", "9", "1,111", ".5", "0.", "9x", "x", "A", "\\", "\\\\boxed{", "\\boxed{", "{"]
    + ["}", "$", "$x", "[", "(", "[1,", "<", "<<", ">", "/", " /", "*", "* ", "-", "- ", ".", "...!"]
    + ["?x", '"', "'", "`", "answer is ", "The answer", "the ", "Answer: ", "A. ", "frac", "\\text{"]
    + ["<answer>", "<think>", "1+", "((", "\n\n", "word ", "is so ", "P.S", "Section 1", "no "]
    + ["\u0301\u0327"]
)  # fmt: skip
TAILS = ("x",)  # a text that a rule almost matches to its end
ROWS = {  # answer and columns of each scorer
    "numeric": ("5", {}),
    "yes_no": ("yes", {}),
    "pope": ("yes", {}),
    "mme": ("yes", {}),
    "mmmu_official": ("5", {"question_type": "open"}),
    "mmmu_strict": ("B", {"options": ["cat", "dog"]}),
    "iou": ([0, 0, 1, 1], {}),
    "iou50": ([0, 0, 1, 1], {}),
    "countdown": (5, {"nums": [2, 3]}),
    "retain_countdown": (5, {"nums": [2, 3]}),
    "jigsaw": ([2, 1, 3], {}),
    "refusal": (1, {}),
    "only_option": ("cat", {"options": ["cat", "dog"]}),
    "json": ('{"cat": 1}', {}),
    "ctbench_open": ("a long gold answer " * 5, {}),
    "ifeval": (
        [
            {"id": "punctuation:no_comma"},
            {"id": "detectable_format:title"},
            {"id": "detectable_format:json_format"},
            {"id": "detectable_format:number_bullet_lists", "num_bullets": 1},
            {"id": "detectable_content:number_placeholders", "num_placeholders": 1},
            {"id": "detectable_content:postscript", "postscript_marker": "P.S."},
            {"id": "detectable_format:number_highlighted_sections", "num_highlights": 1},
            {"id": "length_constraints:number_paragraphs", "num_paragraphs": 2},
            {"id": "detectable_format:multiple_sections", "section_spliter": "Section",
             "num_sections": 1},
            {"id": "change_case:capital_word_frequency", "capital_relation": "at least",
             "capital_frequency": 1},
            {"id": "length_constraints:number_sentences", "relation": "at least",
             "num_sentences": 1},
        ],
        {},
    ),
    "rlvr_ifeval": ({"func_name": "validate_placeholders", "N": 1}, {}),
}  # fmt: skip
# A likelihood is computed, not read from a response.
IN_PROCESS = [s for s in scorers.SCORERS.values() if callable(s.rule) and s.reads != "likelihood"]


def hostile_texts():
    for unit in UNITS:
        for tail in TAILS:
            yield unit * (SIZE // len(unit)) + tail


TEXTS = list(hostile_texts())


def assert_fast(name, function):
    for text in TEXTS:
        started = time.process_time()
        function(text)
        took = time.process_time() - started
        assert took < LIMIT, f"{name}: {took:.1f} s for {text[:12]!r}...{text[-12:]!r}"


@pytest.mark.parametrize("name", EXTRACTIONS)
def test_extractions(name):
    assert_fast(name, EXTRACTIONS[name])


@pytest.mark.parametrize("name", FORMAT_CHECKS)
def test_forms(name):
    assert_fast(name, FORMAT_CHECKS[name])


@pytest.mark.parametrize("scorer", IN_PROCESS, ids=lambda scorer: scorer.name)
def test_scorers(scorer):
    answer, meta = ROWS.get(scorer.name, ("B", {}))
    assert_fast(scorer.name, lambda text: scorer.score(text, answer, meta))


@pytest.mark.parametrize("name", ["multiple choice", "loose"])
def test_other_rules(name):
    if name == "loose":
        for constraint in ROWS["ifeval"][0]:
            instructions.follows_loosely(TEXTS[0], constraint)
        assert_fast(name, english_tokens.count_sentences)
    else:
        score = scorers.find_scorer("mmmu_official").score
        assert_fast(name, lambda text: score(text, "B", {"options": ["cat", "dog"], "id": "x"}))


def test_an_empty_response_is_scored_without_an_error():
    for scorer in IN_PROCESS:
        answer, meta = ROWS.get(scorer.name, ("B", {}))
        scorer.score("", answer, meta)


def test_a_long_number_is_a_wrong_answer_and_no_error():
    digits = "7" * 5_000
    for scorer in IN_PROCESS:
        answer, meta = ROWS.get(scorer.name, ("B", {}))
        if scorer.name not in ("ifeval", "pope"):  # any text without a comma, or without a "no"
            assert scorer.score(digits, answer, meta) == 0.0, scorer.name
