"""Tasks by name: the built-in ones, a config's own, and what is refused."""

import pytest

from cptjax.tasks.registry import BUILT_IN_TASKS, resolve_task
from cptjax.tasks.scoring import scorers


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


def test_every_scorer_and_reward_named_by_a_task_exists():
    for task in BUILT_IN_TASKS.values():
        assert callable(task.scorer) or task.scorer in scorers.SCORERS
        assert set(task.also) <= set(scorers.SCORERS)


def test_the_tasks_of_paper_a_have_one_lenient_scorer_and_report_their_own():
    every = [name for name in BUILT_IN_TASKS if name.startswith("cpt7_")]
    assert len(every) == 10
    assert {BUILT_IN_TASKS[name].scorer for name in every} == {"mathruler_parity"}
    assert all(BUILT_IN_TASKS[name].also for name in every)


def test_boxes_in_pixels_are_refused_under_other_limits():
    assert resolve_task("refcoco", pixels=(200_704, 1_003_520)) is BUILT_IN_TASKS["refcoco"]
    with pytest.raises(
        ValueError,
        match="refcoco: its answers are positions in images of 200704 to 1003520 pixels, but the model sees 784 to",
    ):
        resolve_task("refcoco", pixels=(784, 50_000))
    assert resolve_task(
        "refcoco",
        {"refcoco": {"task": "refcoco", "min_pixels": 784, "max_pixels": 50_000}},
        (784, 50_000),
    ).pixels


def test_boxes_in_pixels_are_refused_for_other_patches():
    limits = (200_704, 1_003_520)
    assert resolve_task("refcoco", pixels=limits, patch=14) is BUILT_IN_TASKS["refcoco"]
    assert resolve_task("refcoco", pixels=limits).patch == 14
    with pytest.raises(
        ValueError, match="patches of 14 pixels, but the model's have 16; leave the task out, or"
    ):
        resolve_task("refcoco", pixels=limits, patch=16)
    assert resolve_task("gqa", pixels=limits, patch=16) is BUILT_IN_TASKS["gqa"]


def test_resolve_prefers_the_config_and_names_the_nearest():
    own = resolve_task(
        "textvqa",
        {
            "textvqa": {
                "task": "textvqa",
                "ocr": True,
                "scorer": "contains",
                "answer_instruction": "Short.",
            }
        },
    )
    assert (own.name, own.scorer, own.answer_instruction) == ("textvqa", "contains", "Short.")
    assert resolve_task("pope").scorer == "pope"
    with pytest.raises(ValueError, match="no task 'textvqq'; did you mean 'textvqa'"):
        resolve_task("textvqq")
    with pytest.raises(ValueError, match="unknown setting 'rowz'; did you mean 'rows'"):
        resolve_task("p", {"p": {"task": "jigsaw", "rowz": 2}})
    with pytest.raises(ValueError, match="tasks.p.task: no task 'jigsow'; did you mean 'jigsaw'"):
        resolve_task("p", {"p": {"task": "jigsow"}})
