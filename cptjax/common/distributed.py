"""Exchange Python values between the processes of a run."""

import pickle
from typing import Any

import jax
import numpy as np


def gather_objects(value: Any) -> list[Any]:
    """Return the values of all processes, in order; each process passes one picklable value."""
    if jax.process_count() == 1:
        return [value]
    from jax.experimental import multihost_utils

    pickled = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = multihost_utils.process_allgather(np.asarray(pickled.size))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: pickled.size] = pickled
    rows = multihost_utils.process_allgather(padded)
    return [pickle.loads(row[: int(size)].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def concat_lists(parts: list[list[Any]]) -> list[Any]:
    """Return one list with the elements of all parts, such as those of `gather_objects`."""
    return [x for part in parts for x in part]


def is_main_process() -> bool:
    """Return whether this process writes the run's files."""
    return jax.process_index() == 0
