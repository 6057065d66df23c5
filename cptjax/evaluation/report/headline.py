"""Write the headline sentences of a comparison: which arms keep, learn and lose most."""

import math
from collections.abc import Sequence

from markupsafe import Markup
from scipy.special import ndtri

from cptjax.evaluation.report.differences import FEW_PAIRS, paired_difference
from cptjax.evaluation.report.read import Arm
from cptjax.evaluation.report.words import format_points, format_rate, html_sentence, is_known

EQUAL_LEARNING_GAP = 0.06  # largest difference in learned accuracy that counts as equal learning


def arm_mean(arm: Arm, name: str) -> float:
    spread = arm.spread(name)
    return spread["mean"] if spread else math.nan


def run_stderr(arm: Arm, name: str) -> float:
    """Return the standard error of a metric within the only run of an arm."""
    return arm.counted_runs[0].metric(name)["stderr"] or 0.0


def comparison_headline(arms: Sequence[Arm]) -> list[Markup]:
    """Write which arms keep, learn and lose most, where differences exceed their intervals."""
    sequences = [arm for arm in arms if is_known(arm_mean(arm, "fm_diagonal"))]

    def rivals(name: str) -> list[Arm]:
        """Return the arms to compare: all but joint training, which sees all tasks at once."""
        return [arm for arm in arms if not arm.is_joint and is_known(arm_mean(arm, name))]

    sentences = [
        best_and_worst_sentence(
            sequences,
            "fm_diagonal",
            "{best} keeps most of what it learned (FM {b}); {worst} keeps least (FM {w}).",
            "What they keep of what they learned does not differ beyond chance (FM {w} to {b}).",
        ),
        best_and_worst_sentence(
            rivals("general_delta"),
            "general_delta",
            "On abilities that were never trained, {best} changed by {b} points "
            "and {worst} by {w}.",
            "On abilities that were never trained, they do not differ beyond chance "
            "({w} to {b} points).",
        ),
    ]
    for group in dict.fromkeys(name for a in arms for run in a.runs for name in run.table.groups):
        sentences.append(
            best_and_worst_sentence(
                rivals(group),
                group,
                "On {on}, {best} changed by {b} and {worst} by {w}.",
                "On {on}, they do not differ beyond chance ({w} to {b}).",
                on=group,
            )
        )
    sentences += [*_plasticity_sentence(sequences), *_format_loss_sentence(arms)]
    seeds = max((len(arm.counted_runs) for arm in arms), default=0)
    if all(len(arm.runs) == 1 for arm in arms):
        sentences.append(Markup("One seed each: differences of a few points may be chance."))
    elif len(arms) > 1 and seeds < FEW_PAIRS:
        text = "At most {n} seeds each: where no difference is clear, methods may still differ."
        sentences.append(html_sentence(text, n=seeds))
    return [sentence for sentence in sentences if sentence]


def best_and_worst_sentence(
    arms: Sequence[Arm], name: str, apart: str, alike: str, **parts: str
) -> Markup | None:
    """Name the best and the worst arm.

    Return the sentence `alike` instead of `apart` if their difference is within its 95 % interval,
    unless it has the same sign in so many seeds that this is not chance.
    """
    if len(arms) < 2:
        return None
    best = max(arms, key=lambda arm: arm_mean(arm, name))
    worst = min(arms, key=lambda arm: arm_mean(arm, name))
    parts |= {"b": format_points(arm_mean(best, name)), "w": format_points(arm_mean(worst, name))}
    sentence = html_sentence(apart, best=best.label, worst=worst.label, **parts)
    # The best and the worst are the most different of all pairs of arms: any pair may be them.
    comparisons = math.comb(len(arms), 2)
    if exceeds_interval(best, worst, name, comparisons):
        return sentence
    if seeds := count_agreeing_seeds(best, worst, name, comparisons):
        note = (
            " The order is the same in each of the {n} seeds, "
            "although the variance between seeds is large."
        )
        return sentence + html_sentence(note, n=seeds)
    return html_sentence(alike, **parts)


def exceeds_interval(best: Arm, worst: Arm, name: str, comparisons: int) -> bool:
    """Return whether `best` is above `worst` by more than the 95 % interval of the difference.

    The interval is that of the differences of the seeds, or of the test examples if both arms have
    one run. It is widened for the number of comparisons (Bonferroni).
    """
    difference = paired_difference(best, worst, name)
    if difference.n > 1:
        return difference.mean > difference.half_width_among(comparisons)
    if len(best.counted_runs) > 1 or len(worst.counted_runs) > 1:
        return False
    error = math.hypot(run_stderr(best, name), run_stderr(worst, name))
    quantile = float(ndtri(1 - 0.025 / comparisons))
    return arm_mean(best, name) - arm_mean(worst, name) > quantile * error


def count_agreeing_seeds(best: Arm, worst: Arm, name: str, comparisons: int) -> int:
    """Return the number of seeds or orders in which `best` is above `worst`.

    Return 0 if one of them disagrees, or if they are too few for a sign test at 5 %: two arms need
    six seeds, and more arms more.
    """
    pairs = paired_difference(best, worst, name).pairs
    chance = comparisons * 2 ** (1 - len(pairs))
    return len(pairs) if chance <= 0.05 and all(d > 0 for d in pairs.values()) else 0


def _plasticity_sentence(arms: Sequence[Arm]) -> list[Markup]:
    if len(arms) < 2:
        return []
    low = min(arms, key=lambda arm: arm_mean(arm, "learned_acc"))
    high = max(arms, key=lambda arm: arm_mean(arm, "learned_acc"))
    values = {
        "l": format_rate(arm_mean(low, "learned_acc")),
        "h": format_rate(arm_mean(high, "learned_acc")),
    }
    if arm_mean(high, "learned_acc") - arm_mean(low, "learned_acc") <= EQUAL_LEARNING_GAP:
        text = "All learned about equally much: {l} to {h} right after each task's stage."
        return [html_sentence(text, **values)]
    text = (
        "They did not learn equally much ({low} {l}, {high} {h}): "
        "part of “forgets less” may be “learned less”."
    )
    return [html_sentence(text, low=low.label, high=high.label, **values)]


def _format_loss_sentence(arms: Sequence[Arm]) -> list[Markup]:
    """Write how much of the largest loss is format."""
    candidates = [a for a in arms if a.spread_of("format_share", "value") and not a.is_joint]
    if not candidates:
        return []
    worst = max(candidates, key=lambda arm: arm.spread_of("format_share", "loss")["mean"])
    share = worst.spread_of("format_share", "value")["mean"]
    text = (
        "About {share} of {name}'s loss is only format: "
        "with a forced response prefix it disappears."
    )
    return [html_sentence(text, share=f"{100 * share:.0f}%", name=worst.label)]
