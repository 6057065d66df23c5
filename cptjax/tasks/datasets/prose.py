"""English prose that every Python has: paragraphs of its library's docstrings; for testing only.

The model is given the first sentence of a paragraph. Its score is the probability per byte of the
rest; nothing is generated. The paragraphs are those of the Python version that runs; of 109 in
Python 3.11, 105 are also in 3.12 and 3.13.
"""

import functools
import importlib
import inspect
import re
from collections.abc import Sequence
from typing import Any

from cptjax.tasks.synthetic.random_streams import hash_key
from cptjax.tasks.task import Examples, Task, user_turn
from cptjax.types import Example

MODULES = (
    "bdb cmd codecs configparser decimal difflib doctest fileinput heapq http.client "
    "http.cookiejar logging pdb smtplib socketserver string subprocess tempfile textwrap threading "
    "timeit traceback unittest urllib.request weakref"
).split()
LENGTHS = (200, 400)  # characters of a paragraph
PROSE_SHARE = 0.98  # of the characters are letters, spaces, commas and periods
INSTRUCTION = "Continue this text: "


def list_docstrings(module_name: str) -> list[str]:
    """Return the docstrings of a module, its classes and functions, and their methods."""
    module = importlib.import_module(module_name)
    objects = [value for _, value in sorted(vars(module).items())]
    own = [o for o in objects if getattr(o, "__module__", "") == module_name]
    methods = [m for o in own if inspect.isclass(o) for _, m in sorted(vars(o).items())]
    documented = [module, *own, *filter(callable, methods)]
    texts = [getattr(each, "__doc__", None) for each in documented]
    return [text for text in texts if isinstance(text, str)]


@functools.cache
def list_paragraphs() -> tuple[tuple[str, str], ...]:
    """Return (first sentence, rest) of each paragraph of prose, in an order by their hashes.

    So versions of Python with a few other paragraphs have nearly the same first rows.
    """
    found: dict[str, str] = {}
    for name in MODULES:
        for text in list_docstrings(name):
            for paragraph in re.split(r"\n\s*\n", text):
                words = " ".join(paragraph.split())
                first, *rest = re.split(r"(?<=\.) (?=[A-Z])", words, maxsplit=1)
                if is_prose(words) and rest:
                    found.setdefault(rest[0], first)
    return tuple(sorted(((f, r) for r, f in found.items()), key=lambda row: hash_key(*row)))


def is_prose(text: str) -> bool:
    """Return whether a text is a paragraph of English sentences rather than of code."""
    plain = sum(c.isalpha() or c in " ,." for c in text)
    return (
        LENGTHS[0] <= len(text) <= LENGTHS[1]
        and text[0].isupper()
        and text.endswith(".")
        and plain >= PROSE_SHARE * len(text)
    )


def load_paragraphs(
    name: str, split: str, root: str = "", limit: int | None = None, seed: int = 0
) -> Sequence[Example]:
    """Return the paragraphs, which are all test rows; no file is read."""
    if split != "test":
        raise ValueError(f"task {name}: no split {split!r}; prose is for testing only")
    return Examples(name, split, list_paragraphs()[:limit], build_prose_example)


def build_prose_example(row: tuple[str, str]) -> Example:
    first, rest = row
    return Example("", user_turn(INSTRUCTION + first), rest, rest)


def make_task(name: str = "prose", **fields: Any) -> Task:
    own = {"template": "none", "scorer": "likelihood"}
    return Task(name, functools.partial(load_paragraphs, name), **{**own, **fields})
