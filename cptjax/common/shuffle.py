"""Shuffle by a seed, with the same result on every machine and with every library version."""

import functools

import numpy as np


@functools.lru_cache(maxsize=16)
def permutation(size: int, seed: tuple[int, ...]) -> np.ndarray:
    """Return 0 ... size - 1, shuffled by the seed."""
    # numpy guarantees stable raw bits of its generators but not a stable `permutation`. Grain's
    # shuffle takes milliseconds per row for short lists.
    return np.argsort(np.random.PCG64(np.random.SeedSequence(seed)).random_raw(size), kind="stable")
