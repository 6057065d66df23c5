"""MLLM-CTBench: which answer a response states, and when it is right."""

import pytest

from cptjax.tasks.scoring import ctbench_answers as ctbench


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think> so B </think><answer> C </answer>", "C"),
        ("<answer>A</answer> no: <answer>B</answer>", "B"),
        ("<THINK>it is A</think> It is B", "It is B"),
        ("B <think> but it never ends, A", "B"),
        ("one<think>a</think>two<think>b</think>three", "one two three"),
        ("</think> kept </answer>", "</think> kept"),
        ("<think>a</think>", ""),
    ],
)
def test_the_answer_is_in_its_tags_or_outside_of_the_thoughts(text, answer):
    assert ctbench.read_response(text) == answer


@pytest.mark.parametrize(
    ("scorer", "response", "gold", "score"),
    [
        ("choice", "B. hawkish", "B", 1),
        ("choice", "(b) hawkish", "B", 1),
        ("choice", "It must be B", "b", 1),
        ("choice", "a guess: B", "B", 0),  # the article is read as A
        ("choice", "dovish", "D", 1),  # no letter stands alone, so one in a word counts
        ("number", "1,234.0 apples", "1234", 1),
        ("number", "2 + 3 = 5", "5.0005", 1),
        ("number", "5", "5.01", 0),
        ("number", "none", "5", 0),
        ("number", "9" * 400, "5", 0),
        ("math", "No, it is not", "no", 1),
        ("math", "It knows", "no", 0),
        ("math", "x = 12", "12 cm", 1),
        ("math", "C", "C", 1),
        ("math", "a circle", "Circle", 1),
        ("open", "It is by Vincent van Gogh.", "vincent van gogh", 1),
        ("open", "an enlarged hart", "An enlarged heart.", 1),  # similar enough
        ("open", "a broken bone", "An enlarged heart.", 0),
        ("open", "hart", "heart", 0),  # too short to be similar
        ("open", "anything", "...", 0),
    ],
)
def test_scores(scorer, response, gold, score):
    rule = getattr(ctbench, f"score_ctbench_{scorer}")
    assert rule(f"<think>A 7 yes</think><answer>{response}</answer>", gold) == score
