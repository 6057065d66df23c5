"""Means as sums with counts add up over micro-batches."""

import math

import numpy as np

from cptjax.types import Mean, add_means


def test_means_of_unequal_micro_batches_add_up_to_the_whole():
    values = np.arange(10.0)
    whole = Mean(values.sum(), len(values))
    parts = [{"x": Mean(p.sum(), len(p))} for p in (values[:1], values[1:4], values[4:])]
    assert add_means(parts)["x"] == whole == sum(p["x"] for p in parts)
    assert whole.value == 4.5 and math.isnan(Mean(0, 0).value)
