"""Windows of success counts, their random control, and the online filter."""

import numpy as np
import pytest

from cptjax.training.algorithms import prompt_filters

COUNTS = np.array([0, 1, 4, 7, 8, 8, 0, 0])


def keep(name, counts=COUNTS, **kw):
    return prompt_filters.keep_prompts(counts, name=name, samples=8, **kw)


def test_presets_and_window():
    for name, given, bounds in [
        ("incompetent", {}, (1, 8)),
        ("zero_variance", {}, (1, 7)),
        ("window", dict(lo=2, hi=7), (2, 7)),
        ("window", {}, (1, 8)),
    ]:
        np.testing.assert_array_equal(
            keep(name, **given), [bounds[0] <= c <= bounds[1] for c in COUNTS]
        )
        assert (
            prompt_filters.success_window(name, 8, **given)
            == prompt_filters.success_window(name, 8, *bounds)
            == bounds
        )


def test_equal_sets_of_solvable_unsolvable_and_random_prompts():
    """The released filter of RIF-RFT compares sets of min(solvable, unsolvable, cap) prompts."""
    counts = np.random.default_rng(0).integers(0, 3, 300)  # about 100 never, 200 sometimes
    never = int((counts == 0).sum())
    filters = {
        "solvable": dict(name="incompetent"),
        "unsolvable": dict(name="unsolvable"),
        "random": dict(name="random", lo=1, hi=2),
    }
    for most, size in ((None, never), (7500, never), (40, 40)):
        kept = {
            k: prompt_filters.keep_prompts(counts, samples=2, balanced=True, most=most, **f)
            for k, f in filters.items()
        }
        assert {int(mask.sum()) for mask in kept.values()} == {size}
        assert counts[kept["solvable"]].min() >= 1 and counts[kept["unsolvable"]].max() == 0
        assert 0 < (counts[kept["random"]] == 0).sum() < size
    with pytest.raises(ValueError, match="keeps none of 5 prompts, since it drops none"):
        keep("incompetent", np.ones(5, int), balanced=True)


def test_the_control_keeps_as_many_prompts_without_using_the_counts():
    counts = np.random.default_rng(0).integers(0, 9, 1000)
    kept = keep("window", counts, lo=2, hi=7)
    control = [keep("random", counts, lo=2, hi=7, seed=s) for s in (0, 0, 1)]
    assert all(c.sum() == kept.sum() for c in control)
    np.testing.assert_array_equal(control[0], control[1])
    assert np.any(control[0] != control[2])
    share = lambda mask: (counts[mask] == 0).mean()
    assert share(kept) == 0 and abs(share(control[0]) - share(np.ones(1000, bool))) < 0.03
    np.testing.assert_array_equal(keep("random", np.sort(counts), lo=2, hi=7), control[0])


def test_online_bounds_are_open_and_work_on_the_group_mean():
    accuracy = np.array([[0, 0], [0, 1], [1, 1], [0, 0.02], [0.98, 1.0]])
    np.testing.assert_array_equal(
        prompt_filters.keep_groups(accuracy), [False, True, False, False, False]
    )
    np.testing.assert_array_equal(
        prompt_filters.keep_groups(accuracy, 0, 1), [False, True, False, True, True]
    )


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: prompt_filters.check_prompt_filter("solvable", 8),
            "incompetent, zero_variance, window, random",
        ),
        (
            lambda: prompt_filters.check_prompt_filter("window", "8"),
            "samples='8'.*expected whole numbers",
        ),
        (
            lambda: prompt_filters.check_prompt_filter("incompetent", 8, lo=2),
            "'incompetent' means lo=1, hi=8 of samples=8; leave them out",
        ),
        (
            lambda: prompt_filters.check_prompt_filter("zero_variance", 8, hi=8),
            "'zero_variance' means lo=1, hi=7",
        ),
        (
            lambda: prompt_filters.check_prompt_filter("incompetent", like="runs/rif"),
            "expected name='random' and the folder of a run",
        ),
        (
            lambda: prompt_filters.check_prompt_filter("random", 8, like="runs/rif"),
            "without samples, lo and hi",
        ),
        (lambda: keep("window", lo=5, hi=3), "0 <= lo <= hi <= samples=8"),
        (lambda: prompt_filters.success_window("zero_variance", 1), "at least 2"),
        (
            lambda: keep("window", counts=np.zeros(4, int)),
            "keeps none of 4 prompts .4 never and 0 always",
        ),
        (lambda: keep("incompetent", counts=np.array([9])), "expected 0 to samples=8"),
        (lambda: prompt_filters.check_online_filter(0.5, 0.5, 1), "0 <= lo < hi <= 1"),
        (lambda: prompt_filters.check_online_filter(0.0, 1.0, -1), "0 or more"),
    ],
)
def test_bad_settings_are_one_clear_line(call, words):
    with pytest.raises(ValueError, match=words) as error:
        call()
    assert "\n" not in str(error.value)
