"""Permutations that are a function of a seed alone, the same on every machine and in every library version."""

import functools

import numpy as np


@functools.lru_cache(maxsize=16)
def permutation(size: int, seed: tuple[int, ...]) -> np.ndarray:
    """Returns 0 ... size - 1 shuffled by seed, the same in every version of every library."""
    # numpy promises the raw bits of its generators, not `permutation`; grain's shuffle takes milliseconds a row in short lists.
    return np.argsort(np.random.PCG64(np.random.SeedSequence(seed)).random_raw(size), kind="stable")
