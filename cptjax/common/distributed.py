"""What several processes tell each other: every process runs the same program, each on its own rows."""

import pickle
from typing import Any

import jax
import numpy as np


def gather_objects(value: Any) -> list[Any]:
    """The value of every process, in order; any picklable value, made by ourselves."""
    if jax.process_count() == 1:
        return [value]
    from jax.experimental import multihost_utils

    mine = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = multihost_utils.process_allgather(np.asarray(mine.size))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: mine.size] = mine
    return [
        pickle.loads(row[: int(n)].tobytes())
        for row, n in zip(multihost_utils.process_allgather(padded), sizes, strict=True)
    ]


def concat_lists(parts: list[list[Any]]) -> list[Any]:
    return [x for part in parts for x in part]


def is_main_process() -> bool:
    """Whether this process writes the run's files."""
    return jax.process_index() == 0
