"""Prompts with images in their places, and the answers of several annotators."""

import pytest

from cptjax.tasks.task import conversation_images, most_frequent, user_turn


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


def test_the_images_of_a_conversation_are_listed_in_order_with_the_frames_of_videos():
    messages = [
        {"role": "system", "content": "Be brief."},
        *user_turn("<image>a<video>b<image><video>", [1, 4], [[2, 3], "film.mp4"]),
    ]
    assert list(conversation_images(messages)) == [1, 2, 3, 4]
