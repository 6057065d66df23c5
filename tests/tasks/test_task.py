"""Prompts with images in their places, and the answers of several annotators."""

import pytest

from cptjax.tasks.task import most_frequent, user_turn


def test_modal_answer_is_the_most_frequent_and_first_of_equals():
    assert most_frequent(["b", "a", "a", "b", "c"]) == "b"


def test_placeholders_and_images_must_agree():
    (turn,) = user_turn("a<image>b<video>", ["x"], ["y"])
    assert [part["type"] for part in turn["content"]] == [
        "text",
        "image",
        "text",
        "video",
    ]
    with pytest.raises(ValueError, match=r"2 <image> in the prompt but 1 image\(s\)"):
        user_turn("<image><image>", ["x"])
