"""A memory is a uniform sample of all rows so far, and stays within its budget."""

import numpy as np
import pytest

from configs import base
from cptjax.training.algorithms.continual_learning import memory
from cptjax.training.algorithms.continual_learning.agem import AGEM
from cptjax.training.algorithms.continual_learning.der import DER
from cptjax.training.algorithms.continual_learning.er import ER
from cptjax.training.algorithms.continual_learning.table import check_methods

METHODS = [ER(max_bytes=5000, tokens=7), DER(max_bytes=5000, tokens=7, top_k=5), AGEM(rows=9)]


def reservoir(sizes, capacity, seed):
    """The rows, numbered over all stages, that a memory has after stages of these sizes."""
    held, seen = np.full(capacity, -1), 0
    for stage, size in enumerate(sizes, 1):
        slots, rows = memory.sample_reservoir(seen, size, capacity, (seed, stage))
        held[slots] = seen + rows
        seen += size
    return held


@pytest.mark.parametrize("sizes", [(2, 5, 4), (11,)], ids=str)
def test_after_every_stage_the_memory_is_a_uniform_sample_without_replacement(sizes):
    runs, capacity, total = 3000, 4, sum(sizes)
    held = np.array([reservoir(sizes, capacity, seed) for seed in range(runs)])
    assert held.min() >= 0 and all(len(set(rows)) == capacity for rows in held.tolist())
    counts = np.bincount(held.ravel(), minlength=total)
    expected = runs * capacity / total
    # Each row is a binomial of `runs`; 4.5 standard deviations for 11 rows.
    assert np.abs(counts - expected).max() < 4.5 * np.sqrt(expected * (1 - capacity / total))
    pairs = np.zeros((total, total))
    for rows in held:
        pairs[np.ix_(rows, rows)] += 1
    chance = capacity * (capacity - 1) / (total * (total - 1))
    off = pairs[np.triu_indices(total, 1)]
    assert np.abs(off - runs * chance).max() < 4.5 * np.sqrt(runs * chance)


def test_rows_that_fit_are_all_kept_in_order():
    assert reservoir((2, 3), 8, seed=0).tolist() == [0, 1, 2, 3, 4, -1, -1, -1]
    assert [x.tolist() for x in memory.sample_reservoir(2, 3, 8, (0, 2))] == [[2, 3, 4], [0, 1, 2]]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_the_arrays_have_at_most_the_budget_and_no_row_less_than_fits(method):
    arrays = memory.empty_memory(method.memory)
    size = sum(array.nbytes for array in arrays.values())
    assert len(arrays["tokens"]) == method.memory.rows and memory.filled_rows(arrays) == 0
    per_row = sum(array[0].nbytes for array in arrays.values() if array.ndim)
    if method.max_bytes:
        assert method.max_bytes - per_row < size <= method.max_bytes
    else:
        assert method.memory.rows == method.rows
    assert size == memory.memory_bytes(method.memory)


REFUSED = [
    ("replay", dict(name="er"), "either rows or max_bytes, got rows=None, max_bytes=None"),
    ("replay", dict(name="der", rows=3, max_bytes=10**6), "either rows or max_bytes"),
    ("replay", dict(name="derpp", max_bytes=1000), "expected at least .*, for one row"),
    ("replay", dict(name="er", rows=0), "rows=0: expected at least 1"),
    ("replay", dict(name="er", rows=3, batch=0), "batch=0: expected at least 1"),
    ("replay", dict(name="er", rows=3, coef=0.0), "does nothing"),
    ("replay", dict(name="er", rows=3, top_k=2), "top_k=2 is not a setting of 'er'"),
    ("replay", dict(name="der", rows=3, alpha=0.0), "alpha=0.0: expected a number above 0"),
    ("replay", dict(name="der", rows=3, top_k=0), "top_k=0: expected at least 1 token"),
    ("replay", dict(name="derpp", rows=3, beta=0.0), "set name='der'"),
    ("gradient", dict(name="agem"), "either rows or max_bytes"),
]


@pytest.mark.parametrize(("entry", "settings", "words"), REFUSED)
def test_bad_settings_are_one_clear_line(entry, settings, words):
    c = base.get_config()
    c.method.update(base.METHODS["sft"] | {entry: settings})
    with pytest.raises(ValueError, match=words) as error:
        check_methods(c)
    assert "\n" not in str(error.value)


def test_two_methods_with_a_memory_are_refused():
    c = base.get_config()
    two = {"replay": dict(name="er", rows=3), "gradient": dict(name="agem", rows=3)}
    c.method.update(base.METHODS["sft"] | two)
    with pytest.raises(ValueError, match="one method with a memory, got er and agem"):
        check_methods(c)
