"""Each family's image shows what its question and answer say."""

import re

import numpy as np
import pytest

from cptjax.tasks.datasets import jigsaw
from cptjax.tasks.synthetic import painting
from cptjax.tasks.synthetic.dataset import (
    SyntheticExamples,
    generate_block,
    make_synthetic_task,
)
from cptjax.tasks.synthetic.families import (
    CREATURES,
    SYNTHETIC_FAMILIES,
    SyntheticSpec,
    answer_classes,
    world_facts,
)

LEVELS = [
    (family, level)
    for family in SYNTHETIC_FAMILIES
    for level in (1, 2, 3)
    if (family, level) not in (("facts", 2), ("facts", 3))
]


@pytest.mark.parametrize(("family", "level"), LEVELS)
def test_every_class_occurs_about_equally_often(family, level):
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


def test_the_answer_is_the_painted_colour():
    block = generate_block(SyntheticSpec("colour", noise=0.0), "train", 0, 0, 100)
    for image, answer in zip(block.images, block.answers, strict=True):
        brightest = image.reshape(-1, 3)[image.reshape(-1, 3).max(1).argmax()].astype(float)
        distance = {name: np.abs(brightest - rgb).sum() for name, rgb in painting.COLOURS.items()}
        assert min(distance, key=distance.get) == answer


def test_the_shape_at_the_answered_position_has_the_colour_in_question():
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
def test_synthetic_jigsaws_follow_the_convention_of_the_jigsaw_task(grid):
    """In the image that the answer restores, red grows to the right and green downwards."""
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
