"""Prompt filters: offline by success counts (RIF-RFT), online by group accuracy (DAPO).

    offline, before a stage: sample K responses per prompt, keep it if lo <= number correct <= hi
        incompetent      1 .. K      drop prompts that are never solved (RIF-RFT's released code)
        zero_variance    1 .. K-1    also drop prompts that are always solved
        window           lo .. hi
        random           keep as many prompts as lo .. hi would keep, or as another run kept, chosen
                         at random: the control
    online, at each step: keep groups whose mean accuracy is strictly between lo and hi

All filters use the accuracy part of a reward, never its format part.
"""

import numpy as np

PROMPT_FILTERS = ("incompetent", "zero_variance", "window", "random")


def check_prompt_filter(
    name: str, samples: int = 0, lo: int | None = None, hi: int | None = None, like: str = ""
) -> None:
    """Refuse offline filters without a window, and settings that a filter of this name ignores."""
    if name not in PROMPT_FILTERS:
        raise ValueError(f"method.filter.name={name!r}: choose one of {', '.join(PROMPT_FILTERS)}")
    if not like:
        success_window(name, samples, lo, hi)
    elif name != "random" or not isinstance(like, str) or samples or (lo, hi) != (None, None):
        raise ValueError(
            f"method.filter.like={like!r}: expected name='random' and the folder of a run, without "
            "samples, lo and hi"
        )


def check_online_filter(lo: float, hi: float, max_refills: int) -> None:
    """Refuse an online filter whose window is empty."""
    if not 0 <= lo < hi <= 1:
        raise ValueError(
            f"method.online_filter lo={lo}, hi={hi}: expected mean accuracies with "
            "0 <= lo < hi <= 1"
        )
    if max_refills < 0:
        raise ValueError(f"method.online_filter.max_refills={max_refills}: expected 0 or more")


def success_window(
    name: str, samples: int, lo: int | None = None, hi: int | None = None
) -> tuple[int, int]:
    """Return the window of success counts: by name, or else as given, by default 1 to all."""
    least = 2 if name == "zero_variance" else 1
    if any(n is not None and type(n) is not int for n in (samples, lo, hi)) or samples < least:
        raise ValueError(
            f"method.filter samples={samples!r}, lo={lo!r}, hi={hi!r}: expected whole numbers, "
            f"and for {name!r} at least {least} responses per prompt"
        )
    given = (1 if lo is None else lo, samples if hi is None else hi)
    window = {"incompetent": (1, samples), "zero_variance": (1, samples - 1)}.get(name, given)
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
    return keep_random_prompts(len(keep), int(keep.sum()), seed) if name == "random" else keep


def keep_random_prompts(prompts: int, kept: int, seed: int) -> np.ndarray:
    """Return a mask [prompts] that keeps `kept` prompts, chosen at random."""
    keep = np.zeros(prompts, bool)
    keep[np.random.default_rng(seed).permutation(prompts)[:kept]] = True
    return keep


def keep_groups(accuracy: np.ndarray, lo: float = 0.01, hi: float = 0.99) -> np.ndarray:
    """Return a mask [Q] of the groups to keep, by the mean of their accuracies [Q, G]."""
    mean = np.asarray(accuracy).mean(1)
    return (mean > lo) & (mean < hi)
