"""Text exercises: the answers follow from the questions, and no question is in two splits."""

import json
import re

import pytest

from cptjax.tasks.registry import resolve_task
from cptjax.tasks.scoring.scorers import find_scorer
from cptjax.tasks.synthetic import exercises


def make(kind, style="bare"):
    return resolve_task("x", {"x": {"task": "exercise", "kind": kind, "style": style}})


def question(example):
    return example.messages[0]["content"][0]["text"]


def solve(kind, text):
    """The answer to a question, found without the module."""
    if kind == "owner":
        owner = {thing: name for name, thing in re.findall(r"(\w+) has the (\w+)(?: and|\.)", text)}
        return owner[re.search(r"Who has the (\w+)\?", text)[1]]
    if kind == "odd":
        category, words = re.search(r"is not (.*): (.*)\?", text).groups()
        known = exercises.CATEGORIES[category].split()
        (odd,) = [word for word in words.split(", ") if word not in known]
        return odd
    if kind == "larger":
        return str(max(map(int, re.findall(r"\d+", text))))
    name, value = re.search(r": (\w+) .*?(\w+)(?: years old)?\.$", text).groups()
    key = re.search(r"name and (\w+)", text)[1]
    return {"name": name, key: int(value) if value.isdigit() else value}


@pytest.mark.parametrize("kind", ["owner", "odd", "larger", "json"])
def test_answers_follow_from_the_questions_and_both_forms_are_right(kind):
    bare, chat = make(kind), make(kind, "chat")
    score = find_scorer(bare.scorer).score
    for one, other in zip(bare.load("train", limit=80), chat.load("train", limit=80), strict=True):
        wanted = solve(kind, question(one))
        assert (json.loads(one.answer) if kind == "json" else one.answer) == wanted
        assert question(one) == question(other) and one.target == one.answer != other.target
        assert score(one.target, one.answer, one.meta) == 1
        assert score(other.target, other.answer, other.meta) == 1
        assert score(question(one), one.answer, one.meta) == 0  # the question repeated


@pytest.mark.parametrize("kind", exercises.MAKERS)
def test_no_question_is_in_two_splits_and_rows_depend_on_seed_and_index(kind):
    task = make(kind)
    found = {split: task.load(split, limit=120) for split in exercises.SIZES}
    sets = [set(map(question, rows)) for rows in found.values()]
    assert not sets[0] & sets[1] and not sets[0] & sets[2] and not sets[1] & sets[2]
    assert question(task.load("test", limit=9)[7]) == question(found["test"][7])
    assert question(task.load("test", limit=9, seed=1)[7]) != question(found["test"][7])


def test_instructions_have_constraints_that_a_fitting_response_meets():
    score = find_scorer("ifeval").score
    kinds = set()
    for example in make("instructions").load("test", limit=60):
        (constraint,) = example.answer
        kinds.add(constraint["id"])
        words = constraint.get("keywords", ())
        least = constraint.get("num_words", 0) if constraint.get("relation") == "at least" else 0
        fitting = " ".join(["Rain", *words, *("falls" for _ in range(least))])
        assert score(fitting, example.answer) == 1 and score("", example.answer) == 0
        assert not example.target
    assert kinds == {
        "keywords:existence",
        "punctuation:no_comma",
        "length_constraints:number_words",
    }


def test_wrong_settings_are_refused_in_one_line():
    for settings, message in [
        ({"kind": "sums"}, "no kind 'sums'.*there are owner, odd"),
        ({"style": "long"}, "no style 'long'.*there are bare, chat"),
    ]:
        with pytest.raises(ValueError, match=message):
            resolve_task("x", {"x": {"task": "exercise", **settings}})
    with pytest.raises(ValueError, match="no split 'dev'.*train, validation, test"):
        make("owner").load("dev")
