"""RefCOCO's boxes are in pixels of the image that the model sees."""

import numpy as np
import pytest
from hub_fixtures import FIXTURES, REFCOCO, write
from PIL import Image, ImageDraw

from cptjax.common.images import ImageSettings
from cptjax.tasks.registry import TASK_MAKERS


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
    write(tmp_path, [("RefCOCO/testA", REFCOCO, [row])])
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
