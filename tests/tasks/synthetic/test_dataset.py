"""Synthetic tasks: what is drawn is what is asked, nothing depends on its neighbours, and no image is in two splits."""

import re
import time

import cloudpickle
import numpy as np
import pytest

from cptjax.tasks.datasets import jigsaw
from cptjax.tasks.registry import BUILT_IN_TASKS, resolve_task
from cptjax.tasks.synthetic import painting
from cptjax.tasks.synthetic.dataset import (
    ANSWER_STYLES,
    SyntheticExamples,
    biased_classes,
    generate_block,
    make_synthetic_task,
    styled_exact,
)
from cptjax.tasks.synthetic.families import (
    CREATURES,
    SYNTHETIC_FAMILIES,
    SyntheticSpec,
    answer_classes,
    world_facts,
)

IMAGE_FAMILIES = sorted(set(SYNTHETIC_FAMILIES) - {"facts", "arithmetic"})
LEVELS = [
    (family, level)
    for family in SYNTHETIC_FAMILIES
    for level in (1, 2, 3)
    if (family, level) not in (("facts", 2), ("facts", 3))
]


@pytest.mark.parametrize("family", SYNTHETIC_FAMILIES)
def test_an_example_depends_on_seed_split_and_index_alone(family):
    spec = SyntheticSpec(family, styles=(("it is", 0.5), ("", 0.5)), bias=0.0)
    whole, alone = generate_block(spec, "train", 3, 0, 50), generate_block(spec, "train", 3, 37, 38)
    assert (whole.questions[37], whole.answers[37], whole.styles[37]) == (
        alone.questions[0],
        alone.answers[0],
        alone.styles[0],
    )
    assert whole.images is None or np.array_equal(whole.images[37], alone.images[0])
    other = generate_block(spec, "train", 4, 0, 50)
    assert (whole.answers, whole.questions) != (other.answers, other.questions)


@pytest.mark.parametrize("family", IMAGE_FAMILIES)
def test_no_image_is_in_two_splits_or_twice_in_one(family):
    seen = {}
    for split in ("train", "validation", "test"):
        images = generate_block(SyntheticSpec(family), split, 0, 0, 200).images
        assert images.shape == (200, 32, 32, 3) and images.dtype == np.uint8
        seen[split] = {image.tobytes() for image in images}
        assert len(seen[split]) == 200
        assert {int(image[0, 0, 0]) % 4 for image in images} == {
            ("train", "validation", "test").index(split)
        }
    assert not seen["train"] & seen["test"] and not seen["validation"] & seen["test"]


@pytest.mark.parametrize(("family", "level"), LEVELS)
def test_every_class_comes_up_and_about_equally_often(family, level):
    spec = SyntheticSpec(family, level)
    names, answers = answer_classes(spec), generate_block(spec, "train", 0, 0, 600).answers
    if not names:
        return
    assert set(answers) <= set(names) and len(set(names)) == len(names)
    if len(names) <= 32 and family != "arithmetic":  # sums are not equally frequent
        expected = 600 / len(names)
        chi_square = sum((answers.count(name) - expected) ** 2 / expected for name in names)
        assert chi_square < len(names) + 4 * (2 * len(names)) ** 0.5


def centre_colour(image, cell, side=16):
    row, column = divmod(cell, 2)
    return (
        image[row * side : (row + 1) * side, column * side : (column + 1) * side]
        .reshape(-1, 3)
        .astype(float)
    )


def test_the_colour_asked_for_is_the_colour_drawn():
    block = generate_block(SyntheticSpec("colour", noise=0.0), "train", 0, 0, 100)
    for image, answer in zip(block.images, block.answers, strict=True):
        brightest = image.reshape(-1, 3)[image.reshape(-1, 3).max(1).argmax()].astype(float)
        distance = {name: np.abs(brightest - rgb).sum() for name, rgb in painting.COLOURS.items()}
        assert min(distance, key=distance.get) == answer


def test_the_place_asked_for_holds_that_colour():
    block = generate_block(SyntheticSpec("position", noise=0.0), "train", 0, 0, 100)
    places = ["top left", "top right", "bottom left", "bottom right"]
    for image, question, answer in zip(block.images, block.questions, block.answers, strict=True):
        rgb = painting.COLOURS[question.split()[3]]
        nearest = [np.abs(centre_colour(image, cell) - rgb).sum(1).min() for cell in range(4)]
        assert places[int(np.argmin(nearest))] == answer


def test_as_many_cells_are_filled_as_are_counted():
    for level in (1, 2, 3):
        grid = level + 1
        block = generate_block(SyntheticSpec("count", level, side=48, noise=0.0), "train", 0, 0, 60)
        cells = block.images.reshape(60, grid, 48 // grid, grid, 48 // grid, 3).max((2, 4, 5))
        assert [(cell > 120).sum() for cell in cells] == list(map(int, block.answers))


def test_the_larger_shape_covers_more():
    for level in (1, 2, 3):
        block = generate_block(
            SyntheticSpec("compare", level, side=96, noise=0.0), "train", 0, 0, 60
        )
        bright = (block.images.max(-1) > 110).reshape(60, 96, 2, 48).sum((1, 3))
        assert [left > right for left, right in bright] == [
            answer == "yes" for answer in block.answers
        ]


def test_shapes_have_the_outline_that_they_are_named_after():
    """At a right angle from the centre, half-way out, and in the corner of the square around it."""
    u, v, r = np.array([0.0, 0.0, 6.0, 7.5]), np.array([0.0, -7.0, 0.0, 7.5]), np.full(4, 10.0)
    inside = {
        shape: tuple(painting.outline_distance(kind, u, v, r) < 0)
        for kind, shape in enumerate(painting.SHAPES)
    }
    assert inside == {
        "circle": (True, True, True, False),
        "square": (True, True, True, True),
        "triangle": (True, True, False, False),
        "diamond": (True, True, True, False),
        "cross": (True, True, True, False),
        "ring": (False, True, True, False),
    }


def test_digits_are_those_of_the_answer():
    """Read back by comparing the bright pixels' grid with the font."""
    block = generate_block(SyntheticSpec("digit", side=64, noise=0.0), "train", 0, 0, 60)
    for image, answer in zip(block.images, block.answers, strict=True):
        bright = image.max(-1) > 120
        rows, columns = np.flatnonzero(bright.any(1)), np.flatnonzero(bright.any(0))
        crop = bright[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        width = 1 if answer == "1" and crop.shape[1] * 3 < crop.shape[0] else 3
        y = ((np.arange(5) + 0.5) / 5 * crop.shape[0]).astype(int)
        x = ((np.arange(width) + 0.5) / width * crop.shape[1]).astype(int)
        assert np.array_equal(
            crop[np.ix_(y, x)], painting.DIGIT_FONT[int(answer)].astype(bool)[:, :width]
        )


@pytest.mark.parametrize("grid", [2, 3])
def test_drawn_jigsaws_follow_the_convention_of_the_jigsaw_task(grid):
    """Put back together by the answer, red grows to the right and green downwards."""
    side = 30 if grid == 3 else 32
    for example in SyntheticExamples(
        "j", SyntheticSpec(f"jigsaw{grid}", side=side, noise=0.0), "test", 0, 12
    ):
        shown = example.messages[0]["content"][0]["image"]
        whole = np.asarray(
            jigsaw.restore_tiles(shown, [int(n) for n in example.answer.split()], grid, grid)
        ).astype(float)
        red, green = np.median(whole[..., 0], axis=0), np.median(whole[..., 1], axis=1)
        assert (np.diff(red)[1:] >= 0).mean() > 0.9 and (np.diff(green)[1:] >= 0).mean() > 0.9


def test_facts_are_one_table_and_sums_are_right():
    assert (
        world_facts() == world_facts(0) != world_facts(1)
        and len(world_facts()) == len(CREATURES) == 64
    )
    assert (
        sorted(list(world_facts().values()).count(food) for food in set(world_facts().values()))
        == [2] * 32
    )
    for split in ("train", "test"):
        block = generate_block(SyntheticSpec("facts"), split, 0, 0, 100)
        assert all(
            world_facts()[question.split()[2]] == answer
            for question, answer in zip(block.questions, block.answers, strict=True)
        )
    mine = [
        make_synthetic_task(family="facts", world=world).load("train", limit=9, seed=3)[8].answer
        for world in (None, 3, 0)
    ]
    assert mine[0] == mine[1]  # None: the run's seed
    asked = {}
    for level in (1, 2, 3):
        for split in ("train", "test"):
            block = generate_block(SyntheticSpec("arithmetic", level), split, 0, 0, 400)
            asked[level, split] = set(block.questions)
            for question, answer in zip(block.questions, block.answers, strict=True):
                x, sign, y = re.fullmatch(r"what is (\d+) (plus|minus) (\d+)\?", question).groups()
                assert int(answer) == int(x) + int(y) * (1 if sign == "plus" else -1)
    assert not asked[2, "train"] & asked[2, "test"] and not asked[3, "train"] & asked[3, "test"]


def test_biased_labels_replace_a_fixed_half_of_the_classes():
    spec = SyntheticSpec("digit", bias=0.55)
    wrong = biased_classes(spec)
    assert len(wrong) == 5 and all(truth != label for truth, label in wrong.items())
    block = generate_block(spec, "train", 0, 0, 3000)
    pairs = list(zip(block.answers, block.labels, strict=True))
    changed = [truth != label for truth, label in pairs if truth in wrong]
    assert 0.5 < np.mean(changed) < 0.6
    assert all(label == truth or label == wrong.get(truth) for truth, label in pairs)
    assert np.array_equal(
        block.images, generate_block(SyntheticSpec("digit"), "train", 0, 0, 3000).images
    )


def test_styles_word_the_target_in_their_shares_and_leave_the_answer_bare():
    task = resolve_task(
        "base",
        {
            "base": {
                "task": "synthetic",
                "family": "shape",
                "styles": {"it is": 0.4, "answer :": 0.3, "i think": 0.3},
            }
        },
    )
    examples = task.load("train", limit=1000)
    shares = [
        np.mean([example.meta["style"] == style for example in examples])
        for style in ANSWER_STYLES[:3]
    ]
    assert np.allclose(shares, [0.4, 0.3, 0.3], atol=0.05)
    assert all(
        example.target == f"{example.meta['style']} {example.answer}" for example in examples
    )
    assert task.forced_prefix == "it is" and task.template == "none"
    assert (
        BUILT_IN_TASKS["synthetic_shape"].load("train")[0].target
        == BUILT_IN_TASKS["synthetic_shape"].load("train")[0].answer
    )


def test_the_verifier_is_lenient_on_style_and_strict_on_the_rest():
    for good in (
        "red",
        "it is red",
        " answer : red\n",
        "answer: red",
        "i think red",
        "the answer is red",
    ):
        assert styled_exact(good, "red") == 1.0, good
    for bad in (
        "",
        "it is",
        "red red",
        "it is red.",
        "it is i think red",
        "blue",
        "it is dark red",
        "bored",
    ):
        assert styled_exact(bad, "red") == 0.0, bad


def test_a_limit_asks_for_any_number_and_the_first_stay_the_same():
    task = BUILT_IN_TASKS["synthetic_count"]
    assert len(task.load("train", limit=25_000)) == 25_000
    short, long = task.load("test", limit=10), task.load("test", limit=200)
    assert [e.answer for e in short] == [e.answer for e in long][:10] and long[
        7
    ].id == "synthetic_count/test/7"
    assert (
        cloudpickle.loads(cloudpickle.dumps(long))[199].answer
        == long[199].answer
        == long[-1].answer
    )
    with pytest.raises(IndexError):
        short[10]


def test_sides_and_settings():
    (example,) = make_synthetic_task(family="jigsaw3", side=100).load("train", limit=1)
    assert example.messages[0]["content"][0]["image"].size == (100, 100)
    for wrong, message in [
        ({"family": "colours"}, "no family 'colours'.*did you mean 'colour'"),
        ({"family": "facts", "level": 2}, "level=2"),
        ({"bias": 1.5}, "bias=1.5"),
        ({"styles": {"maybe": 1.0}}, "styles: expected weights"),
        ({"family": "jigsaw3", "bias": 0.5}, "too many classes"),
    ]:
        with pytest.raises(ValueError, match=message):
            make_synthetic_task(**wrong)
    with pytest.raises(ValueError, match="no split 'dev'"):
        BUILT_IN_TASKS["synthetic_shape"].load("dev")


def test_drawing_is_fast_enough_to_draw_while_training():
    """5,000 images/s are asked for; the bound leaves room for a machine that is busy with other tests."""
    generate_block(SyntheticSpec("colour"), "train", 0, 0, 64)
    started = time.process_time()
    for block in range(10):
        generate_block(SyntheticSpec("colour"), "train", 0, 64 * block, 64 * (block + 1))
    assert 640 / (time.process_time() - started) > 2000
