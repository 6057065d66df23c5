"""Read every row of a split as a run does, and return the ones that cannot be used."""

from cptjax.common.images import ImageSettings, open_image
from cptjax.tasks.bad_rows import make_bad_row
from cptjax.tasks.task import conversation_images


def find_bad_row(examples, index):
    """Decode a row's images and compute the size that the model sees."""
    try:
        for source in conversation_images(examples[index].messages):
            ImageSettings().size(*open_image(source).size)
    except ValueError as error:
        return make_bad_row(examples, index, error)
    return None


def bad_rows(examples):
    """Return the bad rows that loading found, then those whose images cannot be used."""
    checked = [find_bad_row(examples, index) for index in range(len(examples))]
    return [*getattr(examples, "bad", ()), *(row for row in checked if row is not None)]
