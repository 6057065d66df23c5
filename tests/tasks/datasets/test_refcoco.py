"""RefCOCO's boxes are in pixels of the image that the model sees."""

import numpy as np
import pytest
from hub_fixtures import FIXTURES, REFCOCO, write
from PIL import Image, ImageDraw

from cptjax.common.images import ImageSettings
from cptjax.tasks.registry import BUILT_IN_TASKS, TASK_MAKERS
from cptjax.tasks.task import example_text


@pytest.mark.parametrize(
    ("size", "limits"),
    [((320, 240), (200_704, 1_003_520)), ((640, 480), (3136, 50_000)), ((90, 200), (784, 10_000))],
)
def test_boxes_are_pixels_of_the_image_that_the_processor_leaves_alone(tmp_path, size, limits):
    """The stated box covers the coloured part of the image as the model sees it."""
    image = Image.new("RGB", size, "black")
    ImageDraw.Draw(image).rectangle(
        (size[0] // 4, size[1] // 2, size[0] // 2 - 1, size[1] - 11), fill="white"
    )
    box = [size[0] // 4, size[1] // 2, size[0] // 4, size[1] // 2 - 10]
    row = FIXTURES["refcoco"][0][0][2][0] | {"image": image, "bbox": list(map(float, box))}
    write(tmp_path, [("RefCOCO/val", REFCOCO, [row])])
    task = TASK_MAKERS["refcoco"]("r", min_pixels=limits[0], max_pixels=limits[1])
    example = task.load("test", root=str(tmp_path))[0]
    shown = example.messages[0]["content"][0]["image"]
    assert ImageSettings(*limits).size(*shown.size) == shown.size[::-1]
    rows, columns = (np.flatnonzero((np.asarray(shown)[..., 0] > 127).any(axis)) for axis in (1, 0))
    assert (
        np.abs(
            np.array(example.answer) - [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        ).max()
        <= 1
    )


def test_each_expression_of_a_row_is_a_question_of_the_val_split(tmp_path):
    write(tmp_path, FIXTURES["refcoco"][0])
    examples = BUILT_IN_TASKS["refcoco"].load("test", root=str(tmp_path))
    assert [e.id for e in examples] == ["refcoco/test/469306-0", "refcoco/test/469306-1"]
    assert '"yellow shirt"' in example_text(examples[1]) and len(examples) == 2
    assert examples[0].answer == examples[1].answer
    with pytest.raises(ValueError, match="no split 'train'; it has test"):
        BUILT_IN_TASKS["refcoco"].load("train", root=str(tmp_path))
    other = TASK_MAKERS["refcoco"]("r", split="testA")
    assert len(other.load("train", root=str(tmp_path))) == 2
    with pytest.raises(
        ValueError, match=r"tasks\.r\.split: .*; got 'testB2'; did you mean 'testB'"
    ):
        TASK_MAKERS["refcoco"]("r", split="testB2")
