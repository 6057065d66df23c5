"""Facts and prose, which are for testing only: complete tables, and prose rather than code."""

import pytest

from cptjax.tasks.datasets import knowledge, prose
from cptjax.tasks.registry import resolve_task
from cptjax.tasks.scoring.scorers import find_scorer


@pytest.mark.parametrize("subject", knowledge.SUBJECTS)
def test_every_fact_has_one_answer_that_its_sentence_contains(subject):
    task = resolve_task("x", {"x": {"task": "knowledge", "subject": subject}})
    rows = task.load("test")
    assert len(rows) >= 60 and len({row.id for row in rows}) == len(rows)
    score = find_scorer(task.scorer).score
    for row in rows:
        assert score(row.target, row.answer) == 1
        # Another answer in the question would be right for a response that repeats it.
        assert score(row.messages[0]["content"][0]["text"], row.answer) == 0
    with pytest.raises(ValueError, match="no split 'train'; facts are for testing only"):
        task.load("train")


def test_some_facts_are_as_everybody_knows_them():
    answers = {
        (subject, name): answer
        for subject, table in knowledge.SUBJECTS.items()
        for name, answer in table.rows()
    }
    assert answers["capitals", "Argentina"] == "Buenos Aires"
    assert answers["elements", "sodium"] == "Na" and answers["opposites", "cold"] == "hot"


def test_an_unknown_subject_is_one_line():
    with pytest.raises(ValueError, match="no subject 'rivers'; there are capitals, elements"):
        knowledge.make_task(subject="rivers")


def test_prose_is_whole_paragraphs_in_the_same_order_for_any_limit():
    task = resolve_task("prose")
    rows = task.load("test")
    assert len(rows) >= 90 and len({row.answer for row in rows}) == len(rows)
    for row in rows:
        first = row.messages[0]["content"][0]["text"].removeprefix(prose.INSTRUCTION)
        assert first.endswith(".") and prose.is_prose(f"{first} {row.answer}")
    assert [row.answer for row in task.load("test", limit=5)] == [row.answer for row in rows][:5]
    assert not prose.is_prose(">>> x = [1, 2]\n" * 20)
    with pytest.raises(ValueError, match="no split 'train'; prose is for testing only"):
        task.load("train")
