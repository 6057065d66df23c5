"""A small file of a user's rows, and the rows of it that cannot be used."""

import json

from cptjax.common.images import ImageSettings, open_image
from cptjax.tasks.bad_rows import make_bad_row
from cptjax.tasks.registry import resolve_task
from cptjax.tasks.task import conversation_images

RED = (200, 30, 30)


def row(**changes):
    return {"prompt": "<image>What colour?", "images": ["a.png"], "answer": "red"} | changes


def write(folder, *rows, name="train.jsonl"):
    lines = [
        each if isinstance(each, str) else json.dumps(each, ensure_ascii=False) for each in rows
    ]
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(folder / name)


def load(source, split="train", seed=0, limit=None, outside=(), **settings):
    tasks = {"mine": {"train": source, **settings}}
    return resolve_task("mine", tasks, outside_images=outside).load(split, seed=seed, limit=limit)


def only_bad(examples):
    (bad,) = bad_rows(examples)
    return bad


def pixel(example, part=0):
    return open_image(example.messages[0]["content"][part]["image"]).getpixel((0, 0))


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
