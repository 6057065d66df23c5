"""Which prompts are worth learning from: offline by success counts (RIF-RFT), online by group accuracy (DAPO).

    offline, before a stage     K answers per prompt, keep iff lo <= number correct <= hi
        incompetent             1 .. K      only what the policy never solves goes (RIF-RFT's released code)
        zero_variance           1 .. K-1    what it always solves goes too
        window                  lo .. hi
        random                  as many prompts as lo .. hi would keep, or as another run kept, drawn blindly: the control
    online, at each step        keep groups whose mean accuracy lies strictly between lo and hi

All look at the accuracy part of a reward, never at its format part.
"""

import numpy as np

PROMPT_FILTERS = ("incompetent", "zero_variance", "window", "random")


def check_prompt_filter(
    name: str, samples: int = 0, lo: int | None = None, hi: int | None = None, like: str = ""
) -> None:
    """Refuse filters without a window, and settings that a name does not look at."""
    if name not in PROMPT_FILTERS:
        raise ValueError(f"method.filter.name={name!r}: choose one of {', '.join(PROMPT_FILTERS)}")
    if not like:
        success_window(name, samples, lo, hi)
    elif name != "random" or not isinstance(like, str) or samples or (lo, hi) != (None, None):
        raise ValueError(
            f"method.filter.like={like!r}: expected name='random' and the folder of a run, without samples, lo and hi"
        )


def check_online_filter(lo: float, hi: float, max_refills: int) -> None:
    if not 0 <= lo < hi <= 1:
        raise ValueError(
            f"method.online_filter lo={lo}, hi={hi}: expected mean accuracies with 0 <= lo < hi <= 1"
        )
    if max_refills < 0:
        raise ValueError(f"method.online_filter.max_refills={max_refills}: expected 0 or more")


def success_window(
    name: str, samples: int, lo: int | None = None, hi: int | None = None
) -> tuple[int, int]:
    """The window of success counts: what the name stands for, else as given, else 1 to all."""
    if any(n is not None and type(n) is not int for n in (samples, lo, hi)) or samples < 1 + (
        name == "zero_variance"
    ):
        raise ValueError(
            f"method.filter samples={samples!r}, lo={lo!r}, hi={hi!r}: expected whole numbers, and for {name!r} at least "
            f"{1 + (name == 'zero_variance')} answers per prompt"
        )
    given = (1 if lo is None else lo, samples if hi is None else hi)
    window = {"incompetent": (1, samples), "zero_variance": (1, samples - 1)}.get(name, given)
    if lo not in (None, window[0]) or hi not in (None, window[1]):
        raise ValueError(
            f"method.filter lo={lo}, hi={hi}: {name!r} stands for lo={window[0]}, hi={window[1]} of samples={samples}; leave them out, or "
            "choose name='window'"
        )
    if not 0 <= window[0] <= window[1] <= samples:
        raise ValueError(
            f"method.filter lo={window[0]}, hi={window[1]}: expected 0 <= lo <= hi <= samples={samples}"
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
    """Which prompts to keep [Q] given how many of `samples` answers were correct [Q]."""
    lo, hi = success_window(name, samples, lo, hi)
    correct = np.asarray(correct)
    if correct.size and not 0 <= correct.min() <= correct.max() <= samples:
        raise ValueError(
            f"success counts from {correct.min()} to {correct.max()}: expected 0 to samples={samples}"
        )
    keep = (correct >= lo) & (correct <= hi)
    if not keep.any():
        raise ValueError(
            f"method.filter={name!r} keeps none of {len(keep)} prompts ({(correct == 0).sum()} never and {(correct == samples).sum()} "
            f"always solved in {samples} answers): widen lo={lo}, hi={hi} or draw more samples"
        )
    return keep_random_prompts(len(keep), int(keep.sum()), seed) if name == "random" else keep


def keep_random_prompts(prompts: int, kept: int, seed: int) -> np.ndarray:
    """A mask [prompts] with `kept` prompts drawn without looking at them."""
    keep = np.zeros(prompts, bool)
    keep[np.random.default_rng(seed).permutation(prompts)[:kept]] = True
    return keep


def keep_groups(accuracy: np.ndarray, lo: float = 0.01, hi: float = 0.99) -> np.ndarray:
    """Which groups [Q] to keep, by the mean of their accuracies [Q, G]."""
    mean = np.asarray(accuracy).mean(1)
    return (mean > lo) & (mean < hi)
