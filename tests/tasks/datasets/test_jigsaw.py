"""Jigsaw puzzles: the answer restores the image, for every source of images."""

import itertools

import numpy as np
import pytest
from hub_fixtures import FIXTURES, write
from PIL import Image

from cptjax.tasks.datasets import jigsaw
from cptjax.tasks.registry import BUILT_IN_TASKS, TASK_MAKERS, resolve_task


def puzzle_image(width, height):
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("permutation", itertools.permutations(range(4)))
def test_every_2x2_jigsaw_can_be_put_back_together(permutation):
    image = puzzle_image(13, 9)
    shown = jigsaw.shuffle_tiles(image, permutation, 2, 2)
    assert np.array_equal(
        jigsaw.restore_tiles(shown, jigsaw.answer_of_permutation(permutation), 2, 2),
        jigsaw.crop_to_grid(image, 2, 2),
    )


def test_random_3x3_and_uneven_jigsaws_can_be_put_back_together():
    rng = np.random.default_rng(1)
    for rows, cols, size in [(3, 3, (30, 30)), (3, 3, (50, 31)), (2, 5, (47, 20)), (4, 1, (5, 19))]:
        image = puzzle_image(*size)
        for _ in range(10):
            permutation = rng.permutation(rows * cols)
            shown = jigsaw.shuffle_tiles(image, permutation, rows, cols)
            assert np.array_equal(
                jigsaw.restore_tiles(shown, jigsaw.answer_of_permutation(permutation), rows, cols),
                jigsaw.crop_to_grid(image, rows, cols),
            )


def test_the_jigsaw_of_the_docstring():
    """The original a b / c d shown as d c / a b is answered 3 4 2 1."""
    image = Image.fromarray(np.array([[[1] * 3, [2] * 3], [[3] * 3, [4] * 3]], np.uint8))
    shown = jigsaw.shuffle_tiles(image, (3, 2, 0, 1), 2, 2)
    assert np.asarray(shown)[..., 0].tolist() == [[4, 3], [1, 2]]
    assert jigsaw.answer_of_permutation((3, 2, 0, 1)) == [3, 4, 2, 1]
    for place, tile in enumerate(jigsaw.answer_of_permutation((3, 2, 0, 1))):
        assert (
            np.asarray(shown).reshape(4, 3)[tile - 1, 0]
            == np.asarray(image).reshape(4, 3)[place, 0]
        )


def test_jigsaws_of_a_folder_of_another_task_and_of_synthetic_images(tmp_path):
    for number in range(40):
        puzzle_image(31, 20).save(tmp_path / f"{number}.png")
    task = resolve_task(
        "puzzle", {"puzzle": {"task": "jigsaw", "rows": 2, "cols": 3, "images": str(tmp_path)}}
    )
    train, test = (task.load(split) for split in ("train", "test"))
    assert (
        len(train) + len(test) == 40
        and test
        and not {e.meta["source"] for e in train} & {e.meta["source"] for e in test}
    )
    example = train[0]
    shown = example.messages[0]["content"][0]["image"]
    assert (
        shown.size == (30, 20)
        and example.target == " ".join(map(str, example.answer)) != "1 2 3 4 5 6"
    )
    restored = jigsaw.restore_tiles(shown, example.answer, 2, 3)
    assert np.array_equal(
        restored, jigsaw.crop_to_grid(Image.open(tmp_path / example.meta["source"]), 2, 3)
    )
    assert train[0].answer == task.load("train")[0].answer

    write(tmp_path, FIXTURES["pathvqa"][0])
    other = TASK_MAKERS["jigsaw"]("other", images="pathvqa").load("test", root=str(tmp_path))
    assert len(other) == 1 and sorted(other[0].answer) == list(range(1, 10))
    write(tmp_path, FIXTURES["textvqa"][0])  # photographs by default
    by_default = BUILT_IN_TASKS["jigsaw"].load("test", root=str(tmp_path))
    assert by_default[0].meta["source"].startswith("textvqa/test/")
    generated = BUILT_IN_TASKS["synthetic_jigsaw"].load("test", limit=3)
    assert len(generated) == 3 and generated[2].id == "synthetic_jigsaw/test/2"
    with pytest.raises(ValueError, match="expected a folder, a task or"):
        TASK_MAKERS["jigsaw"]("bad", images="nowhere").load("train")
    with pytest.raises(ValueError, match="no images for split 'validation'"):
        task.load("validation")
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match="no images for split 'test'"):
        task.load("test")
