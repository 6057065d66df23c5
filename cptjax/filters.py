"""Which prompts are worth learning from: offline by success counts (RIF-RFT), online by group accuracy (DAPO).

    offline, before a stage     K answers per prompt, keep iff lo <= number correct <= hi
        incompetent             1 .. K      only what the policy never solves goes (RIF-RFT's released code)
        zero_variance           1 .. K-1    what it always solves goes too
        window                  lo .. hi
        random                  as many prompts as lo .. hi would keep, drawn blindly: the control with a matched budget
    online, at each step        keep groups whose mean accuracy lies strictly between lo and hi

All look at the accuracy part of a reward, never at its format part.
"""

import dataclasses

import numpy as np

NAMES = ("incompetent", "zero_variance", "window", "random")


@dataclasses.dataclass(frozen=True)
class FilterReport:
    """What an offline filter did to one task."""

    name: str
    lo: int
    hi: int
    samples: int
    prompts: int
    kept: int
    never: int  # prompts without a correct answer
    always: int  # prompts with nothing but correct answers

    @property
    def fraction(self) -> float:
        return self.kept / self.prompts if self.prompts else 0.0


def check(name: str, samples: int, lo: int, hi: int) -> None:
    """Refuse windows that are not windows."""
    if name not in NAMES:
        raise ValueError(f"method.filter.name={name!r}: choose one of {', '.join(NAMES)}")
    least = 2 if name == "zero_variance" else 1
    if samples < least:
        raise ValueError(f"method.filter.samples={samples}: {name!r} needs at least {least} answers per prompt")
    if name in ("window", "random") and not 0 <= lo <= hi <= samples:
        raise ValueError(f"method.filter lo={lo}, hi={hi}: expected 0 <= lo <= hi <= samples={samples}")


def check_online(lo: float, hi: float, max_refills: int) -> None:
    if not 0 <= lo < hi <= 1:
        raise ValueError(f"method.online_filter lo={lo}, hi={hi}: expected mean accuracies with 0 <= lo < hi <= 1")
    if max_refills < 0:
        raise ValueError(f"method.online_filter.max_refills={max_refills}: expected 0 or more")


def bounds(name: str, samples: int, lo: int, hi: int) -> tuple[int, int]:
    """The window of success counts that a preset stands for."""
    check(name, samples, lo, hi)
    return {"incompetent": (1, samples), "zero_variance": (1, samples - 1)}.get(name, (lo, hi))


def offline(correct: np.ndarray, *, name: str, samples: int, lo: int, hi: int, seed: int = 0) -> tuple[np.ndarray, FilterReport]:
    """Which prompts to keep [Q] given how many of `samples` answers were correct [Q]."""
    lo, hi = bounds(name, samples, lo, hi)
    correct = np.asarray(correct)
    if correct.size and not 0 <= correct.min() <= correct.max() <= samples:
        raise ValueError(f"success counts from {correct.min()} to {correct.max()}: expected 0 to samples={samples}")
    keep = (correct >= lo) & (correct <= hi)
    if name == "random":
        keep = random_control(len(keep), int(keep.sum()), seed)
    report = FilterReport(name, lo, hi, samples, len(keep), int(keep.sum()), int((correct == 0).sum()), int((correct == samples).sum()))
    if not report.kept:
        raise ValueError(
            f"method.filter={name!r} keeps none of {report.prompts} prompts ({report.never} never and {report.always} always solved "
            f"in {samples} answers): widen lo={lo}, hi={hi} or draw more samples"
        )
    return keep, report


def random_control(prompts: int, kept: int, seed: int) -> np.ndarray:
    """A mask [prompts] with `kept` prompts drawn without looking at them."""
    keep = np.zeros(prompts, bool)
    keep[np.random.default_rng(seed).permutation(prompts)[:kept]] = True
    return keep


def online(accuracy: np.ndarray, lo: float = 0.01, hi: float = 0.99) -> np.ndarray:
    """Which groups [Q] to keep, by the mean of their accuracies [Q, G]."""
    mean = np.asarray(accuracy).mean(1)
    return (mean > lo) & (mean < hi)
