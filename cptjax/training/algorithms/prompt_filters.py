"""Prompt filters: offline by success counts (RIF-RFT), online by group accuracy (DAPO).

    offline, before a stage: sample K responses per prompt, keep it if lo <= number correct <= hi
        incompetent      1 .. K      drop prompts that are never solved (RIF-RFT's released code)
        zero_variance    1 .. K-1    also drop prompts that are always solved
        unsolvable       0 .. 0      keep only prompts that are never solved
        window           lo .. hi
        random           keep as many prompts as lo .. hi would keep, or as another run kept, chosen
                         at random: the control
        balanced, most   keep at most as many as are dropped, and at most so many, chosen at random
    online, at each step: keep groups whose mean accuracy is strictly between lo and hi

All filters use the accuracy part of a reward, never its format part.
"""

from typing import Any

import numpy as np

MAX_SAMPLES = 2**20  # responses per prompt
PROMPT_FILTERS = ("incompetent", "zero_variance", "window", "random", "unsolvable")
# Settings of a filter beside its name and window.
FILTER_OPTIONS = ("like", "corpus", "balanced", "most", "top_p")


def check_prompt_filter(
    name: str,
    samples: int = 0,
    lo: int | None = None,
    hi: int | None = None,
    like: str = "",
    **options: Any,
) -> None:
    """Refuse offline filters without a window, and settings that a filter of this name ignores."""
    if name not in PROMPT_FILTERS:
        raise ValueError(f"method.filter.name={name!r}: choose one of {', '.join(PROMPT_FILTERS)}")
    if like:
        window = samples or (lo, hi) != (None, None) or options
        if name != "random" or not isinstance(like, str) or window:
            raise ValueError(
                f"method.filter.like={like!r}: expected name='random' and the folder of a run, "
                f"without samples, lo and hi{', '.join(['', *options])}"
            )
        return
    success_window(name, samples, lo, hi)
    _check_filter_options(**options)


def _check_filter_options(
    corpus: str = "", balanced: bool = False, most: int | None = None, top_p: float | None = None
) -> None:
    if type(balanced) is not bool or (most is not None and (type(most) is not int or most < 1)):
        raise ValueError(
            f"method.filter balanced={balanced!r}, most={most!r}: expected True or False, and a "
            "number of prompts"
        )
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"method.filter.top_p={top_p!r}: expected a share in (0, 1]")
    if corpus and top_p is not None:
        raise ValueError(
            f"method.filter.corpus={corpus!r}: its responses are already sampled; leave out top_p"
        )


def check_online_filter(lo: float, hi: float, max_refills: int) -> None:
    """Refuse an online filter whose window is empty."""
    numbers = all(isinstance(bound, int | float) for bound in (lo, hi))
    if not numbers or not 0 <= lo < hi <= 1:
        raise ValueError(
            f"method.online_filter lo={lo}, hi={hi}: expected mean accuracies with "
            "0 <= lo < hi <= 1"
        )
    if type(max_refills) is not int or max_refills < 0:
        raise ValueError(f"method.online_filter.max_refills={max_refills}: expected 0 or more")


def success_window(
    name: str, samples: int, lo: int | None = None, hi: int | None = None
) -> tuple[int, int]:
    """Return the window of success counts: by name, or else as given, by default 1 to all."""
    least = 2 if name == "zero_variance" else 1
    if (
        any(n is not None and type(n) is not int for n in (samples, lo, hi))
        or not least <= samples <= MAX_SAMPLES
    ):
        raise ValueError(
            f"method.filter samples={samples!r}, lo={lo!r}, hi={hi!r}: expected whole numbers, "
            f"and for {name!r} at least {least} responses per prompt"
        )
    given = (1 if lo is None else lo, samples if hi is None else hi)
    named = {"incompetent": (1, samples), "zero_variance": (1, samples - 1), "unsolvable": (0, 0)}
    window = named.get(name, given)
    if lo not in (None, window[0]) or hi not in (None, window[1]):
        raise ValueError(
            f"method.filter lo={lo}, hi={hi}: {name!r} means lo={window[0]}, hi={window[1]} of "
            f"samples={samples}; leave them out, or choose name='window'"
        )
    if not 0 <= window[0] <= window[1] <= samples:
        raise ValueError(
            f"method.filter lo={window[0]}, hi={window[1]}: "
            f"expected 0 <= lo <= hi <= samples={samples}"
        )
    return window


def keep_prompts(
    correct: np.ndarray,
    *,
    name: str,
    samples: int,
    lo: int | None = None,
    hi: int | None = None,
    balanced: bool = False,
    most: int | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Return a mask [Q] of the prompts to keep, from the number [Q] of correct responses each.

    `samples` is the number of responses per prompt.
    """
    lo, hi = success_window(name, samples, lo, hi)
    correct = np.asarray(correct)
    if correct.size and not 0 <= correct.min() <= correct.max() <= samples:
        raise ValueError(
            f"success counts from {correct.min()} to {correct.max()}: "
            f"expected 0 to samples={samples}"
        )
    keep = (correct >= lo) & (correct <= hi)
    if not keep.any():
        raise ValueError(
            f"method.filter={name!r} keeps none of {len(keep)} prompts "
            f"({(correct == 0).sum()} never and {(correct == samples).sum()} always solved in "
            f"{samples} responses): widen lo={lo}, hi={hi} or take more samples"
        )
    inside = int(keep.sum())
    count = min(inside, len(keep) - inside if balanced else inside, most or inside)
    if not count:
        raise ValueError(
            f"method.filter={name!r} with balanced=True keeps none of {len(keep)} prompts, "
            "since it drops none: set balanced=False"
        )
    if name == "random":
        return keep_random_prompts(np.ones(len(keep), bool), count, seed)
    return keep if count == inside else keep_random_prompts(keep, count, seed)


def keep_random_prompts(candidates: np.ndarray, kept: int, seed: int) -> np.ndarray:
    """Return a mask [Q] that keeps `kept` of the candidate prompts [Q], chosen at random."""
    keep, rows = np.zeros(len(candidates), bool), np.flatnonzero(candidates)
    keep[rows[np.random.default_rng(seed).permutation(len(rows))[:kept]]] = True
    return keep


def keep_groups(accuracy: np.ndarray, lo: float = 0.01, hi: float = 0.99) -> np.ndarray:
    """Return a mask [Q] of the groups to keep, by the mean of their accuracies [Q, G]."""
    mean = np.asarray(accuracy).mean(1)
    return (mean > lo) & (mean < hi)
