"""Painted shapes have the outline of their name."""

import numpy as np

from cptjax.tasks.synthetic import painting


def test_shapes_have_the_outline_that_they_are_named_after():
    """At a right angle from the centre, half-way out, and in the corner of the square around it."""
    u, v, r = np.array([0.0, 0.0, 6.0, 7.5]), np.array([0.0, -7.0, 0.0, 7.5]), np.full(4, 10.0)
    inside = {
        shape: tuple(painting.outline_distance(kind, u, v, r) < 0)
        for kind, shape in enumerate(painting.SHAPES)
    }
    assert inside == {
        "circle": (True, True, True, False),
        "square": (True, True, True, True),
        "triangle": (True, True, False, False),
        "diamond": (True, True, True, False),
        "cross": (True, True, True, False),
        "ring": (False, True, True, False),
    }
