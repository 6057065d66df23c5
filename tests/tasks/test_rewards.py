"""Reward parts, the two formats, and users' own reward functions, wrong ones included."""

import random
import re

import pytest

from configs.base import get_config
from cptjax.tasks import prompted_task, rewards
from cptjax.tasks.prompt_templates import load_template
from cptjax.tasks.rewards import has_box, thinks_then_answers, thinks_then_boxes
from cptjax.tasks.scoring import scorers
from cptjax.tasks.scoring.sandbox import SandboxPool
from cptjax.tasks.scoring.scorers import find_scorer
from cptjax.tasks.task import Task
from cptjax.types import Example


@pytest.fixture(scope="module")
def pool():
    with SandboxPool(processes=1, timeout=0.7) as workers:
        yield workers


def parts(reward, completions, answers, pool=None, metas=None):
    n = len(completions)
    return reward(
        completions, answers, metas or [{}] * n, [f"d.jsonl:{i + 1}" for i in range(n)], pool
    )


@pytest.mark.parametrize(
    ("response", "good"),
    [
        (r"<think>a</think>\boxed{b}", True),
        ("<think>a\nb</think>\n\nSo \\boxed{\\frac{1}{2}}. Done", True),
        (" < think >a< / think > \\boxed{b}", True),  # space around the marks is squeezed
        (r"<think></think>\boxed{}", True),
        (r"so <think>a</think>\boxed{b}", False),  # the whole response must have the form
        (r"<think>\boxed{b}</think>", False),
        (r"\boxed{b}<think>a</think>", False),
        (r"<think>a</think>\boxed{b", False),
        (r"<think>a \boxed{b}", False),
        ("", False),
    ],
)
def test_think_then_box(response, good):
    assert thinks_then_boxes(response) == good


def test_rlvr_ifeval_is_a_reward():
    reward = rewards.find_reward("rlvr_ifeval", load_template("none"), find_scorer("exact"))
    row = {"func_name": "verify_paragraph_count", "N": 2}
    found = parts(reward, ["a\n* * *\nb", "a\n***\nb", ""], [row] * 3)
    assert [p["reward"] for p in found] == [1.0, 0.0, 0.0]


def test_think_then_box_is_the_pattern_of_the_paper():
    pattern, rng = re.compile(r"<think>.*</think>.*\\boxed\{.*\}.*", re.DOTALL), random.Random(0)
    pieces, seen = ["<think>", "</think>", "\\boxed{", "}", "x", "\n", " <", "think>"], set()
    for _ in range(3000):
        response = "".join(rng.choice(pieces) for _ in range(rng.randint(3, 9)))
        response = rng.choice(["", "<think>"]) + response
        expected = pattern.fullmatch(re.sub(r"\s*(<|>|/)\s*", r"\1", response)) is not None
        assert thinks_then_boxes(response) == expected, response
        seen.add(expected)
    assert seen == {True, False}


@pytest.mark.parametrize(
    ("response", "good"),
    [
        ("<think>a</think><answer>b</answer>", True),
        ("\n<think>a\n</think>\n<answer>\nb</answer>\n", True),
        ("<think>a</think> so <answer>b</answer>", False),
        ("<think>a</think><answer>b</answer><answer>c</answer>", False),
        ("<answer>b</answer><think>a</think>", False),
        ("<think>a</think><answer>b</answer> bye", False),
        ("<answer>b</answer>", False),
    ],
)
def test_think_then_answer(response, good):
    assert thinks_then_answers(response) == good


def test_a_box_alone_has_the_form():
    assert has_box(r"so \boxed{1}") and not has_box(r"so \boxed{1")


def test_weights_of_accuracy_and_format():
    reward = rewards.find_reward("default", load_template("cot"), find_scorer("exact_match"))
    both, only_right, only_form, neither = parts(
        reward,
        [r"<think>a</think>\boxed{Blue.}", r"\boxed{blue}", r"<think>a</think>\boxed{red}", "blue"],
        ["blue"] * 4,
    )
    assert both == {"reward": 1.0, "accuracy": 1.0, "extracted": 1.0, "format": 1.0}
    assert only_right == {"reward": 0.9, "accuracy": 1.0, "extracted": 1.0, "format": 0.0}
    assert only_form == {"reward": 0.1, "accuracy": 0.0, "extracted": 1.0, "format": 1.0}
    assert neither == {"reward": 0.0, "accuracy": 0.0, "extracted": 0.0, "format": 0.0}
    custom = rewards.find_reward(
        "", load_template("cot"), find_scorer("exact_match"), accuracy=0.5, format=0.25
    )
    assert parts(custom, [r"<think>a</think>\boxed{blue}"], ["blue"])[0]["reward"] == 0.75


def test_a_template_without_a_form_has_no_format_term():
    reward = rewards.find_reward("", load_template("direct"), find_scorer("exact_match"))
    assert parts(reward, ["blue", "red"], ["blue"] * 2) == [
        {"reward": 1.0, "accuracy": 1.0, "extracted": 1.0},
        {"reward": 0.0, "accuracy": 0.0, "extracted": 1.0},
    ]


def test_graded_scorers_give_graded_rewards():
    reward = rewards.find_reward("vqa_soft", load_template("cot"), find_scorer("exact_match"))
    answers = [["red"] * 3 + ["blue"] * 7]
    assert parts(reward, [r"<think></think>\boxed{red}"], answers)[0]["reward"] == pytest.approx(
        0.9 * 0.9 + 0.1
    )


def test_jigsaw_reward_is_the_sum_of_three():
    reward = rewards.find_reward("jigsaw", load_template("answer"), find_scorer("exact"))
    solved, half, bare, junk = parts(
        reward,
        [
            "<think>.</think><answer>2 4 1 3</answer>",
            "<think>.</think><answer>2 4 3 1</answer>",
            "<answer>2 4 1 3</answer>",
            "2 4 1 3",
        ],
        [[2, 4, 1, 3]] * 4,
    )
    assert solved == {"reward": 3.0, "hit": 1.0, "accuracy": 1.0, "format": 1.0}
    assert half == {"reward": 1.5, "hit": 0.5, "accuracy": 0.0, "format": 1.0}
    assert bare == {"reward": 2.0, "hit": 1.0, "accuracy": 1.0, "format": 0.0}
    assert junk["reward"] == 0.0


def test_countdown_reward_reads_the_columns():
    reward = rewards.find_reward("countdown", load_template("boxed"), find_scorer("exact"))
    got = parts(
        reward,
        [r"\boxed{3 \times 4 + 2}", r"\boxed{14}"],
        [14, 14],
        metas=[{"nums": [2, 3, 4]}] * 2,
    )
    assert [p["reward"] for p in got] == [1.0, pytest.approx(0.1)]


def test_a_hang_in_algebra_costs_the_accuracy_only(pool):
    reward = rewards.find_reward("mathruler_parity", load_template("boxed"), find_scorer("exact"))
    assert parts(reward, [r"\boxed{99999999!}"], ["x"], pool) == [
        {"reward": 0.1, "accuracy": 0.0, "extracted": 1.0, "error": 1.0, "format": 1.0}
    ]


USER = """
def good(completion, answer, **columns):
    return {"reward": float(completion == answer), "length": len(completion), "columns": len(columns), "renamed": columns["answer_"]}
def number(completion, answer): return completion == answer
def nan(completion, answer): return float("nan") if completion == "bad" else 1.0
def bad_part(completion, answer): return {"reward": 1.0, "extra": float("inf")}
def no_reward(completion, answer): return {"score": 1.0}
def none(completion, answer): return None
def raises(completion, answer):
    return {}[completion]
def hangs(completion, answer):
    while True: pass
"""


@pytest.fixture(scope="module")
def user(tmp_path_factory):
    path = tmp_path_factory.mktemp("user") / "mine.py"
    path.write_text(USER)
    return path


def load_user(user, name, pool, **settings):
    return rewards.find_reward(
        f"{user}:{name}", load_template("none"), find_scorer("exact"), pool=pool, **settings
    )


def test_a_users_reward_sees_every_column_and_logs_its_parts(user, pool):
    reward = load_user(user, "good", pool)
    got = parts(reward, ["ab", "c"], ["ab", "d"], pool, [{"answer": 5, "hint": "h"}] * 2)
    assert (
        got[0] == {"reward": 1.0, "length": 2.0, "columns": 2.0, "renamed": 5.0}
        and got[1]["reward"] == 0.0
    )
    assert reward.name == "mine.py:good"
    assert parts(load_user(user, "number", pool), ["a", "b"], ["a", "a"], pool) == [
        {"reward": 1.0},
        {"reward": 0.0},
    ]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nan", r"failed on row d\.jsonl:2: reward: returned nan; expected a finite number"),
        ("bad_part", r"failed on row d\.jsonl:1: extra: returned inf"),
        ("no_reward", "returned the parts score; expected one named 'reward'"),
        ("none", "returned None; expected a finite number"),
        ("raises", r"KeyError: 'good' \(mine\.py, line 10\)"),
        ("hangs", r"no result within 0\.7 s"),
    ],
)
def test_a_wrong_reward_stops_with_file_function_row_and_reason(user, pool, name, message):
    reward = load_user(user, name, pool)
    with pytest.raises(ValueError, match=message) as caught:
        parts(reward, ["good", "bad"], ["a", "a"], pool)
    line = str(caught.value)
    assert (
        line.startswith(f"reward {user}:{name} failed on row d.jsonl:")
        and "\n" not in line
        and "on_error=zero" in line
    )


def test_a_wrong_reward_scores_zero_where_the_config_says_so(user, pool):
    reward = load_user(user, "nan", pool, on_error="zero")
    assert parts(reward, ["good", "bad", "good"], ["a"] * 3, pool) == [
        {"reward": 1.0},
        {"reward": 0.0, "error": 1.0},
        {"reward": 1.0},
    ]


def test_a_function_is_a_reward_without_a_file():
    def mine(completion, answer, hint):
        return {
            "reward": 5.0
            if completion == answer
            else {"no": float("nan"), "odd": 1 / 0}[completion],
            "hint": len(hint),
        }

    def prompted(**settings):
        weights = get_config().rewards
        weights.update(settings)
        return prompted_task.make_prompted_task(
            Task("t", list, "exact", reward=mine, template="direct"), "", weights, None
        )

    said = lambda prompted, *texts: prompted.compute_rewards(
        texts, [Example(f"t/{i}", [], "yes", meta={"hint": "abc"}) for i in range(len(texts))]
    )
    assert said(prompted(), "yes") == [{"reward": 5.0, "hint": 3.0}]
    with pytest.raises(
        ValueError,
        match=r"reward mine failed on row t/1: ZeroDivisionError: .*test_rewards\.py, line \d+\); correct",
    ):
        said(prompted(), "yes", "odd")
    assert said(prompted(on_error="zero"), "odd", "yes") == [
        {"reward": 0.0, "error": 1.0},
        {"reward": 5.0, "hint": 3.0},
    ]


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (lambda p, a, m: float("nan"), "failed on row r1: returned nan; expected a finite number"),
        (lambda p, a, m: None, "failed on row r1: returned None"),
        (lambda p, a, m: m["missing"], "failed on row r1: KeyError: 'missing'"),
    ],
)
def test_a_function_as_scorer_that_gives_no_number_stops_at_its_row(rule, message):
    first_right = lambda p, a, m: 1 if p == "a" else rule(p, a, m)
    with pytest.raises(ValueError, match=message):
        scorers.score_responses(
            scorers.Scorer("mine", first_right), ["a", "b"], ["a", "a"], [{}, {}], ["r0", "r1"]
        )


def test_settings_are_checked(user, pool):
    with pytest.raises(ValueError, match="no function 'nope'"):
        load_user(user, "nope", pool)
    with pytest.raises(ValueError, match="on_error: expected stop or zero, got 'skip'"):
        rewards.find_reward("", load_template("cot"), find_scorer("exact"), on_error="skip")
    with pytest.raises(ValueError, match="weights: expected >= 0"):
        rewards.find_reward("", load_template("cot"), find_scorer("exact"), format=-1)
    with pytest.raises(ValueError, match="unknown scorer 'exactt'; did you mean 'exact'"):
        rewards.find_reward("exactt", load_template("cot"), find_scorer("exact"))


@pytest.mark.parametrize("name", ["", "jigsaw"])
def test_a_response_of_few_words_loses_the_penalty(name):
    def total(words, **settings):
        reward = rewards.find_reward(
            name, load_template("boxed"), find_scorer("exact"), accuracy=1.0, format=0.0, **settings
        )
        (found,) = reward(["so " * (words - 1) + "\\boxed{2 1}"], ["2 1"], [{}], ["t/0"])
        return found

    answer = total(4)["reward"]
    assert "short" not in total(4)
    assert total(5, short_words=5) == {**total(5), "short": 0.0}
    short = total(4, short_words=6, short_penalty=0.25)  # the box has a space
    assert short["reward"] == answer - 0.25 and short["short"] == 1.0
    with pytest.raises(ValueError, match="expected short_words and short_penalty >= 0"):
        total(4, short_words=-1)
