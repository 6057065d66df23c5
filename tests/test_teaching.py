"""Teachers: what they see, how they follow, and that a teacher that knows nothing more teaches nothing."""

import dataclasses

import jax
import numpy as np
import pytest
import school

from configs import base
from cptjax import teaching
from cptjax.classroom import Progress
from cptjax.stage import lesson


def config(method="sdft", **changes):
    c = base.get_config()
    c.stages = (dict(task="first", steps=2),)
    c.method.update({**base.METHODS[method], **changes})
    c = school.tiny(c, batch=4)
    c.data.update(prompt_limit=128, buckets=(128,))
    return c


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    with school.desk(config(), tmp_path_factory.mktemp("sdft")) as desk:
        yield desk


def _lesson(desk, shown: bool):
    """The first lesson, with or without the demonstrations in its rows."""
    blank = [[dataclasses.replace(e, target="") for e in source] for source in desk.room.sources]
    room = desk.room if shown else dataclasses.replace(desk.room, sources=blank)
    with room.stream(0) as stream:
        return list(lesson(room, desk.params, stream, Progress()).updates)


def test_demonstration_of_nothing_gives_zero_gradient(desk):
    (update,) = _lesson(desk, shown=False)
    _, told = desk.update(update)
    assert abs(told["kl_teacher"]) < 1e-6 and told["grad_norm"] < 1e-5
    (update,) = _lesson(desk, shown=True)
    _, told = desk.update(update)
    assert told["kl_teacher"] > 1e-6 and told["grad_norm"] > 1e-3


def test_demonstration_stands_in_the_question(desk):
    course, example = desk.room.tutor.courses["first"], desk.room.sources[0][0]
    said = lambda e: "".join(p["text"] for p in teaching.demonstrated(course, e)[-1]["content"])
    assert example.target in said(example) and said(example).startswith(said(dataclasses.replace(example, target="")))
    assert teaching.demonstrated(course, example)[-1]["role"] == "user"


@pytest.mark.parametrize(("kind", "share"), [("ema", 0.25), ("frozen", 0.0), ("current", 1.0)])
def test_followers(desk, kind, share):
    start = desk.state.params
    teacher = teaching.Teacher(desk.run.rt, desk.room.tutor.courses, kind, 0.25, start, desk.frozen)
    moved = jax.tree.map(lambda x: x + 1.0, start)
    teacher.follow(moved)
    for before, after in zip(jax.tree.leaves(start), jax.tree.leaves(teacher.trained), strict=True):
        np.testing.assert_allclose(after, before + share, atol=1e-5)


def test_previous_stage_pulls_only_once_the_model_has_moved(tmp_path):
    with school.desk(config("sft", penalty=dict(name="lwf", coef=1.0, samples=0)), tmp_path) as desk, desk.room.stream(0) as stream:
        update = next(lesson(desk.room, desk.params, stream, Progress()).updates)
        state, told = desk.update(update, lr=1e-2)
        assert abs(told["lwf"]) < 1e-6
        _, later = dataclasses.replace(desk, state=state).update(update)
        assert later["lwf"] > 1e-4
