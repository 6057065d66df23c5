"""Tasks by name: the built-in ones, a config's own, and what is refused."""

import pytest

from cptjax.tasks.registry import resolve_task


@pytest.mark.parametrize(
    "name, user_tasks, message",
    [
        ("drawn_colour", {}, "task: 'drawn_colour' was renamed; write 'synthetic_colour'"),
        (
            "mine",
            {"mine": {"task": "drawn", "family": "colour"}},
            "tasks.mine.task: 'drawn' was renamed; write 'synthetic'",
        ),
        (
            "mine",
            {"mine": {"task": "countdown", "drawn": True}},
            "tasks.mine: 'drawn' was renamed; write 'synthetic'",
        ),
        (
            "mine",
            {"mine": {"task": "jigsaw", "images": "drawn"}},
            "tasks.mine.images: 'drawn' was renamed; write 'synthetic'",
        ),
        (
            "mine",
            {"mine": {"task": "jigsaw", "images": "drawn_shape"}},
            "tasks.mine.images: 'drawn_shape' was renamed; write 'synthetic_shape'",
        ),
    ],
)
def test_a_former_name_is_refused_in_one_line_that_gives_the_new_one(name, user_tasks, message):
    with pytest.raises(ValueError) as error:
        resolve_task(name, user_tasks)
    assert str(error.value) == message
