"""A task under a template: the prompt, the gold response, and the forced prefix of scoring."""

import dataclasses

import pytest

from configs.base import get_config
from cptjax.tasks.prompted_task import make_prompted_task
from cptjax.tasks.task import Task, user_turn
from cptjax.types import Example

SETTINGS = get_config().rewards
EXAMPLE = Example("t/0", user_turn("<image>What?", ["a.png"]), "cat", "cat")


def prompted(template, /, **fields):
    return make_prompted_task(Task("t", list, "exact", **fields), template, SETTINGS, None)


def test_the_instruction_of_the_task_is_in_every_prompt_and_the_image_keeps_its_place():
    (turn,) = prompted("direct", answer_instruction="Be short.").build_prompt(EXAMPLE)
    assert turn["content"] == [
        {"type": "image", "image": "a.png"},
        {"type": "text", "text": "What?\nBe short."},
    ]
    (turn,) = prompted("boxed", answer_instruction="Be short.").build_prompt(EXAMPLE)
    text = turn["content"][1]["text"]
    assert text.startswith("What?\nBe short.\n") and "\\boxed{}" in text
    row = dataclasses.replace(
        EXAMPLE, meta={"answer_instruction": "A letter.", "instruction": "a column"}
    )
    (turn,) = prompted("cot", answer_instruction="Be short.").build_prompt(row)
    assert turn["content"][1]["text"].startswith("What?\nA letter.\nBe short.\nReason first")


def test_the_gold_response_has_the_form_of_the_template():
    assert prompted("direct").gold_response(EXAMPLE) == "cat"
    assert prompted("boxed").gold_response(EXAMPLE) == "\\boxed{cat}"
    with pytest.raises(ValueError, match="t/0: task t has no gold answers to train on"):
        prompted("boxed").gold_response(Example("t/0", EXAMPLE.messages, "cat"))


@pytest.mark.parametrize("template", ["boxed", "cot", "steps", "answer"])
@pytest.mark.parametrize("target", ["2 + 2 = 4.\nSo it is 4.", "f(x) {\n  return x;\n}\nis right"])
def test_a_target_of_several_lines_is_trained_on_as_a_whole(template, target):
    task = prompted(template)
    response = task.gold_response(dataclasses.replace(EXAMPLE, target=target))
    assert task.template.answer(response) == target


def test_a_form_with_a_thought_is_still_rewarded():
    said = "<think>because</think> \\boxed{cat}"
    (parts,) = prompted("cot").compute_rewards([said], [EXAMPLE])
    assert parts["format"] == parts["accuracy"] == 1.0
    (parts,) = prompted("direct").compute_rewards(["<think>\n\n</think>\n\ncat"], [EXAMPLE])
    assert parts["reward"] == 1.0


def test_a_forced_response_is_scored_after_its_prefix():
    (record,) = prompted("boxed").score(["cat}"], [EXAMPLE], forced=True)
    assert record.score == 1.0
    (record,) = prompted("boxed").score(["cat}"], [EXAMPLE])
    assert record.score == 0.0 and record.prediction is None


@pytest.mark.parametrize(
    ("template", "prefix", "answer", "wanted"),
    [
        ("none", "", "cat", ("The answer is", " cat")),
        ("none", "", 7, ("The answer is", " 7")),
        ("letter", "", "B", ("The answer is:", " B")),
        ("boxed", "", "cat", ("\\boxed{", "cat")),
        ("none", '{"a":', '{"a": 1}', ('{"a":', " 1}")),
    ],
)
def test_the_gold_answer_continues_the_forced_prefix(template, prefix, answer, wanted):
    task = prompted(template, forced_prefix=prefix)
    assert task.gold_continuation(dataclasses.replace(EXAMPLE, answer=answer)) == wanted


def test_a_likelihood_is_no_reward():
    task = make_prompted_task(Task("t", list, "likelihood"), "none", SETTINGS, None)
    with pytest.raises(ValueError, match="task t is scored by a likelihood, which only evaluates"):
        task.compute_rewards(["cat"], [EXAMPLE])


def test_answers_that_a_scorer_cannot_use_are_found_without_a_response():
    number = dataclasses.replace(EXAMPLE, answer="5")
    prompted("direct", reward="numeric").check_answer(EXAMPLE, rewarded=False)
    prompted("direct", reward="numeric").check_answer(number, rewarded=True)
    with pytest.raises(ValueError, match="expected a number as the answer, got 'cat'"):
        prompted("direct", reward="numeric").check_answer(EXAMPLE, rewarded=True)
    with pytest.raises(ValueError, match="expected the column `options`"):
        prompted("direct", also=("only_option",)).check_answer(EXAMPLE, rewarded=False)

    def own(completion, answer, **columns):
        raise AssertionError("a user's function is not called")

    task = Task("t", list, own, reward=own)
    for rewarded in (True, False):
        make_prompted_task(task, "direct", SETTINGS, None).check_answer(EXAMPLE, rewarded)


def test_the_tasks_own_template_takes_precedence():
    assert prompted("boxed", template="none").template.name == "none"
