"""Windows over success counts, their blind control, and the online filter."""

import numpy as np
import pytest

from cptjax import filters

COUNTS = np.array([0, 1, 4, 7, 8, 8, 0, 0])


def keep(name, counts=COUNTS, lo=2, hi=7, **kw):
    return filters.offline(counts, name=name, samples=8, lo=lo, hi=hi, **kw)


def test_presets_and_window():
    for name, bounds in [("incompetent", (1, 8)), ("zero_variance", (1, 7)), ("window", (2, 7))]:
        mask, report = keep(name)
        np.testing.assert_array_equal(mask, [bounds[0] <= c <= bounds[1] for c in COUNTS])
        assert (report.lo, report.hi) == bounds
        assert (report.prompts, report.kept, report.never, report.always) == (8, mask.sum(), 3, 2)
        assert report.fraction == mask.sum() / 8


def test_the_control_keeps_as_many_and_looks_at_nothing():
    counts = np.random.default_rng(0).integers(0, 9, 1000)
    kept = keep("window", counts)[0]
    control = [keep("random", counts, seed=s)[0] for s in (0, 0, 1)]
    assert all(c.sum() == kept.sum() for c in control)
    np.testing.assert_array_equal(control[0], control[1])
    assert np.any(control[0] != control[2])
    share = lambda mask: (counts[mask] == 0).mean()
    assert share(kept) == 0 and abs(share(control[0]) - share(np.ones(1000, bool))) < 0.03
    np.testing.assert_array_equal(keep("random", np.sort(counts))[0], control[0])


def test_online_bounds_are_open_and_work_on_the_group_mean():
    accuracy = np.array([[0, 0], [0, 1], [1, 1], [0, 0.02], [0.98, 1.0]])
    np.testing.assert_array_equal(filters.online(accuracy), [False, True, False, False, False])
    np.testing.assert_array_equal(filters.online(accuracy, 0, 1), [False, True, False, True, True])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: keep("solvable"), "incompetent, zero_variance, window, random"),
        (lambda: keep("window", lo=5, hi=3), "0 <= lo <= hi <= samples=8"),
        (lambda: filters.bounds("zero_variance", 1, 0, 1), "at least 2"),
        (lambda: keep("window", counts=np.zeros(4, int)), "keeps none of 4 prompts .4 never and 0 always"),
        (lambda: keep("incompetent", counts=np.array([9])), "expected 0 to samples=8"),
        (lambda: filters.check_online(0.5, 0.5, 1), "0 <= lo < hi <= 1"),
        (lambda: filters.check_online(0.0, 1.0, -1), "0 or more"),
    ],
)
def test_bad_settings_are_one_clear_line(call, words):
    with pytest.raises(ValueError, match=words) as error:
        call()
    assert "\n" not in str(error.value)
