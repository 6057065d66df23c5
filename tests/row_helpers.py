"""Read every row of a split as a run does, and return the ones that cannot be used."""

from cptjax.common.images import ImageSettings
from cptjax.tasks.bad_rows import collect_bad_rows, make_bad_row
from cptjax.tasks.task import conversation_images


def find_bad_row(examples, index):
    """Decode a row's images and compute the size that the model sees."""
    try:
        for image in conversation_images(examples[index].messages):
            ImageSettings().size(*image.size)
    except ValueError as error:
        return make_bad_row(examples, index, error)
    return None


def bad_rows(examples):
    """Return the bad rows that loading found, then those whose images cannot be used."""
    return [*getattr(examples, "bad", ()), *collect_bad_rows(examples, find_bad_row, "check rows")]
